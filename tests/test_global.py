"""Every global call against sorting the whole list in plain Python, and what it promises about the modules."""

import gc
import itertools
import math
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

import oracles
import pytest
import torch
from cases import (
    DTYPES,
    LAYOUTS,
    POSITIVE,
    batch_norm_for,
    build,
    draw_tensor,
    flat,
    output_axis,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from snapshots import Snapshot
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe

# ----------------------------------------------------------------------------------------------------- the oracle


@dataclass
class Part:
    """One tensor of the list: its units, one score per unit, and its mask, all as lists."""

    units: list
    scores: list
    mask: list

    def alive(self):
        """Return the units that have an entry left."""
        return [u for u, unit in enumerate(self.units) if any(self.mask[i] for i in unit)]

    def floor(self, min_keep):
        """Return how many units stay at least."""
        least = min_keep if isinstance(min_keep, int) else math.ceil(Fraction(min_keep) * len(self.units))
        return min(least, len(self.alive()))


def how_many(parts, amount=None, target_sparsity=None, **_):
    """Return how many units of all ``parts`` go; units that are gone already count for ``target_sparsity``."""
    left = sum(len(part.alive()) for part in parts)
    total = sum(len(part.units) for part in parts)
    return oracles.how_many(amount, left) if amount is not None else round(target_sparsity * total) - (total - left)


def spend(parts, min_keep=1, **asked):
    """Return the masks of all ``parts`` after pruning, or None if the floors leave too little to take."""
    free = []
    for p, part in enumerate(parts):
        best_first = sorted(part.alive(), key=lambda u, scores=part.scores: (-scores[u], u))
        free += [(part.scores[u], -p, -u) for u in best_first[part.floor(min_keep) :]]
    k = how_many(parts, **asked)
    if not 0 <= k <= len(free):
        return None
    masks = [list(part.mask) for part in parts]
    for _, p, u in sorted(free)[:k]:  # of equal scores, the later tensor and the higher index go first
        for i in parts[-p].units[-u]:
            masks[-p][i] = 0
    return masks


def norm(values, n):
    """Return the Ln norm."""
    return {1: sum, 2: lambda v: math.sqrt(sum(x * x for x in v)), math.inf: max, 0: lambda v: sum(x != 0 for x in v)}[
        n
    ]([abs(x) for x in values])


def normalized(norms, n, size, how):
    """Return the norms of units of ``size`` entries as they are compared between tensors."""
    if how == "mean":
        roots = {1: size, 2: math.sqrt(size), math.inf: 1, 0: size}
        return [x / roots[n] for x in norms]
    scale = {None: 1, "max": max(norms, default=0), "sum": sum(norms)}[how]
    return [x / scale if scale else x for x in norms]


# ------------------------------------------------------------------------------------------------------- the rows


@dataclass(frozen=True)
class Row:
    """One global function. ``bn`` rows are called with (layer, bn) pairs, all others with (module, name) pairs."""

    function: Callable[..., None]
    shapes: st.SearchStrategy
    draw: Callable  # (draw, groups) -> keyword arguments that the scores come from
    units: Callable  # (layer, shape, args) -> units
    scores: Callable  # (layer, values, units, args) -> one number per unit; values are 0 where masked
    bn: bool = False

    @property
    def id(self):
        """The function's name is the row's name."""
        return self.function.__name__


ENTRIES = st.one_of(
    st.sampled_from([(0,), (1,), (1, 1), (0, 3), (2, 0), (7, 5)]),
    st.tuples(st.integers(0, 9)),
    st.tuples(st.integers(0, 4), st.integers(0, 7)),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3)),
)
KERNELS = st.one_of(
    st.sampled_from([(1, 1, 1), (2, 3, 0), (2, 2, 1, 1), (3, 2, 3, 3)]),
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3)),
    st.tuples(st.integers(1, 2), st.integers(1, 2), *[st.integers(1, 2)] * 3),
)
SLICES = st.one_of(st.sampled_from([(1, 1), (0, 3), (3, 0), (5, 7)]), st.tuples(st.integers(0, 5), st.integers(0, 6)),
                   KERNELS)  # fmt: skip
CHANNELS = st.one_of(st.tuples(st.integers(1, 6), st.integers(1, 3)), KERNELS.filter(lambda shape: 0 not in shape))


def owner(module):
    """Return the parameter that holds the dense weight."""
    return module._parameters.get("weight_orig", module._parameters.get("weight"))


def dense_mask(module):
    """Return the mask as a list."""
    mask = module._buffers.get("weight_mask")
    return [1] * owner(module).numel() if mask is None else [int(m != 0) for m in flat(mask)]


def tensors_for(draw, groups, levels, dtypes=DTYPES):
    """Draw one tensor for each parameter and list it for all modules that share it."""
    drawn = {}
    for modules in groups:
        shape = owner(modules[0]).shape
        tensor = draw_tensor(draw, shape, levels, draw(st.sampled_from(dtypes)), draw(st.sampled_from(LAYOUTS)))
        drawn |= {(module, "weight"): tensor for module in modules}
    return drawn


def draw_scores(draw, groups):
    return {"importance_scores": tensors_for(draw, groups, POSITIVE)} if draw(st.booleans()) else {}


def draw_gradients(draw, groups):
    if draw(st.booleans()):
        return {"grads": tensors_for(draw, groups, (-2.0, -1.0, 0.0, 0.5, 1.0))}
    for modules in groups:
        parameter = owner(modules[0])
        parameter.grad = draw_tensor(draw, parameter.shape, dtype=parameter.dtype)
    return {}


def draw_norm(*dims):
    def arguments(draw, groups):
        # sums of roots would round differently here and there, and blur ties between tensors
        how, orders = draw(st.sampled_from([("mean", (0, 1, 2, math.inf)), ("max", (0, 1, 2, math.inf)),
                                            ("sum", (0, 1, math.inf)), (None, (0, 1, 2, math.inf))]))  # fmt: skip
        args = {"n": draw(st.sampled_from(orders)), "normalize": how, **draw_scores(draw, groups)}
        if how == "mean" and draw(st.booleans()):
            del args["normalize"]  # is the default
        return {**args, "dim": draw(st.sampled_from(dims))} if dims else args

    return arguments


def entry_scores(layer, values, units, args):
    return [abs(value) for value in values]


def gradient_scores(layer, values, units, args):
    return [abs(g) for g in flat(args["grads"][layer, "weight"] if args else owner(layer).grad)]


def obd_scores(layer, values, units, args):
    return [max(h, 0) * w * w / 2 for h, w in zip(flat(args["hessian_diag"][layer, "weight"]), values, strict=True)]


