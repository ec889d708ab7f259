"""The sensitivity scan leaves no trace, and the amounts made from it follow their definition."""

import json
import math
from itertools import pairwise

import pytest
import torch
import toys
from globally import Tied, weights
from hypothesis import given
from hypothesis import strategies as st
from snapshots import Snapshot
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe
from torchprune_ext.workflow.allocation import Sensitivity, SensitivityRow, from_sensitivity, sensitivity
from torchprune_ext.workflow.sensitivity import _Layer

pytestmark = toys.unwarned
QUIET = {"progress": False}
STEPS, SLACK = 300, 0.01  # of the oracle, and what they may be off


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 3)
    )


IMAGES = torch.randn(5, 1, 6, 6, generator=torch.Generator().manual_seed(1))


class Evaluate:
    """Counts its calls, notes the masks that it sees, and is as careless with the model as it can be."""

    def __init__(self, fails_at=None, error=None):
        self.calls, self.seen, self.fails_at, self.error = 0, [], fails_at, error

    def __call__(self, model):
        self.calls += 1
        self.seen.append({path: module.weight_mask.clone() for path, module, _ in tpe.pruned_parameters(model)})
        model.train()  # running statistics change
        model.register_forward_hook(lambda *_: None)
        output = model(IMAGES)
        if self.calls == self.fails_at:
            raise self.error
        return -output.square().mean()


def metric_of(model):
    with torch.no_grad():
        return float(-model.train()(IMAGES).square().mean())


def by_copies(paths, sparsities, unit):
    """Return the metrics by pruning a new model for each."""
    metrics = []
    for path in paths:
        for sparsity in sparsities:
            model = network()
            tpe.prune_to([(model.get_submodule(path), "weight")], sparsity, unit=unit)
            metrics.append(metric_of(model))
    return metrics


@pytest.mark.parametrize("unit", [None, tpe.Channel(0)], ids=str)
def test_each_layer_and_sparsity_once_and_the_dense_model_once(unit):
    model, evaluate = network(), Evaluate()
    params = tpe.prunable_parameters(model)
    model.eval()
    before, state = Snapshot(model), torch.get_rng_state()
    curve = sensitivity(model, evaluate, params, (0.5, 0.25, 0.5), unit=unit, **QUIET)
    assert before.differences() == []
    assert torch.equal(state, torch.get_rng_state())
    assert evaluate.calls == 1 + 3 * 2
    assert [list(seen) for seen in evaluate.seen] == [[], *[[path] for path in ("0", "3", "5") for _ in range(2)]]
    assert [(row.layer, row.sparsity) for row in curve.rows] == [
        (path, s) for path in ("0.weight", "3.weight", "5.weight") for s in (0.25, 0.5)
    ]
    assert curve.dense == metric_of(network())
    assert [row.metric for row in curve.rows] == by_copies(("0", "3", "5"), (0.25, 0.5), unit)
    assert all(mask.numel() for seen in evaluate.seen for mask in seen.values())


def test_what_is_pruned_already_counts_and_stays():
    model = network()
    prune.l1_unstructured(model[0], "weight", 9)
    tpe.kernel_ln(model[3], "weight", 0.25)
    params = tpe.prunable_parameters(model)
    before = Snapshot(model)
    curve = sensitivity(model, Evaluate(), params, (0.5, 0.75), **QUIET)
    assert before.differences() == []
    assert [row.reached for row in curve.rows[:2]] == [0.5, 0.75]
    with pytest.raises(ValueError, match=r"sparsities hold 0.1: params\[0\], Conv2d.*is less than the 0.2500"):
        sensitivity(model, Evaluate(), params, (0.1, 0.5), **QUIET)
    assert before.differences() == []


