"""The penalty on the scales of batch norms."""

import math

import pytest
import torch
import torch.nn.functional as F
from calibrating import close, equal
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe


def test_bn_l1_penalty_is_the_sum_of_the_sizes_of_the_scales():
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm1d(2), nn.BatchNorm2d(4, affine=False))
    model[1].weight.data = torch.tensor([1.0, -2.0, 0.0])
    model[2].weight.data = torch.tensor([0.5, -0.25])
    penalty = tpe.bn_l1_penalty(model, strength=0.1)
    assert penalty.shape == ()
    assert penalty.item() == pytest.approx(0.375)
    (penalty + 0).backward()
    close(model[1].weight.grad, torch.tensor([0.1, -0.1, 0.0]))
    close(model[2].weight.grad, torch.tensor([0.1, -0.1]))
    assert all(p.grad is None for n, p in model.named_parameters() if n not in ("1.weight", "2.weight"))
    assert tpe.bn_l1_penalty(model).item() == pytest.approx(3.75e-4)
    assert tpe.bn_l1_penalty(model, 0).item() == 0


def test_bn_l1_penalty_of_pruned_scales():
    bn = nn.BatchNorm2d(4)
    bn.weight.data = torch.tensor([1.0, -2.0, 3.0, -4.0])
    prune.custom_from_mask(bn, "weight", torch.tensor([1.0, 0.0, 0.0, 1.0]))
    with torch.no_grad():
        bn.weight_orig += 1  # as an optimizer does; the attribute is stale now
    penalty = tpe.bn_l1_penalty(bn, strength=2)
    assert penalty.item() == 10
    penalty.backward()
    equal(bn.weight_orig.grad, torch.tensor([2.0, 0.0, 0.0, -2.0]))


def test_bn_l1_penalty_makes_small_scales():
    sums = []
    for strength in (0, 0.05):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(60):
            x = torch.randn(16, 2)
            loss = F.mse_loss(model(x)[:, 0], x[:, 0]) + tpe.bn_l1_penalty(model, strength)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        sums.append(float(model[1].weight.detach().abs().sum()))
    assert sums[1] < 0.8 * sums[0]


def test_bn_l1_penalty_refuses():
    for model in (nn.Linear(2, 2), nn.BatchNorm2d(2, affine=False)):
        with pytest.raises(ValueError, match="no BatchNorm with scales"):
            tpe.bn_l1_penalty(model)
    for strength in (-1, math.nan):
        with pytest.raises(ValueError, match="strength="):
            tpe.bn_l1_penalty(nn.BatchNorm1d(2), strength)
    with pytest.raises(ValueError, match="strength=inf is negative or not finite"):
        tpe.bn_l1_penalty(nn.BatchNorm1d(2), math.inf)
    for strength in ("0.1", None, True):
        with pytest.raises(TypeError, match=rf"strength={strength!r} is a {type(strength).__name__}\. Pass a number"):
            tpe.bn_l1_penalty(nn.BatchNorm1d(2), strength)
    for model in (None, nn.BatchNorm1d):
        with pytest.raises(TypeError, match=r"model=.*Pass a torch\.nn\.Module"):
            tpe.bn_l1_penalty(model)
