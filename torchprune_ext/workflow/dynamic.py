"""Dynamic sparse training: the sparsity stays, the mask moves. Prune the smallest weights and regrow others."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from torchprune_ext._checks import check_fraction, check_module, check_sparsity, check_whole, errors_about
from torchprune_ext._host import as_one, install, renew, targets_in, warn_of_zeros
from torchprune_ext._ranks import Ranks
from torchprune_ext._restoring import all_or_nothing
from torchprune_ext._statistics import Key
from torchprune_ext.global_pruning.budget import Listed, Params, digest, groups_of
from torchprune_ext.methods import GlobalPruning
from torchprune_ext.workflow.allocation import uniform
from torchprune_ext.workflow.budgets import Apart
from torchprune_ext.workflow.dense_gradients import DenseGradients
from torchprune_ext.workflow.regrowth import Patch, Sparse, moved, patches, random_mask, rolled_back, write
from torchprune_ext.workflow.targets import check_shares

__all__ = ["DynamicSparse"]

Growth = Literal["gradient", "random"]


class DynamicSparse:
    r"""Train with masks that move: now and then the smallest weights go, and as many others grow (RigL, SET).

    When made, it prunes each tensor at random to its sparsity. From then on, every ``every`` steps before ``end``, the
    fraction

    .. math:: f(t) = \frac{\alpha}{2} \left(1 + \cos \frac{\pi t}{t_{end}}\right)

    of the kept entries of each tensor, those of least :math:`|w|`, is dropped, and as many grow: those of the largest
    :math:`|\partial L / \partial w|` where the weight is 0, or random ones. The sparsity of each tensor stays exactly
    what it was. What grows starts at 0, and momenta of what grows and of what is dropped are set to 0. What is dropped
    may grow back in the same update; it then simply was not dropped, and keeps its value. Ties keep, and grow, the
    lower index.

    The masks are PyTorch's, so that ``is_pruned``, :func:`.remove` and state dicts work as ever, and the history has
    one entry, ``DynamicSparse(...)``.

    Args:
        model: the model that is trained.
        params: ``(module, name)`` pairs within it, any iterable; see :func:`.prunable_parameters`. Of tied tensors,
            list all places.
        sparsity: fraction of each tensor that is pruned, in [0, 1), rounded such that all of them together have it
            exactly; or one for each tensor, ``{(module, name): fraction}``, as :func:`.erk` returns it, which is what
            the authors of RigL recommend. Listed tensors without an entry are left alone. What is pruned already stays
            so at first and counts.
        growth: ``"gradient"`` (RigL) or ``"random"`` (SET).
        every: steps from one update to the next.
        end: step from which on nothing changes; the authors advise 75 % of the steps of the training. None is never,
            with the fraction ``alpha`` throughout, as in SET.
        alpha: fraction of the kept entries that the first updates replace, in [0, 1].
        optimizer: the optimizer that trains the model, whose state is reset where the mask changes: all its tensors
            of the shape of the parameter. Without it, momenta stay as they are.
        seed: of all that is random here; torch's own generator is not used.
        process_group: ``torch.distributed`` group of the ranks that train replicas, each with its own data: dense
            gradients are averaged, and all get the same mask. None is all ranks where ``torch.distributed`` is
            initialized, and this process alone where it is not.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range; a tensor that is not in the model, that is frozen, or that is tied to one
            that is not listed; or more is pruned already. Nothing is pruned then.
        RuntimeError: another rank refused, or ranks differ in arguments or masks. Nothing is pruned then.

    Source: Evci, Gale, Menick, Castro & Elsen 2020, *Rigging the Lottery: Making All Tickets Winners*,
    arXiv:1911.11134, algorithm 1 and section 3; Mocanu et al. 2018, arXiv:1707.04780, for random growth.

    Example:
        >>> import torchprune_ext as tpe
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 1))
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> params = tpe.prunable_parameters(model)
        >>> dst = tpe.DynamicSparse(model, params, 0.9, every=10, end=75, optimizer=optimizer)
        >>> before = model[0].weight_mask.clone()
        >>> for _ in range(100):
        ...     x = torch.randn(8, 10)
        ...     (model(x) - x[:, :1]).square().mean().backward()
        ...     optimizer.step()
        ...     _ = dst.step()
        ...     optimizer.zero_grad()
        >>> int(model[0].weight_mask.sum()), bool((model[0].weight_mask != before).any())
        (20, True)
        >>> tpe.history(model[0], "weight")
        ["DynamicSparse(sparsity=0.9, growth='gradient', every=10, end=75, alpha=0.3, seed=0)"]
    """

    def __init__(
        self,
        model: nn.Module,
        params: Params,
        sparsity: float | Mapping[Key, float],
        growth: Growth = "gradient",
        *,
        every: int = 100,
        end: int | None = None,
        alpha: float = 0.3,
        optimizer: Optimizer | None = None,
        seed: int = 0,
        process_group: Any = None,
    ) -> None:
        if process_group is None and dist.is_available() and dist.is_initialized():
            process_group = dist.group.WORLD
        self._ranks = Ranks(process_group)
        told = {"growth": growth, "every": every, "end": end, "alpha": alpha, "seed": seed}
        self._generator = torch.Generator("cpu")
        with self._ranks.together():
            _check(model, growth, every, end, alpha, optimizer)
            check_whole("seed", seed, 0)
            self._generator.manual_seed(seed)
            amounts, groups = _amounts(sparsity, params)
            _check_places(model, groups, optimizer)
            warn_of_zeros({listed.where: listed.target for listed in groups if listed.target.mask is None})
            masks = []
            for listed in groups:
                with errors_about(listed.where):
                    masks.append(random_mask(listed.target, amounts.share(listed), self._generator))
        shapes = [tuple(listed.target.parameter.shape) for listed in groups]
        self._ranks.agree("the arguments", f"DynamicSparse({told}), shapes {shapes}")
        self._check_same(masks)
        self._every, self._end, self._alpha, self._optimizer = every, end, alpha, optimizer
        self._tensors = [
            Sparse(listed.where, tuple(listed.pairs()), int(mask.count_nonzero()))
            for listed, mask in zip(groups, masks, strict=True)
        ]
        self._gradients = DenseGradients([tensor.keys for tensor in self._tensors]) if growth == "gradient" else None
        with all_or_nothing(module for tensor in self._tensors for module, _ in tensor.keys), self._ranks.together():
            entries = []
            for listed, mask in zip(groups, masks, strict=True):
                asked = amounts.share(listed) if isinstance(sparsity, Mapping) else sparsity
                call = [GlobalPruning("DynamicSparse", sparsity=asked, **told) for _ in listed.everywhere()]
                entries.append([(t, c, mask) for t, c in zip(listed.everywhere(), call, strict=True)])
                as_one(entries[-1])
            install([entry for part in entries for entry in part], values_change=True)
            self._go_on(0, self._after(0))

    def step(self) -> bool:
        """Count one iteration, and update the masks if it is time.

        Call it once in each iteration, after ``optimizer.step()`` and before the gradients are set to zero. In the
        papers an update takes the place of the optimizer's step; for that, call it after ``backward()`` instead:
        ``if not dst.step(): optimizer.step()``.

        The gradients are those of all backward passes since the last call, accumulated ones too. An update whose
        gradients are not finite, as a gradient scaler has them now and then, is made in the next iteration. A tensor
        that no gradient has reached keeps its mask until the next update.

        Returns:
            Whether the masks were updated.

        Raises:
            ValueError: a tensor is no longer pruned as this has left it, its weights are not finite, or another
                :class:`DynamicSparse` trains it, too.
            RuntimeError: no gradient has reached any of the tensors; or another rank refused, or its weights differ.
                Masks, weights and the count of steps are as before, then.
        """
        step = self._step + 1
        if step != self._next:
            self._go_on(step, self._next)
            return False
        before = self._generator.get_state()
        try:
            done = self._update(step)
        except BaseException:
            self._generator.set_state(before)
            raise
        self._go_on(step, self._after(step) if done else step + 1)
        return done

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on later, besides the state dicts of model and optimizer: numbers and a tensor.

        To be taken between two iterations, not amid gradients that accumulate.
        """
        return {
            "step": self._step,
            "next": self._next,
            "kept": [tensor.kept for tensor in self._tensors],
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken. Load the model's state dict first, which has the masks.

        Args:
            state: what :meth:`state_dict` returned, of an object made with the same arguments.

        Raises:
            TypeError: ``state`` is not a dictionary.
            ValueError: it is one of something else, or of other tensors or another sparsity. Nothing is loaded then.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state is a {type(state).__name__}. Pass what DynamicSparse.state_dict() returned.")
        if state.keys() != self.state_dict().keys():
            raise ValueError(
                f"state has the keys {sorted(map(str, state))}, not {sorted(self.state_dict())}. "
                "Pass what DynamicSparse.state_dict() returned."
            )
        own = [tensor.kept for tensor in self._tensors]
        if list(state["kept"]) != own:
            raise ValueError(
                f"state is of tensors that keep {list(state['kept'])} entries, but these keep {own}. Pass the params "
                "and the sparsity that it was made with."
            )
        self._generator.set_state(state["generator"].cpu())
        self._go_on(state["step"], state["next"])

    def _after(self, step: int) -> int | None:
        """Return the step of the first update behind ``step``; None if there is none any more."""
        following = (step // self._every + 1) * self._every
        return following if self._end is None or following < self._end else None

    def _go_on(self, step: int, following: int | None) -> None:
        """Note that ``step`` is done, and listen to gradients if the next one ends in an update."""
        self._step, self._next = step, following
        if self._gradients is not None:
            self._gradients.start() if following == step + 1 else self._gradients.stop()

    def _update(self, step: int) -> bool:
        """Move the masks of all tensors or of none; return whether, or else that the gradients are not of use."""
        with self._ranks.together():
            places = []
            for tensor in self._tensors:
                with errors_about(tensor.where):
                    places.append(tensor.find())
            intact = self._gradients is None or self._gradients.intact()
        gradients: Sequence[Tensor | None] = [None] * len(places)
        if self._gradients is not None:
            averaged = self._averaged(self._gradients.sums(), [found[0][0].parameter for found in places], intact)
            if averaged is None:
                return False
            gradients = averaged
        fraction = self._alpha if self._end is None else self._alpha / 2 * (1 + math.cos(math.pi * step / self._end))
        todo: list[Patch] = []
        moves: list[Tensor] = []
        with self._ranks.together():
            for found, gradient in zip(places, gradients, strict=True):
                target = found[0][0]
                if self._gradients is None or gradient is not None:
                    gone, grown = moved(target, fraction, gradient, self._generator)
                    moves += gone, grown
                    todo += patches([mask for _, mask in found], target.parameter, gone, grown, self._optimizer)
        self._check_same(moves)
        targets = [target for found in places for target, _ in found]
        modules = [target.module for target in targets]
        with all_or_nothing(modules), rolled_back() as done, self._ranks.together():
            write(todo, done)
            for target in targets:
                renew(target)
        return True

    def _averaged(
        self, sums: Sequence[Tensor | None], tensors: Sequence[Tensor], intact: bool
    ) -> list[Tensor | None] | None:
        """Return the gradients as the mean of all ranks; None if some were missed, or are not finite."""
        broken, *reached = self._ranks.totals(not intact, *(each is not None for each in sums))
        if broken:
            return None
        if not any(reached):
            raise RuntimeError(
                f"no gradient has reached any of the {len(sums)} tensors of DynamicSparse since the last step(), so "
                "nothing can grow. Call step() once in each iteration, after the loss.backward() of a model in "
                "training, or pass growth='random'."
            )
        means: list[Tensor | None] = []
        for each, tensor, count in zip(sums, tensors, reached, strict=True):
            if each is None and count:  # on other ranks
                wide = torch.promote_types(tensor.dtype, torch.float32)
                each = torch.zeros(tensor.shape, dtype=wide, device=tensor.device)
            means.append(None if each is None else self._ranks.mean(each))
        return means if all(bool(each.isfinite().all()) for each in means if each is not None) else None

    def _check_same(self, masks: Iterable[Tensor]) -> None:
        """Raise ``RuntimeError`` on all ranks unless their masks are the same."""
        if self._ranks.size > 1 and not self._ranks.alike(digest(masks)):
            raise RuntimeError(
                "DynamicSparse: the masks would differ between ranks, so weights, earlier masks or the states of "
                "optimizers do. Train replicas, as DistributedDataParallel does, or pass the process_group of those "
                "that are. Nothing is changed."
            )


def _check(
    model: nn.Module, growth: str, every: int, end: int | None, alpha: float, optimizer: Optimizer | None
) -> None:
    """Check the arguments that need no tensors."""
    check_module("model", model)
    if growth not in ("gradient", "random"):
        raise ValueError(f"growth={growth!r} is unknown. Pass 'gradient' (RigL) or 'random' (SET).")
    check_whole("every", every, 1)
    if end is not None:
        check_whole("end", end, 1)
        if end <= every:
            raise ValueError(
                f"end={end!r} comes before the first update, at step every={every!r}. Pass a larger end, about 75 % of "
                "the steps of the training, or a smaller every."
            )
    check_fraction("alpha", alpha)
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}. Pass the torch.optim.Optimizer that trains the model; of a "
            "wrapper, the one inside."
        )


