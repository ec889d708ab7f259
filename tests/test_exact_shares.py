"""One budget, met to the entry: the rows of one layer make up for what is not whole steps of rows."""

import compensating
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import torchprune_ext as tpe
from torchprune_ext.compensation import calls

pytestmark = compensating.MARKS
auto = compensating.prune_and_compensate


def network(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(11, 23), nn.ReLU(), nn.Linear(23, 19), nn.ReLU(), nn.Linear(19, 5))
    x = torch.randn(240, 3) @ torch.randn(3, 11)
    return model, tpe.prunable_parameters(model), list(x.split(40))


def gone(params):
    return sum(int((getattr(module, f"{name}_mask") == 0).sum()) for module, name in params)


def total(params):
    return sum(module.weight.numel() for module, _ in params)


# ------------------------------------------------------------------------------------------------- which rows keep one


def rows_with_one_more(scores, alive, size, more):
    """Return the mask by its definition: the largest of each row, then the largest of those next in line."""
    mask, ahead = torch.zeros_like(alive), []
    for row, (values, left) in enumerate(zip(scores.tolist(), alive.tolist(), strict=True)):
        order = sorted((i for i, each in enumerate(left) if each), key=lambda i, values=values: (-abs(values[i]), i))
        for i in order[:size]:
            mask[row, i] = 1
        ahead += [(-abs(values[i]), row, i) for i in order[size : size + 1]]
    for _, row, i in sorted(ahead)[:more]:
        mask[row, i] = 1
    return mask


@given(st.data())
def test_the_largest_of_those_next_in_line_stay(data):
    groups, outputs, inputs = (data.draw(st.integers(1, most)) for most in (2, 4, 5))
    shape, values = (groups, outputs, inputs), st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0])

    def drawn(each):
        many = groups * outputs * inputs
        return torch.tensor(data.draw(st.lists(each, min_size=many, max_size=many))).reshape(shape)

    scores, alive = drawn(values), drawn(st.sampled_from([0.0, 1.0, 1.0]))
    size = data.draw(st.integers(1, inputs))
    more = data.draw(st.integers(0, int((alive.sum(-1) > size).sum())))
    rows = torch.tensor(
        data.draw(st.lists(st.sampled_from([0.5, 1.0]), min_size=groups * outputs, max_size=groups * outputs))
    )
    found = calls._largest(None, scores, size, None, alive, more, rows.view(groups, outputs))
    flat = rows_with_one_more(scores.flatten(0, 1) * rows.unsqueeze(-1), alive.flatten(0, 1), size, more)
    assert torch.equal(found, flat.reshape(shape))


# --------------------------------------------------------------------------------------------------------- whole calls


@pytest.mark.parametrize("sparsity", [0.05, 0.613, 0.9])
def test_the_budget_is_met_to_the_entry(sparsity):
    model, params, data = network()
    fits = auto(model, data, params, target_sparsity=sparsity, allocation="auto")
    assert gone(params) == round(sparsity * total(params)) == sum(fit.pruned for fit in fits.values())
    widths = [module.weight_mask.sum(1).unique() for module, _ in params]
    assert all(each.min() >= 1 for each in widths)
    assert sorted(map(len, widths))[:2] == [1, 1]  # one layer has rows of two kinds
    assert all(each.max() - each.min() <= 1 for each in widths)


@pytest.mark.parametrize("criterion", ["admm", "obs", "wanda", "magnitude"])
def test_by_every_criterion_in_steps_or_not(criterion):
    for steps in (None, 1) if criterion == "admm" else (1, 3):
        model, params, data = network()
        auto(model, data, params, target_sparsity=0.437, allocation="auto", criterion=criterion, steps=steps)
        assert gone(params) == round(0.437 * total(params))


@pytest.mark.parametrize("sparsity", [0.43, 0.6])
def test_what_is_pruned_already_counts_entry_by_entry(sparsity):
    model, params, data = network()
    tpe.global_unstructured(params, target_sparsity=0.401)
    before = [module.weight_mask.clone() for module, _ in params]
    auto(model, data, params, target_sparsity=sparsity, allocation="auto")
    assert gone(params) == round(sparsity * total(params))
    assert not any(module.weight_mask[mask == 0].any() for (module, _), mask in zip(params, before, strict=True))


def test_a_budget_that_is_met_already_prunes_nothing():
    model, params, data = network()
    tpe.global_unstructured(params, target_sparsity=0.4)
    before = [module.weight_mask.clone() for module, _ in params]
    auto(model, data, params, target_sparsity=0.4, allocation="auto")
    assert all(torch.equal(module.weight_mask, mask) for (module, _), mask in zip(params, before, strict=True))


@pytest.mark.parametrize("sparsity", [0.31, 0.5])
def test_convolutions_and_groups(sparsity):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(32, 3)
    )
    params, data = tpe.prunable_parameters(model), [torch.randn(30, 2, 6, 6) for _ in range(5)]
    auto(model, data, params, target_sparsity=sparsity, allocation="auto")
    assert gone(params) == round(sparsity * total(params))


def test_the_history_tells_of_the_rows_that_keep_one_more():
    model, params, data = network()
    auto(model, data, params, target_sparsity=0.5, allocation="auto")
    told = [entry for module, name in params for entry in tpe.history(module, name)]
    [odd] = [entry for entry in told if "rows_with_one_more=" in entry]
    [module] = [module for module, _ in params if len(module.weight_mask.sum(1).unique()) == 2]
    kept = module.weight_mask.sum(1)
    assert f"rows_with_one_more={int((kept == kept.max()).sum())}" in odd
