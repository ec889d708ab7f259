"""One pass of a model over all its calibration data at once, stopping at each layer, with a dense and a pruned stream.

Every batch is given twice over, first half dense, second half pruned, and every batch goes through the model in a
thread of its own. The threads take turns: each runs alone until it reaches one of the listed layers, and when the last
one is there, the layer is solved from what all have brought, and the turns go on with the layer's new weights. So a
model of any structure is treated in sequence in a single pass, as long as its samples do not mix and all batches take
the same way. What is held at a time is what the batches need between two layers, and the moments of one layer.
"""

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from torchprune_ext._host import Target
from torchprune_ext._passes import Batch, Run, tree_map
from torchprune_ext._solvers import Moments, Problem

Solution = tuple[Tensor, Tensor | None]  # the pruned stream's weight and, if it is new, bias, in the module's shapes
Solve = Callable[["Layer", Problem], Solution]
ROWS, NUMBERS = 4096, 1 << 18  # summed up in one product, or more: few enough for the precision and for the cache


class Cancelled(BaseException):
    """Ends a thread after another one has failed."""


class Turns:
    """Threads of which one runs at a time, in a fixed order."""

    def __init__(self, number: int) -> None:
        self.mine = [threading.Semaphore(0) for _ in range(number)]
        self.error: BaseException | None = None

    def run(self, work: Callable[[int], None], device: str) -> None:
        """Call ``work(number)`` in each thread, with the caller's autocast on ``device``, and wait for all.

        Raises:
            BaseException: what the first one raised.
        """
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)

        def one(number: int) -> None:
            self.mine[number].acquire()
            try:
                if self.error is None:
                    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, dtype, enabled):
                        work(number)
            except BaseException as error:
                self.error = self.error or error
            finally:
                self._next(number)

        threads = [threading.Thread(target=one, args=(number,), daemon=True) for number in range(len(self.mine))]
        for thread in threads:
            thread.start()
        try:
            self.mine[0].release()
            for thread in threads:
                thread.join()
        except BaseException as error:  # Ctrl-C
            self.error = error
            for thread in threads:
                thread.join()
        if self.error is not None:
            raise self.error

    def pause(self, number: int) -> None:
        """Let the others have their turns."""
        self._next(number)
        self.mine[number].acquire()
        if self.error is not None:
            raise Cancelled

    def _next(self, number: int) -> None:
        self.mine[(number + 1) % len(self.mine)].release()


