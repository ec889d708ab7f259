"""Pruning while a model trains, by a schedule."""

import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchprune_ext._checks import check_module, errors_about
from torchprune_ext._host import Target
from torchprune_ext._ranks import Ranks
from torchprune_ext.global_pruning.budget import Listed, Params, PerParameter, digest, groups_of, refuse_empty
from torchprune_ext.methods import GlobalPruning
from torchprune_ext.patterns import Unit
from torchprune_ext.schedules import Schedule
from torchprune_ext.workflow.targets import Criterion, Scope, check_unit, count_units, masks_to, paths_in, plan
from torchprune_ext.workflow.writing import write_masks

__all__ = ["GradualPruner"]

Gradual = Literal["magnitude", "gradient"] | PerParameter | Callable[[nn.Module], PerParameter]


class GradualPruner:
    r"""Prunes a model while it trains, such that it has the sparsity of a schedule after each step, exactly.

    Call :meth:`step` once for each step of the optimizer, behind it and before the gradients are set to zero::

        for x, y in loader:
            loss_fn(model(x), y).backward()
            optimizer.step()
            pruner.step()
            optimizer.zero_grad()

    Until the first update that prunes something, the model is left as it is and costs what it did: masks that drop
    nothing would be multiplied at every forward pass. The masks are installed then; from there on, and where there are
    masks before, only their values change. Parameters stay the same objects all the time, so the optimizer may be made
    before or after. What is pruned does not come back.

    - *torch.compile*: code is compiled anew once, at the first update. torch 2.4 does not notice what changes in a
      module that it has compiled: there, install masks that drop nothing first, by ``prune_to(params, 0.0)``.
    - *Gradient accumulation*: call :meth:`step` where the optimizer steps, not for each batch.
    - *AMP*: a step that ``GradScaler`` skips is none. Its gradients are not finite, so ``criterion="gradient"`` refuses
      them: call :meth:`step` only if ``scaler.update()`` has not made ``scaler.get_scale()`` smaller.
    - *Many processes*: each calls :meth:`step`. Replicas hold the same weights and the same reduced gradients, so they
      get the same masks; scores of a rank's own data would not, and are refused: average them, as the functions of
      :mod:`torchprune_ext.calibration` do with ``process_group=``.

    To resume, make everything as at the beginning, then load in this order::

        pruner = tpe.GradualPruner(model, params, schedule)
        tpe.load_pruned_state_dict(model, checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        pruner.load_state_dict(checkpoint["pruner"])

    Args:
        model: the model that trains.
        params: ``(module, name)`` pairs within it; see :func:`.prunable_parameters`.
        schedule: which sparsity each step shall have, over all units of ``params``, earlier pruning included; of
            :mod:`torchprune_ext.schedules`. Step 0 is the first call of :meth:`step`.
        criterion: what is ranked at each update: ``"magnitude"``; ``"gradient"``, :math:`|w \cdot \partial L /
            \partial w|` from the gradients that are there then; a function of the model that returns scores
            ``{(module, name): tensor}``, such as ``lambda model: tpe.calibration.taylor(model, ...)``; or such scores.
        unit: what lives or dies together, as for :func:`.prune_to`.
        scope: where a sparsity of all units is taken from, as for :func:`.prune_to`; a mapping says in which
            proportion.
        min_keep: how much of each tensor stays at least, as for :func:`.prune_to`.
        process_group: ``torch.distributed`` group of the ranks that train replicas, which must get the same masks. None
            is all ranks where ``torch.distributed`` is initialized, and this process alone where it is not.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: the schedule's first update is below what is pruned already, its end cannot be reached with
            ``scope`` and ``min_keep``, or as :func:`.prune_to`. The model is as it was then.

    Source: Zhu & Gupta 2017, *To prune, or not to prune*, arXiv:1710.01878, section 3, with :func:`.cubic` and
    magnitudes; Molchanov et al. 2017, arXiv:1611.06440, equation 7, for the product of weight and gradient.

    Example:
        >>> import torch
        >>> import torchprune_ext as tpe
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> schedule = tpe.schedules.cubic(start=0, end=4, every=2, final=0.75)
        >>> pruner = tpe.GradualPruner(model, tpe.prunable_parameters(model), schedule, scope="layer")
        >>> reached = []
        >>> for _ in range(6):
        ...     model(torch.randn(4, 8)).square().mean().backward()
        ...     optimizer.step()
        ...     pruner.step()
        ...     optimizer.zero_grad()
        ...     reached.append(pruner.sparsity)
        >>> reached
        [0.0, 0.0, 0.65625, 0.65625, 0.75, 0.75]
    """

    def __init__(
        self,
        model: nn.Module,
        params: Params,
        schedule: Schedule,
        criterion: Gradual = "magnitude",
        unit: Unit | None = None,
        *,
        scope: Scope = "global",
        min_keep: float = 1,
        process_group: Any = None,
    ) -> None:
        check_module("model", model)
        if not isinstance(schedule, Schedule):
            raise TypeError(
                f"schedule={schedule!r} is a {type(schedule).__name__}. Pass one of torchprune_ext.schedules, e.g. "
                "cubic(start=0, end=1000, every=100, final=0.9), or one_shot(step=0, sparsity=0.9)."
            )
        if not isinstance(criterion, (str, Mapping)) and not callable(criterion):
            raise TypeError(
                f"criterion={criterion!r} is a {type(criterion).__name__}. Pass 'magnitude', 'gradient', or a function "
                "of the model that returns scores {(module, name): tensor}."
            )
        if isinstance(criterion, str) and criterion not in ("magnitude", "gradient"):
            raise ValueError(
                f"criterion={criterion!r} is unknown. Pass 'magnitude', 'gradient', or a function of the model that "
                "returns scores {(module, name): tensor}."
            )
        check_unit(unit)
        if isinstance(params, Iterable) and not isinstance(params, nn.Module):
            params = list(params)
        groups = groups_of(params)
        refuse_empty(groups)
        paths_in(model, groups)
        self.model, self.schedule = model, schedule
        self._params, self._criterion, self._unit = params, criterion, unit
        self._scope, self._min_keep = scope, min_keep
        if process_group is None and dist.is_available() and dist.is_initialized():
            process_group = dist.group.WORLD
        self._ranks = Ranks(process_group)
        self._steps = 0
        # how many go does not depend on the scores, which may not be there yet
        counted: Criterion = criterion if isinstance(criterion, Mapping) else "magnitude"
        for target in sorted({schedule(next(schedule.updates())), schedule.final}):
            with errors_about(f"schedule={schedule!r}"):
                self._refuse_less(target)
                plan(params, target, counted, unit, scope=scope, min_keep=min_keep)

    @property
    def steps(self) -> int:
        """How many steps there were, which is the number of the next one."""
        return self._steps

    @property
    def sparsity(self) -> float:
        """The fraction of all units of ``params`` that is pruned now."""
        total, dead = self._count()
        return dead / max(total, 1)

    @property
    def finished(self) -> bool:
        """Whether the last update of the schedule is done."""
        return self._steps > self.schedule.end

    def step(self) -> None:
        """Go on by one step; at the updates of the schedule, prune to its sparsity.

        Between updates, this does nothing.

        Raises:
            ValueError: a weight, gradient or score is not finite, or is missing; or more is pruned than the schedule
                says, by other calls. The step does not count then, and nothing is pruned.
            RuntimeError: the masks would differ between ranks, or another rank refused; the same holds.
        """
        if self._steps == 0 or self.schedule.is_update(self._steps):
            self._reach(self.schedule(self._steps))
        self._steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Return where the pruner is, as plain numbers and strings; the masks are in the model's state dict."""
        total, dead = self._count()
        return {"steps": self._steps, "schedule": repr(self.schedule), "units": total, "pruned": dead}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from where the pruner was that has returned ``state_dict``; load the model's state first.

        Raises:
            TypeError: ``state_dict`` is not a mapping.
            ValueError: it is of another schedule or other tensors, or does not go with the masks of the model. The
                pruner is as it was then.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict is a {type(state_dict).__name__}. Pass what state_dict() has returned.")
        total, dead = self._count()
        here = {"steps": self._steps, "schedule": repr(self.schedule), "units": total, "pruned": dead}
        if set(state_dict) != set(here):
            raise ValueError(
                f"state_dict has the keys {sorted(map(str, state_dict))}, not {sorted(here)}. Pass what state_dict() "
                "of a GradualPruner has returned."
            )
        for key, meaning, remedy in (
            ("schedule", "", "Make the pruner with the same schedule."),
            ("units", " units in params", "Make the pruner with the same params and unit."),
            ("pruned", " pruned units", "Load the model's state first, by load_pruned_state_dict(model, ...)."),
        ):
            if state_dict[key] != here[key]:
                raise ValueError(f"state_dict was saved with {state_dict[key]}{meaning}, here is {here[key]}. {remedy}")
        steps = state_dict["steps"]
        if isinstance(steps, bool) or not isinstance(steps, numbers.Integral) or steps < 0:
            raise ValueError(
                f"state_dict['steps']={steps!r} is not a number of steps. Pass what state_dict() returned."
            )
        self._steps = int(steps)

    def __repr__(self) -> str:
        """Return the schedule and how far it has got."""
        return f"GradualPruner({self.schedule!r}, steps={self._steps})"

    def _groups(self) -> list[Listed]:
        """Return the tensors that are pruned, as they are now."""
        scope = self._scope
        groups = groups_of(self._params)
        return [g for g in groups if any(key in scope for key in g.pairs())] if isinstance(scope, Mapping) else groups

    def _count(self) -> tuple[int, int]:
        return count_units(self._groups(), self._unit)

    def _refuse_less(self, target: float) -> None:
        """Raise ``ValueError`` if more than ``target`` is pruned already."""
        total, dead = self._count()
        if round(target * total) < dead:
            raise ValueError(
                f"its update to {target!r} is less than what is pruned already, {dead} of {total}. Pass "
                f"initial={dead / total!r}, or for one_shot a larger sparsity. To resume, make the pruner first, and "
                "then load the state of the model."
            )

    def _reach(self, target: float) -> None:
        """Prune to ``target``, unless that is so already."""
        total, dead = self._count()
        self._agree(dead)
        if dead == round(target * total) or (dead > target * total and not self.schedule.is_update(self._steps)):
            return  # before the first update, what was pruned elsewhere may be more
        with self._ranks.together():
            rest: Any = {"scope": self._scope, "min_keep": self._min_keep}
            masks = masks_to("GradualPruner", self._params, target, self._scores(), self._unit, **rest)
        if self._ranks.size > 1:  # counting all entries takes time
            self._agree(digest(mask for _, _, mask in masks))
        write_masks(masks, self._entry)

    def _agree(self, number: int) -> None:
        """Raise ``RuntimeError`` on all ranks unless all have the same ``number``, which tells of their masks."""
        if not self._ranks.alike(number):
            raise RuntimeError(
                "GradualPruner: the masks would differ between ranks, so weights, earlier masks or scores do. Train "
                "replicas, average scores over the ranks (calibration.taylor(..., process_group=group)), or pass the "
                "process_group of those that are replicas. Nothing is pruned."
            )

    def _scores(self) -> Criterion:
        """Return what is ranked now."""
        if self._criterion == "gradient":
            return {key: _taylor(listed.target) for listed in self._groups() for key in listed.pairs()}
        if callable(self._criterion) and not isinstance(self._criterion, Mapping):
            return self._criterion(self.model)
        return self._criterion

    def _entry(self) -> GlobalPruning:
        """Return what the history tells."""
        told: dict[str, Any] = {"criterion": self._criterion if isinstance(self._criterion, str) else ...}
        if self._unit is not None:
            told["unit"] = str(self._unit)
        scope = self._scope if isinstance(self._scope, str) else ...
        return GlobalPruning(
            "GradualPruner", schedule=repr(self.schedule), scope=scope, min_keep=self._min_keep, **told
        )


def _taylor(target: Target) -> Tensor:
    r"""Return :math:`|w \cdot g|`, with the gradient of the parameter that owns it."""
    gradient = target.parameter.grad
    with errors_about(target.where):
        if gradient is None:
            raise ValueError(
                "criterion='gradient' finds no gradient. Call step() behind backward() and before zero_grad()."
            )
        if not bool((gradient.coalesce().values() if gradient.is_sparse else gradient).isfinite().all()):
            raise ValueError(
                "criterion='gradient' finds gradients that are not finite. Where a GradScaler has skipped the "
                "optimizer's step, leave step() out too."
            )
    dense = gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
    weight = target.weight()
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) * dense.to(wide)).abs()
