"""How a layer multiplies: its weight as a matrix, and its inputs and outputs as rows."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from torchprune_ext._host import Target


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

    def input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the only argument of a call of the module; another call is refused."""
        given = [*args, *kwargs.values()]
        if len(given) != 1 or not isinstance(given[0], Tensor):
            raise TypeError(
                f"params holds {self.label}, whose module is called with {len(given)} arguments and not, as Linear is, "
                "with one tensor. Leave it out."
            )
        return given[0]

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
        if not self.dense.numel():
            raise ValueError(f"params holds {self.label}, which has no entries. Leave it out.")
        for values in (self.dense, *(() if self.bias_now is None else (self.bias_now,))):
            if not values.isfinite().all():
                raise ValueError(f"{self.label} or its bias holds NaN or infinity. Repair it, or leave it out.")
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