def norm_scores(layer, values, units, args):
    norms = [norm([values[i] for i in unit], args["n"]) for unit in units]
    return normalized(norms, args["n"], len(units[0]) if units else 0, args.get("normalize", "mean"))


def slices(layer, shape, args):
    dim = args["dim"] % len(shape)
    return list(oracles.collect(shape, lambda at: at[dim])) if math.prod(shape) else []


ROWS = (
    Row(tpe.global_unstructured, ENTRIES, draw_scores, lambda layer, shape, args: oracles.entries(shape), entry_scores),
    Row(
        tpe.global_gradient_magnitude,
        ENTRIES,
        draw_gradients,
        lambda layer, shape, args: oracles.entries(shape),
        gradient_scores,
    ),
    Row(
        tpe.global_obd_saliency,
        ENTRIES,
        lambda draw, groups: {"hessian_diag": tensors_for(draw, groups, (-1.0, 0.0, 0.5, 1.0, 2.0))},
        lambda layer, shape, args: oracles.entries(shape),
        obd_scores,
    ),
    Row(
        tpe.global_kernel_ln,
        KERNELS,
        draw_norm(),
        lambda layer, shape, args: oracles.kernels(shape),
        norm_scores,
    ),
    Row(
        tpe.global_vector_ln,
        SLICES,
        draw_norm(-1, 0, 1, -2),
        lambda layer, shape, args: oracles.vectors(shape, args["dim"]),
        norm_scores,
    ),
    Row(tpe.global_ln_structured, SLICES, draw_norm(0, 1, -1), slices, norm_scores),
    Row(
        tpe.global_bn_scaling,
        CHANNELS,
        lambda draw, groups: {"paired": draw(st.booleans())},
        lambda layer, shape, args: oracles.channels(shape, *output_axis(layer)),
        lambda layer, values, units, args: [abs(g) for g in flat(owner(args["bns"][layer]))],
        bn=True,
    ),
)
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)


# ------------------------------------------------------------------------------------------------ drawn models


def prune_before(draw, module):
    """Leave the module as it is, or prune it natively or by us; the weight is trained afterwards."""
    chosen = draw(st.sampled_from(["not", "not", "mask", "ours", "both"]))
    parameter = owner(module)
    if chosen in ("mask", "both"):
        prune.custom_from_mask(module, "weight", draw_tensor(draw, parameter.shape, (0, 1, 1)))
    if chosen in ("ours", "both"):
        tpe.every_other(module, "weight", step=draw(st.integers(1, 4)), offset=draw(st.integers(0, 3)))
    if chosen != "not":  # the attribute is stale from now on
        parameter.data = draw_tensor(draw, parameter.shape, dtype=parameter.dtype, kind=draw(st.sampled_from(LAYOUTS)))


@dataclass
class Model:
    """Modules in groups that share one weight, in an order, some of them listed twice."""

    groups: list
    listing: list = field(default_factory=list)  # modules, in the order of the list
    bns: dict = field(default_factory=dict)

    def params(self, row):
        """Return the list that the function takes."""
        return [(module, self.bns[module] if row.bn else "weight") for module in self.listing]

    def ordered(self):
        """Return the groups in the order in which their first module is listed, that module first."""
        first = {}
        for module in self.listing:
            [group] = [g for g in self.groups if any(module is m for m in g)]
            first.setdefault(id(group), [module, *[m for m in group if m is not module]])
        return list(first.values())

    def parts(self, row, args):
        """Return the list as the oracle wants it."""
        parts = []
        for modules in self.ordered():
            shape = tuple(owner(modules[0]).shape)
            mask = [min(flags) for flags in zip(*map(dense_mask, modules), strict=True)] if math.prod(shape) else []
            units = [unit for unit in row.units(modules[0], shape, args) if unit]
            given = args.get("importance_scores", {}).get((modules[0], "weight"), owner(modules[0]))
            values = [v * m for v, m in zip(flat(given), mask, strict=True)]
            parts.append(Part(units, row.scores(modules[0], values, units, args), mask))
        return parts


def draw_model(draw, row):
    """Draw a model of one to four weights of any dtype and layout; tied, pruned before, listed twice."""
    groups, bns = [], {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        for _ in range(draw(st.integers(1, 4))):
            shape = draw(row.shapes)
            transposed = row.bn and len(shape) > 2 and draw(st.booleans())
            split = draw(st.sampled_from([g for g in (1, 2, 3) if shape[0] % g == 0])) if transposed else 1
            sharers = 1 if row.bn else draw(st.sampled_from([1, 1, 1, 2]))
            modules = [build(shape, transposed=transposed, groups=split) for _ in range(sharers)]
            dtype, form = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(LAYOUTS))
            shared = nn.Parameter(draw_tensor(draw, shape, dtype=dtype, kind=form))
            for module in modules:
                module.weight = shared
            if row.bn:
                dim, g = output_axis(modules[0])
                bns[modules[0]] = batch_norm_for(modules[0], draw_tensor(draw, (shape[dim] * g,)))
            for module in modules:
                prune_before(draw, module)
            groups.append(modules)
    modules = [module for group in groups for module in group]
    again = draw(st.lists(st.sampled_from(modules), max_size=2))
    return Model(groups, draw(st.permutations([*modules, *again])), bns)


def draw_budget(draw, parts):
    """Draw an amount and a floor, most of the time such that both hold."""
    min_keep = draw(st.sampled_from([0, 0, 1, 1, 2, 3, 0.0, 0.25, 0.5, 1.0, None]))
    floor = 1 if min_keep is None else min_keep
    left, total = (sum(len(f(part)) for part in parts) for f in (Part.alive, lambda part: part.units))
    k = draw(st.integers(0, left - sum(part.floor(floor) for part in parts)))
    asked = draw(
        st.sampled_from(
            [
                {"amount": k},
                {"amount": k / max(left, 1)},
                {"target_sparsity": (k + total - left) / max(total, 1)},
                {"amount": draw(st.floats(0, 1))},
                {"amount": draw(st.integers(0, left))},
            ]
        )
    )
    return asked if min_keep is None else {**asked, "min_keep": min_keep}


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


