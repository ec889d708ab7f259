"""How a layer multiplies: its weight as a matrix, what the rows of the matrix multiply, and the call that does it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from torchprune_ext._checks import leave_out

Solution = tuple[Tensor, Tensor | None]  # a weight and, if there is one, a bias, in the module's shapes
Multiply = Callable[..., Tensor]  # from a Solution, by default the module's own, to the product with the input
OnProduct = Callable[[Tensor, Multiply], Tensor]  # from an input and how to multiply it to the output
CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")  # its arguments, in order


@dataclass(eq=False)
class Layer:
    """A linear layer: a module with a weight that multiplies its inputs, as ``Linear`` or as a convolution does.

    Of a convolution only the operation itself counts, so its module may do more, such as padding by itself.

    Args:
        module: the module, whose weight is a plain parameter.
        name: name of the weight.
        label: how errors call it.

    Raises:
        TypeError: the module is a convolution of another kind, or the weight has fewer than 2 axes.
        ValueError: the weight has no entries, or it or the bias is not finite.
    """

    module: nn.Module
    name: str
    label: str

    def __post_init__(self) -> None:
        """Find out what can be known before the layer is called."""
        module, weight = self.module, self.weight
        self.convolution = isinstance(module, _ConvNd)
        if weight.dim() < 2 or (self.convolution and not isinstance(module, (nn.Conv1d, nn.Conv2d))):
            raise self.not_linear()
        if not weight.numel():
            raise ValueError(f"params holds {self.label}, which has no entries. {leave_out(self.label)}.")
        bias = getattr(module, "bias", None)
        self.bias = bias.detach() if isinstance(bias, Tensor) else None
        for values in (weight, *(() if self.bias is None else (self.bias,))):
            if not values.isfinite().all():
                raise ValueError(f"{self.label} or its bias holds NaN or infinity. Repair it, or leave it out.")
        self.original = module.forward
        self.groups = module.groups if isinstance(module, _ConvNd) else 1
        self.swapped = False  # (inputs, outputs), as Conv1D of transformers has it
        self.window: Window | None = None

    @property
    def weight(self) -> Tensor:
        """The weight that the module has now."""
        return self.module.get_parameter(self.name).detach()

    def bias_rows(self) -> Tensor:
        """Return the bias in float64 as ``(groups, outputs)``; 0 as ``(1, 1)`` if the layer has none."""
        if self.bias is None:
            return self.weight.new_zeros(1, 1, dtype=torch.float64)
        return self.bias.double().view(self.groups, -1)

    def matrix(self, weight: Tensor) -> Tensor:
        """Return ``weight``, or a mask of it, as ``(groups, outputs, inputs)``."""
        weight = weight.t() if self.swapped else weight.flatten(1)
        return weight.reshape(self.groups, -1, weight.shape[1])

    def shaped(self, matrix: Tensor) -> Tensor:
        """Return what :meth:`matrix` made of a weight in the weight's shape."""
        flat = matrix.flatten(0, 1)
        return (flat.t() if self.swapped else flat).reshape(self.weight.shape)

    def input_order(self, multiple: int = 1) -> Tensor:
        """Return the columns of the matrix in the order in which N:M groups run: input channels side by side.

        They are filled up to a ``multiple`` at each place of a kernel, with the number of a column behind the last.
        """
        weight = self.weight
        size = self.matrix(weight).shape[-1]
        channels = weight.shape[1] if weight.dim() > 2 else size
        places = torch.arange(size, device=weight.device).view(channels, -1).t()
        return F.pad(places, (0, -channels % multiple), value=size).reshape(-1)

    def call(self, on_product: OnProduct, *args: Any, **kwargs: Any) -> Any:
        """Call the module's own forward, with ``on_product`` in the place of its product.

        Raises:
            TypeError: the module is called as no such layer is, or does not multiply with its weight itself.
        """
        if not self.convolution:
            given = [*args, *kwargs.values()]
            if len(given) != 1 or not isinstance(given[0], Tensor):
                raise TypeError(
                    f"params holds {self.label}, whose module is called with {len(given)} arguments and not, as Linear "
                    f"is, with one tensor. {leave_out(self.label)}."
                )
            return on_product(given[0], partial(self.forward, given[0]))
        with _Intercepting(self, on_product) as intercepting:
            output = self.original(*args, **kwargs)
        if not intercepting.seen:
            raise self.not_linear()
        return output

    def forward(self, x: Tensor, solution: Solution | None = None) -> Tensor:
        """Return what a module other than a convolution makes of ``x``, with its own weight and bias or others."""
        if solution is None:
            return self.original(x)  # type: ignore[no-any-return]
        held = dict(self.module._parameters)
        weight, bias = solution
        self.module._parameters[self.name] = nn.Parameter(weight, requires_grad=False)
        if "bias" in held:  # otherwise it is computed, and stays what it is
            self.module._parameters["bias"] = None if bias is None else nn.Parameter(bias, requires_grad=False)
        try:
            output: Tensor = self.original(x)
        finally:
            self.module._parameters.update(held)
        return output

    def check(self, x: Tensor) -> None:
        """Find out from the layer's input ``x`` whether the weight is ``swapped``.

        Raises:
            TypeError: the module does not multiply as ``Linear`` does.
        """
        if self.convolution:
            return  # its operation has been seen
        weight = self.weight
        probe = torch.linspace(-3, 5, 4 * x.shape[-1], device=x.device).sin().to(weight.dtype).view(4, -1)
        try:
            y, inputs = self.outputs(self.forward(probe, (weight, self.bias))), self.inputs(probe)
        except (RuntimeError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise self.not_linear() from error
        for swapped in (False, True) if weight.dim() == 2 else (False,):
            self.swapped = swapped
            matrix = self.matrix(weight)
            if matrix.shape[1:] == (y.shape[2], inputs.shape[2]):
                expected = inputs.to(matrix) @ matrix.mT
                if self.bias is not None:
                    expected = expected + self.bias.view(1, 1, -1)
                if torch.allclose(y.to(expected), expected, rtol=1e-2, atol=2e-2 * float(y.abs().max())):
                    return
        raise self.not_linear()

    def not_linear(self) -> TypeError:
        """Return the error for a module that does something else."""
        return TypeError(
            f"params holds {self.label}, whose module is a {type(self.module).__name__}, which does not multiply with "
            f"its weight as Linear, Conv1d or Conv2d does. {leave_out(self.label)}."
        )

    def use(self) -> tuple[object, ...]:
        """Return all that decides what :meth:`inputs` makes of a tensor."""
        return self.window, self.groups, None if self.window is None else self.weight.shape[2:]

    def inputs(self, x: Tensor) -> Tensor:
        """Return what the rows of the weight multiply, ``(groups, samples, inputs)``."""
        if self.window is None:
            return x.reshape(1, -1, x.shape[-1])
        x = F.pad(x, self.window.padding)
        kernel = self.weight.shape[2:]
        axes = range(2, x.dim())
        for axis, size, stride, gap in zip(axes, kernel, self.window.stride, self.window.dilation, strict=True):
            x = x.unfold(axis, gap * (size - 1) + 1, stride)[..., ::gap]
        return self._by_groups(x.movedim([1, *(axis + len(axes) for axis in axes)], [*range(len(axes) + 1)]), len(axes))

    def outputs(self, y: Tensor) -> Tensor:
        """Return ``y`` as ``(groups, samples, outputs)``."""
        if self.window is None:
            return y.reshape(1, -1, y.shape[-1])
        return self._by_groups(y.transpose(0, 1), 0)

    def _by_groups(self, x: Tensor, inner: int) -> Tensor:
        """Return ``(channels, *inner, samples, *places)`` as ``(groups, samples * places, channels * inner)``."""
        channels = x.shape[: inner + 1].numel() // self.groups
        return x.reshape(self.groups, channels, x.shape[inner + 1 :].numel()).mT


@dataclass(frozen=True, slots=True)
class Window:
    """Where a convolution puts its kernel, as its operation was asked to."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]  # as F.pad wants it: before and behind, the last axis first
    dilation: tuple[int, ...]

    @classmethod
    def of(cls, kernel: torch.Size, stride: Any, padding: Any, dilation: Any) -> "Window":
        """Read the options of an operation with a ``kernel`` of this size."""

        def each(option: Any) -> tuple[int, ...]:
            values = (option,) if isinstance(option, int) else tuple(option)
            return values * len(kernel) if len(values) == 1 else values

        gaps = each(dilation)
        if padding == "same":
            whole = [gap * (size - 1) for gap, size in zip(gaps, kernel, strict=True)]
            pads = [(total // 2, total - total // 2) for total in whole]
        else:
            pads = [(pad, pad) for pad in each(0 if padding == "valid" else padding)]
        return cls(each(stride), tuple(pad for pair in reversed(pads) for pad in pair), gaps)


class _Intercepting(TorchFunctionMode):
    """Lets a function stand in for the convolution with the weight of ``layer``."""

    def __init__(self, layer: Layer, on_product: OnProduct) -> None:
        super().__init__()
        self.layer, self.on_product, self.seen = layer, on_product, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {**dict(zip(CONVOLUTION, args, strict=False)), **(kwargs or {})}
        held = self.layer.module._parameters
        if func not in (torch.conv1d, torch.conv2d) or given.get("weight") is not held[self.layer.name]:
            return func(*args, **(kwargs or {}))
        if given.get("bias") is None and held.get("bias") is not None:
            raise self.layer.not_linear()  # it is added elsewhere
        self.seen = True
        x, own, options = given.pop("input"), (given.pop("weight"), given.pop("bias", None)), given
        window = [options.get(key, default) for key, default in (("stride", 1), ("padding", 0), ("dilation", 1))]
        self.layer.window = Window.of(own[0].shape[2:], *window)
        alone = x.dim() < own[0].dim()  # one sample, without an axis for it

        def multiply(solution: Solution | None = None) -> Tensor:
            weight, bias = own if solution is None else solution
            if own[1] is not None and own[1] is not held.get("bias"):
                bias = own[1]  # it is computed, and stays what it is
            output: Tensor = func(x.unsqueeze(0) if alone else x, weight, bias, **options)
            return output

        product = self.on_product(x.unsqueeze(0) if alone else x, multiply)
        return product.squeeze(0) if alone else product