@dataclass(eq=False)
class Layer:
    """A linear layer of the model and its dense weights.

    Args:
        target: the plain weight in the model.
        label: how errors call it.
        dense: weights of the dense stream.
        dense_bias: bias of the dense stream; None where there is none.
        bias: whether the bias may be changed.
    """

    target: Target
    label: str
    dense: Tensor
    dense_bias: Tensor | None
    bias: bool

    def __post_init__(self) -> None:
        """Find out how the layer multiplies."""
        module = self.target.module
        if self.dense.dim() < 2 or (isinstance(module, _ConvNd) and not isinstance(module, (nn.Conv1d, nn.Conv2d))):
            raise self._no_linear()
        self.module, self.name, self.original = module, self.target.name, module.forward
        self.groups = module.groups if isinstance(module, _ConvNd) else 1
        self.swapped = False  # (inputs, outputs), as Conv1D of transformers has it
        bias = getattr(module, "bias", None)
        self.bias_now = bias.detach() if isinstance(bias, Tensor) else None

    def bias_rows(self) -> Tensor:
        """Return the layer's bias in float64 as ``(groups, outputs)``; 0 as ``(1, 1)`` if it has none."""
        if self.bias_now is None:
            return self.dense.new_zeros(1, 1, dtype=torch.float64)
        return self.bias_now.double().view(self.groups, -1)

    def matrix(self, weight: Tensor) -> Tensor:
        """Return ``weight``, or a mask of it, as ``(groups, outputs, inputs)``."""
        weight = weight.t() if self.swapped else weight.flatten(1)
        return weight.reshape(self.groups, -1, weight.shape[1])

    def shaped(self, matrix: Tensor) -> Tensor:
        """Return what :meth:`matrix` made of a weight in the weight's shape."""
        flat = matrix.flatten(0, 1)
        return (flat.t() if self.swapped else flat).reshape(self.dense.shape)

    def input_order(self, multiple: int = 1) -> Tensor:
        """Return the columns of the matrix in the order in which N:M groups run: input channels side by side.

        They are filled up to a ``multiple`` at each place of a kernel, with the number of a column behind the last.
        """
        size = self.matrix(self.dense).shape[-1]
        channels = self.dense.shape[1] if self.dense.dim() > 2 else size
        places = torch.arange(size, device=self.dense.device).view(channels, -1).t()
        return F.pad(places, (0, -channels % multiple), value=size).reshape(-1)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return what the module makes of ``x`` with ``weight`` and ``bias``."""
        held = dict(self.module._parameters)
        self.module._parameters[self.name] = nn.Parameter(weight, requires_grad=False)
        if "bias" in held:  # otherwise it is computed, and stays what it is
            self.module._parameters["bias"] = None if bias is None else nn.Parameter(bias, requires_grad=False)
        try:
            output: Tensor = self.original(x)
        finally:
            self.module._parameters.update(held)
        return output

    def check(self, x: Tensor) -> None:
        """Find out whether the weight is ``swapped``; a module that does not multiply as Linear does is refused."""
        convolution = isinstance(self.module, _ConvNd)
        shape = (1, *x.shape[1:]) if convolution else (4, x.shape[-1])
        probe = torch.linspace(-3, 5, math.prod(shape), device=x.device).sin().to(self.dense.dtype).view(shape)
        try:
            y, inputs = self.outputs(self.forward(probe, self.dense, self.bias_now)), self.inputs(probe)
        except (RuntimeError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise self._no_linear() from error
        for swapped in (False,) if convolution else (False, True):
            self.swapped = swapped
            matrix = self.matrix(self.dense)
            if matrix.shape[1:] == (y.shape[2], inputs.shape[2]):
                expected = inputs.to(matrix) @ matrix.mT
                if self.bias_now is not None:
                    expected = expected + self.bias_now.view(self.groups, 1, -1)
                if torch.allclose(y.to(expected), expected, rtol=1e-2, atol=2e-2 * float(y.abs().max())):
                    return
        raise self._no_linear()

    def _no_linear(self) -> TypeError:
        kind = type(self.target.module).__name__
        return TypeError(
            f"params holds {self.label}, whose module is a {kind}, which does not multiply as Linear, Conv1d or Conv2d "
            "does. Leave it out."
        )

    def inputs(self, x: Tensor) -> Tensor:
        """Return what the rows of the weight multiply, ``(groups, samples, inputs)``."""
        if not isinstance(self.module, _ConvNd):
            return x.reshape(1, -1, x.shape[-1])
        module = self.module
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        axes = range(2, x.dim())
        for axis, size, stride, gap in zip(axes, module.kernel_size, module.stride, module.dilation, strict=True):
            x = x.unfold(axis, gap * (size - 1) + 1, stride)[..., ::gap]
        return self._by_groups(x.movedim([1, *(axis + len(axes) for axis in axes)], [*range(len(axes) + 1)]), len(axes))

    def outputs(self, y: Tensor) -> Tensor:
        """Return ``y`` as ``(groups, samples, outputs)``."""
        if not isinstance(self.module, _ConvNd):
            return y.reshape(1, -1, y.shape[-1])
        return self._by_groups(y.transpose(0, 1), 0)

    def _by_groups(self, x: Tensor, inner: int) -> Tensor:
        """Return ``(channels, *inner, samples, *places)`` as ``(groups, samples * places, channels * inner)``."""
        channels = x.shape[: inner + 1].numel() // self.groups
        return x.reshape(self.groups, channels, x.shape[inner + 1 :].numel()).mT


class Pass:
    """One pass over the data that solves ``layers`` one after the other."""

    def __init__(self, run: Run, layers: Sequence[Layer], solve: Solve, masks: Sequence[Tensor | None]) -> None:
        self.run, self.layers, self.solve, self.masks = run, layers, solve, masks
        self.solved: dict[Layer, Solution] = {}
        self.at: Layer | None = None
        self.moments = Moments()
        self.axis = 0

    def over(self, batches: Sequence[Batch]) -> None:
        """Go through the model with all ``batches``; ``solved`` then holds the new weights of all layers."""
        self.turns = Turns(len(batches))
        self.batches = batches
        self.number = 0
        for layer in self.layers:
            layer.module.forward = lambda *args, layer=layer, **kwargs: self._reach(layer, *args, **kwargs)
        try:
            self.turns.run(self._whole, self.run.tensors[0].device.type)
        finally:
            for layer in self.layers:
                vars(layer.module).pop("forward", None)
        missed = [layer.label for layer in self.layers if layer not in self.solved]
        if missed:
            raise ValueError(
                f"params holds {missed[0]}, whose module is never called, as when its parent reads the weight. "
                "Leave it out."
            )

    def _whole(self, number: int) -> None:
        self.number = number
        inputs, size = self.batches[number].inputs, self.batches[number].size
        self.run.output(tree_map(lambda t: torch.cat((t, t)) if t.dim() and len(t) == size else t, inputs))
        if number and self.at is not None:
            raise self._other_way()
        self.at = None

    def _reach(self, layer: Layer, *args: Any, **kwargs: Any) -> Tensor:
        """Stand in for the layer's forward: bring the samples, wait until it is solved, and go on."""
        number = self.number
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        if number == 0:
            if layer in self.solved:
                raise ValueError(f"{layer.label} is called more than once in a pass. Leave it out.")
            self.at, self.moments = layer, Moments()
        elif self.at is not layer:
            raise self._other_way()
        axis = self._sample_axis(layer, x, 2 * self.batches[number].size)
        dense, pruned = x.chunk(2, axis)
        y = layer.forward(dense, layer.dense, layer.dense_bias)
        with torch.autocast(x.device.type, enabled=False):
            if number == 0:
                layer.check(x)
            self._bring(layer, pruned, y, self.masks[number])
            if number == len(self.batches) - 1:
                self._finish(layer)
        self.turns.pause(number)
        self.number = number
        weight, bias = self.solved[layer]
        return torch.cat((y, layer.forward(pruned, weight, layer.bias_now if bias is None else bias)), axis)

    def _sample_axis(self, layer: Layer, x: Tensor, size: int) -> int:
        """Return the axis of ``x`` on which the ``size`` samples of both streams, or a multiple of them, stand."""
        found = [axis for axis in range(min(2, x.dim() - 1)) if x.shape[axis] == size]
        found = found or [0] * (x.dim() > 1 and x.shape[0] % size == 0)
        if not self.solved:  # both streams are the same still
            found = [axis for axis in found if _halves_agree(x, axis)]
            self.axis = found[0] if found else 0
        if not found:
            raise ValueError(
                f"{layer.label} gets an input of shape {tuple(x.shape)}, in which the samples do not stand on one of "
                "the first two axes as in the batch, or they mix. Leave it out."
            )
        return self.axis if self.axis in found else found[0]  # where both would do, as in the first layer

    def _bring(self, layer: Layer, x: Tensor, y: Tensor, mask: Tensor | None) -> None:
        most = 1 if isinstance(layer.module, _ConvNd) else x.dim() - 1
        if mask is not None and mask.dim() <= most and x.shape[: mask.dim()] == mask.shape:
            x, y = x[mask], y[mask]
        rows = layer.outputs(y[:1]).shape[1]  # of the least squares, for each entry of the first axis
        step = max(ROWS, NUMBERS // layer.dense[0].numel()) // max(rows, 1)
        for some, outputs in zip(x.split(max(step, 1)), y.split(max(step, 1)), strict=True):
            self.moments.add(layer.inputs(some), layer.outputs(outputs))

    def _finish(self, layer: Layer) -> None:
        if not self.moments.count:
            raise ValueError("sample_mask leaves out every sample. Let it be True where a sample counts.")
        problem = self.moments.problem(None if layer.bias else layer.bias_rows())
        self.moments = Moments()  # what it held is as large as the problem
        self.solved[layer] = self.solve(layer, problem)

    def _other_way(self) -> ValueError:
        return ValueError("loader: batches take different ways through the model. Pass such that call the same layers.")


def _halves_agree(x: Tensor, axis: int) -> bool:
    """Return whether the halves of ``x`` along ``axis`` are the same, to rounding."""
    first, second = x.chunk(2, axis)
    return torch.allclose(first, second, rtol=1e-2, atol=1e-2 * float(first.abs().max()))