def check_mask(module, name, expected):
    """Check mask, product and history of a pruned tensor."""
    dense, mask = module._parameters[f"{name}_orig"], module._buffers[f"{name}_mask"]
    assert torch.equal(mask, torch.tensor(expected, dtype=dense.dtype).reshape(dense.shape))
    assert mask.dtype == dense.dtype
    strides = zip(mask.shape, mask.stride(), torch.empty_like(dense).stride(), strict=True)
    assert mask.numel() == 0 or all(size == 1 or ours == theirs for size, ours, theirs in strides)
    assert not mask.requires_grad
    assert torch.equal(getattr(module, name), dense * mask)
    [hook] = [hook for hook in module._forward_pre_hooks.values() if hook._tensor_name == name]
    last = hook[-1] if isinstance(hook, prune.PruningContainer) else hook
    assert repr(last).startswith("global_")


def linear(values, **options):
    """Return a Linear layer of one row with these weights."""
    layer = nn.Linear(len(values), 1, bias=False, **options)
    layer.weight.data.copy_(torch.tensor([values], dtype=torch.float64))
    return layer


def weights(*layers):
    return [(layer, "weight") for layer in layers]


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


@pytest.mark.parametrize("row", [row for row in ROWS if not row.bn], ids=lambda row: row.id)
def test_floor_and_amount_that_cannot_both_hold_are_refused(row):
    layers = [nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)]
    for layer in layers:
        layer.weight.grad = torch.ones_like(layer.weight)
    curvature = {"hessian_diag": {(layer, "weight"): layer.weight.detach() for layer in layers}}
    args = curvature if row.function is tpe.global_obd_saliency else {}
    before = Snapshot(*layers)
    for amount, min_keep in [(1.0, 1), (0.8, 0.5), (0.1, 1.0)]:
        with pytest.raises(ValueError, match=rf"amount={amount}, min_keep={min_keep}.*floors"):
            row.function(weights(*layers), amount=amount, min_keep=min_keep, **args)
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


def two_convolutions(small=1.0, large=1.0):
    layers = [nn.Conv2d(2, 2, 1, bias=False), nn.Conv2d(2, 2, 3, bias=False)]
    for layer, size in zip(layers, (small, large), strict=True):
        spread = torch.tensor([[0.9, 1.0], [1.1, 1.2]])[:, :, None, None]
        layer.weight.data = (size * spread * torch.ones_like(layer.weight)).detach()
    return layers


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


