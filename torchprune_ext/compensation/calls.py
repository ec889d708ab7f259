"""Prune and re-fit a whole model: the masks given, or chosen layer by layer."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack

from torchprune_ext._checks import check_fraction, check_module, check_whole, errors_about
from torchprune_ext._host import Target, all_or_nothing, install, rewrite, targets_of
from torchprune_ext._layers import Layer
from torchprune_ext._runs import Key, Options, with_progress
from torchprune_ext.compensation.fitting import (
    Decide,
    Fits,
    SampleMask,
    dense_values,
    fit_layers,
    free_biases,
    taken,
    tell,
)
from torchprune_ext.compensation.solvers import (
    Problem,
    magnitude_scores,
    obs_scores,
    refit,
    split,
    wanda_scores,
)
from torchprune_ext.global_pruning import global_unstructured
from torchprune_ext.global_pruning.budget import Budget
from torchprune_ext.masks import nm_mask
from torchprune_ext.methods import GlobalPruning
from torchprune_ext.patterns import NM

Criterion = Callable[[nn.Module], Mapping[Key, Tensor]]
Sparsity = float | Mapping[Key, float]


def compensate(
    model: nn.Module,
    loader: Iterable[Any],
    params: Iterable[Key],
    *,
    sample_mask: SampleMask | None = None,
    create_bias: bool = False,
    **options: Unpack[Options],
) -> Fits:
    """Re-fit what survived of each listed weight, and the layer's bias, to the dense layer's outputs; masks stay.

    The dense model is the one of the values under the masks of the listed weights and of their layers' biases, as
    :func:`.undo` would restore them; what else is pruned stays pruned in it. A bias that is pruned, shared or computed
    stays as it is. The new values of the
    survivors take the place of the old ones in ``weight_orig``.

    Args:
        model: any module, pruned; its samples must not mix, as they do in BatchNorm in training.
        loader: batches as for :mod:`torchprune_ext.calibration`; targets are not used.
        params: ``(module, name)`` pairs of the weights of ``Linear``, ``Conv1d`` and ``Conv2d``, or of other modules
            that multiply as ``Linear`` does; each is called once in a pass. Others stay as they are.
        sample_mask: from a batch of the loader to a bool tensor, False where the leading axes of an input hold no
            sample, as for padded tokens.
        create_bias: give layers that were made with ``bias=False`` one.
        **options: see :class:`.Options`, without ``process_group``.

    Returns:
        The error of each layer before and after, as :class:`Fit`; no row of a weight gets worse on the data given.

    Raises:
        TypeError: an argument of the wrong type, or a module that does not multiply as ``Linear`` does.
        ValueError: no data, or a tensor that is tied, is never used or is used twice. Nothing is changed then.

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
    targets = fitting_targets(model, params)
    free = free_biases(model, targets, create_bias)
    new, fits = fit_layers(model, loader, targets, dense_values(targets), None, sample_mask, free, options)
    rewrite([(fitted.target, fitted.weight, fitted.bias) for fitted in new])
    return fits


