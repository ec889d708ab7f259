"""Smaller models: channels, hidden units and heads that do nothing are taken out, and plain modules are left."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from torchprune_ext._checks import check_module, check_whole
from torchprune_ext._graph import Group, graph_of
from torchprune_ext._host import as_plain, outside_of_inference, pruned
from torchprune_ext.deploy.checking import without
from torchprune_ext.deploy.cutting import Cut, can_fold, holders_of

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class DeadUnits:
    """What :func:`dead_units` found in channels that go together.

    Args:
        layers: names of the tensors that give the channels.
        channels: how many channels there are; of attention, heads.
        removable: how many of them :func:`compact` can take out.
        left: how many others look dead but must stay, by reason.
    """

    layers: tuple[str, ...]
    channels: int
    removable: int
    left: tuple[tuple[int, str], ...]

    def __str__(self) -> str:
        names = ", ".join(self.layers[:3]) + ", ..." * (len(self.layers) > 3)
        told = [f"{self.removable} removable", *(f"{count} left: {why}" for count, why in self.left)]
        return f"{names}: {self.channels} channels, {'; '.join(told)}"


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    """A group, which of its channels are removable, which of these by a constant, and why others are not."""

    group: Group
    dead: Tensor
    constant: Tensor
    left: dict[str, int]

    def row(self) -> DeadUnits:
        left = tuple((count, why) for why, count in self.left.items())
        return DeadUnits(tuple(self.group.names), self.group.size, int(self.dead.sum()), left)


def dead_units(model: nn.Module, example_inputs: Any) -> tuple[DeadUnits, ...]:
    """Find the channels, hidden units and heads of ``model`` that do nothing, and say which of them cannot be removed.

    Runs the model once, in eval mode, and leaves it as it was. See :func:`compact` for what counts as dead.

    Args:
        model: any module; pruned tensors count with their effective weights.
        example_inputs: one batch: a tensor, a tuple of positional or a dictionary of keyword arguments.

    Returns:
        A row for each group of channels of which some are dead, or look so, in the order of the model. Print them one
        by one.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a layer has no shape yet, a module is scripted or quantized, or the output holds no tensor.
        Exception: whatever the model raises.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with torch.no_grad():
        ...     _ = model[0].weight[:3].zero_(), model[0].bias[:2].zero_()
        ...     _ = model[2].weight[:, 6:].zero_()
        >>> print(*dead_units(model, torch.ones(1, 4)))
        0.weight: 8 channels, 5 removable
    """
    check_module("model", model)
    with outside_of_inference(), as_plain(model):
        return tuple(each.row() for each in _found(model, graph_of(model, example_inputs)))


def compact(model: M, example_inputs: Any, *, round_to: int = 1) -> M:
    """Return a smaller model that computes the same: without channels, hidden units and heads that do nothing.

    A channel is dead, and taken out of all tensors that it has entries in, if

    - nobody reads it: the columns of every layer that reads it are zero, by masks or by plain zeros, or
    - it is zero, or another constant, whatever comes in: its own weights are zero (then only its bias or BatchNorm
      shift speaks). A constant is added to the biases of the layers that read it, where that is exact: in ``Linear``
      layers and in convolutions that do not pad with zeros.

    Which channels go together follows from one forward pass, operation by operation: residual adds, concatenations,
    grouped and depthwise convolutions, flattened maps, attention heads (whole; with grouped queries, all queries of a
    key). A channel of which something is not known stays, and :func:`dead_units` says why: one that the model returns,
    or over which a norm or a mean is taken, or that an operation unknown here reads. Inputs and outputs keep their
    widths, and one channel of each group stays always.

    Args:
        model: any module, pruned by whatever method, or with plain zeros. It is left as it was.
        example_inputs: one batch: a tensor, a tuple of positional or a dictionary of keyword arguments. Another size
            is fine later on.
        round_to: keep so many dead channels that the number of those kept is a multiple of this, where there are
            enough. Many kernels are slow at odd widths. Heads are not rounded.

    Returns:
        A new model of plain modules, without masks and hooks of pruning, in the modes and on the device of ``model``,
        with its dtypes, memory formats and ``requires_grad``.

    Raises:
        TypeError: ``model`` is not a module, or ``round_to`` not an int.
        ValueError: nothing can be removed, and why, by layer; ``round_to`` is less than 1; the model cannot be copied;
            or as :func:`dead_units`.
        RuntimeError: the outputs of the smaller model differ from those of ``model``, on ``example_inputs`` or on
            others made of them, whichever layers' channels are cut. Nothing is returned then.

    Example:
        >>> from torch.nn.utils import prune
        >>> model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2))
        >>> _ = prune.ln_structured(model[2], "weight", amount=40, n=2, dim=1)
        >>> compact(model, torch.ones(1, 4))
        Sequential(
          (0): Linear(in_features=4, out_features=24, bias=True)
          (1): ReLU()
          (2): Linear(in_features=24, out_features=2, bias=True)
        )
    """
    check_module("model", model)
    check_whole("round_to", round_to, 1)
    with outside_of_inference():  # what is made in it can never be trained
        plain = _plain_copy(model)
        found = list(_found(plain, graph_of(plain, example_inputs)))
        cuts = [each for one in found if (each := _chosen(one, round_to)) is not None]
        if not cuts:
            raise ValueError(_nothing(model, found, round_to))
        return without(plain, cuts, example_inputs)


def _plain_copy(model: M) -> M:
    """Return a copy of ``model`` with its effective weights as plain parameters."""
    flags = [(target.module, target.name, target.parameter.requires_grad) for target in pruned(model)]
    with as_plain(model):
        for module, name, flag in flags:
            getattr(module, name).requires_grad_(flag)
        try:
            return copy.deepcopy(model)
        except RuntimeError as error:
            raise ValueError(
                f"model of type {type(model).__name__} cannot be copied: {error} Where that is an old-style "
                "weight_norm or spectral_norm, call remove_weight_norm or remove_spectral_norm first, or use "
                "torch.nn.utils.parametrizations."
            ) from error


# ------------------------------------------------------------------------------------------------------- what is dead


def _found(model: nn.Module, groups: tuple[Group, ...]) -> Iterator[_Found]:
    """Yield the groups of which some channels are dead or look so."""
    holders = holders_of(model)
    for group in groups:
        none = torch.zeros((0, group.size), dtype=torch.bool, device="cpu")
        silent = torch.stack([each.silent.all(1) for each in group.readings]) if group.readings else none
        known = torch.stack([(r.silent | ~r.value.isnan()).all(1) for r in group.readings]) if group.readings else none
        folds = [can_fold(holders, group, each) for each in group.readings]
        allowed = torch.tensor([why is None for why in folds], dtype=torch.bool, device="cpu").unsqueeze(1)
        dead = (silent | (known & allowed)).all(0) & ~_differs(group)
        looks = silent.any(0) | _without_weights(group)
        for each in group.readings:
            looks |= each.still.all(1)
        left: dict[str, int] = {}
        for channel in (looks & ~dead).nonzero().flatten().tolist() if group.fixed is None else []:
            for place, reading in enumerate(group.readings):
                if silent[place, channel] or (known[place, channel] and folds[place] is None):
                    continue
                who = reading.reader or "a sum"
                why = f"{who} reads it"
                if bool(reading.still[channel].all()):
                    why = f"it is the same whatever comes in, but not at all places that {who} reads"
                if known[place, channel]:
                    why = f"it gives a constant (its bias or BatchNorm shift), and {folds[place]}"
                break
            else:
                why = "it is read as several constants"
            left[why] = left.get(why, 0) + 1
        if group.fixed is not None:
            dead = torch.zeros_like(dead)
            if bool(looks.any()):
                left[group.fixed] = int(looks.sum())
        if bool(dead.all()):
            dead[0] = False  # one stays always
        if bool(dead.any()) or left:
            yield _Found(group, dead, ~silent.all(0) & dead, left)


def _differs(group: Group) -> Tensor:
    """Return which channels one weight reads as several constants, in several calls."""
    differs = torch.zeros(group.size, dtype=torch.bool, device="cpu")
    for reading in group.readings:
        for other in group.readings:
            if other is not reading and other.reader == reading.reader and other.value.shape == reading.value.shape:
                silent = (reading.silent & other.silent).all(1)
                differs |= ~silent & ~(reading.value == other.value).all(1)
    return differs


def _without_weights(group: Group) -> Tensor:
    """Return which channels have no weights other than zeros in the matrices and kernels that give them."""
    zero = torch.ones(group.size, dtype=torch.bool, device="cpu")
    given = [m for m in group.members if not m.reads and getattr(m.module, m.param).dim() > 1]
    for member in given:
        tensor = getattr(member.module, member.param).detach().movedim(member.axis, 0)
        rows = (tensor == 0).flatten(1).all(1).cpu()
        zero &= rows[member.indices].all(1)
    return zero & bool(given)


def _chosen(found: _Found, round_to: int) -> Cut | None:
    """Return what is to go of a group: its dead channels, less some that round the rest up; None for none."""
    group, gone = found.group, found.dead.clone()
    step = 1 if group.heads else round_to
    kept = group.size - int(gone.sum())
    more = min(group.size, -(-kept // step) * step) - kept
    spare = torch.cat([(gone & found.constant).nonzero().flatten(), (gone & ~found.constant).nonzero().flatten()])
    gone[spare[:more]] = False
    return Cut(group, gone, found.constant & gone) if bool(gone.any()) else None


def _nothing(model: nn.Module, found: list[_Found], round_to: int) -> str:
    """Return what is missing, by layer."""
    name = type(model).__name__
    if any(bool(each.dead.any()) for each in found):
        return f"round_to={round_to} keeps all channels of {name} that could be removed. Pass a smaller one."
    if not found:
        return (
            f"{name} has no dead channels: none whose weights are all zero, and none whose readers' columns are. Prune "
            "whole units first, e.g. by prune.ln_structured(layer, 'weight', amount, n=2, dim=1) in the layers that "
            "read them, or check that the model computes with its masks."
        )
    rows = "\n".join(f"  {each.row()}" for each in found[:20])
    more = f"\n  ... and {len(found) - 20} more" if len(found) > 20 else ""
    return f"{name} has no channels that can be removed; what looks dead must stay:\n{rows}{more}"