class Tied(nn.Module):
    """Embedding, one layer, and a decoder that shares the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embedding, self.layer, self.decoder = nn.Embedding(10, 6), nn.Linear(6, 6), nn.Linear(6, 10)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens):
        return self.decoder(torch.relu(self.layer(self.embedding(tokens))))


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


# ------------------------------------------------------------------------------------------------ history and memory


def reachable(root):
    """Return the bytes of every storage that can be reached from ``root``, through hooks and closures too."""
    todo, seen, storages = [root], [], {}
    known = set()
    while todo:
        thing = todo.pop()
        if id(thing) in known or isinstance(thing, type | types.ModuleType | types.CodeType | str | int | float):
            continue
        known.add(id(thing))
        seen.append(thing)  # keeps it alive, so that no id is used twice
        if torch.is_tensor(thing):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
            todo += [thing.grad] if thing.is_leaf else []
        if isinstance(thing, types.FunctionType):
            todo += [cell.cell_contents for cell in thing.__closure__ or ()]
            todo += [*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]
        else:
            todo += gc.get_referents(thing)
    return storages


def ready(function, state="fresh"):
    """Return modules and good arguments of a call of ``function`` on four layers."""
    layers = [nn.Conv2d(4, 6, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 2, 2), nn.Conv2d(8, 3, 1)]
    norms = [batch_norm_for(layer) for layer in layers]
    for layer in layers:
        layer.weight.grad = layer.weight.detach().clone()
        if state == "native":
            prune.l1_unstructured(layer, "weight", 0.1)
            prune.random_unstructured(layer, "bias", 1)
        elif state == "ours":
            tpe.vector_ln(layer, "weight", 1, dim=1)
            tpe.every_other(layer, "weight", step=5)
    args = {"params": weights(*layers), "amount": 0.3}
    if function is tpe.global_obd_saliency:
        args["hessian_diag"] = {pair: owner(pair[0]).detach().square() + 0.1 for pair in args["params"]}
    if function is tpe.global_bn_scaling:
        args["pairs"] = list(zip(layers, norms, strict=True))
        del args["params"]
    if function is tpe.global_nm_structured:
        args["m"] = 4
    return nn.ModuleList([*layers, *norms]), args


FUNCTIONS = [*(row.function for row in ROWS), tpe.global_nm_structured]
every_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
HISTORY = {
    "global_unstructured": "global_unstructured(amount=0.3, min_keep=1)",
    "global_gradient_magnitude": "global_gradient_magnitude(amount=0.3, min_keep=1)",
    "global_obd_saliency": "global_obd_saliency(amount=0.3, min_keep=1)",
    "global_kernel_ln": "global_kernel_ln(amount=0.3, min_keep=1, n=2, normalize='mean')",
    "global_vector_ln": "global_vector_ln(amount=0.3, min_keep=1, n=2, dim=-1, normalize='mean')",
    "global_ln_structured": "global_ln_structured(amount=0.3, min_keep=1, n=2, dim=0, normalize='mean')",
    "global_bn_scaling": "global_bn_scaling(amount=0.3, min_keep=1, paired=True)",
    "global_nm_structured": "global_nm_structured(amount=0.3, min_keep=1, n=?, m=4, dim=1)",
}


@every_function
@pytest.mark.parametrize("state", ["fresh", "native", "ours"])
def test_the_history_is_readable_and_holds_no_tensor(function, state):
    model, args = ready(function, state)
    for number in (1, 2):
        function(**args)
        for layer in model[:4]:
            [hook] = [hook for hook in layer._forward_pre_hooks.values() if hook._tensor_name == "weight"]
            methods = [*hook] if isinstance(hook, prune.PruningContainer) else [hook]
            assert len(methods) == number + {"fresh": 0, "native": 1, "ours": 2}[state]
            said = repr(methods[-1])
            assert said in [HISTORY[function.__name__].replace("?", str(n)) for n in range(5)]
            assert reachable(layer._forward_pre_hooks) == {}
    assert prune.is_pruned(model)


@every_function
def test_five_rounds_leave_what_one_leaves(function):
    model, args = ready(function)
    args["amount"] = 0.1
    function(**args)
    one = sorted(reachable(model).values())
    for _ in range(4):
        function(**args)
    assert sorted(reachable(model).values()) == one
    assert len(next(iter(model[0]._forward_pre_hooks.values()))) == 5


def test_five_rounds_on_a_larger_model_hold_dense_mask_and_product():
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 32, bias=False))
    for _ in range(5):
        tpe.global_unstructured(tpe.prunable_parameters(model), amount=0.2)
    assert sum(reachable(model).values()) == 3 * 4 * 64 * (64 + 32)


@every_function
def test_native_pruning_goes_on_from_there(function):
    model, args = ready(function)
    function(**args)
    before = [layer.weight_mask.clone() for layer in model[:4]]
    for layer in model[:4]:
        prune.l1_unstructured(layer, "weight", amount=1)
    for layer, mask in zip(model[:4], before, strict=True):
        assert int(mask.sum()) - int(layer.weight_mask.sum()) == 1
        assert torch.all(layer.weight_mask <= mask)
    tpe.remove_all(model)
    assert not prune.is_pruned(model)


@every_function
@pytest.mark.parametrize("state", ["fresh", "native", "ours"])
def test_amount_zero_changes_no_value(function, state):
    model, args = ready(function, state)
    before = [
        owner(layer).detach() * torch.tensor(dense_mask(layer)).reshape(layer.weight.shape) for layer in model[:4]
    ]
    function(**{**args, "amount": 0})
    for layer, weight in zip(model[:4], before, strict=True):
        assert torch.equal(layer.weight, weight)


# -------------------------------------------------------------------------------------------------- all or nothing


class PlantedError(Exception):
    """An error that nobody expects."""


def no_module(args, i):
    listed = args.get("params", args.get("pairs"))
    listed[i] = ("conv1", listed[i][1])
    return TypeError


def no_pair(args, i):
    args.get("params", args.get("pairs"))[i] = 7
    return TypeError


def no_parameter(args, i):
    args.get("params", args.get("pairs"))[i] = (nn.ReLU(), args.get("params", args.get("pairs"))[i][1])
    return ValueError


def half_way(args, i):
    param = "params" if "params" in args else "pairs"

    def generator(pairs):
        for place, pair in enumerate(pairs):
            if place == i:
                raise PlantedError("half way")
            yield pair

    args[param] = generator(list(args[param]))
    return PlantedError


def nan_weight(args, i):
    owner(args["params"][i][0]).data.view(-1)[-1] = math.nan
    return ValueError


def nan_scale(args, i):
    args["pairs"][i][1].weight.data[-1] = math.nan
    return ValueError


def other_size(args, i):
    args["pairs"][i] = (args["pairs"][i][0], nn.BatchNorm2d(99))
    return ValueError


def no_batch_norm(args, i):
    args["pairs"][i] = (args["pairs"][i][0], nn.ReLU())
    return TypeError


def no_gradient(args, i):
    owner(args["params"][i][0]).grad = None
    return ValueError


def nan_gradient(args, i):
    owner(args["params"][i][0]).grad.view(-1)[0] = math.nan
    return ValueError


def tensors(param, how):
    def spoil(args, i):
        good = {pair: owner(pair[0]).detach().abs() + 1 for pair in args["params"]}
        pair = args["params"][i]
        if how == "missing":
            del good[pair]
        elif how == "shape":
            good[pair] = good[pair].flatten()
        elif how == "transposed":
            good[pair] = good[pair].transpose(0, 1) if good[pair].shape[0] != good[pair].shape[1] else good[pair][0]
        elif how == "list":
            good[pair] = good[pair].tolist()
        elif how == "integer":
            good[pair] = good[pair].long()
        else:
            good[pair].view(-1)[-1] = how
        args[param] = good
        return TypeError if how in ("list", "integer") else ValueError

    spoil.__name__ = f"{param}-{how}"
    return spoil


LISTS = [no_module, no_pair, no_parameter, half_way]
BAD = ["missing", "shape", "transposed", "list", "integer", math.nan, math.inf]
SCORES = [tensors("importance_scores", how) for how in [*BAD, -1.0]]
SPOILS = [
    *[(function, spoil) for function in FUNCTIONS for spoil in LISTS],
    *[(function, spoil) for function in FUNCTIONS if function.__name__ in
      ("global_unstructured", "global_kernel_ln", "global_vector_ln", "global_ln_structured", "global_nm_structured")
      for spoil in [nan_weight, *SCORES]],
    *[(tpe.global_gradient_magnitude, s) for s in [no_gradient, nan_gradient, *(tensors("grads", b) for b in BAD)]],
    *[(tpe.global_obd_saliency, s) for s in [nan_weight, *(tensors("hessian_diag", b) for b in BAD)]],
    *[(tpe.global_bn_scaling, s) for s in [nan_scale, other_size, no_batch_norm]],
]  # fmt: skip


@pytest.mark.parametrize("state", ["fresh", "native", "ours"])
@pytest.mark.parametrize(
    ("function", "spoil"), SPOILS, ids=[f"{function.__name__}-{spoil.__name__}" for function, spoil in SPOILS]
)
def test_an_error_at_any_place_of_the_list_changes_nothing(function, spoil, state):
    for i in range(4):
        model, args = ready(function, state)
        error = spoil(args, i)
        before = Snapshot(*model)
        with pytest.raises(error, match=r"half way" if spoil is half_way else rf"(params|pairs)\[{i}\]"):
            function(**args)
        assert before.differences() == [], f"place {i}"


def raise_at(monkeypatch, target, name, number, error):
    """Make the ``number``-th call of ``target.name`` raise; return a list that is non-empty once it has."""
    calls, raised, original = itertools.count(1), [], getattr(target, name)

    def planted(*args, **kwargs):
        if next(calls) == number:
            raised.append(name)
            raise error("planted")
        return original(*args, **kwargs)

    monkeypatch.setattr(target, name, planted)
    return raised


PLANTS = [
    (nn.Module, "register_parameter"),
    (nn.Module, "register_buffer"),
    (nn.Module, "register_forward_pre_hook"),
    (nn.Module, "__setattr__"),
    (nn.Module, "__delattr__"),
    (prune.BasePruningMethod, "apply_mask"),
    (prune.PruningContainer, "add_pruning_method"),
    (prune.PruningContainer, "compute_mask"),
    (torch, "empty_like"),
    (torch, "ones_like"),
]


@every_function
@pytest.mark.parametrize(
    ("state", "error"),
    [("fresh", PlantedError), ("native", PlantedError), ("ours", PlantedError), ("native", KeyboardInterrupt)],
)
def test_an_error_planted_anywhere_inside_changes_nothing(function, state, error):
    reached = set()
    for target, name in PLANTS:
        for number in itertools.count(1):
            model, args = ready(function, state)
            before = Snapshot(*model)
            with pytest.MonkeyPatch.context() as monkeypatch:
                raised = raise_at(monkeypatch, target, name, number, error)
                try:
                    function(**args)
                except error:
                    pass
                else:
                    break
            assert before.differences() == [], f"call {number} of {target.__name__}.{name}"
            assert raised
            reached.add(number)
    assert {1, 2, 3, 4} <= reached, "no plant was reached at every layer: name what the installation uses in PLANTS"


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"amount": None}, TypeError, r"amount=None, target_sparsity=None"),
        ({"target_sparsity": 0.5}, TypeError, r"amount=0\.3, target_sparsity=0\.5"),
        ({"amount": -1}, ValueError, r"amount=-1\b"),
        ({"amount": 1.5}, ValueError, r"amount=1\.5"),
        ({"amount": math.nan}, ValueError, r"amount=nan"),
        ({"amount": 10**9}, ValueError, r"amount=1000000000\b"),
        ({"amount": "x"}, TypeError, r"amount='x'"),
        ({"amount": True}, TypeError, r"amount=True"),
        ({"amount": None, "target_sparsity": -0.1}, ValueError, r"target_sparsity=-0\.1"),
        ({"amount": None, "target_sparsity": 1.1}, ValueError, r"target_sparsity=1\.1"),
        ({"amount": None, "target_sparsity": 2}, ValueError, r"target_sparsity=2\b"),
        ({"amount": None, "target_sparsity": math.nan}, ValueError, r"target_sparsity=nan"),
        ({"amount": None, "target_sparsity": "x"}, TypeError, r"target_sparsity='x'"),
        ({"amount": None, "target_sparsity": True}, TypeError, r"target_sparsity=True"),
        ({"min_keep": -1}, ValueError, r"min_keep=-1\b"),
        ({"min_keep": 1.5}, ValueError, r"min_keep=1\.5"),
        ({"min_keep": math.nan}, ValueError, r"min_keep=nan"),
        ({"min_keep": "x"}, TypeError, r"min_keep='x'"),
        ({"min_keep": True}, TypeError, r"min_keep=True"),
        ({"min_keep": None}, TypeError, r"min_keep=None"),
    ],
)
@every_function
@pytest.mark.parametrize("state", ["fresh", "native"])
def test_a_wrong_budget_is_refused_by_name_and_changes_nothing(function, state, changes, error, words):
    model, args = ready(function, state)
    before = Snapshot(*model)
    with pytest.raises(error, match=words):
        function(**{**args, **changes})
    assert before.differences() == []


@every_function
@pytest.mark.parametrize(
    ("listed", "error"),
    [([], ValueError), ((), ValueError), (7, TypeError), (None, TypeError), (nn.Linear(2, 2), TypeError)],
)
def test_what_is_no_list_is_refused(function, listed, error):
    _, args = ready(function)
    args["pairs" if "pairs" in args else "params"] = listed
    with pytest.raises(error, match=r"params|pairs"):
        function(**args)


@pytest.mark.parametrize(
    ("function", "changes", "error", "words"),
    [
        (tpe.global_kernel_ln, {"normalize": "l2"}, ValueError, r"normalize='l2'"),
        (tpe.global_vector_ln, {"normalize": 1}, ValueError, r"normalize=1"),
        (tpe.global_kernel_ln, {"n": "fro"}, TypeError, r"n='fro'"),
        (tpe.global_kernel_ln, {"n": math.nan}, ValueError, r"n=nan"),
        (tpe.global_vector_ln, {"dim": 7}, ValueError, r"params\[0\].*dim=7"),
        (tpe.global_vector_ln, {"dim": 0.5}, TypeError, r"dim=0\.5"),
        (tpe.global_ln_structured, {"dim": -6}, ValueError, r"params\[0\].*dim=-6"),
        (tpe.global_unstructured, {"reduce": "mean"}, ValueError, r"reduce='mean'.*process_group"),
        (tpe.global_unstructured, {"importance_scores": torch.ones(3)}, TypeError, r"importance_scores is a Tensor"),
        (tpe.global_gradient_magnitude, {"grads": [torch.ones(3)]}, TypeError, r"grads is a list"),
        (tpe.global_nm_structured, {"m": 0}, ValueError, r"m=0"),
        (tpe.global_nm_structured, {"m": 2.0}, TypeError, r"m=2\.0"),
        (tpe.global_nm_structured, {"m": 7}, ValueError, r"params\[0\].*m=7.*pad=True"),
        (tpe.global_nm_structured, {"dim": 9}, ValueError, r"params\[0\].*dim=9"),
        (tpe.global_nm_structured, {"choices": []}, ValueError, r"choices=\[\]"),
        (tpe.global_nm_structured, {"choices": [5]}, ValueError, r"choices=\[5\]"),
        (tpe.global_nm_structured, {"choices": [-1], "min_keep": 0}, ValueError, r"choices=\[-1\]"),
        (tpe.global_nm_structured, {"choices": ["x"]}, (TypeError, ValueError), r"choices="),
        (tpe.global_nm_structured, {"choices": [1.5]}, (TypeError, ValueError), r"choices="),
        (tpe.global_nm_structured, {"choices": 1}, TypeError, r"choices=1"),
        (tpe.global_nm_structured, {"min_keep": 0.5}, (TypeError, ValueError), r"min_keep=0\.5"),
        (tpe.global_nm_structured, {"min_keep": 5}, ValueError, r"min_keep=5"),
        (tpe.global_nm_structured, {"amount": 0.9}, ValueError, r"amount=0\.9.*1 of 4"),
        (tpe.global_nm_structured, {"choices": [4], "amount": 0.1}, ValueError, r"4 of 4.*choices="),
    ],
)
def test_other_arguments_are_refused_by_name(function, changes, error, words):
    model, args = ready(function)
    before = Snapshot(*model)
    with pytest.raises(error, match=words):
        function(**{**args, **changes})
    assert before.differences() == []


def test_kernels_need_convolutions_and_the_message_says_which_is_none():
    layers = [nn.Conv2d(2, 2, 3), nn.Linear(4, 4)]
    before = Snapshot(*layers)
    with pytest.raises(ValueError, match=r"params\[1\], Linear\.weight of shape \(4, 4\): .*kernels"):
        tpe.global_kernel_ln(weights(*layers), amount=0.5)
    assert before.differences() == []


def test_the_norm_of_a_tiny_order_is_refused_by_name():
    layer = nn.Conv2d(1, 2, 3)
    nn.init.zeros_(layer.weight)
    with pytest.raises(ValueError, match=r"n=0\.001"):
        tpe.global_kernel_ln(weights(layer), amount=1, n=0.001)


# -------------------------------------------------------------------------------------------------------- N of M


def vertices(points):
    """Return the indices of ``points`` (cost, total), by rising cost, that lie on their upper concave envelope."""

    def below(a, point, b):
        share = Fraction(point[0] - a[0], b[0] - a[0])
        return point[1] < a[1] + share * (b[1] - a[1])

    distinct = [i for i, point in enumerate(points) if point[0] not in [cost for cost, _ in points[:i]]]
    return [
        i
        for i in distinct
        if not any(
            points[a][0] < points[i][0] < points[b][0] and below(points[a], points[i], points[b])
            for a in distinct
            for b in distinct
        )
    ]


def draw_nm(draw, *, even):
    """Draw layers, arguments, and for each layer what each ``n`` would keep; ``even``: nothing disturbs the steps."""
    m = draw(st.integers(1, 4))
    pad = not even and draw(st.booleans())
    dim = draw(st.sampled_from([0, 1, -1]))
    layers, options = [], []
    groups = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    for _ in range(draw(st.integers(1, 3))):
        rows = groups[0] if even else draw(st.integers(1, 4))
        size = m * (groups[1] if even else draw(st.integers(1, 2))) - (draw(st.integers(0, m - 1)) if pad else 0)
        layer = build((rows, size) if dim else (size, rows))
        # whole numbers: sums are exact
        values = draw_tensor(draw, (rows, size) if dim else (size, rows), range(-9, 10), draw(st.sampled_from(DTYPES)))
        layer.weight = nn.Parameter(values)
        if not even and draw(st.booleans()):
            prune.custom_from_mask(layer, "weight", draw_tensor(draw, values.shape, (0, 1)))
        layers.append(layer)
    args = {"m": m, "dim": dim, **({"pad": True} if pad else {})}
    given_scores = draw_scores(draw, [[layer] for layer in layers])
    for layer in layers:
        shape, mask = tuple(owner(layer).shape), dense_mask(layer)
        scores = flat(given_scores["importance_scores"][layer, "weight"] if given_scores else owner(layer))
        masks = [oracles.keep_n_of_m(oracles.runs(shape, m, dim), scores, mask, n) for n in range(m + 1)]
        totals = [sum(Fraction(abs(s)) * k for s, k in zip(scores, keep, strict=True)) for keep in masks]
        options.append([(sum(keep), total, keep) for keep, total in zip(masks, totals, strict=True)])
    return layers, {**args, **given_scores}, options


@pytest.mark.parametrize("even", [True, False])
@settings(max_examples=80)
@given(data=st.data())
def test_the_best_n_of_each_tensor(even, data):
    layers, args, options = draw_nm(data.draw, even=even)
    m = args["m"]
    min_keep = data.draw(st.sampled_from([0, 1]))
    if min_keep == 0:
        args["min_keep"] = 0
    ns = list(range(min_keep, m + 1))
    if not even and data.draw(st.booleans()):
        args["choices"] = data.draw(st.lists(st.integers(0, m), min_size=1, unique=True))
        ns = sorted(n for n in args["choices"] if n >= min_keep)
    alive = sum(option[m][0] for option in options)
    size = sum(owner(layer).numel() for layer in layers)
    asked = data.draw(
        st.sampled_from([{"amount": data.draw(st.floats(0, 1))}, {"amount": data.draw(st.integers(0, alive))},
                         {"target_sparsity": data.draw(st.floats(1 - alive / size, 1))}])
    )  # fmt: skip
    keep = alive - (
        oracles.how_many(asked["amount"], alive)
        if "amount" in asked
        else round(asked["target_sparsity"] * size) - (size - alive)
    )
    before, state = Snapshot(*layers), torch.get_rng_state()
    if not ns or sum(option[ns[0]][0] for option in options) > keep:
        with pytest.raises(ValueError, match=r"choices="):
            tpe.global_nm_structured(weights(*layers), **args, **asked)
        assert before.differences() == []
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tpe.global_nm_structured(weights(*layers), **args, **asked)
    assert torch.equal(torch.get_rng_state(), state)
    chosen = []
    for layer, option in zip(layers, options, strict=True):
        fits = [n for n in ns if option[n][2] == flat(layer.weight_mask)]
        assert fits, "the mask is that of no allowed n"
        check_mask(layer, "weight", option[fits[0]][2])
        chosen.append(fits[0])
    entries, total = (sum(option[n][i] for option, n in zip(options, chosen, strict=True)) for i in (0, 1))
    assert entries <= keep, "less sparse than asked"
    every = [
        tuple(sum(option[n][i] for option, n in zip(options, combination, strict=True)) for i in (0, 1))
        for combination in itertools.product(ns, repeat=len(layers))
    ]
    best = max(value for cost, value in every if cost <= keep)
    gains, costs = [0], []
    for option, n in zip(options, chosen, strict=True):
        corners = [ns[i] for i in vertices([option[n][:2] for n in ns])]
        gains += [option[b][1] - option[a][1] for a, b in itertools.pairwise(corners)]
        costs += [option[b][0] - option[n][0] for b in corners if option[b][0] > option[n][0]][:1]
    assert total >= best - max(gains), "lost more than the gain of one step"
    assert all(cost > keep - entries for cost in costs), "another step would have fitted"
    if even:  # all steps cost the same
        assert total == max(value for cost, value in every if cost <= entries)
    emptied = [not any(flat(layer.weight_mask)) for layer in layers]
    assert len(caught) <= (min_keep == 0 and any(emptied))


def test_counting_norms_compare_across_precisions():
    single, double = nn.Conv1d(1, 2, 3), nn.Conv1d(1, 2, 3).double()
    for layer in (single, double):
        layer.weight.data.fill_(5.0)
    double.weight.data[1, 0, 0] = 0  # two of three entries
    tpe.global_kernel_ln(weights(single, double), amount=1, n=0, min_keep=0)
    assert [float(layer.weight_mask.sum()) for layer in (single, double)] == [6, 3]


def test_what_counts_is_the_gain_per_entry():
    large, *small = layers = [nn.Linear(2, 4), *[nn.Linear(2, 1) for _ in range(4)]]
    large.weight.data.fill_(2.0)  # the second of two gains 8 for 4 entries
    for layer in small:
        layer.weight.data.fill_(5.0)  # and here 5 for 1
    tpe.global_nm_structured(weights(*layers), m=2, amount=4)
    assert [int(layer.weight_mask.sum()) for layer in layers] == [4, 2, 2, 2, 2]


def test_tied_tensors_get_the_same_n():
    model = Tied()
    tpe.global_nm_structured(weights(model.embedding, model.layer, model.decoder), m=2, amount=0.5)
    assert torch.equal(model.embedding.weight_mask, model.decoder.weight_mask)
    assert int(model.embedding.weight_mask.sum() + model.layer.weight_mask.sum()) == (60 + 36) // 2


# ------------------------------------------------------------------------------------------------------- discovery


class Conv1D(nn.Module):
    """A Linear whose weight lies transposed, as in ``transformers``."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


