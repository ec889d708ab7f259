"""Targets: whatever is pruned already, what was asked for is reached exactly, or nothing is pruned."""

import copy
import json
import math
import pickle
import warnings

import pytest
import torch
import toys
from globally import ROWS, Part, draw_model, owner, spend, weights
from hypothesis import given
from hypothesis import strategies as st
from snapshots import Snapshot
from test_apportion import one_by_one
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe

pytestmark = toys.unwarned
UNITS = {
    "global_unstructured": lambda args: None,
    "global_kernel_ln": lambda args: tpe.Kernel(),
    "global_vector_ln": lambda args: tpe.Vector(args["dim"]),
    "global_block_ln": lambda args: tpe.Block(args["block"]),
    "global_ln_structured": lambda args: tpe.Channel(args["dim"]),
}
CHOSEN = [row for row in ROWS if row.id in UNITS]
every_unit = pytest.mark.parametrize("row", CHOSEN, ids=lambda row: row.id)


def in_the_end(parts, masks):
    return [len(part.units) - len(Part(part.units, part.scores, mask).alive()) for part, mask in zip(parts, masks)]  # noqa: B905


def fractions(draw):
    return draw(st.sampled_from([0.0, 0.25, 0.5, 0.75]) | st.floats(0, 1, exclude_max=True))


def tensor_by_tensor(parts, amounts, **floor):
    """Return the masks where each part has a fraction of its own, or None."""
    masks = [spend([part], target_sparsity=amount, **floor) for part, amount in zip(parts, amounts, strict=True)]
    return None if None in masks else [mask for [mask] in masks]


def in_proportion(parts, shares, total, min_keep=1):
    """Return the masks where the parts give units in proportion to their shares, or None."""
    sizes = [len(part.units) for part in parts]
    dead = [len(part.units) - len(part.alive()) for part in parts]
    most = [size - part.floor(min_keep) for size, part in zip(sizes, parts, strict=True)]
    goal = round(total * sum(sizes))
    w = [share * size for share, size in zip(shares, sizes, strict=True)]
    if goal < sum(dead) or goal > sum(top for top, weight in zip(most, w, strict=True) if weight):
        return None
    if any(weight * goal > size * sum(w) for weight, size in zip(w, sizes, strict=True)):
        return None
    counts = one_by_one(w, goal, most)
    if any(gone > count for gone, count in zip(dead, counts, strict=True)):
        return None
    free = [
        spend([part], amount=count - gone, min_keep=0) for part, count, gone in zip(parts, counts, dead, strict=True)
    ]
    return [mask for [mask] in free]


@every_unit
@given(data=st.data())
def test_targets_against_plain_loops(row, data):
    model = draw_model(data.draw, row)
    args = row.draw(data.draw, model.groups)
    args |= {"n": 2, "normalize": "mean"} if "n" in args else {}
    parts, params, unit = model.parts(row, args), model.params(row), UNITS[row.id](args)
    criterion = args.get("importance_scores", "magnitude")
    floor = data.draw(st.sampled_from([{}, {}, {"min_keep": 0}, {"min_keep": 2}, {"min_keep": 0.25}]))
    kind = data.draw(st.sampled_from(["global", "layer", "mapping", "scaled"]))
    shares = [fractions(data.draw) for _ in parts]
    named = {(ms[0], "weight"): share for ms, share in zip(model.ordered(), shares, strict=True)}
    if kind == "mapping":
        amounts, scope, expected = named, {}, tensor_by_tensor(parts, shares, **floor)
    else:
        amounts = fractions(data.draw)
        scope = {"global": {}, "layer": {"scope": "layer"}, "scaled": {"scope": named}}[kind]
        if kind == "global":
            expected = spend(parts, target_sparsity=amounts, **floor)
        else:
            expected = in_proportion(parts, shares if kind == "scaled" else [1.0] * len(parts), amounts, **floor)
    before = Snapshot(*model.listing)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "prune_to: min_keep=0 lets be emptied")
        if expected is None:
            for call in (tpe.plan, tpe.prune_to):
                with pytest.raises(ValueError, match=r"amounts=|scope="):
                    call(params, amounts, criterion, unit, **scope, **floor)
            assert before.differences() == []
            return
        plan = tpe.plan(params, amounts, criterion, unit, **scope, **floor)
        assert before.differences() == []
        tpe.prune_to(params, amounts, criterion, unit, **scope, **floor)
    for modules, mask in zip(model.ordered(), expected, strict=True):
        for module in modules:
            dense = owner(module)
            assert torch.equal(
                module._buffers["weight_mask"], torch.tensor(mask, dtype=dense.dtype).reshape(dense.shape)
            )
    assert [row.pruned + row.to_prune for row in plan.rows] == in_the_end(parts, expected)
    assert [row.units for row in plan.rows] == [len(part.units) for part in parts]
    assert plan.sparsity == sum(in_the_end(parts, expected)) / max(sum(len(p.units) for p in parts), 1)


