"""Input channels in another order, and with them the outputs of all that feeds them, so that N:M keeps more."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from torchprune_ext._checks import check_module, errors_about
from torchprune_ext._graph import Group, Member, graph_of
from torchprune_ext._host import as_plain, kept_zeros, outside_of_inference, pruned
from torchprune_ext._reduction import reduction_axis
from torchprune_ext._reordering import Order, moved, reorder
from torchprune_ext._swaps import Stripes, best_order
from torchprune_ext._tables import percent, table
from torchprune_ext.global_pruning.budget import (
    Listed,
    Params,
    PerParameter,
    groups_of,
    refuse_empty,
    weights_or_scores,
)
from torchprune_ext.masks import nm_profile
from torchprune_ext.patterns import NM

LARGE = 1 << 34  # differences of two scores in one look at all exchanges; of larger layers, fewer outputs are asked
NO_GAIN = "no exchange of two channels keeps more"


@dataclass(frozen=True, slots=True)
class Row:
    """What became of the inputs of one layer.

    Args:
        tensor: its weight, by its name in the model.
        inputs: how many inputs each output sums over, along the axis that groups of ``m`` run along.
        moved: how many of them stand at another place now.
        before: which share of the sum of its scores n:m kept, from 0 to 1.
        after: the same now.
        reason: why inputs stay where they were, or None.
    """

    tensor: str
    inputs: int
    moved: int
    before: float
    after: float
    reason: str | None


@dataclass(frozen=True, slots=True)
class Permutation:
    """What :func:`permute_for_nm` did; ``str()`` is a table.

    Args:
        n: entries kept of ``m``.
        m: length of a group.
        rows: a row for each listed tensor, in the order of the list.
    """

    n: int
    m: int
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        cells = [
            (row.tensor, f"{row.inputs:,}", f"{row.moved:,}", percent(row.before), percent(row.after))
            for row in self.rows
        ]
        lines = [table(["tensor", "inputs", "moved", f"{self.n}:{self.m} kept", "keeps now"], cells)]
        reasons: dict[str, list[str]] = {}
        for row in self.rows:
            if row.reason is not None:
                reasons.setdefault(row.reason, []).append(row.tensor)
        for reason, names in reasons.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"{', '.join(names[:3])}{more}: {reason}")
        return "\n".join(lines)


@dataclass(slots=True, eq=False)
class _Reader:
    """A listed weight, its scores, and which input stands at each place of its reduction axis.

    Args:
        listed: the weight.
        name: its name in the model.
        scores: at least 0, of its shape.
        pattern: n:m along its inputs; a short last group counts as filled up with zeros.
        order: int64, ``(inputs,)``.
        reasons: why inputs stay.
    """

    listed: Listed
    name: str
    scores: Tensor
    pattern: NM
    order: Tensor
    reasons: list[str] = field(default_factory=list)

    @property
    def axis(self) -> int:
        """The reduction axis."""
        return self.pattern.axis(self.scores.shape)

    def now(self) -> Tensor:
        """Return the scores with the inputs where they stand."""
        return self.scores.index_select(self.axis, self.order.to(self.scores.device))

    def kept(self) -> tuple[float, float]:
        """Return the sum of the scores that n:m keeps, and that of all."""
        total = nm_profile(self.now(), self.pattern, self.listed.target.mask).total
        return total[self.pattern.n], total[-1]

    def share(self) -> float:
        """Return which share of its scores n:m keeps."""
        kept, whole = self.kept()
        return kept / whole if whole else 1.0

    def stripes(self) -> Tensor:
        """Return the number of the group of ``m`` that each input is in."""
        places, part = torch.arange(len(self.order), device="cpu"), len(self.order) // self.pattern.groups
        return places // max(part, 1) * -(-part // self.pattern.m) + places % max(part, 1) // self.pattern.m

    def row(self, before: float) -> Row:
        """Return what became of it."""
        moved = int((self.order != torch.arange(len(self.order), device="cpu")).sum())
        reasons = [each for each in dict.fromkeys(self.reasons) if not (moved and each == NO_GAIN)]
        reason = "; ".join(reasons) or None
        return Row(self.name, len(self.order), moved, before, self.share(), reason)


def permute_for_nm(
    model: nn.Module,
    example_inputs: Any,
    params: Params,
    n: int = 2,
    m: int = 4,
    *,
    importance_scores: PerParameter | None = None,
) -> Permutation:
    """Reorder the input channels of layers, and the outputs of all that feeds them, so that N:M pruning keeps more.

    Of ``m`` consecutive inputs each output keeps ``n``, so large weights that stand side by side push each other out.
    In another order they do not, and the order of hidden channels is free: what gives them (filters, biases, BatchNorm
    entries) and all that read them get the same one. The model computes the same as before, up to the order in which
    its sums are taken. Call it before pruning.

    Which channels go together follows from one forward pass, as in :func:`~torchprune_ext.deploy.compact.compact`. All
    layers that read the same channels share one order: the one in which the listed ones keep most in sum, as found by
    exchanges of two channels until none gains (in very large layers, as far as every so many outputs tell). What a head
    of attention gives changes places within the head. Inputs stay where they are if they are the model's inputs or
    outputs, or if something unknown reads them; channels that the model's code tells apart do not mix; and maps that
    are flattened channel by channel have nothing to gain.

    Before it returns, all outputs are compared with those of before as ``compact`` does, in eval mode, on
    ``example_inputs``, on other values and on other sizes.

    Args:
        model: any module. Its parameters and buffers get their new order in place: they stay the same objects, in
            their memory formats, with their gradients. What else goes by the order of channels does not: make
            optimizers, scores and copies that serve as reference models (``dense=``) afterwards. A reference model from
            before has other channels in each place, which is refused only where it can be seen.
        example_inputs: one batch: a tensor, a tuple of positional or a dictionary of keyword arguments.
        params: tensors that are to be pruned, as in ``prunable_parameters(model)``, whose scores count.
        n: entries kept per group (count, ``0 < n <= m``).
        m: group length (count), along each layer's reduction axis; a short last group counts as filled up with zeros.
        importance_scores: scores of every listed tensor, keyed by its pair; by default :math:`|w|`. With
            ``tpe.calibration.activations``, weights count by the norms of their inputs.

    Returns:
        How much of each listed tensor the pattern kept and keeps, how many of its inputs have moved, and why others
        have not.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: not ``0 < n <= m``; a tensor of the list is not in the model, has no reduction axis, or scores that
            are not finite and at least 0; or as :func:`~torchprune_ext.deploy.compact.dead_units`. Nothing is changed.
        RuntimeError: the outputs differ, and which layer's channels are to blame. All is put back then.

    Source:
        Pool & Yu 2021, *Channel Permutations for N:M Sparsity*.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1, bias=False))
        >>> _ = model[2].weight.data.copy_(torch.tensor([[9.0, 8.0, 7.0, 6.0, 1.0, 1.0, 1.0, 1.0]]))
        >>> print(permute_for_nm(model, torch.randn(4, 2), [(model[2], "weight")]))
        tensor    inputs  moved  2:4 kept  keeps now
        2.weight       8      4    55.9 %     88.2 %
    """
    check_module("model", model)
    NM(n, m)
    readers = _readers(model, groups_of(params), n, m, importance_scores)
    before = [reader.share() for reader in readers]
    stay = _stay(model)
    with outside_of_inference(), as_plain(model), torch.no_grad():
        orders = []
        for group in graph_of(model, example_inputs, in_order=True):
            own = _reading(group, readers) if n < m else []
            order, why = _best(group, own, n) if (why := _obstacle(group, stay)) is None and own else (None, why)
            if order is not None:
                orders.append(Order(group, order))
            for reader, _ in own:
                reader.reasons += [] if why is None else [why]
        if orders:
            reorder(model, orders, example_inputs)
    return Permutation(n, m, tuple(reader.row(share) for reader, share in zip(readers, before, strict=True)))


def _readers(
    model: nn.Module, listed: Sequence[Listed], n: int, m: int, importance_scores: PerParameter | None
) -> list[_Reader]:
    """Return the listed tensors with their scores."""
    refuse_empty(listed)
    paths = {module: path for path, module in model.named_modules()}
    readers = []
    for each in listed:
        target = each.target
        with errors_about(each.where):
            if target.module not in paths:
                raise ValueError(
                    f"it is not a tensor of model, a {type(model).__name__}. Pass the model it belongs to."
                )
            axes = {reduction_axis(other) for other in each.everywhere()}
            if len(axes) > 1:
                raise ValueError("it is tied, and its layers sum over different axes of it. Leave it out of params.")
            scores = weights_or_scores(importance_scores, target).abs()
        pattern = NM(n, m, pad=True).along(*axes.pop())
        path = paths[target.module]
        order = torch.arange(target.parameter.shape[pattern.axis(scores.shape)], device="cpu")
        readers.append(_Reader(each, f"{path}.{target.name}" if path else target.name, scores, pattern, order))
        if len(order) < 2 or n == m:
            readers[-1].reasons.append("each output has one input" if n < m else "n = m keeps all")
    return readers


def _stay(model: nn.Module) -> dict[Any, str]:
    """Return tensors of ``model``, by id and by pair, that stay as they are for what goes with them, and why."""
    why = [(each, f"{each.where} is pruned: call this first, or after undo_all(model)") for each in pruned(model)]
    why += [(each, f"{each.where} keeps its zeros (keep_zeros)") for each, _ in kept_zeros(model)]
    by_pair: dict[Any, str] = {(target.module, target.name): text for target, text in why}
    return by_pair | {id(target.parameter): text for target, text in why}


def _reading(group: Group, readers: Sequence[_Reader]) -> list[tuple[_Reader, Member]]:
    """Return the listed tensors that read the channels of a group along their reduction axis."""
    plain = {id(getattr(each.listed.target.module, each.listed.target.name)): each for each in readers}
    found = [(plain.get(id(getattr(each.module, each.param))), each) for each in group.members]
    return [(reader, member) for reader, member in found if reader is not None and reader.axis == member.axis]


def _obstacle(group: Group, stay: Mapping[Any, str]) -> str | None:
    """Return why no channel of a group can change places, or None."""
    if group.fixed is not None:
        return group.fixed
    if group.size == 1:
        return "no other channel goes the same ways"
    for member in group.members:
        tensor = getattr(member.module, member.param)
        why = stay.get((member.module, member.param)) or stay.get(id(tensor))
        if why is None and tensor.is_inference():
            why = f"{member.name} was made in inference mode"
        if why is None and any(step == 0 for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1):
            why = f"{member.name} is expanded, so that several entries are one"
        if why is None and tensor.grad is not None and tensor.grad.layout != torch.strided:
            why = f"{member.name} has a sparse gradient"
        if why is not None:
            return why
    return None


def _best(group: Group, own: Sequence[tuple[_Reader, Member]], n: int) -> tuple[Tensor | None, str | None]:
    """Return the order in which the listed readers of a group keep most, and put it down there; or None, and why."""
    m = own[0][0].pattern.m
    rows = sum(reader.scores.numel() // len(reader.order) * member.indices.shape[1] for reader, member in own)
    step = -(-rows * group.size**2 // LARGE)
    views: dict[tuple[int, ...], list[Tensor]] = {}
    for reader, member in own:
        if isinstance(found := _matrices(reader, member.indices, step), str):
            return None, found
        for key, matrix in found:
            views.setdefault(key, []).append(matrix)
    if not views:
        return None, f"whole groups of {m} inputs are one channel, wherever it stands"
    device = next(iter(views.values()))[0].device
    stripes = [
        Stripes(torch.cat([each.to(device) for each in same]), _places(key, m).to(device))
        for key, same in views.items()
    ]
    order = best_order(stripes, group.size, n).cpu()
    before, kept = [reader.order for reader, _ in own], sum(reader.kept()[0] for reader, _ in own)
    for reader, member in own:
        reader.order = moved(reader.order, member.indices, order)
    why = None if sum(reader.kept()[0] for reader, _ in own) > kept else NO_GAIN
    why = why or _breaks(group, order, own[0][0].pattern)
    if why is not None:
        for (reader, _), old in zip(own, before, strict=True):
            reader.order = old
        return None, why
    return order, None


def _matrices(reader: _Reader, indices: Tensor, step: int) -> list[tuple[tuple[int, ...], Tensor]] | str:
    """Return the scores of a reader for the search, one matrix for each entry that a channel has; or why not.

    Args:
        reader: the reader.
        indices: which of its inputs are channel i, ``(channels, each)``.
        step: take every so many of its outputs.

    Returns:
        For each, which channels share a group of ``m``, as the first of those that do, and the matrix: a column for
        each channel, then, group by group, one for each input or none that fills it up to ``m``.
    """
    stripes, (size, each) = reader.stripes(), indices.shape
    count, m = int(stripes.max()) + 1, reader.pattern.m
    none = torch.full_like(stripes, -1)
    channel = none.index_put((indices,), torch.arange(size, device="cpu")[:, None])
    entry = none.index_put((indices,), torch.arange(each, device="cpu"))

    def ends(values: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
        low = stripes.new_full((count,), len(stripes)).scatter_reduce(0, stripes[among], values[among], "amin")
        return low, stripes.new_full((count,), -1).scatter_reduce(0, stripes[among], values[among], "amax")

    touched = stripes[indices].unique()
    low, high = ends(channel, torch.ones_like(stripes, dtype=torch.bool))
    if bool((low == high)[touched].all()):
        return []
    low, high = ends(entry, channel >= 0)
    if bool((low != high)[touched].any()):
        return f"groups of {m} inputs span several of one channel, as where maps are flattened channel by channel"
    scores = reader.now().movedim(reader.axis, 0).flatten(1).t()[::step].float()
    found = []
    for place in range(each):
        own = stripes[indices[:, place]]
        first = own.new_full((count,), size).scatter_reduce(0, own, torch.arange(size, device="cpu"), "amin")
        key = first[own]
        others = []
        for stripe in key.unique().tolist():
            number = int(own[stripe])
            beside = ((stripes == number) & (channel < 0)).nonzero().flatten()
            free = m - int((own == number).sum()) - len(beside)
            others += [scores[:, beside.to(scores.device)], scores.new_zeros((len(scores), free))]
        found.append((tuple(key.tolist()), torch.cat([scores[:, indices[:, place].to(scores.device)], *others], 1)))
    return found


def _places(key: Sequence[int], m: int) -> Tensor:
    """Return the places of each stripe, ``(stripes, m)``: of its channels, and of what fills it up."""
    stripes: dict[int, list[int]] = {}
    for place, stripe in enumerate(key):
        stripes.setdefault(stripe, []).append(place)
    count = len(key)
    for _, places in sorted(stripes.items()):
        more = m - len(places)
        places += range(count, count + more)
        count += more
    return torch.tensor([places for _, places in sorted(stripes.items())], device="cpu")


def _breaks(group: Group, order: Tensor, pattern: NM) -> str | None:
    """Return which weight is n:m now and would not be any more, or None."""
    for member in group.members:
        weight = getattr(member.module, member.param)
        if member.reads and weight.dim() > 1:
            along = replace(pattern, dim=member.axis, groups=1)
            places = torch.arange(weight.shape[member.axis], device="cpu")
            places = moved(places, member.indices, order).to(weight.device)
            now, then = (nm_profile(each, along).total for each in (weight, weight.index_select(member.axis, places)))
            if now[along.n] == now[-1] and then[along.n] < then[-1]:
                return f"{member.name} is {along.n}:{along.m} already, and would not be in another order"
    return None