def test_layers_of_any_type_are_found_and_pruned():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.c_attn, self.norm, self.c_proj = Conv1D(12, 4), nn.LayerNorm(12), Conv1D(4, 12)

        def forward(self, x):
            return x + self.c_proj(self.norm(self.c_attn(x)))

    class Transformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.h, self.lm_head = nn.Embedding(9, 4), nn.Sequential(Block(), Block()), nn.Linear(4, 9)
            self.lm_head.weight = self.wte.weight

        def forward(self, tokens):
            return self.lm_head(self.h(self.wte(tokens)))

    model = Transformer()
    params = tpe.prunable_parameters(model, types=(nn.Linear, Conv1D))
    blocks = [layer for block in model.h for layer in (block.c_attn, block.c_proj)]
    assert params == [(layer, "weight") for layer in [model.wte, model.lm_head, *blocks]]
    assert tpe.prunable_parameters(model, types=Conv1D) == weights(*blocks)
    assert tpe.prunable_parameters(model, types=(Conv1D,), exclude="h.0") == weights(*blocks[2:])
    tpe.global_unstructured(params, amount=0.5)
    assert torch.equal(model.wte.weight_mask, model.lm_head.weight_mask)
    zeros = sum(int((layer.weight_mask == 0).sum()) for layer in [model.wte, *blocks])
    assert zeros == round(0.5 * (36 + 4 * 48))
    model(torch.arange(9)).sum().backward()


