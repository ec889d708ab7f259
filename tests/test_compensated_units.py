"""Whole input columns and channels go, by what they cost once the rest has adapted; the rest is re-fitted."""

import oracles
import pytest
import torch
from compensating import (
    ALL,
    MARKS,
    SPOILT,
    Conv1D,
    build,
    columns,
    data,
    equal,
    history,
    matrix,
    mlp,
    never_worse,
    pairs,
    prune_and_compensate,
    pruned,
    rows,
    same_as_oracle,
    spoilt,
    watch,
    weights,
)
from hypothesis import given
from hypothesis import strategies as st
from snapshots import Snapshot
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe
from torchprune_ext.compensation import greedy, solvers
from torchprune_ext.masks import unit_mask

pytestmark = MARKS
NAMED = ["obs", "admm", "wanda", "magnitude"]
COLUMNS = tpe.Channel(dim=1)


# ------------------------------------------------------------------------------------------------- the greedy search


@st.composite
def problems(draw):
    """Draw a layer's least squares with dead, equal and constant inputs, and masks that leave units in part."""
    groups, width, units, outputs = (draw(st.integers(1, most)) for most in (2, 3, 6, 4))
    seed, inputs = draw(st.integers(0, 9)), width * units
    torch.manual_seed(seed)
    samples = draw(st.sampled_from([3, 40]))
    x, weight = torch.randn(groups, samples, inputs).double(), torch.randn(groups, outputs, inputs).double()
    x = x + x.roll(1, 2)
    for place in draw(st.lists(st.integers(0, inputs - 1), max_size=inputs)):
        how = draw(st.sampled_from(["dead", "equal", "constant", "small"]))
        if how == "equal":
            x[..., place] = x[..., draw(st.integers(0, inputs - 1))]
        else:
            x[..., place] *= {"dead": 0, "constant": 0, "small": 1e-6}[how]
            x[..., place] += how == "constant"
    moments = solvers.Moments()
    moments.add(x, x @ weight.mT + draw(st.sampled_from([0.0, 0.1])) * torch.randn(groups, samples, outputs))
    problem = moments.problem(draw(st.sampled_from([None, torch.zeros(groups, outputs).double()])))
    mask = torch.ones_like(weight)
    for unit in draw(st.lists(st.integers(0, units - 1), max_size=units)):
        mask[draw(st.integers(0, groups - 1)), :, unit * width : (unit + 1) * width] = 0
    return problem, mask, width, draw(st.integers(1, units))


@given(drawn=problems(), panel=st.sampled_from([1, 4, greedy.PANEL]))
def test_units_go_as_the_least_squares_without_them_says(drawn, panel):
    problem, mask, width, keep = drawn
    gram, cross = problem.damped(torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greedy, "PANEL", panel)
        found = greedy.greedy_units(problem, mask, width, keep)
    for group in range(len(gram)):
        alive = [u for u in range(found.shape[1]) if mask[group, :, u * width : (u + 1) * width].any()]
        ours = found[group].nonzero().flatten().tolist()
        assert len(ours) == min(keep, len(alive))
        assert set(ours) <= set(alive)
        theirs, margin = oracles.greedy_units(gram[group], cross[group], alive, width, keep)
        if margin > 1e-9:  # else two units are as good as each other, and which goes may change what comes after
            assert ours == theirs


@pytest.mark.parametrize("width", [1, 2])
def test_of_equal_units_the_later_go(width):
    x = torch.cat([torch.randn(50, width), torch.zeros(50, 5 * width)], 1).double()[None]
    moments = solvers.Moments()
    moments.add(x, x.sum(-1, keepdim=True))
    problem = moments.problem(None)
    for keep in range(1, 7):
        found = greedy.greedy_units(problem, torch.ones(1, 1, 6 * width), width, keep)
        assert found.nonzero()[:, 1].tolist() == list(range(keep))


@given(data=st.data())
def test_rows_that_keep_the_same_columns_are_fitted_exactly(data):
    problem, mask, _, _ = data.draw(problems())
    start = torch.randn_like(mask)
    found = solvers.refit(problem, start, mask)
    gram, cross = problem.damped(torch.float64)
    gradient = (found @ gram - cross - solvers.RIDGE * start) * mask
    assert not found[mask == 0].any()
    assert float(gradient.abs().max()) <= 1e-9 * (1 + float(cross.abs().max()))


# ---------------------------------------------------------------------------------------------------- what a unit is


