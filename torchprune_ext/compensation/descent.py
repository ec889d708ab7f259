"""Fit tensors by gradient steps, and keep the best values by an error on data that the steps do not see."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from inspect import signature

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchprune_ext._runs import wide
from torchprune_ext.compensation.block_outputs import gradients

Parts = Callable[[], Tensor]  # computes the parts of an error, of which the mean counts, as a vector
MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]
MOST_WARM_UP = 30  # steps
UNASKED = (
    "optimizer(parameters) gave a {}, whose step() does not call the closure that it is given, which computes the "
    "gradients. Pass one whose step(closure) does, as those of torch do."
)
UNMOVED = (
    "the error that is to go down depends on nothing that may change, as where the model computes under "
    "torch.no_grad() or detaches, or where loss= does. Let it have a gradient, or leave such a block out of blocks."
)
PATIENCE = 5  # the error may rise in this part of all epochs, one after the other


class Free:
    """A tensor of the model that may change.

    Args:
        parameter: what the model holds while it is fitted.
        dead: where it stays 0, bool; None if nowhere.
    """

    def __init__(self, parameter: nn.Parameter, dead: Tensor | None) -> None:
        self.parameter, self.dead, dtype = parameter, dead, parameter.dtype
        self.master = parameter  # what the optimizer changes: small steps are lost in half precision
        if wide(dtype) != dtype:
            self.master = nn.Parameter(parameter.detach().to(wide(dtype)))

    @torch.no_grad()
    def write(self, values: Tensor | None = None) -> None:
        """Bring the model's tensor up to date, with ``values`` or with what the optimizer has left."""
        if values is not None:
            self.master.copy_(values)
        if self.dead is not None:
            self.master.masked_fill_(self.dead, 0)
        if self.master is not self.parameter:
            self.parameter.copy_(self.master)


@dataclass(frozen=True, slots=True)
class Descent:
    """What gradient steps have given.

    Args:
        before: the parts of the error on the data kept aside, before.
        after: the same with the values that were kept.
        best: the epoch whose values were kept; 0 for those that were there.
        epochs: how many epochs there were.
    """

    before: tuple[float, ...]
    after: tuple[float, ...]
    best: int
    epochs: int


def adam(parameters: list[nn.Parameter]) -> Optimizer:
    """Return the optimizer that is used unless another is given."""
    return torch.optim.Adam(parameters, lr=1e-4, betas=(0.9, 0.98))


