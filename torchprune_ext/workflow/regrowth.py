"""Which entries of a tensor go and which grow, and how that is written into masks, weights and momenta, or not at all.

Masks are written in place, since others hold them, as ``DistributedDataParallel`` and CUDA graphs do.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchprune_ext._checks import check_finite
from torchprune_ext._host import Target
from torchprune_ext._statistics import Key
from torchprune_ext.criteria import magnitude
from torchprune_ext.masks import entry_mask, identity
from torchprune_ext.selection import Scores, kept, select_smallest

Patch = tuple[Tensor, Tensor, float]  # a tensor, where in it, and what to write there
Done = list[tuple[Tensor, Tensor, Tensor]]  # the same with what was there before


@dataclass(frozen=True, slots=True)
class Sparse:
    """A tensor of constant sparsity.

    Args:
        where: the tensor in words, for errors.
        keys: module and name, of all places if it is tied.
        kept: how many of its entries are not pruned.
    """

    where: str
    keys: tuple[Key, ...]
    kept: int

    def find(self) -> list[tuple[Target, Tensor]]:
        """Return the tensor at all of its places with its mask there.

        Raises:
            ValueError: it is not pruned as it was left, or its weights are not finite.
        """
        found = []
        for key in self.keys:
            target = Target.of(*key)
            if target.mask is None or target.hook()[1] is None:
                raise ValueError(
                    "is no longer pruned, or has lost its hook, as by a native call that failed. Call step() no more, "
                    "or make a new DynamicSparse."
                )
            found.append((target, target.mask))
        (target, mask), *others = found
        if (left := int(mask.count_nonzero())) != self.kept:
            raise ValueError(
                f"has {left} entries that are not pruned, but DynamicSparse has left {self.kept}: another call has "
                "pruned it, or another mask was loaded. Make a new DynamicSparse for the new sparsity."
            )
        if any(other is not mask and not torch.equal(other != 0, mask != 0) for _, other in others):
            raise ValueError("is tied, and has different masks at its places. Load a state dict with the same ones.")
        check_finite(target.name, target.parameter)
        return found


def random_mask(target: Target, sparsity: float, generator: torch.Generator) -> Tensor:
    """Return a mask of exactly ``round(sparsity * entries)`` zeros, which are random but for those that are there."""
    drawn = torch.rand(target.parameter.shape, generator=generator, dtype=torch.float32, device="cpu")
    scores = Scores.of(identity, drawn.to(target.parameter.device), alive=target.mask)
    size, dead = len(scores), len(scores) - scores.count_alive()
    goal = round(sparsity * size)
    if goal >= size > 0:
        raise ValueError(f"sparsity={sparsity!r} leaves none of its {size} entries. Ask for less, or leave it out.")
    if goal < dead:
        raise ValueError(
            f"sparsity={sparsity!r} is {goal} of its {size} entries, but {dead} are pruned already. Ask for more, or "
            "undo() its pruning first."
        )
    return entry_mask(scores, select_smallest([scores], goal - dead)[0], target.parameter)


def moved(
    target: Target, fraction: float, gradient: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return which entries go and which grow, equally many, each as booleans in the tensor's shape.

    Args:
        target: a pruned tensor.
        fraction: how many of the kept entries are dropped, those of least magnitude.
        gradient: what grows is where this is largest; None for random growth.
        generator: source of that.
    """
    weights = Scores.of(magnitude, target.parameter, alive=target.mask)
    k = round(fraction * weights.count_alive())
    before = kept(weights, select_smallest([weights], 0)[0])
    stay = kept(weights, select_smallest([weights], k)[0])
    free = ~stay  # what was just dropped is among it
    if gradient is None:
        places = free.nonzero().view(-1)
        order = torch.randperm(len(places), generator=generator, device="cpu")[:k]
        grow = torch.zeros_like(free)
        grow[places[order.to(places.device)]] = True
    else:
        scores = Scores.of(magnitude, gradient, alive=free)
        grow = kept(scores, select_smallest([scores], scores.count_alive() - k)[0])
    after, shape = stay | grow, target.parameter.shape
    return (before & ~after).view(shape), (after & ~before).view(shape)


def patches(
    masks: Sequence[Tensor], parameter: nn.Parameter, gone: Tensor, grown: Tensor, optimizer: Optimizer | None
) -> list[Patch]:
    """Return what to write where a mask moves.

    Args:
        masks: the mask, of all places of the tensor.
        parameter: the dense values; 0 where something grows.
        gone: where entries go.
        grown: where entries grow.
        optimizer: 0 in its state, wherever that has a value for each entry, both where entries go and grow.
    """
    found: list[Patch] = [(parameter, grown, 0.0)]
    for mask in masks:
        found += [(mask, gone, 0.0), (mask, grown, 1.0)]
    state = {} if optimizer is None else optimizer.state.get(parameter, {})
    for key, value in state.items():
        if key != "step" and isinstance(value, Tensor) and value.shape == parameter.shape:
            found.append((value, (gone | grown).to(value.device), 0.0))
    return found


@contextmanager
def rolled_back() -> Iterator[Done]:
    """Yield a list for :func:`write`; on any error, Ctrl-C too, put back what was written with it."""
    done: Done = []
    try:
        yield done
    except BaseException:
        with torch.no_grad():
            for tensor, where, old in reversed(done):
                tensor[where] = old
        raise


@torch.no_grad()
def write(patches: Sequence[Patch], done: Done) -> None:
    """Write ``patches``, and what was there before into ``done``."""
    for tensor, where, value in patches:
        done.append((tensor, where, tensor[where]))
        tensor.masked_fill_(where, value)
