"""Which rows of a layer's input belong to which sample of a batch.

A rehearsal tells: the model runs once on a batch, and once on that batch with its first sample behind it, as many times
as the batch is long. The axis of a layer's input on which samples stand is the only one that doubles, its first half is
what it was, and its second half is the first sample over and over. Where that does not hold, samples mix.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchprune_ext._batches import Batch
from torchprune_ext._runs import Run

MIXED = (
    "Samples may not mix, and every tensor of a batch whose first axis is as long as the batch, here {size}, counts as "
    "one entry per sample. If one is something else, say so by sample_axes=, choose another batch size or pass "
    "prepare=."
)


class Seen(NamedTuple):
    """What a layer's input looked like in a pass: its shape, and a mixture of its features, ``shape[:-1]``."""

    shape: torch.Size
    mixed: Tensor


def seen(x: Tensor) -> Seen:
    """Return what is remembered of a layer's input ``x``."""
    with torch.autocast(x.device.type, enabled=False):
        mixed = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        return Seen(x.shape, mixed @ torch.arange(1, x.shape[-1] + 1, device=x.device).sin().to(mixed.dtype))


def sample_axis(where: str, size: int, once: Seen, twice: Seen | None, last: int) -> int:
    """Return the axis of a layer's input on which the ``size`` samples stand, or rows of them one after another.

    Args:
        where: the layer in words, for errors.
        size: number of samples of the batch.
        once: the input when the model gets the batch.
        twice: the input when it gets :meth:`.Batch.with_first_behind`; None if the layer was not called then.
        last: last axis on which samples can stand: 0 for convolutions, that before the features for linear layers.

    Raises:
        ValueError: there is no such axis, so samples mix or do not stand together.
    """
    longer, other = twice if twice is not None else (torch.Size(), once.mixed)
    grown = [axis for axis, pair in enumerate(zip(once.shape, longer, strict=False)) if pair[0] != pair[1]]
    if len(once.shape) == len(longer) and len(grown) == 1 and longer[grown[0]] == 2 * once.shape[grown[0]]:
        [axis] = grown
        if axis <= last and once.shape[axis] % size == 0:
            first = once.mixed.narrow(axis, 0, once.shape[axis] // size)
            expected = torch.cat([once.mixed, *[first] * size], axis)
            most = float(expected.nan_to_num(0, 0, 0).abs().max())
            if torch.allclose(other, expected, rtol=1e-2, atol=1e-2 * most, equal_nan=True):
                return axis
    raise ValueError(
        f"{where} gets an input of shape {tuple(once.shape)} in which a sample's rows depend on other samples or "
        f"do not stand together. {MIXED.format(size=size)} Otherwise leave the layer out."
    )


def find_sample_axes(
    run: Run, modules: Mapping[nn.Module, str], batch: Batch, last: Mapping[nn.Module, int]
) -> dict[nn.Module, list[int]]:
    """Return, for each call of each module in a pass, on which axis of its input the samples stand.

    Args:
        run: an open run.
        modules: the modules to watch, and how errors call them.
        batch: a batch to rehearse with; the model sees it twice.
        last: last axis on which samples can stand in each module's input; counts from the end if negative.

    Raises:
        ValueError: as :func:`sample_axis`, or the model fails on a batch that is given twice over.
    """
    once = _inputs_seen(run, modules, batch.inputs)
    try:
        twice = _inputs_seen(run, modules, batch.with_first_behind())
    except (RuntimeError, IndexError) as error:
        raise ValueError(
            f"loader: the model fails on a batch that is given twice over. {MIXED.format(size=batch.size)}"
        ) from error
    found: dict[nn.Module, list[int]] = {}
    for module, where in modules.items():
        first, second = once[module], twice[module]
        pairs = zip(first, [*second, *[None] * len(first)], strict=False)
        found[module] = [
            sample_axis(where, batch.size, a, b if len(first) == len(second) else None, last[module] % len(a.shape))
            for a, b in pairs
        ]
    return found


def _inputs_seen(run: Run, modules: Mapping[nn.Module, str], inputs: Any) -> dict[nn.Module, list[Seen]]:
    found: dict[nn.Module, list[Seen]] = {module: [] for module in modules}

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found[module].append(seen([*args, *kwargs.values()][0]))

    with hooked(modules, watch), torch.no_grad():
        run.output(inputs)
    return found


@contextmanager
def hooked(modules: Iterable[nn.Module], watch: Callable[..., None]) -> Iterator[None]:
    """Let ``watch(module, args, kwargs)`` be called before each forward of ``modules``."""
    hooks = [module.register_forward_pre_hook(watch, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