def test_prunable_parameters_are_those_of_the_given_types():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Sequential(nn.ConvTranspose1d(2, 2, 2), nn.Linear(2, 2)),
        nn.Linear(2, 3),
    )
    assert tpe.prunable_parameters(model) == weights(model[0], model[2][0], model[2][1], model[3])
    assert tpe.prunable_parameters(model, types=nn.Linear) == weights(model[2][1], model[3])
    assert tpe.prunable_parameters(model, types=(nn.BatchNorm2d,)) == weights(model[1])
    assert tpe.prunable_parameters(model, name="bias", types=(nn.Linear,)) == [
        (model[2][1], "bias"),
        (model[3], "bias"),
    ]
    assert tpe.prunable_parameters(model, exclude="2") == weights(model[0], model[3])
    assert tpe.prunable_parameters(model, exclude=["2.0", "3"]) == weights(model[0], model[2][1])
    assert tpe.prunable_parameters(model[3]) == weights(model[3])
    tpe.every_other(model[3], "weight")
    assert tpe.prunable_parameters(model) == weights(model[0], model[2][0], model[2][1], model[3])


def test_a_path_that_only_begins_alike_is_not_excluded():
    model = nn.Sequential(*[nn.Linear(1, 1) for _ in range(12)])
    assert tpe.prunable_parameters(model, exclude="1") == weights(model[0], *model[2:])


