"""Lottery tickets: prune what training made small, and train what is left from where training began."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchprune_ext._checks import check_module, check_sparsity, check_whole, errors_about, number_from
from torchprune_ext._host import as_plain, outside_of_inference, targets_in
from torchprune_ext._runs import refuse_lazy
from torchprune_ext.deploy.copying import refresh
from torchprune_ext.global_pruning.budget import Listed, Params, groups_of, refuse_empty
from torchprune_ext.patterns import Unit
from torchprune_ext.workflow.targets import Criterion, Scope, check_unit, count_units, paths_in, prune_to

__all__ = ["LotteryTicket", "TicketComparison"]


@dataclass(frozen=True, slots=True)
class TicketComparison:
    """What the same masks have reached with remembered and with random values.

    Args:
        sparsity: fraction of the entries of ``params`` that the masks drop.
        ticket: what the remembered values have reached.
        reinitialized: what random ones have reached, one for each seed.
    """

    sparsity: float
    ticket: float
    reinitialized: tuple[float, ...]

    @property
    def gain(self) -> float:
        """How much more the ticket has reached than random values on average."""
        return self.ticket - sum(self.reinitialized) / len(self.reinitialized)


class LotteryTicket:
    """Remembers where training began, so that a pruned model can begin there again.

    Iterative magnitude pruning with rewinding: train, prune a fraction of what is left by the trained weights, put the
    survivors back to what they were, and so on::

        ticket = tpe.LotteryTicket(model, params)
        for _ in range(rounds):
            train(model)
            ticket.prune(0.2)
            ticket.rewind()
        train(model)

    In large networks it helps to rewind not to the very beginning but to a point early in training: train up to there,
    and make the ticket then, or call :meth:`rewind_point`.

    All parameters and buffers of the model are remembered, each once, on ``device``; masks are not, since they only
    shrink. Running statistics of BatchNorm, being buffers, are rewound too, as the point where training begins has its
    own.

    Args:
        model: any module, pruned already or not.
        params: the ``(module, name)`` pairs within it that are pruned; see :func:`.prunable_parameters`.
        device: where values are remembered; by default where each is. ``"cpu"`` saves memory of an accelerator.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a tensor that is not in the model or cannot be pruned, or a model with lazy layers.

    Source: Frankle & Carbin 2019, *The Lottery Ticket Hypothesis*, arXiv:1803.03635, section 2, strategy 1 of the
    appendix; Frankle, Dziugaite, Roy & Carbin 2020, *Linear Mode Connectivity and the Lottery Ticket Hypothesis*,
    arXiv:1912.05671, for the later point.

    Example:
        >>> import torchprune_ext as tpe
        >>> model = nn.Linear(4, 4)
        >>> ticket = tpe.LotteryTicket(model, [(model, "weight")])
        >>> first = model.weight.detach().clone()
        >>> for _ in range(2):
        ...     _ = nn.init.normal_(dict(model.named_parameters()).get("weight_orig", model.weight))  # training
        ...     ticket.prune(0.5)
        ...     ticket.rewind()
        >>> int(model.weight_mask.sum()), bool((model.weight == first * model.weight_mask).all())
        (4, True)
    """

    def __init__(self, model: nn.Module, params: Params, *, device: torch.device | str | None = None) -> None:
        check_module("model", model)
        refuse_lazy(model)
        if isinstance(params, Iterable) and not isinstance(params, nn.Module):
            params = list(params)
        groups = groups_of(params)
        refuse_empty(groups)
        paths_in(model, groups)
        self.model = model
        self._params, self._device = params, device
        self.rewind_point()

    def rewind_point(self) -> None:
        """Remember the values that the model has now; :meth:`rewind` goes back to them from here on."""
        with outside_of_inference():
            copies: dict[int, Tensor] = {}
            self._values = {
                name: copies.setdefault(id(tensor), tensor.detach().to(self._device or tensor.device, copy=True))
                for name, tensor in _tensors(self.model).items()
            }

    @property
    def sparsity(self) -> float:
        """The fraction of all entries of ``params`` that is pruned now."""
        total, dead = count_units(self._groups(), None)
        return dead / max(total, 1)

    def prune(
        self,
        amount: float,
        criterion: Criterion = "magnitude",
        unit: Unit | None = None,
        *,
        scope: Scope = "global",
        min_keep: float = 1,
    ) -> None:
        """Prune a fraction of what is left, by the weights as they are now; call this before :meth:`rewind`.

        Args:
            amount: fraction of the units that are left, in [0, 1); 0.2 is the authors' rate. It is rounded to a number
                of units as in PyTorch.
            criterion: as for :func:`.prune_to`, and so are the other arguments.
            unit: what lives or dies together.
            scope: ``"global"``, ``"layer"``, or in which proportion.
            min_keep: how much of each tensor stays at least.

        Raises:
            TypeError: an argument of the wrong type.
            ValueError: an amount that is not in [0, 1), or as :func:`.prune_to`. Nothing is pruned then.
        """
        check_sparsity("amount", amount)
        check_unit(unit)
        groups = self._groups()
        if isinstance(scope, Mapping):
            groups = [listed for listed in groups if any(key in scope for key in listed.pairs())]
        total, dead = count_units(groups, unit)
        goal = dead + round(amount * (total - dead))
        with errors_about(f"amount={amount!r} of the {total - dead} {'entries' if unit is None else unit.units} left"):
            if goal == total:
                raise ValueError("takes all of them. Pass a smaller one.")
            prune_to(self._params, goal / total, criterion, unit, scope=scope, min_keep=min_keep)

    def rewind(self, optimizer: Optimizer | None = None) -> None:
        """Put all parameters and buffers of the model back to the remembered values; masks stay.

        Args:
            optimizer: an optimizer of the model whose state, such as momentum, is cleared together with the gradients,
                so that it starts as a new one would. What a scheduler has made of its learning rate stays: make the
                scheduler anew. Without it, make the optimizer anew.

        Raises:
            TypeError: ``optimizer`` is not an optimizer.
            ValueError: the model has other tensors than at the rewind point. It is as it was then.
        """
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer is a {type(optimizer).__name__}. Pass the torch.optim.Optimizer that trains the model; of "
                "a wrapper, the one inside."
            )
        self._write(self._values)
        if optimizer is not None:
            optimizer.state.clear()
            optimizer.zero_grad()

    def reinitialize(self, seed: int | None = None, initialize: Callable[[nn.Module], object] | None = None) -> None:
        """Give the model new random values under the same masks: the control experiment.

        A ticket is said to win if it trains better than the same masks with other values.

        Args:
            seed: seed of the values; the random state of torch is left as it was then. By default that state is used.
            initialize: gives a model its values, as if nothing was pruned, such as ``lambda model:
                model.apply(model._init_weights)``; by default each module's own ``reset_parameters()``.

        Raises:
            TypeError: an argument of the wrong type.
            ValueError: a module has parameters and no ``reset_parameters()``. The model is as it was then.
        """
        if seed is not None:
            check_whole("seed", seed, 0)
        if initialize is not None and not callable(initialize):
            raise TypeError(f"initialize={initialize!r} is a {type(initialize).__name__}. Pass a function of a model.")
        if initialize is None:
            _refuse_without_reset(self.model)
        with _values_kept_on_error(self.model):
            with torch.random.fork_rng() if seed is not None else nullcontext():
                if seed is not None:
                    torch.manual_seed(seed)
                fresh = _initialized(self.model, initialize or _reset)
            self._write(fresh)

    def compare(
        self,
        run: Callable[[nn.Module], float],
        seeds: Iterable[int] = (0,),
        initialize: Callable[[nn.Module], object] | None = None,
    ) -> TicketComparison:
        """Train the ticket and, under the same masks, random values, and say what each has reached.

        Args:
            run: trains the model with an optimizer of its own and returns what it has reached, larger is better.
            seeds: one run with random values for each.
            initialize: as for :meth:`reinitialize`.

        Returns:
            Both results. The model is rewound in the end.

        Raises:
            TypeError: an argument of the wrong type, or ``run`` gives no number.
            ValueError: as :meth:`reinitialize`, no seed, or ``run`` gives NaN or infinity.

        Example:
            >>> import torchprune_ext as tpe
            >>> model = nn.Linear(4, 4)
            >>> ticket = tpe.LotteryTicket(model, [(model, "weight")])
            >>> ticket.prune(0.5)
            >>> found = ticket.compare(lambda model: model(torch.ones(4)).sum().item(), seeds=(0, 1))
            >>> found.sparsity, len(found.reinitialized)
            (0.5, 2)
        """
        if not callable(run):
            raise TypeError(
                f"run={run!r} is a {type(run).__name__}. Pass a function that trains and evaluates a model."
            )
        asked = list(seeds)
        for place, seed in enumerate(asked):
            check_whole(f"seeds[{place}]", seed, 0)
        if not asked:
            raise ValueError("seeds=() leaves nothing to compare with. Pass e.g. (0, 1, 2).")
        if initialize is None:
            _refuse_without_reset(self.model)
        try:
            self.rewind()
            ticket = number_from(run(self.model), "run(model)")
            random = []
            for seed in asked:
                self.rewind()  # whatever initialize does not reach
                self.reinitialize(seed, initialize)
                random.append(number_from(run(self.model), "run(model)"))
        finally:
            self.rewind()
        return TicketComparison(self.sparsity, ticket, tuple(random))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the remembered values by name, to save them beside the model's own state."""
        return dict(self._values)

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Remember the values that :meth:`state_dict` has returned.

        Raises:
            TypeError: ``state_dict`` is not a mapping from names to tensors.
            ValueError: names or shapes are not those of the model. What was remembered stays then.
        """
        if not isinstance(state_dict, Mapping) or not all(isinstance(value, Tensor) for value in state_dict.values()):
            raise TypeError(f"state_dict is a {type(state_dict).__name__}. Pass what state_dict() has returned.")
        own = self._fitting(state_dict)
        with outside_of_inference():
            self._values = {
                name: state_dict[name].detach().to(self._device or own[name].device, copy=True) for name in own
            }

    def _groups(self) -> list[Listed]:
        return groups_of(self._params)

    def _write(self, values: Mapping[str, Tensor]) -> None:
        """Copy ``values`` into the tensors of the model, or change nothing."""
        own = self._fitting(values)
        with _values_kept_on_error(self.model), outside_of_inference(), torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(values[name])
            refresh(self.model)

    def _fitting(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of the model by name, if those of ``values`` are called alike and have their shapes."""
        own = _tensors(self.model)
        if differing := sorted(own.keys() ^ values.keys()):
            raise ValueError(
                f"model of type {type(self.model).__name__} has other tensors than at the rewind point: "
                f"{', '.join(differing[:5])}. Make a new LotteryTicket of it, or call rewind_point()."
            )
        for name, tensor in own.items():
            if tensor.shape != values[name].shape:
                raise ValueError(
                    f"{name} has the shape {tuple(tensor.shape)}, but {tuple(values[name].shape)} at the rewind point. "
                    "Make a new LotteryTicket of the model, or call rewind_point()."
                )
        return own


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters, pruned ones with their dense values, and all buffers but masks, by name."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        targets = list(targets_in(module))
        own: dict[str, Tensor] = {target.name: target.parameter for target in targets}
        masks = {id(target.mask) for target in targets if target.mask is not None}
        buffers = module.named_buffers(recurse=False, remove_duplicate=False)
        own |= {name: buffer for name, buffer in buffers if id(buffer) not in masks}
        found |= {f"{path}.{name}" if path else name: tensor for name, tensor in own.items()}
    return found