@pytest.mark.parametrize("error", [ValueError("planted"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("call", [1, 2, 4])
def test_errors_and_interrupts_leave_no_trace(call, error):
    model = network()
    prune.l1_unstructured(model[0], "weight", 9)
    model[5].weight.grad = torch.ones_like(model[5].weight)
    before = Snapshot(model)
    with pytest.raises(type(error)):
        sensitivity(model, Evaluate(call, error), tpe.prunable_parameters(model), (0.5, 0.75), **QUIET)
    assert before.differences() == []


def test_an_evaluation_that_trains_is_taken_back_too():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)

    def fine_tuned(model):
        for _ in range(2):
            optimizer.zero_grad()
            model.train()(IMAGES).square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            return -float(model(IMAGES).square().mean())

    before = Snapshot(model)
    sensitivity(model, fine_tuned, tpe.prunable_parameters(model), (0.5,), **QUIET)
    assert before.differences() == []


def test_tied_tensors_are_one_layer_and_small_ones_keep_a_unit():
    model = Tied()
    tokens = torch.arange(10)
    curve = sensitivity(
        model, lambda m: -m(tokens).square().mean(), tpe.prunable_parameters(model), (0.5,), unit=tpe.Vector(1), **QUIET
    )
    assert [row.layer for row in curve.rows] == ["embedding.weight", "layer.weight"]
    amounts = from_sensitivity(curve, 0.25)
    assert amounts[model.embedding, "weight"] == amounts[model.decoder, "weight"]
    layer = nn.Linear(2, 2)
    curve = sensitivity(layer, lambda m: m.weight.detach().abs().sum(), weights(layer), (0.5, 0.9), **QUIET)
    assert [(row.sparsity, row.reached) for row in curve.rows] == [(0.5, 0.5), (0.9, 0.75)]


def test_curves_are_frozen_and_can_be_printed_and_written():
    model = network()
    scores = tpe.calibration.random(tpe.prunable_parameters(model), generator=torch.Generator().manual_seed(0))
    curve = sensitivity(model, Evaluate(), tpe.prunable_parameters(model), (0.5, 0.9), criterion=scores, **QUIET)
    plain = curve.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["rows"][0]["drop"] == curve.dense - curve.rows[0].metric
    assert [layer["macs"] for layer in plain["layers"]] == [36 * 16 * 5, 72 * 4 * 5, 48 * 5]
    lines = str(curve).splitlines()
    assert lines[0].split() == ["layer", "entries", "dense", "50.0", "%", "90.0", "%"]
    assert [line.split()[:2] for line in lines[1:]] == [["0.weight", "36"], ["3.weight", "72"], ["5.weight", "48"]]
    assert "Conv2d" not in repr(curve)
    with pytest.raises(AttributeError):
        curve.dense = 0.0


def test_a_progress_bar_shows_the_time_left(capsys):
    pytest.importorskip("tqdm")
    model = network()
    sensitivity(model, Evaluate(), tpe.prunable_parameters(model), (0.5,), progress=True)
    assert "sensitivity" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        ({"model": 3}, TypeError, "model=3"),
        ({"evaluate": 0.5}, TypeError, "evaluate=0.5"),
        ({"evaluate": lambda m: None}, TypeError, "gave a NoneType"),
        ({"evaluate": lambda m: True}, TypeError, "gave a bool"),
        ({"evaluate": lambda m: torch.ones(2)}, TypeError, "gave a Tensor"),
        ({"evaluate": lambda m: math.nan}, ValueError, r"evaluate\(model\) gave nan"),
        ({"evaluate": lambda m: float("nan" if hasattr(m[3], "weight_mask") else 1)}, ValueError,
         r"with 3.weight at a sparsity of 0.5 gave nan"),
        ({"params": []}, ValueError, "lists nothing"),
        ({"params": weights(nn.Linear(2, 2))}, ValueError, "not a part of the model"),
        ({"sparsities": 0.5}, TypeError, "sparsities=0.5"),
        ({"sparsities": ()}, ValueError, "nothing to measure"),
        ({"sparsities": (0.5, 1.0)}, ValueError, r"sparsities\[1\]=1.0"),
        ({"criterion": "taylor"}, ValueError, "'taylor'"),
        ({"unit": tpe.Kernel()}, ValueError, r"params\[2\].*no kernels"),
    ],
)  # fmt: skip
def test_refusals_leave_no_trace(bad, error, words):
    model = network()
    args = {"model": model, "evaluate": Evaluate(), "params": tpe.prunable_parameters(model), "sparsities": (0.5,)}
    before = Snapshot(model)
    with pytest.raises(error, match=words):
        sensitivity(**{**args, **bad, **QUIET})
    assert before.differences() == []


