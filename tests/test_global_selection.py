"""Every global call against sorting the whole list in plain Python."""

import math
import warnings

import pytest
import torch
from cases import (
    build,
    flat,
)
from globally import (
    ROWS,
    Part,
    Tied,
    check_mask,
    draw_budget,
    draw_model,
    every_row,
    how_many,
    linear,
    owner,
    ready,
    spend,
    two_convolutions,
    weights,
)
from hypothesis import given
from hypothesis import strategies as st
from snapshots import Snapshot
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe

# ------------------------------------------------------------------------------------------------ drawn models


@every_row
@given(data=st.data())
def test_the_whole_list_is_pruned_as_by_sorting_it(row, data):
    model = draw_model(data.draw, row)
    args = row.draw(data.draw, model.groups)
    known = {**args, "bns": model.bns} if row.bn else args
    parts = model.parts(row, known)
    budget = draw_budget(data.draw, parts)
    expected = spend(parts, **budget)
    params = model.params(row)
    params = (pair for pair in params) if data.draw(st.booleans()) else params
    owners = {module: owner(module) for module in model.listing}
    before, state = Snapshot(*model.listing, *model.bns.values()), torch.get_rng_state()
    if expected is None:
        with pytest.raises(ValueError, match=r"min_keep="):
            row.function(params, **budget, **args)
        assert before.differences() == []
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert row.function(params, **budget, **args) is None
    assert torch.equal(torch.get_rng_state(), state)
    for modules, mask, part in zip(model.ordered(), expected, parts, strict=True):
        for module in modules:
            assert owner(module) is owners[module]
            check_mask(module, "weight", mask)
            if row.bn and args["paired"]:
                flags = [int(any(mask[i] for i in unit)) for unit in part.units]
                check_mask(model.bns[module], "weight", flags)
                check_mask(model.bns[module], "bias", flags)
    gone = how_many(parts, **budget)
    after = [Part(part.units, part.scores, mask) for part, mask in zip(parts, expected, strict=True)]
    assert sum(len(part.alive()) for part in after) == sum(len(part.alive()) for part in parts) - gone
    emptied = [any(part.mask) and not any(new.mask) for part, new in zip(parts, after, strict=True)]
    empty = [part.mask and not any(part.mask) for part in after]
    assert len(caught) == 1 if any(emptied) else len(caught) <= any(empty)
    assert all(warning.category is UserWarning and row.id in str(warning.message) for warning in caught)


# --------------------------------------------------------------------------------------------- selection and budget


def test_double_precision_of_one_layer_is_not_lost_against_single_of_another():
    single, double = linear([1.0, 1.0, 3.0]), linear([1 + 2**-40, 1 - 2**-40, 3.0], dtype=torch.float64)
    tpe.global_unstructured(weights(single, double), amount=2)
    assert flat(single.weight_mask) == [1, 0, 1]
    assert flat(double.weight_mask) == [1, 0, 1]


@pytest.mark.filterwarnings("ignore:global_unstructured. min_keep=0")
@pytest.mark.parametrize("min_keep", [0, 1000, 0.125])
@pytest.mark.parametrize("levels", [2, 5, 10**6])
def test_large_lists_are_selected_exactly(levels, min_keep):
    generator = torch.Generator().manual_seed(levels)
    layers, dead = [], []
    for shape, dtype in [((301, 333), torch.float16), ((1, 1), torch.float32), ((257, 511), torch.float32),
                         ((0, 5), torch.float32), ((64, 2049), torch.bfloat16)]:  # fmt: skip
        layer = build(shape)
        values = torch.randint(levels, shape, generator=generator) - levels // 2
        layer.weight = nn.Parameter((values * (1.0 if levels < 10**6 else 1e-2)).to(dtype))
        dead.append(torch.rand(shape, generator=generator) < 0.3)
        prune.custom_from_mask(layer, "weight", (~dead[-1]).float())
        layers.append(layer)
    left = sum(int((~d).sum()) for d in dead)
    expected = [~d.reshape(-1) for d in dead]
    free = []  # (score, place in the list): the floor's entries are left out
    for place, (layer, d) in enumerate(zip(layers, dead, strict=True)):
        scores = layer.weight_orig.detach().double().abs().reshape(-1)
        order = (-scores).argsort(stable=True)
        order = order[~d.reshape(-1)[order]]
        floor = min(min_keep if isinstance(min_keep, int) else math.ceil(min_keep * d.numel()), len(order))
        order = order[floor:].flip(0)  # worst first, the later one of equals first
        free.append(torch.stack((scores[order], torch.full_like(scores[order], place), order.double())))
    worst = torch.cat(free[::-1], dim=1)
    worst = worst[:, worst[0].argsort(stable=True)][1:, : round(0.6 * left)].long()
    for place, keep in enumerate(expected):
        keep[worst[1][worst[0] == place]] = False
    tpe.global_unstructured(weights(*layers), amount=0.6, min_keep=min_keep)
    for layer, keep in zip(layers, expected, strict=True):
        assert torch.equal(layer.weight_mask.bool().reshape(-1), keep)


