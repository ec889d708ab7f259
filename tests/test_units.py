"""A unit is a value with a name and a split: nothing that uses units knows which there are."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from torchprune_ext.global_pruning.budget import Budget
from torchprune_ext.global_pruning.units import _prune_units
from torchprune_ext.masks import unit_mask, unit_scores, units_alive
from torchprune_ext.methods.units import _Units


@dataclass(frozen=True)
class Half:
    """A stranger's unit: the left or the right half of a row."""

    units: ClassVar[str] = "halves"

    def split(self, tensor):
        return tensor.unflatten(1, (2, -1)), (2,)


class HalfLn(_Units):
    """A stranger's method."""

    def _pattern(self):
        return Half()


WEIGHT = torch.tensor([[1.0, 1.0, 5.0, 5.0], [3.0, 3.0, 2.0, 2.0]])


def layer():
    linear = nn.Linear(4, 2)
    linear.weight = nn.Parameter(WEIGHT.clone())
    return linear


def test_masks_take_a_unit_that_the_package_does_not_know():
    scores = unit_scores(WEIGHT, Half(), 1, None)
    assert scores.inputs[0].reshape(-1).tolist() == [2, 10, 6, 4]
    mask = unit_mask(torch.tensor([0, 1, 1, 0]), Half(), WEIGHT, None)
    assert mask.tolist() == [[0, 0, 1, 1], [1, 1, 0, 0]]
    assert units_alive(Half(), mask).tolist() == [False, True, True, False]


def test_methods_and_global_calls_take_it_too():
    one, other = layer(), layer()
    HalfLn.apply(one, "weight", 0.5)
    _prune_units("global_half_ln", [(other, "weight")], Budget(2, None, 1), Half, 2, None, "mean", None)
    for each in (one, other):
        assert each.weight_mask.tolist() == [[0, 0, 1, 1], [1, 1, 0, 0]]
    with pytest.raises(ValueError, match=r"amount=3.*2 halves not yet pruned"):
        HalfLn.apply(one, "weight", 3)
    with pytest.raises(ValueError, match=r"2 halves"):
        _prune_units("global_half_ln", [(other, "weight")], Budget(3, None, 1), Half, 2, None, "mean", None)