# -------------------------------------------------------------------------------------------------- from a curve


def curve_of(drops, entries, units=None, uses=None):
    """Return a curve with these drops, ``{sparsity: drop}`` for each layer."""
    units, uses = units or entries, uses or [1] * len(entries)
    owners = [nn.Linear(1, 1) for _ in entries]
    layers = tuple(
        _Layer(f"{i}.weight", ((owner, "weight"),), n, u, use)
        for i, (owner, n, u, use) in enumerate(zip(owners, entries, units, uses, strict=True))
    )
    rows = [
        SensitivityRow(f"{i}.weight", s, round(s * u) / u, 1.0 - drop)
        for i, (each, u) in enumerate(zip(drops, units, strict=True))
        for s, drop in each.items()
    ]
    return Sensitivity(1.0, tuple(rows), "entries", layers), [(owner, "weight") for owner in owners]


def furthest(points, drop):
    """Return, by walking in small steps, how far a layer may go."""
    knots, worst = [(0.0, 0.0)], 0.0
    for s, lost in sorted(points):
        worst = max(worst, lost)
        knots.append((s, worst))
    best = 0.0
    for (a, low), (b, high) in pairwise(knots):
        for i in range(STEPS + 1):
            if low + (high - low) * i / STEPS <= drop + 1e-12:
                best = max(best, a + (b - a) * i / STEPS)
            else:
                return best
    return best


DROPS = st.sampled_from([-0.01, 0.0, 0.01, 0.02, 0.1, 0.5])


@given(st.data())
def test_the_common_drop_is_the_smallest_that_meets_the_target(data):
    entries = data.draw(st.lists(st.sampled_from([40, 100, 200]), min_size=1, max_size=4))
    drops = [{s: data.draw(DROPS) for s in (0.2, 0.5, 0.9)} for _ in entries]
    curve, keys = curve_of(drops, entries)
    target, max_drop = data.draw(st.floats(0, 0.95)), data.draw(st.sampled_from([0.0, 0.02, 0.3, math.inf]))
    points = [curve.drops(f"{i}.weight") for i in range(len(entries))]
    goal = round(target * sum(entries))

    def reach(drop):
        return sum(furthest(each, drop) * n for each, n in zip(points, entries, strict=True))

    slack = SLACK * sum(entries)
    if reach(max_drop) < goal - slack:
        with pytest.raises(ValueError, match="out of reach"):
            from_sensitivity(curve, target, max_drop)
        return
    if reach(max_drop) < goal + slack:
        return  # too near to tell by steps
    amounts = from_sensitivity(curve, target, max_drop)
    counts = [amounts[key] * n for key, n in zip(keys, entries, strict=True)]
    assert sum(map(round, counts)) == goal
    low, high = 0.0, min(max_drop, 0.5)
    for _ in range(25):  # the smallest drop that is enough
        middle = (low + high) / 2
        low, high = (low, middle) if reach(middle) >= goal else (middle, high)
    assert all(c <= furthest(p, high) * n + 1 + SLACK * n for c, p, n in zip(counts, points, entries, strict=True))
    below = [furthest(p, high - 1e-5) * n if high > 1e-5 else 0.0 for p, n in zip(points, entries, strict=True)]
    assert all(c >= least - 1 - SLACK * n for c, least, n in zip(counts, below, entries, strict=True))