@pytest.mark.filterwarnings("ignore:global_unstructured. min_keep=0")
@pytest.mark.parametrize("scored", [False, True])
def test_masks_are_those_of_native_pruning_where_there_are_no_ties(scored):
    def make():
        generator = torch.Generator().manual_seed(1)
        model = nn.ModuleList([nn.Linear(7, 5), nn.Conv2d(3, 4, 3), nn.Linear(1, 1), nn.Conv1d(2, 2, 5)])
        values = torch.randperm(35 + 108 + 1 + 20, generator=generator) - 80.25  # all sizes differ
        for module, part in zip(model, values.split([35, 108, 1, 20]), strict=True):
            module.weight.data = part.reshape(module.weight.shape)
        params = tpe.prunable_parameters(model)
        return params, {(module, name): getattr(module, name).detach().abs().neg().exp2() for module, name in params}

    (native, theirs), (ours, mine) = make(), make()
    for amount in (0.3, 17, 0.5):
        prune.global_unstructured(native, prune.L1Unstructured, theirs if scored else None, amount=amount)
        tpe.global_unstructured(ours, amount, importance_scores=mine if scored else None, min_keep=0)
        for (a, _), (b, _) in zip(native, ours, strict=True):
            assert torch.equal(a.weight_mask, b.weight_mask)
            assert torch.equal(a.weight, b.weight)


def test_rounds_reach_the_sparsity_that_was_asked_for():
    layers = [linear([float(i) for i in range(1, 11)]), linear([float(i) for i in range(11, 21)])]
    for sparsity in (0.2, 0.4, 0.4, 0.6):
        tpe.global_unstructured(weights(*layers), target_sparsity=sparsity)
        zeros = sum(int((layer.weight_mask == 0).sum()) for layer in layers)
        assert zeros == round(sparsity * 20)
    with pytest.raises(ValueError, match=r"target_sparsity=0\.5.*0\.6"):
        tpe.global_unstructured(weights(*layers), target_sparsity=0.5)


def test_a_layer_of_small_weights_is_not_emptied():
    small, large = linear([0.01, 0.02, 0.03, 0.04]), linear([1.0, 2.0, 3.0, 4.0])
    tpe.global_unstructured(weights(small, large), amount=0.5)
    assert flat(small.weight_mask) == [0, 0, 0, 1]
    assert flat(large.weight_mask) == [0, 1, 1, 1]


def test_what_one_floor_saves_may_bring_the_next_to_its_floor():
    layers = [linear([0.1, 0.2, 0.3]), linear([1.0, 1.1, 1.2]), linear([2.0, 2.1, 2.2]), linear([3.0, 3.1, 3.2])]
    tpe.global_unstructured(weights(*layers), amount=4, min_keep=2)  # by size alone: the first layer and one more
    assert [flat(layer.weight_mask) for layer in layers] == [[0, 1, 1]] * 4


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_floor_and_amount_that_cannot_both_hold_are_refused(row):
    model, args = ready(row.function)
    before = Snapshot(*model)
    for amount, min_keep in [(1.0, 1), (0.8, 0.5), (0.1, 1.0)]:
        with pytest.raises(ValueError, match=rf"amount={amount}, min_keep={min_keep}.*floors"):
            row.function(**{**args, "amount": amount, "min_keep": min_keep})
    assert before.differences() == []