@contextmanager
def _values_kept_on_error(model: nn.Module) -> Iterator[None]:
    """Put the values of all tensors back on any exception; keeps them in main memory meanwhile."""
    before = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in _tensors(model).values()]
    try:
        yield
    except BaseException:
        with outside_of_inference(), torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
            refresh(model)
        raise


def _initialized(model: nn.Module, initialize: Callable[[nn.Module], object]) -> dict[str, Tensor]:
    """Return the values that ``initialize`` gives to all tensors of ``model``; pruned ones keep their own."""
    with outside_of_inference(), as_plain(model):
        initialize(model)
        return {name: tensor.detach().clone() for name, tensor in _tensors(model).items()}


def _reset(model: nn.Module) -> None:
    """Call the modules' own initializations, from the leaves up."""
    for module in reversed(list(model.modules())):
        if (reset := _own_reset(module)) is not None:
            reset()


def _own_reset(module: nn.Module) -> Callable[[], object] | None:
    """Return what gives ``module`` its first values, or None."""
    return getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)


def _refuse_without_reset(model: nn.Module) -> None:
    """Raise ``ValueError`` if a module would keep its values."""
    for path, module in model.named_modules():
        if any(p is not None for p in module._parameters.values()) and _own_reset(module) is None:
            raise ValueError(
                f"model.{path}, a {type(module).__name__}, has parameters and no reset_parameters(), so they would "
                "stay as they are. Pass initialize=, a function that gives a model its first values."
            )