@pytest.mark.parametrize("scope", ["global", "layer", "amounts"])
@pytest.mark.parametrize("unit", [None, tpe.Vector(1)], ids=str)
def test_step_by_step_each_target_is_met_and_nothing_comes_back(scope, unit):
    torch.manual_seed(0)
    layers = [nn.Linear(n, m) for n, m in ((7, 19), (19, 15), (15, 13), (13, 8))]
    params = weights(*layers)
    shares = tpe.allocation.erk(params, 0.75) if scope == "amounts" else scope
    schedule = tpe.schedules.cubic(0, 20, final=0.75)
    total = sum(len(layer.weight) if unit else layer.weight.numel() for layer in layers)
    last = None
    for step in schedule.updates():
        tpe.prune_to(params, schedule(step), unit=unit, scope=shares)
        masks = [layer.weight_mask.clone() for layer in layers]
        alive = sum(int((mask.amax(1) if unit else mask).count_nonzero()) for mask in masks)
        assert total - alive == round(schedule(step) * total)
        assert last is None or all(bool((new <= old).all()) for new, old in zip(masks, last, strict=True))
        last = masks
        for layer in layers:  # training goes on
            layer.weight_orig.data.normal_()
    if scope == "amounts":  # the last step is the allocation itself
        assert unit or all(int((m == 0).sum()) == round(a * m.numel()) for m, a in zip(last, shares.values()))  # noqa: B905


def test_what_has_no_amount_stays_as_it_is():
    first, second, third = (nn.Linear(4, 4) for _ in range(3))
    prune.l1_unstructured(second, "weight", 3)
    before = Snapshot(second, third)
    tpe.prune_to(weights(first, second, third), {(first, "weight"): 0.5})
    assert before.differences() == []
    assert int(first.weight_mask.sum()) == 8
    assert [row.tensor for row in tpe.plan(weights(third, first), {(first, "weight"): 0.5}).rows] == [
        "params[1], Linear.weight"
    ]


def test_history_tells_what_was_asked_of_the_tensor():
    def layer():
        return nn.Conv2d(4, 4, 3)

    for kwargs, told in (
        ({"amounts": 0.5}, "prune_to(amounts=0.5, min_keep=1, criterion='magnitude')"),
        (
            {"amounts": 0.5, "unit": tpe.Kernel(), "scope": "layer", "min_keep": 0.1},
            "prune_to(amounts=0.5, scope='layer', min_keep=0.1, criterion='magnitude', unit='Kernel()')",
        ),
        ({"amounts": {}}, "prune_to(amounts=0.25, min_keep=1, criterion='magnitude')"),
        ({"amounts": 0.5, "scope": {}}, "prune_to(amounts=0.5, scope=..., min_keep=1, criterion='magnitude')"),
        ({"amounts": 0.5, "criterion": {}}, "prune_to(amounts=0.5, min_keep=1, criterion=...)"),
    ):
        conv = layer()
        key = (conv, "weight")
        fills = {"amounts": {key: 0.25}, "scope": {key: 0.25}, "criterion": {key: torch.rand(4, 4, 3, 3)}}
        tpe.prune_to([key], **{k: fills[k] if v == {} else v for k, v in kwargs.items()})
        assert tpe.history(*key) == [told]
        assert repr(pickle.loads(pickle.dumps(conv))._forward_pre_hooks.popitem()[1]) == told
    tpe.prune_to([key], 0.5)  # is there already
    assert tpe.history(*key) == [told]


