"""Batches of data: trees of tensors, which of them hold samples, and on which axis."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence
from torch.utils import _pytree as pytree

from torchprune_ext._loading import Options

SEEN = object()  # an axis that is to be seen from the shapes
AXES_REMEDY = (
    "Pass sample_axes=, as vmap's in_dims: the axis of the samples for all tensors, or (inputs, targets), or a "
    "dictionary as the batch is, with None for what all samples share."
)


# -------------------------------------------------------------------------------------------------------------- trees


def is_leaf(tree: Any) -> bool:
    """Return whether ``tree`` is not to be taken apart though it could be."""
    return isinstance(tree, PackedSequence)


def tree_map(change: Callable[[Tensor], Any], tree: Any, other: Callable[[Any], Any] = lambda leaf: leaf) -> Any:
    """Return ``tree`` with ``change`` of its tensors and ``other`` of the other leaves.

    A tree is what ``torch.utils._pytree`` knows, registered classes too, and any mapping, list or tuple.
    """

    def each(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return change(leaf)
        if isinstance(leaf, Mapping):  # of a class that is not registered
            return tree_map(change, dict(leaf), other)
        if isinstance(leaf, (list, tuple)) and not is_leaf(leaf):
            return tree_map(change, (list if isinstance(leaf, list) else tuple)(leaf), other)
        return other(leaf)

    return pytree.tree_map(each, tree, is_leaf=is_leaf)


def leaves(tree: Any) -> list[Tensor]:
    """Return the tensors of ``tree`` in order."""
    found: list[Tensor] = []
    tree_map(found.append, tree)
    return found


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return ``inputs`` of a model as the positional arguments and the keywords that it is called with."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    plain = not isinstance(inputs, (tuple, list)) or is_leaf(inputs)
    return (inputs,) if plain else tuple(inputs), {}


def call(model: nn.Module, inputs: Any) -> Any:
    """Return what ``model`` makes of a tensor, a tuple of positional or a mapping of keyword arguments."""
    given, keywords = arguments(inputs)
    return model(*given, **keywords)


def _flat(tree: Any) -> tuple[list[Any], Any]:
    """Return the leaves of ``tree``, whose mappings, lists and tuples are plain, and how they stand together."""
    return pytree.tree_flatten(tree, is_leaf=is_leaf)


# ------------------------------------------------------------------------------------------------------------- batch


class Batch:
    """Inputs and targets on the model's device, how many samples they hold, and where.

    Args:
        raw: what the loader gave.
        options: how it is read.
        device: of the model.
    """

    def __init__(self, raw: Any, options: Options, device: torch.device) -> None:
        prepare, sample_mask = options.get("prepare"), options.get("sample_mask")
        self.given = options.get("sample_axes", SEEN)
        self.keywords, self.labelled = prepare is None and isinstance(raw, Mapping), True
        self.mask = None if sample_mask is None else bool_mask(sample_mask(raw))
        batch = raw if prepare is None else prepare(raw)
        if self.keywords:
            inputs = targets = _moved(batch, device)
        elif prepare is None and (isinstance(batch, (Tensor, PackedSequence)) or _alone(batch)):
            inputs, targets, self.labelled = _moved(batch, device), None, False
        elif isinstance(batch, (tuple, list)) and not is_leaf(batch) and len(batch) == 2:
            inputs, targets = (_moved(part, device) for part in batch)
        else:
            _moved(batch, device)  # says so where it is of numpy
            raise TypeError(f"loader gave a {type(batch).__name__}, {PAIR}")
        _refuse_lists_of_samples(inputs, targets)
        self.inputs, self._targets = inputs, targets

    @property
    def targets(self) -> Any:
        """The targets; a batch without is refused."""
        if not self.labelled:
            raise TypeError(f"loader gave inputs without targets, {PAIR}")
        return self._targets

    @property
    def size(self) -> int:
        """Number of samples."""
        return self._split[0]

    @property
    def axes(self) -> list[int | None]:
        """Axis of the samples of each leaf of ``(inputs, targets)``; None for what all samples share.

        Raises:
            ValueError: a sample is not a slice of tensors.
        """
        _, axes = self._split
        if axes is None:
            raise ValueError(
                f"loader gave a list of samples, {self.shapes()}, which cannot be taken apart. Pass prepare= to make "
                "one tensor of them, with an axis for the samples."
            )
        return axes

    @cached_property
    def _split(self) -> tuple[int, list[int | None] | None]:
        found = list(self._named())
        lengths = [_length(leaf, axis) for _, leaf, axis, _ in found]
        fixed = {
            length
            for (_, _, axis, _), length in zip(found, lengths, strict=True)
            if axis is not SEEN and length is not None
        }
        for (name, leaf, axis, _), length in zip(found, lengths, strict=True):
            if isinstance(leaf, Tensor) and isinstance(axis, int) and length is None:
                raise ValueError(
                    f"sample_axes gives axis {axis} for {name}, whose shape {_shape(leaf)} does not have that. "
                    f"{AXES_REMEDY}"
                )
        if len(fixed) > 1:
            raise ValueError(
                f"sample_axes={self.given!r} does not fit {self.shapes()}: lengths {sorted(fixed)} differ."
            )
        listed = max((row[3] for row in found), default=0)  # as many tensors stand in a list among the inputs
        votes: Counter[int] = Counter()
        first: Counter[int] = Counter()
        for (name, _, axis, inside), length in zip(found, lengths, strict=True):
            if axis is SEEN and length is not None and not inside:
                votes[length] += 1
                first[length] += name.startswith("inputs")
        targets = self._targets
        if not fixed and listed and isinstance(targets, (list, tuple)) and len(targets) == listed:
            return listed, None
        if fixed:
            [size] = fixed
        elif votes:
            size = max(votes, key=lambda length: (votes[length], first[length], length))
        elif listed:
            raise ValueError(
                f"loader gave inputs in a list, {self.shapes()}, of which is not clear whether each is a sample. "
                "Pass prepare= to make one tensor of them, or sample_axes= if each holds all samples."
            )
        else:
            size = 0
        if not size:
            raise ValueError("loader gave a batch without samples. Drop empty batches, or pass prepare=.")
        axes: list[int | None] = []
        for (_, _, axis, inside), length in zip(found, lengths, strict=True):
            if inside and axis is SEEN and length != size:
                if inside == size:
                    return size, None
                raise ValueError(
                    f"loader gave {self.shapes()}: the tensors of a list are neither {size}, nor do they hold {size} "
                    f"samples each. Pass prepare= to make one tensor of them. {AXES_REMEDY}"
                )
            fits = length == size if axis is SEEN else isinstance(axis, int)
            axes.append((0 if axis is SEEN else int(axis)) if fits and length is not None else None)
        return size, axes

    def _named(self) -> Iterator[tuple[str, Any, Any, int]]:
        """Yield name, leaf, given axis, and the length of the list in which it stands if so, as ``_flat`` has them."""
        given = self.given
        if given is SEEN or given is None or isinstance(given, int):
            pair: Any = (SEEN if given is None else given,) * 2
        elif isinstance(given, Mapping) and self.keywords:
            pair = (given, given)
        elif isinstance(given, (tuple, list)) and len(given) == 2:
            pair = given
        else:
            raise TypeError(f"sample_axes={given!r} does not fit {self.shapes()}. {AXES_REMEDY}")
        for name, tree, axes in zip(("inputs", "targets"), (self.inputs, self._targets), pair, strict=True):
            top = isinstance(tree, (tuple, list, Mapping)) and name == "inputs"
            yield from _walk(name, tree, axes, 0, top=top)

    def shapes(self) -> str:
        """Return names and shapes of all tensors, for errors."""
        parts = (("inputs", self.inputs),) if self.keywords else (("inputs", self.inputs), ("targets", self._targets))
        return ", ".join(
            f"{name} of shape {_shape(leaf)}"
            for part, tree in parts
            for name, leaf, _, _ in _walk(part, tree, SEEN, 0, top=True)
            if isinstance(leaf, (Tensor, PackedSequence))
        )

    def tensors(self) -> tuple[list[Any], Callable[[list[Any]], tuple[Any, Any]]]:
        """Return the leaves of ``(inputs, targets)`` and a function that puts such leaves together again."""
        flat, spec = _flat((self.inputs, self._targets))
        return flat, lambda changed: pytree.tree_unflatten(changed, spec)

    def gathered(self, *some: slice) -> tuple[Any, Any]:
        """Return inputs and targets of the samples in each of ``some``, one behind the other."""
        flat, whole = self.tensors()
        return whole([_gather(leaf, some, axis) for leaf, axis in zip(flat, self.axes, strict=True)])

    def with_first_behind(self) -> Any:
        """Return the inputs with the first sample behind them, as many times as there are samples."""
        return self.gathered(slice(None), *[slice(0, 1)] * self.size)[0]

    @property
    def seen(self) -> bool:
        """Whether the axes of all tensors were seen from their shapes."""
        return self.given is SEEN or self.given is None

    def placed(self) -> Iterator[tuple[str, Any, int | None]]:
        """Yield name, leaf and axis of the samples of all leaves."""
        for (name, leaf, _, _), axis in zip(self._named(), self.axes, strict=True):
            yield name, leaf, axis

    def split(self, samples: slice) -> tuple[list[Any], list[int], Callable[[list[Any]], tuple[Any, Any]]]:
        """Return some samples for ``torch.vmap``: what has samples, on which axes, and how it becomes a batch of one.

        The function takes what vmap leaves of the tensors, and returns inputs and targets of a single sample.
        """
        flat, whole = self.tensors()
        axes, flat = self.axes, [take(leaf, samples, axis) for leaf, axis in zip(flat, self.axes, strict=True)]

        def one(given: list[Any]) -> tuple[Any, Any]:
            each = iter(given)
            return whole([leaf if a is None else next(each).unsqueeze(a) for leaf, a in zip(flat, axes, strict=True)])

        given = [leaf for leaf, axis in zip(flat, axes, strict=True) if axis is not None]
        return given, [axis for axis in axes if axis is not None], one


PAIR = "not (inputs, targets) or a dictionary. Pass prepare= to turn a batch into (inputs, targets)."


def _alone(batch: Any) -> bool:
    """Return whether ``batch`` is the one tensor of a data set without targets, as ``TensorDataset(x)`` gives it."""
    return isinstance(batch, (tuple, list)) and len(batch) == 1 and isinstance(batch[0], (Tensor, PackedSequence))


def _moved(tree: Any, device: torch.device) -> Any:
    """Return ``tree`` on ``device``, with plain mappings; arrays of numpy are refused."""

    def other(leaf: Any) -> Any:
        if isinstance(leaf, PackedSequence):
            return leaf.to(device)  # type: ignore[arg-type]
        if type(leaf).__module__ == "numpy" and hasattr(leaf, "__array__"):
            raise TypeError(
                f"loader gave a numpy {type(leaf).__name__}. Turn it into a tensor by torch.as_tensor, in the data set "
                "or in prepare=, or let a DataLoader do it."
            )
        return leaf

    def moved(leaf: Tensor) -> Tensor:
        return (leaf.clone() if leaf.is_inference() else leaf).to(device)  # those cannot be saved for a gradient

    return tree_map(moved, tree, other)


def _refuse_lists_of_samples(inputs: Any, targets: Any) -> None:
    """Refuse a pair of one list of samples and one of their targets, whose samples would become arguments."""
    if (
        isinstance(inputs, (tuple, list))
        and isinstance(targets, (tuple, list))
        and len(inputs) == len(targets) > 0
        and all(isinstance(leaf, Tensor) for leaf in inputs)
        and all(isinstance(target, Mapping) for target in targets)
    ):
        raise TypeError(
            f"loader gave {len(inputs)} inputs and as many dictionaries of targets, which looks like a list of "
            "samples, but a list of inputs is passed as so many arguments. For a model that takes a list, pass "
            "prepare=lambda batch: ((list(batch[0]),), list(batch[1]))."
        )


def _walk(name: str, tree: Any, axes: Any, inside: int, *, top: bool = False) -> Iterator[tuple[str, Any, Any, int]]:
    """Yield name, leaf, axis and the length of the list in which it stands, else 0."""
    plain = axes is SEEN or axes is None or (isinstance(axes, int) and not isinstance(axes, bool))
    if isinstance(tree, Mapping) and (plain or isinstance(axes, Mapping)):
        strangers = [] if plain else [key for key in axes if key not in tree]
        if strangers:
            raise ValueError(f"sample_axes names {strangers}, which {name} does not have. It has {list(tree)}.")
        for key, value in tree.items():
            yield from _walk(f"{name}[{key!r}]", value, axes if plain else axes.get(key, SEEN), inside)
    elif isinstance(tree, (tuple, list)) and not is_leaf(tree) and (plain or isinstance(axes, (tuple, list))):
        if not plain and len(axes) != len(tree):
            raise ValueError(f"sample_axes has {len(axes)} entries for {name}, which has {len(tree)}. {AXES_REMEDY}")
        if isinstance(tree, list) and not top and name.startswith("inputs"):
            inside = len(tree)
        for place, value in enumerate(tree):
            yield from _walk(f"{name}[{place}]", value, axes if plain else axes[place], inside)
    elif not plain:
        raise TypeError(f"sample_axes={axes!r} does not fit {name}, a {type(tree).__name__}. {AXES_REMEDY}")
    else:
        flat, _ = _flat(tree)
        for place, leaf in enumerate(flat):
            held = inside if isinstance(leaf, Tensor) else 0  # lists of strings and numbers are constants
            yield (name if leaf is tree else f"{name}, leaf {place}"), leaf, axes, held


def _shape(leaf: Any) -> Any:
    if isinstance(leaf, PackedSequence):
        return f"({int(leaf.batch_sizes[0])} packed sequences)"
    return "(nested)" if leaf.is_nested else tuple(leaf.shape)


def _length(leaf: Any, axis: Any) -> int | None:
    """Return the length of ``leaf`` along ``axis``; None for what does not have one."""
    if axis is None or not isinstance(leaf, (Tensor, PackedSequence)):
        return None
    if isinstance(leaf, PackedSequence):
        return int(leaf.batch_sizes[0])
    axis = 0 if axis is SEEN else axis
    return int(leaf.size(axis)) if -leaf.dim() <= axis < leaf.dim() else None


def take(leaf: Any, samples: slice, axis: int | None) -> Any:
    """Return some samples of ``leaf``."""
    return _gather(leaf, (samples,), axis)


def _gather(leaf: Any, some: tuple[slice, ...], axis: int | None) -> Any:
    """Return the samples of ``leaf`` in each of ``some``, one behind the other."""
    if axis is None:
        return leaf
    if isinstance(leaf, PackedSequence):
        each = unpack_sequence(leaf)
        return pack_sequence([row for samples in some for row in each[samples]], enforce_sorted=False)
    ranges = [samples.indices(leaf.size(axis))[:2] for samples in some]
    parts = [leaf.narrow(axis, start, stop - start) for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def bool_mask(mask: Any) -> Tensor:
    """Return ``mask``, what sample_mask gave, if it is a bool tensor; else raise."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        what = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"sample_mask gave {what}. Let it return a bool tensor, True where a sample counts.")
    return mask