@given(data=st.data())
def test_channels_are_runs_of_neighbours(data):
    groups, rows, per_group, size = (data.draw(st.integers(0 if least else 1, 3)) for least in (0, 1, 1, 0))
    shape = (groups * rows, per_group * size, *data.draw(st.sampled_from([(), (2,), (1, 3)])))
    dim = data.draw(st.sampled_from([1, 1 - len(shape)]))
    if groups == 1 and data.draw(st.booleans()):
        dim, shape = 0, (shape[1], shape[0], *shape[2:])
    units = oracles.channels(shape, dim, groups, size)
    flags = torch.tensor(data.draw(st.lists(st.integers(0, 1), min_size=len(units), max_size=len(units))))
    mask = unit_mask(flags, tpe.Channel(dim, groups, size), torch.ones(shape))
    expected = torch.zeros(shape).flatten()
    for flag, unit in zip(flags, units, strict=True):
        expected[unit] = float(flag)
    assert torch.equal(mask.flatten(), expected)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"size": 0}, ValueError, "size=0"),
        ({"size": 2.0}, TypeError, "size=2.0"),
        ({"size": True}, TypeError, "size=True"),
    ],
)
def test_bad_sizes(arguments, error, words):
    with pytest.raises(error, match=words):
        tpe.Channel(**arguments)


def test_a_size_that_does_not_divide_names_those_that_do():
    with pytest.raises(ValueError, match=r"size=4 does not divide the 6 channels .* from \[1, 2, 3, 6\]"):
        tpe.Channel(dim=1, size=4).split(torch.ones(2, 6))


# ---------------------------------------------------------------------------------------------------- one whole layer

UNITS = {
    "linear": COLUMNS,
    "linear, tokens": tpe.Channel(dim=-1, size=2),
    "linear, no bias": tpe.Channel(dim=1, size=3),
    "(in, out)": tpe.Channel(dim=0, size=2),
    "(in, out), square": tpe.Channel(dim=-2),
    "conv2d": COLUMNS,
    "conv2d, no bias": COLUMNS,
    "grouped": COLUMNS,
    "grouped, no bias": tpe.Channel(dim=1, groups=2),
    "strided": tpe.Channel(dim=-3),
    "conv1d": COLUMNS,
    "conv1d, grouped": COLUMNS,
}
several = pytest.mark.parametrize("name", UNITS)


def widths(module, unit):
    """Return how many columns of the layer's matrix a unit has."""
    return unit.size * (1 if isinstance(module, Conv1D) else module.weight[0, 0].numel())


def kept(module, unit):
    """Return which units are left, (groups, units), checked to be whole."""
    mask = matrix(module, module.weight_mask)
    each = mask.unflatten(-1, (-1, widths(module, unit))).movedim(2, 1).flatten(2)
    assert ((each == 1).all(-1) | (each == 0).all(-1)).all()
    return each[..., 0] != 0


@several
@pytest.mark.parametrize("criterion", NAMED)
def test_all_rows_keep_the_same_units(name, criterion):
    for sparsity in (0.0, 0.4, 1.0) if criterion == "obs" else (0.4,):
        model, batches = build(ALL[name][0]), data(ALL[name][1], (20, 12))
        options = {"target_sparsity": sparsity, "unit": UNITS[name], "criterion": criterion}
        fits = prune_and_compensate(model, batches, pairs(model), **options)
        left = kept(model, UNITS[name])
        assert set(left.sum(1).tolist()) == {max(1, round(left.shape[1] * (1 - sparsity)))}
        never_worse(fits)
        same_as_oracle(name, model, batches, fits)


@several
def test_the_default_is_the_greedy_search_on_the_layers_own_data(name):
    model, batches = build(ALL[name][0]), data(ALL[name][1], (30, 30))
    x, y = watch(model, model, batches)
    x, y = columns(model, x), rows(model, y)
    shift = model.bias is not None
    moments = [t - t.mean(1, keepdim=True) if shift else t for t in (x, y)]
    gram, cross = moments[0].mT @ moments[0], moments[1].mT @ moments[0]
    prune_and_compensate(model, batches, pairs(model), target_sparsity=0.5, unit=UNITS[name])
    left = kept(model, UNITS[name])
    for group, each in enumerate(gram):
        size = each.diagonal().mean()
        ridge = each / size + solvers.RIDGE * torch.eye(len(each))
        arguments = range(left.shape[1]), widths(model, UNITS[name]), int(left[0].sum())
        theirs, margin = oracles.greedy_units(ridge, cross[group] / size, *arguments)
        assert margin > 1e-9
        assert left[group].nonzero().flatten().tolist() == theirs


