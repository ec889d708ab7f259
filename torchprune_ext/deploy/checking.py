"""Takes channels out of a model and checks that it still computes the same, on real numbers."""

import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from torchprune_ext._batches import call, tree_map
from torchprune_ext._checks import warn
from torchprune_ext._graph import Group, evaluating, outputs_in
from torchprune_ext.deploy.cutting import Cut, cut, fitting_inputs

M = TypeVar("M", bound=nn.Module)
ROUNDING = 1 << 10  # largest difference of outputs, in units in the last place of the largest


class _WidthError(Exception):
    """The code of a model does not run with the new widths."""


class _ValueError(Exception):
    """A smaller model computes something else."""


def without(plain: M, cuts: Sequence[Cut], inputs: Any) -> M:
    """Return a copy of a model without some channels, whose outputs agree.

    Args:
        plain: the model, without masks.
        cuts: what is to go. What the model's code does not allow stays, with a warning.
        inputs: a batch, on which the two are compared, and on others that are made of it.

    Raises:
        RuntimeError: they agree for no group, or not for all that agree alone, and which are to blame.
        ValueError: the model's code allows nothing.
    """
    wanted = Outputs(plain, inputs)
    try:
        return _attempt(plain, cuts, wanted)
    except (_WidthError, _ValueError) as error:
        first = error
    allowed, stay, wrong = [], [], []
    for each in cuts:
        names = ", ".join(each.group.names[:3])
        try:
            allowed.append(_alone(plain, each, wanted))
        except _WidthError as error:
            stay.append(f"{names}: {error}")
        except _ValueError as error:
            if not bool(each.constant.any()):
                wrong.append(f"{names}: {error}")
                continue
            stay.append(f"{names}: without those that give a constant (a bias or BatchNorm shift), {error}")
            fewer = replace(each, gone=each.gone & ~each.constant, constant=torch.zeros_like(each.constant))
            if bool(fewer.gone.any()):
                try:
                    allowed.append(_alone(plain, fewer, wanted))
                except (_WidthError, _ValueError) as other:
                    (wrong if isinstance(other, _ValueError) else stay).append(f"{names}: {other}")
    if wrong and not allowed:
        raise RuntimeError(
            "Without these channels the model computes something else, so nothing was removed. Its code depends on "
            "their number, or on values that are not in its parameters:\n  " + "\n  ".join(wrong)
        )
    if not allowed:
        raise ValueError(
            "The model's code fixes all widths that could be smaller, or depends on what they give:\n  "
            + "\n  ".join(stay)
        )
    try:
        small = _attempt(plain, allowed, wanted)
    except (_WidthError, _ValueError) as error:
        raise RuntimeError(
            f"Nothing was removed: each group of channels can go, but not all together ({error}). Groups: "
            + "; ".join(", ".join(each.group.names[:3]) for each in allowed)
        ) from first
    if stay or wrong:
        warn(
            "compact leaves channels that are dead, since the model's code fixes their number or depends on it, or on "
            "what they give. Where it fixes the number, let it read the width from the tensor, as x.flatten(1) "
            "does:\n  " + "\n  ".join([*stay, *wrong])
        )
    return small


def fixed_widths(plain: nn.Module, cuts: Sequence[Cut], inputs: Any) -> dict[Group, str]:
    """Return the groups that cannot be cut, and why: without these channels the model's code does not run as before.

    Args:
        plain: the model, without masks.
        cuts: what may go, whatever it does now: only the shapes of the outputs are compared.
        inputs: a batch.

    Returns:
        Why, by group; nothing for a model that cannot be copied, and so cannot be cut at all.
    """
    shapes = _shapes(plain, inputs)
    try:
        copy.deepcopy(plain)
    except (RuntimeError, TypeError):
        return {}

    def fails(some: Sequence[Cut]) -> str | None:
        small = copy.deepcopy(plain)
        cut(small, some)
        try:
            with fitting_inputs(small):
                found = _shapes(small, inputs)
        except Exception as error:  # whatever the model raises
            first = (str(error).splitlines() or [""])[0]
            return f"with fewer channels the model's code raises {type(error).__name__}: {first}"
        return None if found == shapes else "with fewer channels the model's code returns other shapes"

    # Of two groups that must lose equally many, one of the following has one only.
    bits = range(len(cuts).bit_length())
    several = [list(cuts), *([each for place, each in enumerate(cuts) if place >> bit & 1] for bit in bits)]
    if all(fails(some) is None for some in several if some):
        return {}
    why = {each.group: fails([each]) and fails([replace(each, widest=True)]) for each in cuts}
    return {group: told for group, told in why.items() if told}


def _shapes(model: nn.Module, inputs: Any) -> list[tuple[str, torch.Size]]:
    with evaluating(model):
        return [(name, tensor.shape) for name, tensor in outputs_in(call(model, inputs))]


def _alone(plain: nn.Module, each: Cut, wanted: "Outputs") -> Cut:
    """Return a cut that works alone, with the numbers that it needs put right."""
    try:
        _attempt(plain, [each], wanted)
    except (_WidthError, _ValueError) as error:
        wide = replace(each, widest=True)
        try:
            _attempt(plain, [wide], wanted)
        except (_WidthError, _ValueError):
            raise error from None
        return wide
    return each


