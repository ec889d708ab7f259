"""Masks from the zeros that are there already."""

from torch import Tensor

from torchprune_ext._checks import warn
from torchprune_ext._host import Target, as_one, install
from torchprune_ext.global_pruning.budget import Listed, Params, groups_of, refuse_empty
from torchprune_ext.masks import finish
from torchprune_ext.methods import GlobalPruning

__all__ = ["mask_zeros"]


def mask_zeros(params: Params) -> None:
    """Turn the exact zeros of tensors into masks, so that they count as pruned and stay so.

    For weights that were pruned elsewhere, or pruned and then made permanent: a checkpoint saved after
    :func:`.remove_all` or by another tool holds zeros and no masks. All other calls would take these zeros for the
    smallest living weights and prune them again instead of others, and training or re-fitting would fill them in. Call
    this before training: an optimizer moves zeros that no mask holds.

    Args:
        params: ``(module, name)`` pairs, any iterable; see :func:`.prunable_parameters`. Of any floating dtype; -0.0
            is a zero. Tied tensors get one mask, as in the other calls over lists.

    Warns:
        UserWarning: a tensor holds nothing but zeros, and would never be trained again.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: as :func:`.global_unstructured`. Nothing is masked then.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import torchprune_ext as tpe
        >>> layer = nn.Linear(4, 1)
        >>> layer.weight.data = torch.tensor([[0.5, 0.0, -1.0, 0.0]])
        >>> mask_zeros([(layer, "weight")])
        >>> layer.weight_mask, tpe.history(layer, "weight")
        (tensor([[1., 0., 1., 0.]]), ['mask_zeros()'])
        >>> mask_zeros([(layer, "weight")])  # nothing new
        >>> tpe.history(layer, "weight")
        ['mask_zeros()']
    """
    groups = groups_of(params)
    refuse_empty(groups)
    found = [(listed, mask) for listed in groups if (mask := _new_mask(listed)) is not None]
    emptied = [listed.where for listed, mask in found if not mask.any()]
    if emptied:
        warn(
            f"mask_zeros: {'; '.join(emptied)}: nothing but zeros, all of which are masked now and get no gradient. If "
            "these were initialized to zero and not pruned, undo them and leave them out of params."
        )
    masks: list[tuple[Target, GlobalPruning, Tensor]] = []
    for listed, mask in found:
        together = [(target, GlobalPruning("mask_zeros"), mask) for target in listed.everywhere()]
        as_one(together)
        masks += together
    install(masks)


def _new_mask(listed: Listed) -> Tensor | None:
    """Return a mask of all that is not zero nor masked already; None if that is what there is."""
    dense, earlier = listed.target.parameter.detach(), listed.target.mask
    nonzero = dense != 0
    alive = nonzero if earlier is None else nonzero.logical_and_(earlier != 0)
    count = dense.numel() if earlier is None else int(earlier.count_nonzero())
    return None if int(alive.count_nonzero()) == count else finish(alive.to(dense.dtype), dense)