def test_where_a_layer_jumps_all_go_the_same_part_of_the_way():
    curve, keys = curve_of([{0.5: 0.0}, {0.5: 0.0}], [100, 200])
    assert from_sensitivity(curve, 0.25) == {keys[0]: 0.25, keys[1]: 0.25}
    assert from_sensitivity(curve, 0.0) == {keys[0]: 0.0, keys[1]: 0.0}
    curve, keys = curve_of([{0.5: 0.1, 0.9: 0.1}, {0.5: 0.4}], [100, 100])
    found = from_sensitivity(curve, 0.3)  # 50 and 12.5 just below a drop of 0.1, 90 and 12.5 at it
    assert list(found.values()) == pytest.approx([0.475, 0.125], abs=0.01)


def test_costs_count_as_multiplications_and_in_whole_units():
    drops = [{0.5: 0.1, 0.9: 0.2}, {0.5: 0.1, 0.9: 0.2}]
    curve, keys = curve_of(drops, [90, 900], units=[10, 100], uses=[1000, 1])
    for cost, prices in (("parameters", (90, 900)), ("macs", (90_000, 900))):
        amounts = from_sensitivity(curve, 0.4, cost=cost)
        counts = [amounts[key] * units for key, units in zip(keys, (10, 100), strict=True)]
        assert all(abs(count - round(count)) < 1e-9 for count in counts)
        spent = sum(amounts[key] * price for key, price in zip(keys, prices, strict=True))
        unit = max(price / units for price, units in zip(prices, (10, 100), strict=True))
        assert 0 <= spent - 0.4 * sum(prices) < unit
    curve, _ = curve_of(drops, [90, 900], uses=[1000, None])
    with pytest.raises(ValueError, match=r"\['1.weight'\] are not known"):
        from_sensitivity(curve, 0.4, cost="macs")


def test_what_is_out_of_reach_is_told_with_a_remedy_that_works():
    curve, _ = curve_of([{0.5: 0.1, 0.9: 0.3}, {0.5: 0.2}], [100, 100])
    words = r"0.6 of the parameters is out of reach.*0.1.*\(0.weight 50.0 %, 1.weight 25.0 %\)"
    with pytest.raises(ValueError, match=words) as caught:
        from_sensitivity(curve, 0.6, 0.1)
    enough = float(str(caught.value).partition("max_drop=0.1")[2].partition("max_drop=")[2].split()[0])
    assert enough == pytest.approx(0.2, abs=0.002)  # where 0.5 + 0.4 * (d - 0.1) / 0.2 + 0.5 * d / 0.2 is 1.2
    assert sum(from_sensitivity(curve, 0.6, enough).values()) == pytest.approx(1.2)
    with pytest.raises(ValueError, match="Measure larger sparsities"):
        from_sensitivity(curve, 0.8)
    for bad, error, words in (
        ({"target_sparsity": 1.0}, ValueError, "target_sparsity=1.0"),
        ({"max_drop": -0.1}, ValueError, "max_drop=-0.1"),
        ({"max_drop": "x"}, TypeError, "max_drop='x'"),
        ({"cost": "flops"}, ValueError, "cost='flops'"),
        ({"curve": {}}, TypeError, "curve is a dict"),
    ):
        with pytest.raises(error, match=words):
            from_sensitivity(**{"curve": curve, "target_sparsity": 0.5, **bad})


def test_from_the_scan_to_the_model():
    model = network()
    params = tpe.prunable_parameters(model)
    curve = sensitivity(model, Evaluate(), params, **QUIET)
    for cost in ("parameters", "macs"):
        tpe.plan(params, from_sensitivity(curve, 0.5, cost=cost))
    tpe.prune_to(params, from_sensitivity(curve, 0.6))
    assert sum(int((module.weight_mask == 0).sum()) for module, _ in params) == round(0.6 * 156)
