"""Masks that change again and again while a model trains.

The first time they are installed as any others. From then on only their values are written, in the same buffers, so
that compiled code goes on as it is, and the history has one entry instead of one for each update.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchprune_ext._host import Target, as_one, install, outside_of_inference, renew
from torchprune_ext._restoring import all_or_nothing
from torchprune_ext.global_pruning.budget import Listed
from torchprune_ext.methods import GlobalPruning


def write_masks(masks: Sequence[tuple[Listed, Target, Tensor]], entry: Callable[[], GlobalPruning]) -> None:
    """Let targets have these finished masks, or change nothing.

    Args:
        masks: tensor, one of its places, and mask.
        entry: makes what the history tells; a target whose history has it gets new values in its buffer.
    """
    new: dict[Listed, list[tuple[Target, GlobalPruning, Tensor]]] = {}
    standing = []
    for listed, place, mask in masks:
        target = Target.of(place.module, place.name)
        if target.mask is None or repr(entry()) not in target.told():
            new.setdefault(listed, []).append((target, entry(), mask))
        else:
            standing.append((target, target.mask, target.mask.clone(), mask))
    for own in new.values():
        as_one(own)
    with outside_of_inference(), torch.no_grad():
        try:
            with all_or_nothing(target.module for _, target, _ in masks):
                install([each for own in new.values() for each in own])
                for target, buffer, _, mask in standing:
                    buffer.copy_(mask)
                    renew(target)
        except BaseException:
            for _, buffer, before, _ in standing:
                buffer.copy_(before)
            raise