def check_mask(mask: Tensor | None, size: int) -> None:
    """Raise ``ValueError`` unless ``mask`` has a row for each of ``size`` samples."""
    if mask is not None and mask.shape[:1] != (size,):
        raise ValueError(
            f"sample_mask gave shape {tuple(mask.shape)} for a batch of {size} samples. Let it return "
            "one value for each sample, (samples,), or for each token, (samples, tokens)."
        )


def mask_rows(mask: Tensor, each: int, where: str) -> Tensor:
    """Return which rows count, ``(samples * each,)`` of bool, of a layer ``where`` that sees ``each`` for a sample.

    Args:
        mask: bool, ``(samples,)`` or ``(samples, tokens)``, True where a sample or token counts.
        each: rows for a sample. A layer that sees one row for each sample counts it if any of its tokens counts.
        where: the layer in words, for errors.
    """
    size = len(mask)
    mask = mask.reshape(size, math.prod(mask.shape[1:]))
    if each == 1:
        mask = mask.any(1, keepdim=True)
    elif mask.shape[1] == 1:
        mask = mask.expand(-1, each)
    elif mask.shape[1] != each:
        raise ValueError(
            f"sample_mask gave {mask.shape[1]} values for each sample, of which {where} sees {each} rows. "
            "Let it return one for each sample, or leave the layer out."
        )
    return mask.reshape(-1)