@pytest.mark.parametrize("criterion", ["wanda", "magnitude"])
def test_scores_of_a_unit_are_sums_of_squares(criterion):
    model, batches = build(lambda: nn.Linear(8, 3)), data((8,), (40,))
    scores = model.weight.detach().square() * (batches[0][0].square().sum(0) if criterion == "wanda" else 1)
    expected = scores.sum(0).view(4, 2).sum(1).argsort(descending=True)[:2]
    options = {"unit": tpe.Channel(1, size=2), "criterion": criterion, "target_sparsity": 0.5}
    prune_and_compensate(model, batches, pairs(model), **options)
    assert kept(model, options["unit"])[0].nonzero().flatten().tolist() == sorted(expected.tolist())


def test_scores_may_be_taken_in_steps():
    model, batches = build(lambda: nn.Linear(16, 4)), data((16,), (60,))
    options = {"unit": COLUMNS, "criterion": "wanda", "target_sparsity": 0.75}
    fits = prune_and_compensate(model, batches, pairs(model), steps=4, **options)
    assert kept(model, COLUMNS).sum() == 4
    assert repr(history(model)).endswith("criterion='wanda', steps=4)")
    once = build(lambda: nn.Linear(16, 4))
    prune_and_compensate(once, batches, pairs(once), **options)
    assert not torch.equal(once.weight_mask, model.weight_mask)
    never_worse(fits)


def test_columns_of_a_flattened_channel():
    model = build(lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)))
    params, unit = pairs(model), {(model[3], "weight"): tpe.Channel(dim=1, size=16)}
    prune_and_compensate(model, data((2, 6, 6), (30,)), params, target_sparsity=0.5, unit=unit)
    assert kept(model[3], tpe.Channel(dim=1, size=16)).sum() == 2
    assert not prune.is_pruned(model[0])


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("criterion", NAMED)
def test_units_cope_with_hard_inputs(how, criterion):
    dtype = torch.float64 if criterion == "admm" else torch.float32
    model = build(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), dtype=dtype)
    batches = spoilt(data((6,), (17, 9), dtype=dtype), how)
    options = {"target_sparsity": 0.5, "unit": tpe.Channel(dim=1, size=2), "criterion": criterion}
    never_worse(prune_and_compensate(model, batches, pairs(model), **options))
    assert all(torch.isfinite(tensor).all() for both in weights(model) for tensor in both)
    assert [kept(m, options["unit"]).sum().item() for m, _ in pairs(model)] == [2, 2]


def test_half_precision():
    for dtype in (torch.float16, torch.bfloat16):
        model = build(mlp, dtype=dtype)
        prune_and_compensate(model, data((6,), (40,), dtype=dtype), pairs(model), target_sparsity=0.5, unit=COLUMNS)
        assert [kept(m, COLUMNS).sum().item() for m, _ in pairs(model)] == [3, 4, 4]


def test_greedy_beats_the_others_where_inputs_repeat_each_other():
    error = dict.fromkeys(NAMED, 0.0)
    for seed in range(4):
        torch.manual_seed(seed)
        batches = [(torch.randn(200, 8).double() @ torch.randn(8, 32).double() + 0.3 * torch.randn(200, 32), None)]
        for criterion in NAMED:
            model = build(lambda: nn.Linear(32, 16), seed)
            options = {"criterion": criterion, "unit": COLUMNS, "target_sparsity": 0.7}
            error[criterion] += prune_and_compensate(model, batches, pairs(model), **options)[model, "weight"].after
    assert error["obs"] < error["admm"] < error["magnitude"]
    assert error["obs"] < error["wanda"]


# ------------------------------------------------------------------------------------------------------ a whole model


def test_a_tensor_without_a_unit_loses_nothing_and_is_refitted():
    found = []
    for goal in (0.5, "each", "all"):
        model, batches = build(mlp), data((6,), (40, 20))
        first, second, third = params = pairs(model)
        goals = {"each": {second: 0.5}, "all": {first: 0.0, second: 0.5, third: 0.0}}.get(goal, goal)
        before = [module.weight.detach().clone() for module, _ in params]
        fits = prune_and_compensate(model, batches, params, target_sparsity=goals, unit={second: COLUMNS})
        assert list(fits) == params
        assert [prune.is_pruned(module) for module, _ in params] == [False, True, False]
        assert not torch.equal(third[0].weight, before[2])
        close = torch.testing.assert_close
        close(first[0].weight.detach(), before[0])  # what it gets has not changed
        found.append(weights(model))
    equal(found[1:], [found[0], found[0]])