def test_plans_are_frozen_and_can_be_printed_and_written():
    conv, head = nn.Conv2d(2, 4, 3), nn.Linear(4, 2)
    tpe.prune_to(weights(conv), 0.25, unit=tpe.Kernel())
    plan = tpe.plan(weights(conv, head), {(conv, "weight"): 0.5, (head, "weight"): 0.25})
    assert json.loads(json.dumps(plan.to_dict())) == plan.to_dict()
    assert plan.to_dict()["rows"][0] == {
        "tensor": "params[0], Conv2d.weight",
        "shape": [4, 2, 3, 3],
        "units": 72,
        "pruned": 18,
        "to_prune": 18,
        "sparsity": 0.5,
    }
    assert str(plan).splitlines()[-1].split() == ["all", "80", "18", "20", "47.5", "%"]
    with pytest.raises(AttributeError):
        plan.rows = ()


LAYER = nn.Linear(4, 4)
KEY = (LAYER, "weight")


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        ({"amounts": 1.0}, ValueError, r"amounts=1.0 is not in \[0, 1\)"),
        ({"amounts": -0.5}, ValueError, "amounts=-0.5"),
        ({"amounts": "0.5"}, TypeError, "amounts='0.5' is a str"),
        ({"amounts": {KEY: 1.5}}, ValueError, r"amounts\[Linear, 'weight'\]=1.5"),
        ({"amounts": {KEY: None}}, TypeError, r"amounts\[Linear, 'weight'\]=None"),
        ({"amounts": {}}, ValueError, r"amounts=\{\} names no tensor"),
        ({"amounts": {(nn.Linear(4, 4), "weight"): 0.5}}, ValueError, "a copy of a model needs amounts of its own"),
        ({"amounts": {"0.weight": 0.5}}, ValueError, r"amounts\['0.weight'\]"),
        ({"amounts": {KEY: 0.1}}, ValueError, r"params\[0\], Linear.weight.*amounts=0.1 is less than the 0.2500"),
        ({"amounts": 0.1}, ValueError, "amounts=0.1 is less than"),
        ({"amounts": 0.1, "scope": "layer"}, ValueError, "amounts=0.1.* is less than"),
        ({"amounts": {KEY: 0.99}}, ValueError, r"params\[0\].*16 entries|amounts=0.99.*min_keep=0"),
        ({"amounts": {KEY: 0.5}, "scope": "layer"}, TypeError, "scope='layer' has no meaning"),
        ({"scope": "all"}, ValueError, "scope='all' is unknown"),
        ({"scope": {KEY: 0.0}}, ValueError, "Raise its zeros"),
        ({"scope": 0.5}, ValueError, "scope=0.5 is unknown"),
        ({"criterion": "taylor"}, ValueError, "criterion='taylor' is unknown"),
        ({"criterion": tpe.criteria.magnitude}, TypeError, "is a function"),
        ({"criterion": {}}, ValueError, "no entry for this tensor"),
        ({"criterion": {KEY: -torch.ones(4, 4)}}, ValueError, "negative entry"),
        ({"unit": tpe.Kernel}, TypeError, "is not a unit"),
        ({"unit": "kernel"}, TypeError, "unit='kernel' is not a unit"),
        ({"unit": tpe.NM(2, 4)}, TypeError, "global_nm_structured"),
        ({"unit": tpe.Kernel()}, ValueError, r"params\[0\].*has no kernels"),
        ({"min_keep": -1}, ValueError, "min_keep=-1"),
        ({"params": []}, ValueError, "lists nothing"),
        ({"params": LAYER}, TypeError, "params is a Linear"),
        ({"params": [KEY, (LAYER, "wait")], "amounts": {KEY: 0.5}}, ValueError, r"params\[1\]"),
    ],
)
@pytest.mark.parametrize("call", [tpe.prune_to, tpe.plan], ids=lambda call: call.__name__)
def test_refusals_leave_no_trace(call, bad, error, words):
    if not hasattr(LAYER, "weight_mask"):
        prune.l1_unstructured(LAYER, "weight", 4)
    before = Snapshot(LAYER)
    with pytest.raises(error, match=words):
        call(**{"params": [KEY], "amounts": 0.5, **bad})
    assert before.differences() == []