def _attempt(plain: M, cuts: Sequence[Cut], wanted: "Outputs") -> M:
    """Return a copy without some channels if its outputs are the wanted ones."""
    small = copy.deepcopy(plain)
    cut(small, cuts)
    with fitting_inputs(small):
        problem = wanted.differ(small, wanted.dtype)
    if problem is not None and wanted.dtype != torch.float64:  # is it rounding?
        try:
            wanted.of(torch.float64)
        except Exception:  # code that is bound to its dtype
            raise _ValueError(problem) from None
        problem = wanted.differ(small, torch.float64)
    if problem is not None:
        raise _ValueError(problem)
    return small


class Outputs:
    """What a model makes of inputs, in several dtypes.

    Args:
        model: the model.
        inputs: a batch.
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.model, self.inputs = model, inputs
        dtypes = {tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()}
        halves = dtypes & {torch.float16, torch.bfloat16}
        self.dtype = None if not halves else torch.float32  # None: as it is
        self.found: dict[torch.dtype | None, list[Any]] = {}

    def of(self, dtype: torch.dtype | None) -> list[Any]:
        """Return the outputs of the model itself."""
        if dtype not in self.found:
            self.found[dtype] = list(_outputs(self.model, self.inputs, dtype))
        return self.found[dtype]

    def differ(self, small: nn.Module, dtype: torch.dtype | None) -> str | None:
        """Return where the outputs of a smaller model differ, or None."""
        wanted = self.of(dtype)
        try:
            given = list(_outputs(small, self.inputs, dtype))
        except Exception as error:  # whatever the model raises
            first = (str(error).splitlines() or [""])[0]
            raise _WidthError(f"with fewer channels it raises {type(error).__name__}: {first}") from error
        for one, other in zip(wanted, given, strict=True):
            if one is None:
                continue
            if other is None:
                raise _WidthError("with fewer channels it cannot be called with other values")
            if [name for name, _ in one] != [name for name, _ in other]:
                return "it returns other things"
            for (name, a), (_, b) in zip(one, other, strict=True):
                if (why := _difference(a, b)) is not None:
                    return f"{name} {why}"
        return None


def _outputs(model: nn.Module, inputs: Any, dtype: torch.dtype | None) -> Iterator[list[tuple[str, Tensor]] | None]:
    """Yield what a model makes of inputs, and of others made of them; None where it cannot take these."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    if dtype is not None:
        model, inputs = copy.deepcopy(model).to(dtype), tree_map(cast, inputs)
    compiled = any("_orig_mod" in module._modules for module in model.modules())  # anew for each size
    sizes = () if compiled else _sizes(inputs)
    for place, each in enumerate((inputs, _others(inputs), *sizes)):
        with evaluating(model), warnings.catch_warnings():
            if place > 1:  # of sizes that nobody asked for
                warnings.simplefilter("ignore")
            torch.manual_seed(0)
            try:
                found = [(name, tensor.detach().clone()) for name, tensor in outputs_in(call(model, each))]
            except Exception:
                if not place:
                    raise
                yield None
                continue
        yield found


def _sizes(inputs: Any) -> Iterator[Any]:
    """Yield inputs half as long along all axes of one size, for each size that there is; of size 1, twice as long."""
    tensors: list[Tensor] = []

    def seen(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    tree_map(seen, inputs)
    if any(tensor.is_cuda and not tensor.is_floating_point() for tensor in tensors):
        return  # as indices, they could lie outside now, after which a GPU computes nothing more
    for size in sorted({size for tensor in tensors for size in tensor.shape}):

        def other(tensor: Tensor, size: int = size) -> Tensor:
            for axis in [axis for axis, length in enumerate(tensor.shape) if length == size > 0]:
                tensor = torch.cat([tensor, tensor], axis) if size == 1 else tensor.narrow(axis, 0, (size + 1) // 2)
            return tensor

        yield tree_map(other, inputs)


def _others(inputs: Any) -> Any:
    """Return inputs with other values: noise on real ones, whole ones in reverse along their last axis."""
    made = torch.Generator("cpu").manual_seed(0)

    def other(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.flip(-1) if tensor.dim() > 1 else tensor
        tensor = tensor.detach()
        noise = torch.randn(tensor.shape, generator=made, dtype=torch.float32, device="cpu").to(tensor)
        finite = tensor[tensor.isfinite()].float()
        scale = float(finite.std(correction=0)) if finite.numel() > 1 else 1.0
        return tensor * 0.7 + noise * (scale or 1.0)

    return tree_map(other, inputs)


def _difference(a: Tensor, b: Tensor) -> str | None:
    """Return how two outputs differ by more than rounding, or None."""
    if a.shape != b.shape:
        return f"has shape {tuple(b.shape)}, not {tuple(a.shape)}"
    if a.dtype != b.dtype:
        return f"has dtype {b.dtype}, not {a.dtype}"
    if a.layout != torch.strided or a.is_nested:
        return None
    if not a.is_floating_point() and not a.is_complex():
        return None if torch.equal(a, b) else "has other values"
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return None
    finite = a[a.isfinite()].abs()
    scale = float(finite.amax()) if finite.numel() else 0.0
    apart = (a - b).abs()
    bad = ~same & ~(apart <= ROUNDING * torch.finfo(a.dtype).eps * scale)
    if not bool(bad.any()):
        return None
    worst = float(apart[bad].nan_to_num(float("inf")).amax())
    return f"differs by {worst:.2g} where its largest value is {scale:.2g}"