@pytest.mark.parametrize(("amount", "min_keep"), [(0.45, 0.55), (0.93, 0.07), (0.9, 0.1), (0.5, 0.5), (0.42, 0.58)])
def test_a_fraction_and_its_complement_both_hold(amount, min_keep):
    layers = [nn.Linear(10, 10), nn.Linear(20, 10)]
    tpe.global_unstructured(weights(*layers), amount=amount, min_keep=min_keep)
    assert [int(layer.weight_mask.sum()) for layer in layers] == [round(100 * min_keep), round(200 * min_keep)]


EMPTYING = {
    tpe.global_unstructured: {},
    tpe.global_gradient_magnitude: {},
    tpe.global_ln_structured: {},
    tpe.global_vector_ln: {},
    tpe.global_nm_structured: {"m": 4, "choices": [0, 4]},
}


@pytest.mark.parametrize("function", EMPTYING, ids=lambda function: function.__name__)
def test_one_warning_names_what_is_emptied_and_points_to_the_caller(function):
    small, large = nn.Linear(4, 3), nn.Linear(4, 5)
    small.weight.data.uniform_(0.01, 0.02)
    large.weight.data.uniform_(1, 2)
    for layer in (small, large):
        layer.weight.grad = layer.weight.detach().clone()
    with pytest.warns(UserWarning, match=rf"{function.__name__}.*Linear\.weight of shape \(3, 4\)") as caught:
        function(weights(small, large), target_sparsity=12 / 32 if function in list(EMPTYING)[:2] else 0.375,
                 min_keep=0, **{"normalize": None} if "ln" in function.__name__ else {},
                 **EMPTYING[function])  # fmt: skip
    assert len(caught) == 1
    assert "(5, 4)" not in str(caught[0].message)
    assert caught[0].filename == __file__
    assert not small.weight_mask.any()
    assert large.weight_mask.all()


def test_the_warning_tells_layers_of_one_shape_apart():
    layers = [linear([3.0, 4.0]), linear([0.1, 0.2]), linear([5.0, 6.0])]
    with pytest.warns(UserWarning, match=r"params\[1\]"):
        tpe.global_unstructured(weights(*layers), amount=2, min_keep=0)


@every_row
def test_a_warning_that_is_an_error_changes_nothing(row):
    model, args = ready(row.function)
    before = Snapshot(*model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"min_keep=0"):
            row.function(**{**args, "amount": 1.0, "min_keep": 0})
    assert before.differences() == []


# --------------------------------------------------------------------------------------- normalization, by example


@pytest.mark.parametrize(
    ("normalize", "sizes", "kept"),
    [
        (None, (2.0, 1.0), (1, 3)),  # norms 1.8 to 2.4 and 2.7 to 3.6: the larger kernels win though entries are half
        ("mean", (2.0, 1.0), (3, 1)),  # per entry
        ("max", (2.0, 1.0), (2, 2)),  # a layer's scale drops out
        ("sum", (2.0, 1.0), (2, 2)),
        ("mean", (1.0, 2.0), (1, 3)),
        ("max", (1.0, 1e6), (2, 2)),
    ],
)
@pytest.mark.parametrize("function", [tpe.global_kernel_ln])
def test_what_is_compared_between_kernels_of_different_size(function, normalize, sizes, kept):
    layers = two_convolutions(*sizes)
    function(weights(*layers), amount=4, normalize=normalize)
    assert tuple(int(layer.weight_mask.amax((2, 3)).sum()) for layer in layers) == kept


def test_sums_and_maxima_are_those_of_what_is_alive():
    layers = [nn.Linear(1, 4, bias=False), nn.Linear(1, 4, bias=False)]
    layers[0].weight.data = torch.tensor([[100.0], [1.0], [0.8], [0.6]])
    layers[1].weight.data = torch.tensor([[1.0], [0.9], [0.7], [0.5]])
    prune.custom_from_mask(layers[0], "weight", torch.tensor([[0.0], [1.0], [1.0], [1.0]]))
    tpe.global_ln_structured(weights(*layers), amount=3, normalize="max")
    assert [flat(layer.weight_mask) for layer in layers] == [[0, 1, 1, 0], [1, 1, 0, 0]]


