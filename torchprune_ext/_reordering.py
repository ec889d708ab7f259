"""Puts channels of a model in another order, in place, and checks that it still computes the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchprune_ext._graph import Group
from torchprune_ext.deploy.checking import Outputs


@dataclass(frozen=True, slots=True, eq=False)
class Order:
    """Channels of a group in another order.

    Args:
        group: the group.
        order: int64 of shape ``(group.size,)``: which channel stands at each place.
    """

    group: Group
    order: Tensor

    def back(self) -> "Order":
        """Return the order that undoes this one."""
        return Order(self.group, self.order.argsort())

    @property
    def where(self) -> str:
        """The channels in words."""
        return f"the {self.group.size} channels of {', '.join(self.group.names[:3])}"


def moved(places: Tensor, indices: Tensor, order: Tensor) -> Tensor:
    """Return what stands at each place of an axis once channels are in another order.

    Args:
        places: what stands there now, ``(places,)``.
        indices: which places are channel i, ``(channels, each)``.
        order: which channel stands where channel i stood, ``(channels,)``.
    """
    after = places.clone()
    after[indices] = places[indices[order]]
    return after


def reorder(model: nn.Module, orders: Sequence[Order], inputs: Any) -> None:
    """Put channels of ``model`` in another order, in place, or change nothing.

    Args:
        model: the model, of plain tensors.
        orders: groups, each once, and their orders.
        inputs: a batch, on which the outputs are compared with those of before, and on others that are made of it.

    Raises:
        RuntimeError: the outputs differ by more than rounding.
    """
    wanted, journal = Outputs(model, inputs), _Journal()
    wanted.of(wanted.dtype)
    try:
        journal.apply(orders)
        problem = _problem(wanted, wanted.dtype)
        if problem is not None and wanted.dtype != torch.float64:  # is it rounding?
            journal.back()
            precise = _runs_in_double(wanted)
            journal.apply(orders)
            problem = _problem(wanted, torch.float64) if precise else problem
        if problem is not None:
            journal.back()
            raise RuntimeError(_blame(wanted, orders, problem))
    except BaseException:
        journal.back()
        raise


class _Journal:
    """Tensors that have another order now, so that they can be put back at any moment."""

    def __init__(self) -> None:
        self.done: list[tuple[Tensor, int, Tensor]] = []
        self.last: tuple[tuple[Tensor, int, Tensor], Tensor] | None = None

    def apply(self, orders: Sequence[Order]) -> None:
        """Put channels in another order, wherever they have entries."""
        for each in orders:
            for member in each.group.members:
                tensor = getattr(member.module, member.param)
                places = moved(torch.arange(tensor.shape[member.axis], device="cpu"), member.indices, each.order)
                for own in (tensor, tensor.grad) if tensor.grad is not None else (tensor,):
                    old = own.detach().clone()
                    entry = (own, member.axis, places.to(own.device))
                    self.last = (entry, old)
                    own.detach().copy_(_selected(old, entry[1], entry[2]))
                    self.done.append(entry)

    def back(self) -> None:
        """Put all back, exactly."""
        if self.last is not None:  # where an interrupt may have come in between
            entry, old = self.last
            if self.done and self.done[-1] is entry:
                self.done.pop()
            entry[0].detach().copy_(old)
            self.last = None
        while self.done:
            tensor, axis, places = self.done[-1]
            tensor.detach().copy_(tensor.detach().index_select(axis, places.argsort()))
            self.done.pop()


def _selected(tensor: Tensor, axis: int, places: Tensor) -> Tensor:
    return tensor.index_select(axis, places)


def _problem(wanted: Outputs, dtype: torch.dtype | None) -> str | None:
    """Return how the outputs differ now, or None."""
    try:
        return wanted.differ(wanted.model, dtype)
    except Exception as error:  # whatever the model raises
        return f"the model raises {type(error.__cause__ or error).__name__}"


def _runs_in_double(wanted: Outputs) -> bool:
    """Return whether the model runs in float64, and note its outputs."""
    try:
        wanted.of(torch.float64)
    except Exception:  # code that is bound to its dtype, or a model that cannot be copied
        return False
    return True


def _blame(wanted: Outputs, orders: Sequence[Order], problem: str) -> str:
    """Return an error that names the groups which alone make the outputs differ; all stand as they were."""
    dtype, guilty = torch.float64 if torch.float64 in wanted.found else wanted.dtype, []
    for each in orders:
        journal = _Journal()
        try:
            journal.apply([each])
            if _problem(wanted, dtype) is not None:
                guilty.append(each)
        finally:
            journal.back()
    blamed = guilty or orders
    who = " or ".join(each.where for each in blamed)
    readers = [m.name for each in blamed for m in each.group.members if m.reads]
    return (
        f"In another order of {who} the model computes something else ({problem}), so everything was put back. Its "
        "code depends on the order of channels in a way that its operations do not show. Leave what reads them out "
        f"of params: {', '.join(dict.fromkeys(readers))}."
    )
