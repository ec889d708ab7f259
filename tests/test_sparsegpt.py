"""SparseGPT against the plain loop of its paper."""

import pytest
import torch
from compensating import (
    MARKS,
    SPOILT,
    build,
    close,
    columns,
    data,
    equal,
    history,
    matrix,
    mlp,
    pairs,
    sparsegpt,
    spoilt,
)
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe

pytestmark = MARKS


def plain_sparsegpt(x, weight, width, keep_of):
    """Column by column with the inverse of what is left of the Hessian, recomputed for each."""
    gram, weight, mask = x.T @ x, weight.clone(), torch.ones_like(weight)
    dead = gram.diagonal() == 0
    gram = gram + torch.diag(torch.where(dead, 1.0, 0.01 * gram.diagonal().mean()))
    inverse = [torch.linalg.inv(gram[i:, i:]) for i in range(len(gram))]
    for i in range(len(gram)):
        if i % width == 0:
            stop = min(i + width, len(gram))
            scores = weight[:, i:stop].square() / torch.stack([inverse[j][0, 0] for j in range(i, stop)])
            mask[:, i:stop] = keep_of(scores)
        error = weight[:, i] * (1 - mask[:, i]) / inverse[i][0, 0]
        weight[:, i:] -= error[:, None] * inverse[i][0]
        weight[:, i] *= mask[:, i]
    return weight, mask


def half(scores):
    kept = torch.zeros_like(scores).flatten()
    kept[scores.flatten().argsort(descending=True)[: scores.numel() - round(0.5 * scores.numel())]] = 1
    return kept.view_as(scores)


def two_of_four(scores):
    return torch.zeros_like(scores).scatter(1, scores.topk(2, 1).indices, 1)


@pytest.mark.parametrize("inputs", [12, 140])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", [{"target_sparsity": 0.5}, {"pattern": tpe.NM(2, 4)}], ids=str)
def test_sparsegpt_is_what_the_paper_says(inputs, bias, options):
    model = build(lambda: nn.Linear(inputs, 5, bias=bias))
    dense, batches = build(lambda: nn.Linear(inputs, 5, bias=bias)), data((inputs,), (100, 100))
    x = torch.cat([x for x, _ in batches])
    y = dense(x).detach()
    width, choose = (128, half) if "target_sparsity" in options else (4, two_of_four)
    weight, mask = plain_sparsegpt(x, dense.weight.detach(), width, choose)
    fits = sparsegpt(model, batches, [(model, "weight")], **options)
    equal(model.weight_mask, mask)
    close(model.weight.detach(), weight)
    found = x @ weight.T
    if bias:  # stays
        found = found + dense.bias.detach()
        equal(model.bias.detach(), dense.bias.detach())
    error = (found - y).square().sum() / (y - y.mean(0)).square().sum()
    assert fits[model, "weight"].after == pytest.approx(float(error), rel=1e-6)
    assert repr(history(model)).startswith("sparsegpt(")


@pytest.mark.parametrize(("n", "m"), [(1, 3), (2, 5), (100, 150)])
def test_sparsegpt_with_groups_that_do_not_divide_its_blocks(n, m):
    model = build(lambda: nn.Linear(300, 4))
    sparsegpt(model, data((300,), (400,)), [(model, "weight")], pattern=tpe.NM(n, m))
    assert torch.equal(model.weight_mask.view(4, -1, m).sum(-1), torch.full((4, 300 // m), float(n)).double())


def test_sparsegpt_lets_go_of_dead_inputs_first():
    model, batches = build(lambda: nn.Linear(8, 4)), data((8,), (50,))
    batches[0][0][:, ::2] = 0
    sparsegpt(model, batches, [(model, "weight")], target_sparsity=0.5)
    assert model.weight_mask[0].tolist() == [0, 1] * 4


@pytest.mark.parametrize("groups", [1, 2])
def test_sparsegpt_on_convolutions(groups):
    make = lambda: nn.Conv2d(8, 4, 3, groups=groups, padding=1)  # noqa: E731
    dense, batches = build(make), data((8, 5, 5), (12, 10))
    model = build(make)
    sparsegpt(model, batches, [(model, "weight")], pattern=tpe.NM(2, 4))
    assert set(model.weight_mask.unflatten(1, (-1, 4)).sum(2).flatten().tolist()) == {2.0}
    x = columns(dense, torch.cat([x for x, _ in batches]))
    order = torch.arange(x.shape[-1]).view(8 // groups, 9).t().flatten()  # channels of one place side by side
    expected = torch.zeros_like(matrix(dense, dense.weight)).detach()
    for group in range(groups):
        old = matrix(dense, dense.weight.detach())[group][:, order]
        expected[group][:, order] = plain_sparsegpt(x[group][:, order], old, 4, two_of_four)[0]
    close(matrix(model, model.weight.detach()), expected)


@pytest.mark.parametrize("groups", [1, 2])
def test_sparsegpt_fills_up_short_groups(groups):
    make = lambda: nn.Conv2d(6 * groups, 4, 3, groups=groups, padding=1)  # noqa: E731
    dense, model, batches = build(make), build(make), data((6 * groups, 5, 5), (12, 10))
    with pytest.raises(ValueError, match="pad=True"):
        sparsegpt(model, batches, [(model, "weight")], pattern=tpe.NM(2, 4))
    sparsegpt(model, batches, [(model, "weight")], pattern=tpe.NM(2, 4, pad=True))
    assert set(model.weight_mask[:, :4].sum(1).flatten().tolist()) == {2.0}
    assert set(model.weight_mask[:, 4:].sum(1).flatten().tolist()) == {2.0}
    x = columns(dense, torch.cat([x for x, _ in batches]))
    order = torch.arange(54).view(6, 9).t()
    order = torch.cat((order, torch.full((9, 2), 54)), 1).flatten()  # two columns of zeros at each place
    real = order < 54
    for group in range(groups):
        old = torch.nn.functional.pad(matrix(dense, dense.weight.detach())[group], (0, 1))[:, order]
        inputs = torch.nn.functional.pad(x[group], (0, 1))[:, order]
        expected = plain_sparsegpt(inputs, old, 4, two_of_four)[0]
        close(matrix(model, model.weight.detach())[group][:, order[real]], expected[:, real])


@pytest.mark.parametrize("amount", [0.0, 0.77, 1.0])
@pytest.mark.parametrize("how", SPOILT)
def test_sparsegpt_counts_and_stays_finite(amount, how):
    model = build(mlp)
    sparsegpt(model, spoilt(data((6,), (17, 9)), how), pairs(model), target_sparsity=amount)
    for module, _ in pairs(model):
        total = module.weight.numel()
        assert int((module.weight_mask == 0).sum()) == round(amount * total)
        assert torch.isfinite(module.weight).all()


def test_sparsegpt_keeps_the_dead_dead():
    for options in ({"target_sparsity": 0.5}, {"pattern": tpe.NM(2, 4)}):
        model = build(lambda: nn.Linear(8, 4))
        prune.random_unstructured(model, "weight", amount=0.3)
        mask, orig = model.weight_mask.clone(), model.weight_orig.detach().clone()
        sparsegpt(model, data((8,)), [(model, "weight")], **options)
        assert bool((model.weight_mask <= mask).all())
        gone = model.weight_mask == 0
        equal(model.weight_orig.detach()[gone], orig[gone])
        assert isinstance(history(model), prune.PruningContainer)