def test_excluding_one_end_of_a_tie_excludes_the_other():
    model = Tied()
    for path in ("embedding", "decoder"):
        assert tpe.prunable_parameters(model, exclude=path) == weights(model.layer)
    assert tpe.prunable_parameters(model) == weights(model.embedding, model.decoder, model.layer)


def test_tensors_without_a_parameter_are_left_out():
    model = nn.Sequential(
        nn.Linear(2, 2), nn.Linear(2, 2, bias=False), nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    )
    assert tpe.prunable_parameters(model) == weights(model[0], model[1])
    assert tpe.prunable_parameters(model, name="bias") == [(model[0], "bias"), (model[2], "bias")]


@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        ({"model": [nn.Linear(1, 1)]}, TypeError, r"model="),
        ({"exclude": "9"}, ValueError, r"exclude='9'.*'0'"),
        ({"exclude": ["0", "fc"]}, ValueError, r"exclude='fc'"),
        ({"exclude": ["0", "1"]}, ValueError, r"exclude=\['0', '1'\]"),
        ({"types": nn.Conv2d}, ValueError, r"types="),
        ({"name": "nope"}, ValueError, r"'nope'"),
    ],
)
def test_what_leaves_nothing_to_prune_is_refused(args, error, words):
    with pytest.raises(error, match=words):
        tpe.prunable_parameters(**{"model": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), **args})


def test_thousands_of_layers():
    model = nn.Sequential(*[nn.Linear(3, 3, bias=False) for _ in range(1500)])
    params = tpe.prunable_parameters(model, exclude=["7", "1499"])
    assert len(params) == 1498
    tpe.global_unstructured(params, amount=0.5, min_keep=0.3)
    left = [int(layer.weight_mask.sum()) for layer, _ in params]
    assert sum(left) == 1498 * 9 - round(0.5 * 1498 * 9)
    assert min(left) == 3


class Block(nn.Module):
    """Layers and BatchNorms with what may stand between them."""

    def __init__(self, between=None, raises=False):
        super().__init__()
        self.conv, self.bn, self.dropout = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.last, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.between, self.raises = between or (lambda x: x), raises

    def forward(self, x, *, scale=1.0):
        x = self.dropout(self.bn(self.between(self.conv(x * scale))))
        if self.raises:
            raise PlantedError("in the middle")
        return self.norm(self.last(x))


IMAGES = torch.linspace(-1, 1, 2 * 2 * 5 * 5).reshape(2, 2, 5, 5)


@pytest.mark.parametrize("inputs", [IMAGES, (IMAGES,), [IMAGES], {"x": IMAGES}, {"x": IMAGES, "scale": 2.0}])
def test_batch_norms_behind_layers_are_found(inputs):
    model = Block()
    assert tpe.bn_pairs(model, inputs) == [(model.conv, model.bn), (model.last, model.norm)]


@pytest.mark.parametrize(
    "between",
    [torch.relu, torch.relu_, nn.ReLU(), nn.ReLU(inplace=True), lambda x: x + 0, lambda x: x.mul_(2), nn.MaxPool2d(1),
     nn.Sequential(nn.ReLU(inplace=True))],
)  # fmt: skip
def test_what_stands_between_separates(between):
    model = Block(between)
    assert tpe.bn_pairs(model, IMAGES) == [(model.last, model.norm)]