def prune_and_compensate(
    model: nn.Module,
    loader: Iterable[Any],
    params: Iterable[Key],
    *,
    target_sparsity: Sparsity | None = None,
    pattern: NM | None = None,
    criterion: str | Criterion = "admm",
    steps: int | None = None,
    sample_mask: SampleMask | None = None,
    create_bias: bool = False,
    **options: Unpack[Options],
) -> Fits:
    """Prune and re-fit without training, to the end or a little at a time.

    With a named ``criterion`` each layer in turn is pruned by itself and re-fitted, all in one pass over the data:
    each row of a weight, the entries of one output, keeps the same number, or ``n`` of ``m``.

    - ``"admm"``: operator splitting looks for the mask that the re-fitted weights like best.
    - ``"obs"``: what deleting an entry costs after the others adapt; ``"wanda"``: weight times norm of the input;
      ``"magnitude"``. In ``steps``, each followed by a re-fit.

    With a function as ``criterion`` one threshold runs over all listed tensors: each of ``steps`` rounds computes
    ``criterion(model)``, prunes by it as :func:`.global_unstructured` does, and re-fits all layers. The kept fraction
    falls geometrically, and every round is fitted to the model as it was at first.

    Args:
        model: as for :func:`compensate`, and so are ``loader``, ``params`` and the arguments not listed here.
        loader: batches.
        params: ``(module, name)`` pairs.
        target_sparsity: fraction of the entries that shall be pruned in the end; or one for each listed tensor, as
            ``{(module, name): fraction}``, and with a function a threshold for each. By rows at least one entry stays,
            and a row of which more is pruned already stays as it is.
        pattern: instead of it, ``NM(n, m)``; ``NM(n, m, dim=0)`` for weights of shape (inputs, outputs).
        criterion: see above; a function returns scores ``{(module, name): tensor}``.
        steps: number of rounds; by default 1 for a named criterion, 10 for a function. For ``"admm"`` always 1.
        sample_mask: which samples count.
        create_bias: give layers without a bias one.
        **options: see :class:`.Options`, without ``process_group``.

    Returns:
        The error of each layer before and after, as :class:`Fit`; with a function, of the last round.

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
    named = {"obs": obs_scores, "wanda": wanda_scores, "magnitude": magnitude_scores}
    if not callable(criterion) and criterion not in ("admm", *named):
        raise ValueError(
            f"criterion={criterion!r} is unknown. Pass one of {['admm', *named]}, or a function of the model."
        )
    if (target_sparsity is None) == (pattern is None):
        raise TypeError(
            f"target_sparsity={target_sparsity!r}, pattern={pattern!r}: pass exactly one of them, e.g. "
            "target_sparsity=0.5 or pattern=NM(2, 4)."
        )
    if pattern is not None and not isinstance(pattern, NM):
        raise TypeError(f"pattern={pattern!r} is a {type(pattern).__name__}. Pass e.g. NM(2, 4).")
    if steps is not None:
        check_whole("steps", steps, 1)
    targets = fitting_targets(model, params)
    goals = {} if target_sparsity is None else _goals(targets, target_sparsity)
    if callable(criterion):
        if target_sparsity is None:
            raise TypeError("pattern= goes with a named criterion. Pass target_sparsity= with a function.")
        budgets = [([key], goal) for key, goal in goals.items()]
        if not isinstance(target_sparsity, Mapping):
            budgets = [(list(goals), target_sparsity)]
        if not all(goal < 1 for goal in goals.values()):
            raise ValueError(f"target_sparsity={target_sparsity!r} leaves nothing to re-fit. Pass less than 1.0.")
        rounds = steps or 10
        return _in_rounds(model, loader, targets, budgets, criterion, rounds, sample_mask, create_bias, options)

    def decide(layer: Layer, problem: Problem, weight: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
        goal = goals.get((layer.module, layer.name))
        sizes = _shrinking(layer.matrix(layer.dense).shape[-1], goal, pattern, steps or 1)
        if criterion == "admm":
            alive = split(problem, weight * alive, lambda scores: _largest(layer, scores, sizes[-1], alive))
            return refit(problem, weight, alive), alive
        for size in sizes:
            alive = _largest(layer, named[criterion](problem, weight * alive), size, alive)
            weight = refit(problem, weight, alive)
        return weight, alive

    def call(target: Target) -> GlobalPruning:
        asked = {"target_sparsity": goals[target.module, target.name]} if pattern is None else {"pattern": pattern}
        return GlobalPruning("prune_and_compensate", **asked, criterion=criterion, steps=steps or 1)

    free = free_biases(model, targets, create_bias)
    return prune_and_fit(model, loader, targets, decide, call, sample_mask, free, options)


def fitting_targets(model: nn.Module, params: Iterable[Key]) -> list[Target]:
    """Find the listed tensors; those that several modules share are refused."""
    check_module("model", model)
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    found = targets_of(params)
    if not found:
        raise ValueError("params=[] lists no tensor. Pass (module, name) pairs, e.g. of prunable_parameters(model).")
    for place, target in found.items():
        names = places.get(id(target.parameter), [])
        if not names:
            raise ValueError(f"params[{place}], {target.where}, is no part of the model.")
        if [each.module for each in found.values()].count(target.module) > 1:
            raise TypeError(
                f"params[{place}], {target.where}, is one of several tensors of its module, which therefore does not "
                "multiply as Linear does. Leave them out."
            )
        if target.mask is not None and not ((target.mask == 0) | (target.mask == 1)).all():
            raise ValueError(
                f"params[{place}], {target.where}, has a mask with values besides 0 and 1. Prune it by a mask of those."
            )
        if len(names) > 1:
            raise ValueError(
                f"params[{place}], {target.where}, is tied: {' and '.join(names)} would have to make up for different "
                "errors. Leave it out, or untie it."
            )
    return list(found.values())


def prune_and_fit(
    model: nn.Module,
    loader: Iterable[Any],
    targets: Sequence[Target],
    decide: Decide,
    call: Callable[[Target], GlobalPruning],
    sample_mask: SampleMask | None,
    free: Sequence[bool],
    options: Options,
) -> Fits:
    """Let ``decide`` prune and fit each layer in one pass, then install all or nothing."""
    new, fits = fit_layers(model, loader, targets, dense_values(targets), decide, sample_mask, free, options)
    with all_or_nothing(target.module for target in targets):
        install([(fitted.target, call(fitted.target), fitted.mask) for fitted in new])
        rewrite([(fitted.target, fitted.weight, fitted.bias) for fitted in new])
    return fits


def _goals(targets: Sequence[Target], target_sparsity: Sparsity) -> dict[Key, float]:
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


def _in_rounds(
    model: nn.Module,
    loader: Iterable[Any],
    targets: Sequence[Target],
    budgets: Sequence[tuple[list[Key], float]],
    criterion: Criterion,
    steps: int,
    sample_mask: SampleMask | None,
    create_bias: bool,
    options: Options,
) -> Fits:
    """Prune a little by one threshold over the tensors of each of ``budgets`` and re-fit, again and again."""
    dense, free = dense_values(targets), free_biases(model, targets, create_bias)
    left = []
    for keys, goal in budgets:
        alive, total = _counts(Target.of(*key) for key in keys)
        Budget(None, goal, 1).count(alive, total, "entries")  # raises where more is pruned already
        left.append(alive / max(total, 1))
    batches = taken(loader, options)
    fits: Fits = {}
    with all_or_nothing(target.module for target in targets):
        bar: Any = with_progress(range(1, steps + 1), "prune and compensate", None, options.get("progress"))
        for step in bar:
            scores = criterion(model)
            if not isinstance(scores, Mapping):
                raise TypeError(
                    f"criterion(model) gave a {type(scores).__name__}. Let it return {{(module, name): scores}}."
                )
            for target in targets:
                if (target.module, target.name) not in scores:
                    raise ValueError(f"criterion(model) gave no scores for {target.where}. Let it score all of params.")
            for (keys, goal), share in zip(budgets, left, strict=True):
                kept = share ** (1 - step / steps) * (1 - goal) ** (step / steps)
                now = 1 - kept if step < steps else goal
                with errors_about("criterion(model)"):
                    global_unstructured(keys, target_sparsity=now, importance_scores={key: scores[key] for key in keys})
            pruned = [Target.of(target.module, target.name) for target in targets]
            quiet: Options = {**options, "progress": False}
            new, fits = fit_layers(model, batches, pruned, dense, None, sample_mask, free, quiet)
            rewrite([(fitted.target, fitted.weight, fitted.bias) for fitted in new])
            alive, total = _counts(pruned)
            tell(bar, 1 - alive / max(total, 1), max(fit.after for fit in fits.values()))
    return fits


def _counts(targets: Iterable[Target]) -> tuple[int, int]:
    """Return how many entries of ``targets`` are not pruned, and how many there are."""
    sizes = [
        (t.parameter.numel() if t.mask is None else int(t.mask.count_nonzero()), t.parameter.numel()) for t in targets
    ]
    return sum(alive for alive, _ in sizes), sum(total for _, total in sizes)


def _largest(layer: Layer, scores: Tensor, size: NM | int, alive: Tensor) -> Tensor:
    """Return the mask of the largest of ``scores`` of those ``alive``: so many of each row, or ``n`` of ``m``."""
    if isinstance(size, int):
        return nm_mask(scores, NM(size, scores.shape[-1], dim=2), alive)
    shaped = layer.shaped(scores)
    return layer.matrix(nm_mask(shaped, size, layer.shaped(alive)))


def _shrinking(inputs: int, target_sparsity: float | None, pattern: NM | None, steps: int) -> list[NM | int]:
    """Return what to keep in each step: of the ``inputs`` of a row, or of each group; falls geometrically."""
    if pattern is not None:
        falling = {round(pattern.m * (pattern.n / pattern.m) ** (step / steps)) for step in range(1, steps + 1)}
        return [replace(pattern, n=n) for n in sorted(falling, reverse=True)]
    share = max(1 - (target_sparsity or 0.0), 1 / inputs)
    return [max(round(inputs * share ** (step / steps)), 1) for step in range(1, steps + 1)]
