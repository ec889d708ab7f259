"""Soft filter pruning: what is small is set to zero again and again while a model trains, and may come back."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchprune_ext._checks import check_module, check_sparsity, check_whole, errors_about
from torchprune_ext._host import Target, outside_of_inference, renew
from torchprune_ext._scoring import bn_masks, output_channels
from torchprune_ext.global_pruning.budget import Listed, Params, groups_of, refuse_empty
from torchprune_ext.global_pruning.channels import layers_of
from torchprune_ext.masks import units_alive
from torchprune_ext.methods import GlobalPruning
from torchprune_ext.patterns import Channel, Unit
from torchprune_ext.schedules import Schedule
from torchprune_ext.workflow.targets import Scope, check_unit, masks_to, paths_in, plan
from torchprune_ext.workflow.writing import write_masks

__all__ = ["SoftFilterPruner"]

FILTERS = Channel(0)


class SoftFilterPruner:
    r"""Sets the filters of smallest norm to zero every so many steps, and lets them train on.

    A filter that was set to zero has gradients as before, grows again, and stands at the next update against the
    others. Only :meth:`harden`, at the end, installs masks. Compared with pruning for good, the network keeps its
    capacity while it trains::

        soft = tpe.SoftFilterPruner(model, params, 0.3, every=len(loader))
        for x, y in epochs_of(loader):
            loss_fn(model(x), y).backward()
            optimizer.step()
            soft.step()
            optimizer.zero_grad()
        soft.harden(tpe.bn_pairs(model, x))

    Set to zero are the listed tensors alone. A BatchNorm behind them is left to train, since a filter that is zero
    under a scale that is zero would have no gradient, and could not come back. Nor can, but by momentum, one whose
    BatchNorm bias is negative in front of a ReLU.

    Args:
        model: the model that trains.
        params: ``(module, name)`` pairs within it, such as the weights of its convolutions.
        sparsity: fraction of the units that an update sets to zero, in [0, 1), or a schedule of it, see
            :mod:`torchprune_ext.schedules`.
        unit: what is set to zero together: by default the filters of a ``Linear`` layer or convolution. Those of a
            transposed convolution are ``Channel(1, groups)``.
        every: number of steps from one update to the next; the authors take an epoch. The first update is in the
            ``every``-th call of :meth:`step`.
        scope: where the fraction is taken from, as for :func:`.prune_to`: by default the same of each layer, as the
            authors do.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range, or as :func:`.prune_to`. The model is as it was then.

    Source: He, Kang, Dong, Fu & Yang 2018, *Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks*,
    arXiv:1808.06866, algorithm 1, with the l2 norm.

    Example:
        >>> import torchprune_ext as tpe
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> soft = tpe.SoftFilterPruner(model, [(model[0], "weight")], 0.25, every=2)
        >>> for _ in range(2):
        ...     soft.step()
        >>> int((model[0].weight == 0).all(1).sum())  # of 8 filters
        2
        >>> soft.harden()
        >>> int(model[0].weight_mask.amax(1).sum())
        6
    """

    def __init__(
        self,
        model: nn.Module,
        params: Params,
        sparsity: float | Schedule,
        unit: Unit | None = FILTERS,
        *,
        every: int,
        scope: Scope = "layer",
    ) -> None:
        check_module("model", model)
        check_unit(unit)
        check_whole("every", every, 1)
        if not isinstance(sparsity, Schedule):
            check_sparsity("sparsity", sparsity)
        if isinstance(params, Iterable) and not isinstance(params, nn.Module):
            params = list(params)
        groups = groups_of(params)
        refuse_empty(groups)
        paths_in(model, groups)
        self.model, self.every = model, every
        self._params, self._unit, self._scope, self._sparsity = params, unit, scope, sparsity
        self._steps = 0
        ends = (self._target(every - 1), sparsity.final if isinstance(sparsity, Schedule) else sparsity)
        for target in ends:
            with errors_about(f"sparsity={sparsity!r}"):
                plan(params, target, unit=unit, scope=scope)

    @property
    def steps(self) -> int:
        """How many steps there were."""
        return self._steps

    @property
    def sparsity(self) -> float:
        """The fraction of all units that hold only zeros now."""
        units = [self._alive(listed) for listed in self._groups()]
        return sum(int((~alive).sum()) for alive in units) / max(sum(map(len, units)), 1)

    def step(self) -> None:
        """Go on by one step, behind that of the optimizer; every so often, set the smallest units to zero.

        Raises:
            ValueError: a weight is not finite. The step does not count then, and nothing is set to zero.
        """
        if (self._steps + 1) % self.every == 0:
            self._set_to_zero([(t, mask) for _, t, mask in self._masks(self._target(self._steps))])
        self._steps += 1

    def harden(self, pairs: Iterable[tuple[nn.Module, nn.Module]] = ()) -> None:
        """Prune for good what is smallest now: install the masks of the sparsity that was reached.

        Args:
            pairs: ``(layer, bn)`` pairs, as :func:`.bn_pairs` finds them, whose biases and BatchNorm entries are
                masked together with the filter, so that its channel is zero; see :func:`.bn_scaling`. Without them
                the output of the model stays what it is when the filters are zero, but a channel whose filter is zero
                may still put out a constant.

        Raises:
            TypeError: an argument of the wrong type.
            ValueError: pairs of layers that ``params`` does not list, units that are not output channels, or as
                :func:`.prune_to`. Nothing is pruned then.
        """
        masks = self._masks(self._target(max(self._steps - 1, 0)))
        partner: dict[nn.Module, nn.Module] = {}
        layers = [module for module, _ in layers_of(pairs, partner)]
        listed_at = {target.module: (listed, target, mask) for listed, target, mask in masks if target.name == "weight"}
        more = []
        for place, layer in enumerate(layers):
            with errors_about(f"pairs[{place}], {type(layer).__name__}"):
                if layer not in listed_at:
                    raise ValueError("its weight is not in params. Leave the pair out, or list the weight.")
                listed, target, mask = listed_at[layer]
                if self._unit != output_channels(target):
                    raise ValueError(
                        f"unit={self._unit} is not its output channels, which a BatchNorm is paired with. Pass "
                        f"unit={output_channels(target)}, or leave the pair out."
                    )
                keep = units_alive(output_channels(target), mask)
                more += [(listed, each, m) for each, _, m in bn_masks(target, partner[layer], keep, paired=True)][1:]
        write_masks([*masks, *more], self._entry)

    def state_dict(self) -> dict[str, Any]:
        """Return where the pruner is; all else is in the model's state dict."""
        return {"steps": self._steps, "sparsity": repr(self._sparsity), "every": self.every}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from where the pruner was that has returned ``state_dict``.

        Raises:
            TypeError: ``state_dict`` is not a mapping.
            ValueError: it is of a pruner with other arguments. This one is as it was then.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict is a {type(state_dict).__name__}. Pass what state_dict() has returned.")
        here = self.state_dict()
        if set(state_dict) != set(here) or any(state_dict[key] != here[key] for key in ("sparsity", "every")):
            raise ValueError(f"state_dict is {dict(state_dict)}, here it is {here}. Make the pruner as that one was.")
        check_whole("state_dict['steps']", state_dict["steps"], 0)
        self._steps = int(state_dict["steps"])

    def _groups(self) -> list[Listed]:
        groups, scope = groups_of(self._params), self._scope
        return [g for g in groups if any(key in scope for key in g.pairs())] if isinstance(scope, Mapping) else groups

    def _target(self, step: int) -> float:
        return self._sparsity(step) if isinstance(self._sparsity, Schedule) else self._sparsity

    def _alive(self, listed: Listed) -> Tensor:
        """Return which units of a tensor have an entry that is not zero."""
        weight = (listed.target.weight() != 0).to(listed.target.parameter.dtype)
        return weight.reshape(-1) != 0 if self._unit is None else units_alive(self._unit, weight)

    def _masks(self, target: float) -> list[tuple[Listed, Target, Tensor]]:
        """Return the masks of what is smallest now."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Zeros without a mask", UserWarning)  # they are meant
            return masks_to("SoftFilterPruner", self._params, target, "magnitude", self._unit, scope=self._scope)

    def _entry(self) -> GlobalPruning:
        """Return what the history tells."""
        sparsity = repr(self._sparsity) if isinstance(self._sparsity, Schedule) else self._sparsity
        return GlobalPruning("SoftFilterPruner", sparsity=sparsity, unit=str(self._unit), every=self.every)

    @staticmethod
    def _set_to_zero(masks: Iterable[tuple[Target, Tensor]]) -> None:
        """Set the dense values to zero where masks are, or change nothing."""
        before = []
        with outside_of_inference(), torch.no_grad():
            try:
                for target, mask in masks:
                    before.append((target, target.parameter.clone()))
                    target.parameter.masked_fill_(mask == 0, 0)
                    if target.hook()[1] is not None:
                        renew(target)
            except BaseException:
                for target, values in before:
                    target.parameter.copy_(values)
                    if target.hook()[1] is not None:
                        renew(target)
                raise