def test_tensors_with_units_of_their_own():
    model, batches = build(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7))), data((6,), (40,))
    first, second = params = pairs(model)
    unit, goals = {first: tpe.Channel(1, size=2), second: COLUMNS}, {first: 1 / 3, second: 0.75}
    prune_and_compensate(model, batches, params, target_sparsity=goals, unit=unit)
    assert [kept(key[0], unit[key]).sum().item() for key in params] == [2, 2]
    assert [f"{goals[key]}, unit={unit[key]!r}, criterion='obs')" in repr(history(key[0])) for key in params]


@pytest.mark.parametrize("criterion", NAMED)
@pytest.mark.parametrize("name", ["linear", "(in, out)", "grouped", "deep mlp"])
def test_more_units_go_and_none_comes_back(criterion, name):
    units = {"(in, out)": tpe.Channel(dim=0)}
    model, batches, dense = build(ALL[name][0]), data(ALL[name][1], (40,)), build(ALL[name][0])
    options = {"unit": units.get(name, COLUMNS), "criterion": criterion, "dense": dense}
    before = [torch.ones_like(module.weight) for module, _ in pairs(model)]
    for sparsity, reached in ((0.3, 0.3), (0.6, 0.6), (0.5, 0.6)):  # where more is gone already, it stays as it is
        never_worse(prune_and_compensate(model, batches, pairs(model), target_sparsity=sparsity, **options))
        masks = [module.weight_mask.clone() for module, _ in pairs(model)]
        for (module, _), mask, earlier in zip(pairs(model), masks, before, strict=True):
            assert bool((mask <= earlier).all())
            left = kept(module, options["unit"])
            assert set(left.sum(1).tolist()) == {max(1, round(left.shape[1] * (1 - reached)))}
        before = masks
    with pytest.raises(ValueError, match="dense="):
        prune_and_compensate(model, batches, pairs(model), **{**options, "target_sparsity": 0.7, "dense": None})


@pytest.mark.parametrize("criterion", NAMED)
@pytest.mark.parametrize("name", ["linear", "grouped", "deep mlp"])
def test_entries_that_are_pruned_stay_so_in_units_that_stay(criterion, name):
    for amount in (0.3, 0.9):
        model, params = pruned(name, amount)
        before = [matrix(module, module.weight_mask) for module, _ in params]
        batches = data(ALL[name][1], (30,))
        fits = prune_and_compensate(model, batches, params, target_sparsity=0.5, unit=COLUMNS, criterion=criterion)
        never_worse(fits)
        for (module, _), mask in zip(params, before, strict=True):
            width = widths(module, COLUMNS)
            left, had = (
                t.unflatten(-1, (-1, width)).movedim(2, 1).flatten(2)
                for t in (matrix(module, module.weight_mask), mask)
            )
            stay = left.any(-1)
            assert torch.equal(left, had * stay[..., None])
            goal = max(1, round(0.5 * had.shape[1]))
            assert stay.sum(1).tolist() == had.any(-1).sum(1).clamp_max(goal).tolist()


def test_undo_takes_the_units_back():
    model, batches = build(mlp), data((6,), (40,))
    prune_and_compensate(model, batches, pairs(model), target_sparsity=0.5, unit=COLUMNS)
    for module, name in pairs(model):
        assert "prune_and_compensate(target_sparsity=0.5, unit=Channel(dim=1, groups=1, size=1), criterion='obs')" in (
            repr(history(module))
        )
        with pytest.warns(UserWarning, match="re-fitted"):
            tpe.undo(module, name)
        assert not prune.is_pruned(module)


def test_a_bias_makes_up_for_a_unit_that_is_constant():
    layer = build(lambda: nn.Linear(4, 3, bias=False))
    [(x, _)] = batches = data((4,), (30,))
    x[:, 2] = 5.0
    y = layer(x).detach()
    options = {"target_sparsity": 0.25, "unit": COLUMNS, "create_bias": True}
    fits = prune_and_compensate(layer, batches, pairs(layer), **options)
    assert kept(layer, COLUMNS)[0].tolist() == [True, True, False, True]
    torch.testing.assert_close(layer(x).detach(), y, rtol=1e-3, atol=1e-3)
    assert fits[layer, "weight"].after < 1e-9


# ------------------------------------------------------------------------------------------------------------ refusals

