"""How data is read: the options of all calls that do, the batches of a loader, and the progress bar."""

import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from itertools import islice
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from torchprune_ext._checks import check_whole

SampleMask = Callable[[Any], Tensor]


class Options(TypedDict, total=False):
    """How the data is read; the same for all calls that read data.

    Args:
        prepare: turns a batch of the loader into ``(inputs, targets)``; not needed for batches that are such pairs, or
            dictionaries, which are passed to the model as keywords and to the loss as targets.
        sample_mask: from a batch of the loader to a bool tensor, ``(samples,)`` or ``(samples, tokens)``, False where
            it does not count, as padding; for calls without a loss, which itself decides what counts.
        sample_axes: on which axis the samples stand, as ``in_dims`` of ``torch.vmap``: an int for all tensors, or a
            pair ``(inputs, targets)``, or a dictionary as the batch is, of an int, or None where all samples share a
            tensor. By default seen from the shapes: axis 0 of each tensor whose first axis has the length that most
            have.
        max_batches: stop after so many batches.
        progress: show a progress bar, which needs ``tqdm``; by default if that is installed.
        keep_rng: put torch's random state back to what it was.
        process_group: ``torch.distributed`` group whose ranks call this together, each with its own share of the data
            and a replica of the model; all get the statistics of all data, and so the same masks and weights.
    """

    prepare: Callable[[Any], tuple[Any, Any]] | None
    sample_mask: SampleMask | None
    sample_axes: Any
    max_batches: int | None
    progress: bool | None
    keep_rng: bool
    process_group: Any


class PassOptions(Options, total=False):
    """How the data is read, and where it is held while it waits between two layers.

    Args:
        offload: an existing folder, for more data than memory holds. What goes from one block of the model to the next
            is written there, and one batch at a time is in memory. Takes about three times the forward passes.
    """

    offload: str | os.PathLike[str] | None


def without_offload(options: PassOptions) -> tuple[Options, str | None]:
    """Return the other options, and the folder, checked."""
    rest: Any = dict(options)
    folder = rest.pop("offload", None)
    if folder is None:
        return rest, None
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"offload={folder!r} is a {type(folder).__name__}. Pass the path of a folder.")
    if not os.path.isdir(folder):
        raise ValueError(f"offload={os.fspath(folder)!r} is not a folder. Make it first, e.g. by tempfile.mkdtemp().")
    return rest, os.fspath(folder)


def check_options(options: Options) -> None:
    """Raise unless ``options`` are known and in range."""
    unknown = set(options) - set(Options.__annotations__)
    if unknown:
        raise TypeError(f"unknown arguments {sorted(unknown)}. Known: {sorted(Options.__annotations__)}.")
    if options.get("max_batches") is not None:
        check_whole("max_batches", options["max_batches"] or 0, 1)
    for name in ("prepare", "sample_mask"):
        if options.get(name) is not None and not callable(options.get(name)):
            raise TypeError(f"{name}={options.get(name)!r} cannot be called. Pass a function of a batch.")


def read(loader: Iterable[Any], options: Options, what: str) -> Iterator[Any]:
    """Yield the batches of ``loader`` that the options ask for, under a progress bar called ``what``.

    Raises:
        TypeError: ``loader`` is a batch, or no iterable.
        ValueError: it gives nothing.
    """
    check_options(options)
    single = isinstance(loader, (Tensor, Mapping, str, PackedSequence)) or (
        isinstance(loader, tuple) and len(loader) > 0 and all(isinstance(part, Tensor) for part in loader)
    )
    if single or not isinstance(loader, Iterable):
        raise TypeError(
            f"loader is a {type(loader).__name__}, not an iterable of batches. Pass e.g. a DataLoader, or [batch]."
        )
    most, count = options.get("max_batches"), 0
    for raw in islice(with_progress(loader, what, most, options.get("progress")), most):
        yield raw
        count += 1
    if not count:
        raise ValueError("loader gave no batch. Pass data, or a loader that is not exhausted.")


def taken(loader: Iterable[Any], options: Options) -> list[Any]:
    """Return the batches of ``loader`` that the options ask for, to go through them several times; without a bar."""
    with torch.random.fork_rng() if options.get("keep_rng") else nullcontext():
        return list(read(loader, {**options, "progress": False}, ""))


def with_progress(loader: Iterable[Any], what: str, most: int | None, progress: bool | None) -> Iterable[Any]:
    """Return ``loader`` with a progress bar called ``what``, if ``progress`` and what is installed allow it."""
    if progress is False:
        return loader
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]
    except ImportError as error:
        if progress is None:
            return loader
        raise ImportError("progress=True needs tqdm: pip install torchprune-ext[progress]") from error
    try:
        total = operator.length_hint(loader, -1)  # -1 too where len() raises, as over an iterable data set
    except NotImplementedError:
        total = -1
    bar: Iterable[Any] = tqdm(
        iter(loader), desc=what, total=most if total < 0 else min(total, most or total), leave=False
    )
    return bar