@pytest.mark.parametrize("n", [-math.inf, -1, 0.5, 3])
@pytest.mark.parametrize("normalize", ["mean", "max", "sum", None])
def test_other_orders_of_norm_keep_the_larger_units(n, normalize):
    layers = two_convolutions()
    tpe.global_kernel_ln(weights(*layers), amount=0.5, n=n, normalize=normalize)
    assert sum(int(layer.weight_mask.amax((2, 3)).sum()) for layer in layers) == 4
    assert all(layer.weight_mask[1, 1].all() for layer in layers)


# ------------------------------------------------------------------------------------------- tied and listed twice


@pytest.mark.parametrize("first", ["embedding", "decoder"])
@pytest.mark.parametrize("earlier", ["nowhere", "embedding", "decoder", "both"])
def test_a_tied_tensor_counts_once_and_is_pruned_everywhere(first, earlier):
    model = Tied()
    for name in ("embedding", "decoder"):
        if earlier in (name, "both"):
            prune.custom_from_mask(
                getattr(model, name), "weight", (torch.arange(60).reshape(10, 6) % 4 != len(name) % 3).float()
            )
    dead = {"nowhere": 0, "embedding": 15, "decoder": 15, "both": 30}[earlier]
    modules = [model.embedding, model.layer, model.decoder]
    shared = owner(model.embedding)
    assert shared is owner(model.decoder)
    tpe.global_unstructured(weights(*modules[:: 1 if first == "embedding" else -1]), target_sparsity=0.5)
    assert torch.equal(model.embedding.weight_mask, model.decoder.weight_mask)
    zeros = [int((module.weight_mask == 0).sum()) for module in modules]
    assert zeros[0] + zeros[1] == round(0.5 * (60 + 36))
    assert zeros[0] >= dead
    assert owner(model.embedding) is owner(model.decoder) is shared
    model(torch.arange(10)).square().sum().backward()
    assert torch.equal(shared.grad == 0, (shared.grad * model.decoder.weight_mask) == 0)
    tpe.remove_all(model)
    assert model.embedding.weight is model.decoder.weight is shared


def test_what_is_listed_twice_counts_once():
    once, twice = linear([1.0, 2.0, 3.0, 4.0, 5.0]), linear([1.0, 2.0, 3.0, 4.0, 5.0])
    tpe.global_unstructured(weights(once), amount=0.4)
    tpe.global_unstructured(weights(twice, twice, twice), amount=0.4)
    assert torch.equal(once.weight_mask, twice.weight_mask)
    assert not isinstance(next(iter(twice._forward_pre_hooks.values())), prune.PruningContainer)


def test_layers_that_share_a_weight_share_no_batch_norm_pair():
    first, second = nn.Conv2d(1, 4, 1, bias=False), nn.Conv2d(1, 4, 1, bias=False)
    second.weight = first.weight
    norms = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    before = Snapshot(first, second, *norms)
    # the two would want different channels of one tensor, and one BatchNorm would keep its bias on a masked channel
    with pytest.raises(ValueError, match=r"params\[1\]|pairs\[1\]"):
        tpe.global_bn_scaling([(first, norms[0]), (second, norms[1])], amount=2)
    assert before.differences() == []


def test_batch_norms_and_layers_of_several_pairs_are_refused():
    conv, other, bn, norm_ = nn.Conv2d(1, 4, 1), nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    for pairs in ([(conv, bn), (conv, norm_)], [(conv, bn), (other, bn)]):
        before = Snapshot(conv, other, bn, norm_)
        with pytest.raises(ValueError, match=r"pairs\[1\].*another pair"):
            tpe.global_bn_scaling(pairs, amount=1)
        assert before.differences() == []


def test_batch_norm_pruning_silences_the_channels():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)
    ).eval()
    for bn in (model[1], model[4]):
        bn.weight.data = torch.randn(bn.weight.shape, generator=generator)
        bn.bias.data = torch.randn(bn.bias.shape, generator=generator)
    gammas = sorted(flat(model[1].weight.abs()) + flat(model[4].weight.abs()))
    tpe.global_bn_scaling(tpe.bn_pairs(model, torch.ones(1, 2, 8, 8)), amount=0.5)
    after = model[:2](torch.randn(3, 2, 8, 8, generator=generator)), model(torch.ones(1, 2, 8, 8))
    for bn, output in zip((model[1], model[4]), after, strict=True):
        assert torch.equal(bn.weight_mask.bool(), bn.weight_orig.abs() > gammas[4])
        assert not output[:, bn.weight_mask == 0].any()
