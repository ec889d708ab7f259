"""Parameters whose type is a subclass of Tensor, as torch's own DTensor is."""

import pytest
import torch
from torch import nn

import torchprune_ext as tpe


class Plain(torch.Tensor):
    pass


class Sharded(torch.Tensor):
    device_mesh = "of two ranks"


def layer(kind):
    module = nn.Linear(4, 2)
    module.weight = nn.Parameter(torch.arange(8.0).view(2, 4).as_subclass(kind))
    return module


def test_a_parameter_of_a_subclass_is_not_taken_for_a_lazy_one():
    module = layer(Plain)
    tpe.nm_structured(module, "weight", 2, 4)
    assert module.weight_mask.tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]


def test_a_sharded_parameter_is_refused_as_sharded():
    with pytest.raises(ValueError, match=r"already sharded .* Prune first, then call fully_shard"):
        tpe.nm_structured(layer(Sharded), "weight", 2, 4)


def test_a_lazy_parameter_is_refused_as_lazy():
    with pytest.raises(ValueError, match=r"has no shape yet\. Run one forward first"):
        tpe.nm_structured(nn.LazyLinear(2), "weight", 2, 4)


def test_a_parameter_of_a_subclass_is_drawn():
    pytest.importorskip("matplotlib")
    from torchprune_ext import plots

    plots.weight_histograms(layer(Plain))