def test_a_remedy_for_a_tensor_that_is_pruned_too_far_already():
    far, near = nn.Linear(4, 4), nn.Linear(4, 4)
    prune.l1_unstructured(far, "weight", 12)
    with pytest.raises(ValueError, match=r"params\[0\].*takes 8 of the 16 entries.*12 are pruned already"):
        tpe.prune_to(weights(far, near), 0.5, scope="layer")
    tpe.undo(far, "weight")
    tpe.prune_to(weights(far, near), 0.5, scope="layer")
    assert [int(layer.weight_mask.sum()) for layer in (far, near)] == [8, 8]
    with pytest.raises(ValueError, match=r"0.6250.*takes more than the 16"):
        tpe.prune_to(weights(far, near), 0.9, scope={(far, "weight"): 0.75, (near, "weight"): 0.5})


def test_tied_tensors_are_pruned_alike_and_have_one_amount():
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight
    with pytest.raises(ValueError, match=r"tied.*\[0.25, 0.5\]"):
        tpe.prune_to(weights(a, b), {(a, "weight"): 0.5, (b, "weight"): 0.25})
    tpe.prune_to(weights(a, b), {(b, "weight"): 0.5})
    assert torch.equal(a.weight_mask, b.weight_mask)
    assert int(a.weight_mask.sum()) == 8


def test_an_interrupt_between_two_tensors_changes_nothing(monkeypatch):
    layers = [nn.Linear(4, 4) for _ in range(3)]
    before, register = Snapshot(*layers), nn.Module.register_buffer

    def interrupted(self, name, *args, **kwargs):
        if self is layers[1]:
            raise KeyboardInterrupt
        register(self, name, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "register_buffer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tpe.prune_to(weights(*layers), 0.5)
    assert before.differences() == []


def test_amounts_of_one_layer_scale_exactly_to_themselves():
    torch.manual_seed(1)
    layers = [nn.Linear(5, 6), nn.Linear(6, 11)]
    amounts = tpe.allocation.uniform(weights(*layers), 0.77)
    twin = copy.deepcopy(nn.ModuleList(layers))
    tpe.prune_to(weights(*layers), amounts)
    copied = dict(zip(weights(*twin), amounts.values(), strict=True))
    tpe.prune_to(weights(*twin), 0.77, scope=copied)
    assert all(torch.equal(a.weight_mask, b.weight_mask) for a, b in zip(layers, twin, strict=True))
    assert math.isclose(sum(int((layer.weight_mask == 0).sum()) for layer in layers), round(0.77 * 96))


def test_errors_show_what_is_not_repeated_as_dots():
    params = [(nn.Linear(4, 4), "weight"), (nn.Linear(4, 2), "weight")]
    with pytest.raises(ValueError, match=r"amounts=0.9, scope=\.\.\., min_keep=1: scope= takes all of it"):
        tpe.prune_to(params, 0.9, scope={params[0]: 0.5, params[1]: 0.0})
    with pytest.raises(ValueError, match=r"^((?!Ellipsis)(.|\n))*$"):
        tpe.prune_to(params, 0.95, scope={params[0]: 0.9, params[1]: 0.8})
