"""Re-fit a pruned model, or prune and re-fit it layer by layer, in one pass over the data."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack

from torchprune_ext._checks import check_whole
from torchprune_ext._host import Target
from torchprune_ext._layers import Layer
from torchprune_ext._loading import PassOptions
from torchprune_ext._ranks import Ranks
from torchprune_ext._statistics import Key
from torchprune_ext.compensation.by_output import Goals, shares_by_output
from torchprune_ext.compensation.fitting import Fits, Task
from torchprune_ext.compensation.goals import (
    Sparsity,
    Units,
    along_inputs,
    check_allocation,
    check_goal,
    goals_of,
    units_of,
    width_of,
)
from torchprune_ext.compensation.greedy import greedy_units, of_units
from torchprune_ext.compensation.reference import Dense
from torchprune_ext.compensation.solvers import (
    Problem,
    magnitude_scores,
    obs_scores,
    refit,
    wanda_scores,
)
from torchprune_ext.compensation.splitting import Thresholds, split
from torchprune_ext.compensation.unit_budget import Limit, prune_to_limit
from torchprune_ext.masks import nm_mask
from torchprune_ext.methods import GlobalPruning
from torchprune_ext.patterns import NM, Channel
from torchprune_ext.schedules import geometric_mean

SCORES: dict[str, Callable[[Problem, Tensor], Tensor]] = {
    "obs": obs_scores,
    "wanda": wanda_scores,
    "magnitude": magnitude_scores,
}
IN_SCALE = {"admm": 1, "obs": 2}  # power of the scale of the outputs in which such scores of several rows compare


def compensate(
    model: nn.Module,
    loader: Iterable[Any],
    params: Iterable[Key],
    *,
    dense: Dense | None = None,
    create_bias: bool = False,
    dense_inputs: float = 1.0,
    **options: Unpack[PassOptions],
) -> Fits:
    """Re-fit what survived of each listed weight, and the layer's bias, to the reference layer's outputs; masks stay.

    A layer shall give these outputs both for its inputs in the model as pruned before it, so that it makes up for what
    those lack, and for its inputs in the reference model, so that it does not adapt to the errors of this data alone.
    Where all that is done with them is to add something that was there before, as a residual stream is, the sum counts:
    for the former inputs, the layer makes up for what the stream lacks too.

    The reference model is ``dense``. Without it, it is this model with the values under the masks of the listed weights
    and of their layers' biases, as :func:`.undo` would restore them. They must not have changed since they were pruned;
    what else is pruned stays pruned in the reference model. A bias that is pruned, shared or computed stays as it is.
    The new values of the survivors take the place of the old ones in ``weight_orig``.

    Args:
        model: any module, pruned.
        loader: batches as for :mod:`torchprune_ext.calibration`; targets are not used.
        params: ``(module, name)`` pairs of the weights of ``Linear``, ``Conv1d`` and ``Conv2d``, or of other modules
            that multiply as ``Linear`` does; each is called once in a pass. Others stay as they are.
        dense: the reference model: a copy of the model from before pruning, its state dict, or what
            :func:`.dense_values` returned then. Needed when pruning and re-fitting, or training, take turns. Its
            channels have to be in the model's order: take it after :func:`.permute_for_nm`, as one from before cannot
            always be told once the model has been trained or re-fitted.
        create_bias: give layers that were made with ``bias=False`` one.
        dense_inputs: weight of a layer's inputs in the reference model beside those in the pruned one, 0 or more. The
            deeper the model and the fewer the data, the more they help; 0 is better where a few layers see much data.
        **options: see :class:`.PassOptions`.

    Returns:
        The error of each layer before and after, as :class:`Fit`; no row of a weight gets worse on the data given.

    Raises:
        TypeError: an argument of the wrong type, or a module that does not multiply as ``Linear`` does.
        ValueError: no data; a tensor that is tied, is never used or is used twice; ``dense`` does not fit, or is
            missing although a listed tensor has changed since it was pruned. Nothing is changed then.

    Source: the least squares of *Optimal Brain Surgeon* (Hassibi & Stork 1992) for a given mask, layer by layer.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import torchprune_ext as tpe
        >>> layer = nn.Linear(2, 1)
        >>> _ = layer.weight.data.copy_(torch.tensor([[2.0, 1.0]]))
        >>> _ = tpe.threshold(layer, "weight", threshold=1.5)  # the second input goes, though it is much like the first
        >>> data = [(torch.tensor([[0.0, 0.1], [1.0, 0.9], [2.0, 2.0]]), None)]
        >>> fit = tpe.compensate(layer, data, [(layer, "weight")], progress=False)[layer, "weight"]
        >>> fit.before > 0.05, fit.after < 0.01, bool(layer.weight_orig[0, 0] > 2.9)
        (True, True, True)
    """
    with Ranks(options.get("process_group")).together():
        task = Task.of(model, loader, params, dense, options, create_bias=create_bias, dense_inputs=dense_inputs)
    task.agree("compensate")
    found, fits = task.fit()
    task.install(found, lambda target: None if target.mask is None else GlobalPruning("compensate"))
    return fits


def prune_and_compensate(
    model: nn.Module,
    loader: Iterable[Any],
    params: Iterable[Key],
    *,
    target_sparsity: Sparsity | None = None,
    pattern: NM | None = None,
    unit: Units | None = None,
    target_macs: float | None = None,
    target_parameters: float | None = None,
    round_to: int = 1,
    min_keep: float = 1,
    criterion: str | None = None,
    steps: int | None = None,
    allocation: str | None = None,
    dense: Dense | None = None,
    create_bias: bool = False,
    dense_inputs: float = 1.0,
    **options: Unpack[PassOptions],
) -> Fits:
    """Prune each layer in turn and re-fit it, without training, all in one pass over the data.

    Each row of a weight, the entries of one output, keeps the same number, or ``n`` of ``m``; or, with ``unit``, all
    rows keep the same input columns, so that what feeds the others can be removed. By ``criterion``:

    - ``"admm"``: operator splitting (ADMM) alternates between the weights that fit best and those that obey the
      pattern, until both keep the same entries.
    - ``"obs"``: what deleting an entry costs after the others adapt. Units go one after the other, with all costs
      brought up to date as each goes.
    - ``"wanda"``: weight times norm of the input; ``"magnitude"``; units by the sum of the squares.

    Or, with ``target_macs`` or ``target_parameters``, there is one budget for the whole model, and whole hidden units,
    channels and heads go, where they cost least for what they save; :func:`.compact` then removes them.

    Every listed layer is re-fitted, those that lose nothing too, since what they get has changed. For one threshold
    over all layers, and scores of your own, see :func:`.prune_in_rounds`.

    Args:
        model: as for :func:`compensate`, and so are ``loader``, ``params`` and the arguments not listed here.
        loader: batches.
        params: ``(module, name)`` pairs.
        target_sparsity: fraction of the entries, or of the units, that shall be pruned in the end; or one for each
            listed tensor, as ``{(module, name): fraction}``. At least one entry of a row stays, and one unit in each
            group of a convolution; a row or a group of which more is pruned already stays as it is.
        pattern: instead of it, ``NM(n, m)``, along the input features or channels unless it names another ``dim``.
        unit: ``Channel(dim=1)``, input columns or channels, or so many in a row, ``Channel(dim=1, size=64)``; or one
            for each tensor that shall lose some, as ``{(module, name): Channel(dim=1)}``. ``dim`` is the axis that the
            layer sums over, 0 in the ``Conv1D`` of transformers. In a convolution with groups, each has channels of
            its own, and all keep the same number. What is pruned by entries stays pruned in units that stay.
        target_macs: instead of both, fraction of the model's multiplications that shall be left at most, in (0, 1],
            when :func:`.compact` has removed what nobody reads any more; counted on the first batch, with what is not
            a product with a listed weight or what feeds it taken as it is. Units are what belongs together in
            the model: a hidden unit, a channel, also of a residual stream or before a flatten, a head, a key's head
            with all its queries. They go if all weights that read them are listed.
        target_parameters: the same of the model's parameters.
        round_to: with these, the number of channels kept of what loses some is a multiple of it, as many kernels are
            slow at odd widths. Heads are not rounded.
        min_keep: with these, how much stays at least of each group of units: an int is a number of units, a float a
            fraction.
        criterion: see above; by default ``"admm"``, and ``"obs"`` for units.
        steps: number of rounds within a layer, each followed by a re-fit; by default 1. Not for ``"admm"``, nor for
            ``"obs"`` with units.
        allocation: ``"auto"`` for shares of ``target_sparsity`` that differ from layer to layer, chosen by what pruning
            a layer does to the model's output: all floating-point tensors in it, in squares relative to their
            variation. Every fourth batch is kept aside to choose by, and has the last word: what is not better there
            than equal shares is not taken. Then all batches are fitted to. Together exactly that fraction of the
            entries goes, as in :func:`.global_unstructured`; so in one of the layers some rows may keep one entry more
            than others. It takes some more passes, seldom more than five, and memory for gradients. Shares that you
            know, as of :mod:`.allocation`, are a ``target_sparsity``.
        dense: the reference model, see :func:`compensate`.
        create_bias: give layers without a bias one.
        dense_inputs: weight of a layer's inputs in the reference model, see :func:`compensate`.
        **options: see :class:`.PassOptions`.

    Returns:
        The error of each layer before and after, as :class:`Fit`.

    Raises:
        TypeError: an argument of the wrong type, or that does not go with another.
        ValueError: as :func:`compensate`, or an argument out of range; ``unit`` does not count the inputs of a layer,
            does not divide their number, or is all of them. Nothing is changed then.

    Source: Meng, Behdin, Wang & Mazumder 2024, arXiv:2406.07831, and Boza 2024, arXiv:2401.02938, for ADMM;
    Hassibi & Stork 1992 for OBS, and Kurtic, Frantar & Alistarh 2023, arXiv:2302.04089, for units; Sun et al. 2023,
    arXiv:2306.11695, for Wanda.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import torchprune_ext as tpe
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> data = [(torch.randn(64, 8), None)]
        >>> params = tpe.prunable_parameters(model)
        >>> fits = tpe.prune_and_compensate(model, data, params, pattern=tpe.NM(2, 4), progress=False)
        >>> int(model[0].weight_mask.sum()), all(fit.after <= fit.before for fit in fits.values())
        (32, True)

        Half of the hidden units of a model, which is the inputs of its second layer; the first is only re-fitted:

        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> unit = {(model[2], "weight"): tpe.Channel(dim=1)}
        >>> params = tpe.prunable_parameters(model)
        >>> fits = tpe.prune_and_compensate(model, data, params, target_sparsity=0.5, unit=unit, progress=False)
        >>> model[2].weight_mask.sum(0).count_nonzero(), torch.nn.utils.prune.is_pruned(model[0])
        (tensor(4), False)

        The same as a budget for the whole model, which :func:`.compact` then makes smaller:

        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> params = tpe.prunable_parameters(model)
        >>> fits = tpe.prune_and_compensate(model, data, params, target_macs=0.5, progress=False)
        >>> tpe.compact(model, data[0][0])[0].out_features
        4
    """
    limit = Limit(target_macs, target_parameters, round_to, min_keep)
    asked = {"target_sparsity": target_sparsity, "pattern": pattern, "steps": steps, "allocation": allocation}
    with Ranks(options.get("process_group")).together():
        whole = limit.given(**asked, criterion=criterion)
        shared = None
        if not whole:
            criterion, steps = _checked(criterion, steps, unit)
            check_goal(target_sparsity, pattern, unit)
            shared = check_allocation(allocation, target_sparsity, pattern, unit)
        task = Task.of(model, loader, params, dense, options, create_bias=create_bias, dense_inputs=dense_inputs)
        units = None if whole else units_of(task.targets, unit)
        goals = {} if target_sparsity is None else goals_of(task.targets, target_sparsity, units)
    by = criterion, steps, allocation
    task.agree("prune_and_compensate", limit=limit, goals=goals, unit=unit, pattern=pattern, by=by)
    if whole:
        return prune_to_limit(task, limit, unit)
    choice, rounds = _Choice(criterion or "admm", steps, goals, units, pattern), list[float]()
    if shared is not None:

        def chosen(found: Goals) -> _Choice:
            return replace(choice, goals=found.sparsity, more=found.more)

        best, rounds = shares_by_output(task, shared, lambda found: chosen(found).decide)
        choice = chosen(best)
    found, fits = task.fit(choice.decide, check=choice.width)
    task.install(found, choice.entry)
    fits.rounds = rounds
    return fits


def _checked(criterion: str | None, steps: int | None, unit: object) -> tuple[str, int | None]:
    """Return the criterion and the steps that are meant, without which each has a default; None if it has no steps."""
    if criterion is None:
        criterion = "admm" if unit is None else "obs"
    if callable(criterion):
        raise TypeError(
            f"criterion={criterion!r} is a function, which ranks all listed tensors together. "
            "Pass it to prune_in_rounds(model, loader, params, criterion, target_sparsity=...)."
        )
    if criterion not in ("admm", *SCORES):
        raise ValueError(f"criterion={criterion!r} is unknown. Pass one of {['admm', *SCORES]}.")
    if steps is not None:
        check_whole("steps", steps, 1)
    if criterion != "admm" and (unit is None or criterion != "obs"):
        return criterion, steps or 1
    if steps not in (None, 1):
        raise ValueError(
            f"steps={steps!r} has no meaning for criterion={criterion!r}{' with unit=' * (unit is not None)}, which "
            f"iterates by itself. Leave it out, or pass criterion={'obs' if unit is None else 'wanda'!r}."
        )
    return criterion, None


@dataclass(frozen=True, slots=True, eq=False)
class _Choice:
    """What each layer keeps.

    Args:
        criterion: by its name.
        steps: number of rounds within a layer; None if the criterion has none.
        goals: the sparsity of each tensor, in entries or in units; empty with a ``pattern``.
        units: the units of each tensor that has such; None to prune by entries.
        pattern: what the rows of all tensors keep, instead of ``goals``.
        more: of some tensors, how many rows keep one entry more than that.
    """

    criterion: str
    steps: int | None
    goals: Mapping[Key, float]
    units: Mapping[Key, Channel] | None
    pattern: NM | None
    more: Mapping[Key, int] = field(default_factory=dict)

    def width(self, layer: Layer) -> int | None:
        """Return how many columns of the layer's matrix are a unit, checked; None if it does not lose units."""
        key = layer.module, layer.name
        return width_of(self.units[key], layer) if self.units and self.goals[key] else None

    def decide(self, layer: Layer, problem: Problem, weight: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
        """Return the new weights and the mask of a layer, ``(groups, outputs, inputs)``."""
        key = layer.module, layer.name
        goal, width, more = self.goals.get(key), self.width(layer), self.more.get(key, 0)
        if goal == 0:
            return refit(problem, weight, alive), alive
        along = None if self.pattern is None else along_inputs(self.pattern, layer)
        for size in _shrinking(weight.shape[-1] // (width or 1), goal, along, self.steps or 1):
            rows = problem.scale ** IN_SCALE.get(self.criterion, 0)
            largest = partial(_largest, layer, size=size, width=width, alive=alive, more=more, rows=rows)
            start = None
            if self.criterion == "admm":
                near = Thresholds(size, alive) if isinstance(size, int) and width is None else None
                alive, start = split(problem, weight * alive, largest, near)
            elif self.criterion == "obs" and width is not None and isinstance(size, int):
                alive = of_units(greedy_units(problem, alive, width, size), width, alive)
            else:
                alive = largest(SCORES[self.criterion](problem, weight * alive))
            weight = refit(problem, weight, alive, start)
        return weight, alive

    def entry(self, target: Target) -> GlobalPruning | None:
        """Return the entry in the history; None for a tensor that loses nothing and has no mask."""
        key = target.module, target.name
        asked: dict[str, Any] = {"target_sparsity": self.goals[key]} if self.goals else {"pattern": self.pattern}
        if self.units is not None:
            if key not in self.units and target.mask is None:
                return None
            asked |= {"unit": self.units[key]} if key in self.units else {}
        asked |= {"rows_with_one_more": self.more[key]} if key in self.more else {}
        asked |= {"criterion": self.criterion} | ({} if self.steps is None else {"steps": self.steps})
        return GlobalPruning("prune_and_compensate", **asked)


def _largest(
    layer: Layer, scores: Tensor, size: NM | int, width: int | None, alive: Tensor, more: int, rows: Tensor
) -> Tensor:
    """Return the mask of the largest of ``scores`` of those ``alive``.

    ``n`` of ``m``, or so many of each row, and so many ``more`` in all, one of a row at most; or so many units of
    ``width`` columns, by the sum of their squares over ``rows``, each by its scale.
    """
    if isinstance(size, NM):
        shaped = layer.shaped(scores)
        return layer.matrix(nm_mask(shaped, size, layer.shaped(alive)))
    if width is None:
        mask = nm_mask(scores, NM(size, scores.shape[-1], dim=2), alive)
        if more:
            ahead = nm_mask(scores, NM(size + 1, scores.shape[-1], dim=2), alive) - mask
            worth = ((scores * ahead).sum(-1) * rows).flatten()
            mask += ahead * nm_mask(worth, NM(more, len(worth), dim=0), ahead.sum(-1).flatten()).view_as(ahead[..., :1])
        return mask
    squares = (scores * alive * rows.unsqueeze(-1)).double().square().unflatten(-1, (-1, width)).sum((1, 3))
    left = alive.unflatten(-1, (-1, width)).amax((1, 3))
    return of_units(nm_mask(squares, NM(size, squares.shape[-1], dim=1), left), width, alive)


def _shrinking(inputs: int, target_sparsity: float | None, pattern: NM | None, steps: int) -> list[NM | int]:
    """Return what to keep in each step: of the ``inputs`` of a row, or of each group; falls geometrically."""
    progress = [step / steps for step in range(1, steps + 1)]
    if pattern is not None:
        falling = {round(pattern.m * geometric_mean(1.0, pattern.n / pattern.m, done)) for done in progress}
        return [replace(pattern, n=n) for n in sorted(falling, reverse=True)]
    share = max(1 - (target_sparsity or 0.0), 1 / inputs)
    return [max(round(inputs * geometric_mean(1.0, share, done)), 1) for done in progress]