def _amounts(sparsity: float | Mapping[Key, float], params: Params) -> tuple[Apart, list[Listed]]:
    """Return how much of each tensor goes, and the tensors."""
    if isinstance(params, Iterable) and not isinstance(params, nn.Module):
        params = list(params)  # it is read twice
    if isinstance(sparsity, Mapping):
        check_shares("sparsity", sparsity, params)
        shares = sparsity
    else:
        check_sparsity("sparsity", sparsity)
        shares = uniform(params, sparsity)
    amounts = Apart(None, None, 1, "sparsity", shares)
    return amounts, [listed for listed in groups_of(params) if amounts.covers(listed)]


def _check_places(model: nn.Module, groups: Sequence[Listed], optimizer: Optimizer | None) -> None:
    """Raise unless the tensors are trained, in the model, listed wherever they are used, and in the optimizer."""
    modules = set(model.modules())
    listed = {id(group.target.parameter): group for group in groups}
    for group in groups:
        for target in group.everywhere():
            if target.module not in modules:
                raise ValueError(
                    f"{group.where} is not a part of the model {type(model).__name__}. Pass pairs of modules within it."
                )
        if not group.target.parameter.requires_grad:
            raise ValueError(
                f"{group.where} is frozen (requires_grad=False), so what grows would stay 0. Leave it out of params, "
                "or call requires_grad_() on it first."
            )
    pairs = {pair for group in groups for pair in group.pairs()}
    for path, module in model.named_modules():
        for holder in targets_in(module):
            tied = listed.get(id(holder.parameter))
            if tied is not None and (module, holder.name) not in pairs:
                raise ValueError(
                    f"{tied.where} and {f'{path}.{holder.name}'.lstrip('.')} are the same parameter (tied), but only "
                    "the first is listed, and what grows in it starts at 0. List both, or untie them first."
                )
    held = {id(p) for each in (optimizer.param_groups if optimizer else []) for p in each["params"]}
    if optimizer is not None and not held & listed.keys():
        raise ValueError(
            f"optimizer holds none of the {len(groups)} tensors of params. Pass the optimizer that was made with "
            "model.parameters()."
        )
