"""Masks that change again and again while a model trains.

Where there is a mask, its buffer stays the same tensor and gets new values, so that compiled code goes on as it is. The
history has one entry instead of one for each update.
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
        entry: makes what the history tells; a target whose history has it keeps it as it is.
    """
    new: dict[Listed, list[tuple[Target, GlobalPruning, Tensor]]] = {}
    known, written = [], []
    for listed, place, mask in masks:
        target = Target.of(place.module, place.name)
        buffer = target.mask
        if buffer is not None and (buffer.dtype != mask.dtype or buffer.is_inference()):
            buffer = None  # as native methods may make them
        if buffer is not None:
            written.append((buffer, buffer.clone(), mask))
        if buffer is not None and repr(entry()) in target.told():
            known.append(target)
        else:
            new.setdefault(listed, []).append((target, entry(), mask if buffer is None else buffer))
    for own in new.values():
        as_one(own)
    with outside_of_inference(), torch.no_grad():
        try:
            with all_or_nothing(target.module for _, target, _ in masks):
                for buffer, _, mask in written:
                    buffer.copy_(mask)
                install([each for own in new.values() for each in own], values_change=True)
                for target in known:
                    renew(target)
        except BaseException:
            for buffer, before, _ in written:
                buffer.copy_(before)
            raise
