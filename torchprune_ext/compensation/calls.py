"""Re-fit a pruned model, or prune and re-fit it layer by layer, in one pass over the data."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack

from torchprune_ext._checks import check_fraction, check_whole
from torchprune_ext._host import Target
from torchprune_ext._layers import Layer
from torchprune_ext._loading import Options
from torchprune_ext._statistics import Key
from torchprune_ext.compensation.fitting import Fits, Task
from torchprune_ext.compensation.reference import Dense
from torchprune_ext.compensation.solvers import (
    Problem,
    magnitude_scores,
    obs_scores,
    refit,
    split,
    wanda_scores,
)
from torchprune_ext.masks import nm_mask
from torchprune_ext.methods import GlobalPruning
from torchprune_ext.patterns import NM
from torchprune_ext.schedules import geometric_mean

Sparsity = float | Mapping[Key, float]
SCORES: dict[str, Callable[[Problem, Tensor], Tensor]] = {
    "obs": obs_scores,
    "wanda": wanda_scores,
    "magnitude": magnitude_scores,
}


def compensate(
    model: nn.Module,
    loader: Iterable[Any],
    params: Iterable[Key],
    *,
    dense: Dense | None = None,
    create_bias: bool = False,
    **options: Unpack[Options],
) -> Fits:
    """Re-fit what survived of each listed weight, and the layer's bias, to the reference layer's outputs; masks stay.

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
            :func:`.dense_values` returned then. Needed when pruning and re-fitting, or training, take turns.
        create_bias: give layers that were made with ``bias=False`` one.
        **options: see :class:`.Options`, without ``process_group``.

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
    task = Task.of(model, loader, params, dense, options, create_bias=create_bias)
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
    criterion: str = "admm",
    steps: int | None = None,
    dense: Dense | None = None,
    create_bias: bool = False,
    **options: Unpack[Options],
) -> Fits:
    """Prune each layer in turn and re-fit it, without training, all in one pass over the data.

    Each row of a weight, the entries of one output, keeps the same number, or ``n`` of ``m``; by ``criterion``:

    - ``"admm"``: operator splitting looks for the mask that the re-fitted weights like best.
    - ``"obs"``: what deleting an entry costs after the others adapt; ``"wanda"``: weight times norm of the input;
      ``"magnitude"``. In ``steps``, each followed by a re-fit.

    For one threshold over all layers, and scores of your own, see :func:`.prune_in_rounds`.

    Args:
        model: as for :func:`compensate`, and so are ``loader``, ``params`` and the arguments not listed here.
        loader: batches.
        params: ``(module, name)`` pairs.
        target_sparsity: fraction of the entries that shall be pruned in the end; or one for each listed tensor, as
            ``{(module, name): fraction}``. At least one entry of a row stays, and a row of which more is pruned
            already stays as it is.
        pattern: instead of it, ``NM(n, m)``, along the input features or channels unless it names another ``dim``.
        criterion: see above.
        steps: number of rounds within a layer; by default 1. Not for ``"admm"``.
        dense: the reference model, see :func:`compensate`.
        create_bias: give layers without a bias one.
        **options: see :class:`.Options`, without ``process_group``.

    Returns:
        The error of each layer before and after, as :class:`Fit`.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: as :func:`compensate`, or an argument out of range. Nothing is changed then.

    Source: Meng, Behdin, Wang & Mazumder 2024, arXiv:2406.07831, and Boza 2024, arXiv:2401.02938, for the splitting;
    Hassibi & Stork 1992 for OBS; Sun et al. 2023, arXiv:2306.11695, for Wanda.

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
    """
    if callable(criterion):
        raise TypeError(
            f"criterion={criterion!r} is a function, which ranks all listed tensors together. "
            "Pass it to prune_in_rounds(model, loader, params, criterion, target_sparsity=...)."
        )
    if criterion not in ("admm", *SCORES):
        raise ValueError(f"criterion={criterion!r} is unknown. Pass one of {['admm', *SCORES]}.")
    if steps is not None:
        check_whole("steps", steps, 1)
        if criterion == "admm" and steps != 1:
            raise ValueError(
                f"steps={steps!r} has no meaning for criterion='admm', which iterates by itself. Leave it out, or pass "
                "criterion='obs'."
            )
    check_goal(target_sparsity, pattern)
    task = Task.of(model, loader, params, dense, options, create_bias=create_bias)
    goals = {} if target_sparsity is None else goals_of(task.targets, target_sparsity)

    def decide(layer: Layer, problem: Problem, weight: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
        along = None if pattern is None else along_inputs(pattern, layer)
        sizes = _shrinking(weight.shape[-1], goals.get((layer.module, layer.name)), along, steps or 1)
        if criterion == "admm":
            alive = split(problem, weight * alive, lambda scores: _largest(layer, scores, sizes[-1], alive))
            return refit(problem, weight, alive), alive
        for size in sizes:
            alive = _largest(layer, SCORES[criterion](problem, weight * alive), size, alive)
            weight = refit(problem, weight, alive)
        return weight, alive

    def entry(target: Target) -> GlobalPruning:
        asked = {"target_sparsity": goals[target.module, target.name]} if pattern is None else {"pattern": pattern}
        rounds = {} if criterion == "admm" else {"steps": steps or 1}
        return GlobalPruning("prune_and_compensate", **asked, criterion=criterion, **rounds)

    found, fits = task.fit(decide)
    task.install(found, entry)
    return fits


def check_goal(target_sparsity: Sparsity | None, pattern: NM | None) -> None:
    """Raise unless exactly one of the two is given, and is of the right type."""
    if (target_sparsity is None) == (pattern is None):
        raise TypeError(
            f"target_sparsity={target_sparsity!r}, pattern={pattern!r}: pass exactly one of them, e.g. "
            "target_sparsity=0.5 or pattern=NM(2, 4)."
        )
    if pattern is not None and not isinstance(pattern, NM):
        raise TypeError(f"pattern={pattern!r} is a {type(pattern).__name__}. Pass e.g. NM(2, 4).")


def goals_of(targets: Sequence[Target], target_sparsity: Sparsity) -> dict[Key, float]:
    """Return the sparsity that each target shall have, or all together."""
    keys = [(target.module, target.name) for target in targets]
    if not isinstance(target_sparsity, Mapping):
        check_fraction("target_sparsity", target_sparsity)
        return dict.fromkeys(keys, target_sparsity)
    for target, key in zip(targets, keys, strict=True):
        if key not in target_sparsity:
            raise ValueError(
                f"target_sparsity has no entry for {target.where}. Give one for each tensor of params, as "
                "{(module, name): fraction}."
            )
        check_fraction(f"target_sparsity[{type(target.module).__name__}, {target.name!r}]", target_sparsity[key])
    if len(target_sparsity) > len(keys):
        raise ValueError(
            f"target_sparsity has {len(target_sparsity)} entries, but params lists {len(keys)} tensors. List all."
        )
    return {key: target_sparsity[key] for key in keys}


def along_inputs(pattern: NM, layer: Layer) -> NM:
    """Return ``pattern`` along the axis that ``layer`` sums over, unless it names an axis itself."""
    return pattern.along(0 if layer.swapped else 1)


def _largest(layer: Layer, scores: Tensor, size: NM | int, alive: Tensor) -> Tensor:
    """Return the mask of the largest of ``scores`` of those ``alive``: so many of each row, or ``n`` of ``m``."""
    if isinstance(size, int):
        return nm_mask(scores, NM(size, scores.shape[-1], dim=2), alive)
    shaped = layer.shaped(scores)
    return layer.matrix(nm_mask(shaped, size, layer.shaped(alive)))


def _shrinking(inputs: int, target_sparsity: float | None, pattern: NM | None, steps: int) -> list[NM | int]:
    """Return what to keep in each step: of the ``inputs`` of a row, or of each group; falls geometrically."""
    progress = [step / steps for step in range(1, steps + 1)]
    if pattern is not None:
        falling = {round(pattern.m * geometric_mean(1.0, pattern.n / pattern.m, done)) for done in progress}
        return [replace(pattern, n=n) for n in sorted(falling, reverse=True)]
    share = max(1 - (target_sparsity or 0.0), 1 / inputs)
    return [max(round(inputs * geometric_mean(1.0, share, done)), 1) for done in progress]