@pytest.mark.parametrize("between", [nn.Identity(), nn.Sequential(), lambda x: (x + 1, x)[1]])
def test_what_passes_the_tensor_on_does_not_separate(between):
    model = Block(between)
    assert len(tpe.bn_pairs(model, IMAGES)) == 2


def test_resnet18_has_twenty_pairs():
    models = pytest.importorskip("torchvision.models")
    model = models.resnet18(weights=None)
    pairs = tpe.bn_pairs(model, torch.zeros(1, 3, 32, 32))
    assert len(pairs) == 20
    assert pairs[0] == (model.conv1, model.bn1)
    assert {bn for _, bn in pairs} == {module for module in model.modules() if isinstance(module, nn.BatchNorm2d)}
    for path, module in model.named_modules():
        if path.endswith(("conv1", "conv2")):
            partner = model.get_submodule(path.replace("conv", "bn"))
            assert (module, partner) in pairs
    tpe.global_bn_scaling(pairs, amount=0.5)
    left = [int(conv.weight_mask.amax((1, 2, 3)).sum()) for conv, _ in pairs]
    assert sum(left) == sum(conv.out_channels for conv, _ in pairs) // 2
    assert min(left) >= 1


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("between", [None, lambda x: nn.functional.dropout(x)], ids=["plain", "functional dropout"])
def test_finding_pairs_leaves_the_model_as_it_was(raises, between):
    model = Block(between, raises)
    model.bn.eval()
    model.last.eval()
    model.conv.register_forward_hook(lambda module, args, output: None)
    before, state = Snapshot(model), torch.get_rng_state()
    if raises:
        with pytest.raises(PlantedError):
            tpe.bn_pairs(model, IMAGES)
    else:
        tpe.bn_pairs(model, IMAGES)
    assert before.differences() == []
    assert torch.equal(torch.get_rng_state(), state)


def test_layers_and_batch_norms_of_several_pairs_are_left_out_with_a_warning():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(2, 2, 1) for _ in range(3))
            self.shared, self.d, self.e, self.f = (nn.BatchNorm2d(2) for _ in range(4))

        def forward(self, x):
            twice = self.c(x)
            alone = self.b(x)
            return self.shared(self.a(x)) + self.d(twice) + self.e(twice) + self.f(alone)

    class SharedNorm(Shared):
        def forward(self, x):
            return self.shared(self.a(x)) + self.shared(self.b(x)) + self.d(self.c(x))

    model = Shared()
    with pytest.warns(UserWarning, match=r"Conv2d with BatchNorm2d") as caught:
        assert tpe.bn_pairs(model, IMAGES) == [(model.a, model.shared), (model.b, model.f)]
    assert len(caught) == 1
    assert caught[0].filename == __file__
    model = SharedNorm()
    with pytest.warns(UserWarning, match=r"several pairs"):
        assert tpe.bn_pairs(model, IMAGES) == [(model.c, model.d)]


def test_batch_norms_without_scales_and_pruned_layers():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2), nn.Flatten(),
        nn.Linear(50, 8), nn.BatchNorm1d(8)
    )  # fmt: skip
    expected = [(model[2], model[3]), (model[5], model[6])]
    assert tpe.bn_pairs(model, IMAGES) == expected
    tpe.global_bn_scaling(expected, amount=0.3)
    assert tpe.bn_pairs(model, IMAGES) == expected


def test_a_batch_norm_over_another_axis_is_no_partner():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))  # normalizes the 6 places, not the 6 features
    assert tpe.bn_pairs(model, torch.ones(2, 6, 4)) == []
    assert tpe.bn_pairs(model, torch.ones(3, 4)) == [(model[0], model[1])]


def test_pairs_are_found_in_inference_mode():
    with torch.inference_mode():
        model = Block()
        assert len(tpe.bn_pairs(model, IMAGES)) == 2


def test_only_modules_have_pairs():
    with pytest.raises(TypeError, match=r"model="):
        tpe.bn_pairs(lambda x: x, IMAGES)


# ------------------------------------------------------------------------------------------------- a transformer


def encoder():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(layer, 2)


TOKENS = torch.linspace(-1, 1, 3 * 5 * 8).reshape(3, 5, 8).sin()
CALLS = {
    tpe.global_unstructured: {},
    tpe.global_gradient_magnitude: {},
    tpe.global_vector_ln: {"dim": 0},
    tpe.global_ln_structured: {"dim": 0},
    tpe.global_nm_structured: {"m": 4},
}


# `self_attn.out_proj` is left out: MultiheadAttention reads its weight without calling it, so the product that the hook
# made is used again in the next step, and the second backward fails (native pruning does the same). Eval is fine.
@pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__name__)
def test_a_pruned_transformer_encoder_computes_and_trains(function):
    model, twin = encoder(), encoder()
    params = tpe.prunable_parameters(model, exclude=["layers.0.self_attn", "layers.1.self_attn"])
    assert params == weights(*(layer for block in model.layers for layer in (block.linear1, block.linear2)))
    model(TOKENS).square().sum().backward()
    model.zero_grad(set_to_none=False) if function is not tpe.global_gradient_magnitude else None
    function(params, amount=0.5, **CALLS[function])
    masks = {path: module.weight_mask.clone() for path, module, _ in tpe.pruned_parameters(model)}
    assert all(mask.any() for mask in masks.values())

    def same_as_dense():
        dense = {key.removesuffix("_orig"): value for key, value in model.state_dict().items() if "_mask" not in key}
        twin.load_state_dict({k: v * masks[k[:-7]] if k[:-7] in masks else v for k, v in dense.items()})
        for mode in (True, False):
            torch.testing.assert_close(model.train(mode)(TOKENS), twin.train(mode)(TOKENS))
        with torch.no_grad():  # the fused path reads the weights itself
            torch.testing.assert_close(model(TOKENS), twin(TOKENS))

    same_as_dense()
    for _ in range(3):
        model.zero_grad()
        model.train()(TOKENS).square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    model(TOKENS)  # renews the products
    same_as_dense()
    for path, mask in masks.items():
        layer = model.get_submodule(path)
        assert torch.equal(layer.weight_mask, mask)
        assert not layer.weight[mask == 0].any()


def test_all_layers_of_a_transformer_encoder_can_be_pruned_for_inference():
    model = encoder().eval()
    params = tpe.prunable_parameters(model)
    assert len(params) == 6
    tpe.global_unstructured(params, amount=0.5)
    with torch.no_grad():
        pruned = model(TOKENS)
        tpe.remove_all(model)
        torch.testing.assert_close(model(TOKENS), pruned)