one = lambda model: pairs(model)[0]  # noqa: E731
REFUSED = {
    "a list": (mlp, lambda model: [COLUMNS], {}, TypeError, r"unit=\[Channel.* is a list"),
    "an int": (mlp, lambda model: 1, {}, TypeError, "unit=1 is a int"),
    "nothing": (mlp, lambda model: {}, {}, ValueError, "unit={} lists no tensor"),
    "another value": (mlp, lambda model: {one(model): 64}, {}, TypeError, r"unit\[Linear, 'weight'\]=64 is a int"),
    "not listed": (
        mlp,
        lambda model: {(nn.Linear(2, 2), "weight"): COLUMNS},
        {},
        ValueError,
        "entries for what params does not list: Linear, 'weight'",
    ),
    "not a key": (
        mlp,
        lambda model: {model[0]: COLUMNS},
        {},
        ValueError,
        "entries for what params does not list: a Linear",
    ),
    "outputs": (
        mlp,
        lambda model: tpe.Channel(),
        {},
        ValueError,
        r"0.weight of shape \(8, 6\).*dim=0 counts the outputs.* Pass Channel\(dim=1\)",
    ),
    "outputs of (in, out)": (ALL["(in, out)"][0], lambda model: COLUMNS, {}, ValueError, r"Pass Channel\(dim=0\)"),
    "no axis": (mlp, lambda model: tpe.Channel(dim=2), {}, ValueError, "dim=2 is not an axis"),
    "kernel's axis": (ALL["conv2d"][0], lambda model: tpe.Channel(dim=2), {}, ValueError, "dim=2 counts"),
    "size": (
        mlp,
        lambda model: tpe.Channel(1, size=4),
        {},
        ValueError,
        r"0.weight.*size=4 does not divide the 6 .* from \[1, 2, 3, 6\]",
    ),
    "last size": (
        mlp,
        lambda model: {pairs(model)[2]: tpe.Channel(1, size=3)},
        {},
        ValueError,
        r"4.weight.*size=3 does not divide the 7 .* from \[1, 7\]",
    ),
    "one unit": (mlp, lambda model: {one(model): tpe.Channel(1, size=6)}, {}, ValueError, "there is one unit, and"),
    "depthwise": (ALL["depthwise"][0], lambda model: COLUMNS, {}, ValueError, "there is one unit in each group"),
    "groups": (ALL["grouped"][0], lambda model: tpe.Channel(1, groups=3), {}, ValueError, "groups=2, not 3"),
    "groups of a linear": (mlp, lambda model: tpe.Channel(1, groups=2), {}, ValueError, "groups=1, not 2"),
    "pattern": (
        mlp,
        lambda model: COLUMNS,
        {"pattern": tpe.NM(1, 2), "target_sparsity": None},
        TypeError,
        "unit=.*pattern=",
    ),
    "no sparsity": (mlp, lambda model: COLUMNS, {"target_sparsity": None}, TypeError, "target_sparsity=None"),
    "steps": (mlp, lambda model: COLUMNS, {"steps": 4}, ValueError, "steps=4 .* criterion='obs' with unit="),
    "criterion": (mlp, lambda model: COLUMNS, {"criterion": "best"}, ValueError, "criterion='best'"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_refused_units_leave_no_trace(why):
    make, unit, options, error, words = REFUSED[why]
    model = build(make)
    [inputs] = {ALL[name][1] for name in ALL if ALL[name][0] is make} or {(6,)}
    before = Snapshot(model)
    with pytest.raises(error, match=words):
        prune_and_compensate(
            model, data(inputs), pairs(model), **{"target_sparsity": 0.5, "unit": unit(model), **options}
        )
    assert not before.differences()


def test_a_unit_of_the_wrong_type_is_refused_before_the_data_is_read():
    def loader():
        raise ArithmeticError("read")
        yield

    model = build(mlp)
    with pytest.raises(TypeError, match="unit=64"):
        prune_and_compensate(model, loader(), pairs(model), target_sparsity=0.5, unit=64)


def test_a_sparsity_without_a_unit_is_refused():
    model = build(mlp)
    first, second, _ = params = pairs(model)
    for goals, words in (
        ({first: 0.5, second: 0.5}, r"target_sparsity\[Linear, 'weight'\]=0.5, but unit has no entry"),
        ({first: 0.0}, "has no entry for Linear.weight"),
        ({second: 1.5}, "1.5"),
        ({second: 0.5, (nn.Linear(2, 2), "weight"): 0.5}, "entries for what params does not list: Linear, 'weight'"),
    ):
        before = Snapshot(model)
        with pytest.raises(ValueError, match=words):
            prune_and_compensate(model, data((6,)), params, target_sparsity=goals, unit={second: COLUMNS})
        assert not before.differences()


def test_one_unit_may_stay_where_nothing_is_to_go():
    model = build(ALL["depthwise"][0])
    prune_and_compensate(
        model, data((3, 5, 5)), pairs(model), target_sparsity=dict.fromkeys(pairs(model), 0.0), unit=COLUMNS
    )
    assert bool(model.weight_mask.all())
