"""Which tensors of a model may change while its masks stay, and what stands in for them until that is done."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchprune_ext._host import Target, kept_zeros, targets_in, warn_of_zeros
from torchprune_ext._obstacles import obstacle
from torchprune_ext.compensation.descent import Free

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A parameter of a model, and all modules that hold it.

    Args:
        listed: the places that hold it, pruned or not.
        fitted: whether it may change.
        mask: which entries survive, of its shape; None if it is not pruned.
        zeros: which entries stay 0 without a mask, see :func:`.kept_zeros`; None if none do.
    """

    listed: list[Target]
    fitted: bool
    mask: Tensor | None
    zeros: Tensor | None

    @property
    def parameter(self) -> nn.Parameter:
        """The dense values."""
        return self.listed[0].parameter

    @property
    def modules(self) -> set[nn.Module]:
        """All modules that hold it."""
        return {target.module for target in self.listed}

    def dead(self) -> Tensor | None:
        """Return where it stays 0, bool; None if nowhere."""
        return self.zeros if self.mask is None else self.mask == 0

    def values(self, new: Tensor) -> Tensor:
        """Return ``new`` where it survives, and what it holds elsewhere."""
        return new if self.mask is None else torch.where(self.mask != 0, new, self.parameter.detach())


def held_parameters(model: nn.Module) -> list[Held]:
    """Return all parameters of ``model``, each once.

    Those of floating point that require grad may change, but for the tables of embeddings and what is tied to them:
    most of their rows are not in the data.

    Raises:
        ValueError: a parameter that may change stands under different masks, or one that is not of 0 and 1.

    Warns:
        UserWarning: a tensor that may change holds so many zeros outside of its mask that it looks pruned.
    """
    places: dict[int, list[Target]] = {}
    for module in model.modules():
        for target in targets_in(module):
            places.setdefault(id(target.parameter), []).append(target)
    kept = {id(target.parameter): zeros for target, zeros in kept_zeros(model)}
    found = []
    for listed in places.values():
        first = listed[0]
        fitted = (
            first.parameter.requires_grad
            and first.parameter.is_floating_point()
            and obstacle(first.name, first.parameter) is None
            and not any(isinstance(target.module, EMBEDDINGS) for target in listed)
        )
        if fitted:
            _refuse_masks(listed)
        found.append(Held(listed, fitted, first.mask, kept.get(id(first.parameter))))
    warn_of_zeros(
        {
            held.listed[0].where: held.listed[0]
            for held in found
            if held.fitted and held.zeros is None and held.parameter.dim() > 1
        }
    )
    return found


def _refuse_masks(listed: Sequence[Target]) -> None:
    """Raise ``ValueError`` unless one mask of 0 and 1, or none, stands in all places of a parameter."""
    first = listed[0]
    for other in listed:
        if other.mask is not None and not ((other.mask == 0) | (other.mask == 1)).all():
            raise ValueError(f"{other.where} has a mask with values besides 0 and 1. Prune it by a mask of those.")
        alike = first.mask is other.mask if first.mask is None or other.mask is None else None
        if not (torch.equal(first.mask, other.mask) if alike is None else alike):  # type: ignore[arg-type]
            raise ValueError(
                f"{first.where} and {other.where} are the same parameter (tied) under different masks, so there is not "
                "one set of survivors. Prune both alike by one global call, untie them, or freeze the parameter by "
                "requires_grad_(False)."
            )


@contextmanager
def standing_in(everything: Sequence[Held]) -> Iterator[dict[Held, Free]]:
    """Let copies stand in for what may change, and nothing else require grad.

    To be called where pruned tensors are plain; whoever has made them so puts all modules back.
    """
    free: dict[Held, Free] = {}
    flags = []
    try:
        for held in everything:
            now = [target.module._parameters[target.name] for target in held.listed]
            if held.fitted and now[0] is not None:
                parameter = nn.Parameter(now[0].detach().clone())
                for target in held.listed:
                    setattr(target.module, target.name, parameter)
                free[held] = Free(parameter, held.dead())
            else:
                for tensor in now:
                    if tensor is not None and tensor.requires_grad:
                        flags.append(tensor)
                        tensor.requires_grad_(False)
        yield free
    finally:
        for tensor in flags:
            tensor.requires_grad_(True)