def descend(
    free: Sequence[Free],
    steps: Sequence[Parts],
    kept_aside: Sequence[tuple[float, Parts]],
    epochs: int,
    make_optimizer: MakeOptimizer,
    tell: Callable[[float], object],
) -> Descent:
    """Fit ``free`` and leave the best values in it, those that were there if none are better.

    The learning rate rises linearly in the first tenth of all steps, 30 at most, and then falls linearly to 0.

    Args:
        free: the tensors.
        steps: for each step of an epoch, what computes the error to go down.
        kept_aside: weights, and what computes the errors that decide; their last part must not get worse either.
        epochs: how often to go through ``steps``, each time in another order; fewer if the error kept aside rises from
            epoch to epoch for a fifth of them, at least one.
        make_optimizer: from the tensors to an optimizer of them.
        tell: called with the error after each epoch.

    Raises:
        TypeError: ``make_optimizer`` gives something else.
        ValueError: its optimizer holds none of the tensors, or others, or does not ask for gradients; or an error, or
            its gradient, is not finite with the values that were there, or depends on none of the tensors.
    """
    start = best = checked(measured(kept_aside))
    first = kept = [each.master.detach().clone() for each in free]
    optimizer = _checked(make_optimizer, [each.master for each in free])
    rates = _rates(optimizer, epochs * len(steps))
    found, last, rises, epoch = 0, _mean(start), 0, 0
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(steps), generator=torch.Generator("cpu").manual_seed(epoch), device="cpu").tolist()
        try:
            for place in order:
                next(rates)
                _step(optimizer, free, steps[place])
        except _DivergedError:
            for each, values in zip(free, first, strict=True):
                each.write(values)
            _refuse_data(free, steps[place])
            break
        now = measured(kept_aside)
        tell(_mean(now))
        rises, last = 0 if _mean(now) <= last else rises + 1, _mean(now)
        if last < _mean(best) and now[-1] <= start[-1]:
            best, found, kept = now, epoch, [each.master.detach().clone() for each in free]
        if math.isnan(last) or rises >= max(epochs // PATIENCE, 1):
            break
    for each, values in zip(free, kept, strict=True):
        each.write(values)
    return Descent(start, best, found, epoch)


class _DivergedError(Exception):
    """The error that is to go down, or its gradient, is not finite."""


def _step(optimizer: Optimizer, free: Sequence[Free], parts: Parts) -> None:
    """Let ``optimizer`` go one step down."""
    asked = False

    def closure() -> Tensor:
        nonlocal asked
        asked = True
        for each in free:
            each.write()
        error, found = _differentiated(free, parts)
        for each, gradient in zip(free, found, strict=True):
            if gradient is not None and each.dead is not None:
                gradient = gradient.masked_fill(each.dead, 0)
            each.master.grad = None if gradient is None else gradient.to(each.master.dtype)
        return error

    optimizer.step(closure)  # type: ignore[arg-type]
    if not asked:
        raise ValueError(UNASKED.format(type(optimizer).__name__))
    for each in free:
        each.write()


def _differentiated(free: Sequence[Free], parts: Parts) -> tuple[Tensor, Sequence[Tensor | None]]:
    """Return an error and its gradients; raise :class:`_DivergedError` if they are not finite."""

    def total() -> Tensor:
        error = parts().mean()
        if not error.isfinite():
            raise _DivergedError
        return error

    error, found = gradients(total, [each.parameter for each in free], UNMOVED)
    if not all(gradient is None or gradient.isfinite().all() for gradient in found):
        raise _DivergedError
    return error, found


def _refuse_data(free: Sequence[Free], parts: Parts) -> None:
    """Raise ``ValueError`` if an error or its gradients are not finite before any step."""
    try:
        with torch.enable_grad():
            _differentiated(free, parts)
    except _DivergedError:
        raise ValueError(
            "what the model or the reference model gives for a batch is NaN or infinity, or its error or loss= is, or "
            "the gradient of that. Check the data and the weights. NaN in samples that sample_mask leaves out gets "
            "into the gradient too: put zeros there."
        ) from None


def _rates(optimizer: Optimizer, steps: int) -> Iterator[float]:
    """Set the learning rate of one step after the other, and yield what of the full one it is."""
    full = [group.get("lr") for group in optimizer.param_groups]
    warm_up = min(MOST_WARM_UP, -(-steps // 10))
    for step in range(steps):
        factor = min((step + 1) / warm_up, (steps - step) / (steps - warm_up + 1))
        for group, rate in zip(optimizer.param_groups, full, strict=True):
            if rate is not None:
                group["lr"] = rate * factor
        yield factor


@torch.no_grad()
def measured(kept_aside: Sequence[tuple[float, Parts]]) -> tuple[float, ...]:
    """Return the weighted mean of each part over the data kept aside."""
    total = sum(weight for weight, _ in kept_aside)
    sums = sum(parts().double() * (weight / total) for weight, parts in kept_aside)
    return tuple(sums.tolist()) if isinstance(sums, Tensor) else ()


def checked(errors: tuple[float, ...]) -> tuple[float, ...]:
    """Return the errors that there are before any step, if they are finite."""
    if not all(map(math.isfinite, errors)):
        raise ValueError(
            "the model or the reference model gives NaN or infinity on the batches kept aside, or loss= gave NaN or "
            "infinity for them. Check the data, the weights and the loss."
        )
    return errors


def _mean(parts: Sequence[float]) -> float:
    return sum(parts) / len(parts)


def _checked(make_optimizer: MakeOptimizer, masters: list[nn.Parameter]) -> Optimizer:
    """Return the optimizer of ``masters``, if it is one."""
    optimizer: object = make_optimizer(masters)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer(parameters) gave a {type(optimizer).__name__}. Pass a function that makes a torch optimizer, "
            "e.g. lambda parameters: torch.optim.Adam(parameters, lr=1e-4)."
        )
    try:
        signature(optimizer.step).bind(None)
    except TypeError:
        raise ValueError(UNASKED.format(type(optimizer).__name__)) from None
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not held or not held <= {id(parameter) for parameter in masters}:
        raise ValueError(
            "optimizer(parameters) gave an optimizer of other parameters. Make it of those that the function gets, "
            "which stand in for the model's until the fit is done."
        )
    return optimizer
