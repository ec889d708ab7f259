"""Gradual pruning: after each step the sparsity is that of the schedule, exactly; killed and resumed, it goes on so."""

import itertools
import os
import pathlib
import pickle
import runpy
import signal
import subprocess
import sys
import time

import pytest
import torch
import toys
from hypothesis import given
from hypothesis import strategies as st
from releases import compiled_then_pruned
from snapshots import Snapshot
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe
from torchprune_ext import schedules
from torchprune_ext.workflow import writing

pytestmark = toys.unwarned
X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 7), nn.ReLU(), nn.Linear(7, 3))


def backward(model, x=X):
    model(x).square().mean().backward()


def masks(model):
    return [module.weight_mask.clone() for _, module, _ in tpe.pruned_parameters(model)]


def dead(params, unit=None):
    """Count pruned units, of all, in plain loops."""
    gone = total = 0
    for module, name in params:
        weight = module._parameters.get(f"{name}_orig", module._parameters.get(name))
        mask = module._buffers.get(f"{name}_mask", torch.ones_like(weight))
        for row in mask.tolist():
            for each in [row] if unit else [[value] for value in row]:
                total, gone = total + 1, gone + (not any(each))
    return gone, total


@st.composite
def schedule_of(draw):
    start, every = draw(st.integers(0, 3)), draw(st.integers(1, 3))
    final = draw(st.sampled_from([0.0, 0.5, 0.75]) | st.floats(0, 0.8))
    kind = draw(st.sampled_from(["one_shot", "linear", "cubic", "geometric"]))
    if kind == "one_shot":
        return schedules.one_shot(start, final)
    initial = draw(st.sampled_from([0.0, final / 2, final]))
    return getattr(schedules, kind)(start, start + draw(st.integers(1, 6)), every, initial, final=final)


@given(
    schedule=schedule_of(),
    sizes=st.lists(st.integers(3, 9), min_size=2, max_size=4),
    unit=st.sampled_from([None, tpe.Vector(1), tpe.Channel(0)]),
    scope=st.sampled_from(["global", "layer", "amounts"]),
    criterion=st.sampled_from(["magnitude", "gradient", "random", "callable"]),
    halved=st.booleans(),
    before=st.integers(0, 2),
)
def test_each_step_has_the_sparsity_of_the_schedule(schedule, sizes, unit, scope, criterion, halved, before):
    layers = [nn.Linear(n, m) for n, m in itertools.pairwise(sizes)]
    model, params = nn.Sequential(*layers), [(layer, "weight") for layer in layers]
    if halved:
        nn.init.constant_(layers[0].weight, 0.5)  # ties
    if before and unit is None:
        prune.l1_unstructured(layers[0], "weight", before)
    shares = tpe.allocation.uniform(params, 0.4) if scope == "amounts" else scope
    how = {
        "random": tpe.calibration.random(params),
        "callable": lambda model: {key: getattr(*key).detach().square() for key in params},
    }.get(criterion, criterion)
    gone, total = dead(params, unit)
    first = schedule(next(schedule.updates()))
    try:
        tpe.plan(params, schedule.final, unit=unit, scope=shares)
        tpe.plan(params, first, unit=unit, scope=shares)
    except ValueError:
        picture = Snapshot(model)
        with pytest.raises(ValueError, match="schedule="):
            tpe.GradualPruner(model, params, schedule, how, unit, scope=shares)
        assert picture.differences() == []
        return
    pruner = tpe.GradualPruner(model, params, schedule, how, unit, scope=shares)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    last = None
    for step in range(schedule.end + 3):
        model(torch.randn(4, sizes[0])).square().sum().backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
        wanted = round(schedule(step) * total)
        if not any(update <= step for update in schedule.updates()):
            wanted = max(wanted, gone)  # what was pruned before the first update
        assert dead(params, unit) == (wanted, total)
        assert pruner.sparsity == wanted / total
        assert pruner.finished == (step >= schedule.end)
        now = masks(model)
        assert last is None or all(bool((new <= old).all()) for new, old in zip(now, last, strict=False))
        last = now if len(now) == len(layers) else None
    assert pruner.steps == schedule.end + 3


def test_gradients_come_from_the_parameter_that_owns_them():
    model = network()
    params = tpe.prunable_parameters(model)
    pruner = tpe.GradualPruner(model, params, schedules.linear(0, 4, final=0.8), "gradient")
    for step in range(5):
        backward(model, torch.randn(8, 6))
        owners = [module._parameters.get("weight_orig", module._parameters.get("weight")) for module, _ in params]
        alive = [module._buffers.get("weight_mask", torch.ones_like(o)) for (module, _), o in zip(params, owners)]  # noqa: B905
        scores = [(o * o.grad).abs().detach() for o in owners]
        pruner.step()
        order = sorted(
            (float(score), -p, -i)
            for p, (part, mask) in enumerate(zip(scores, alive, strict=True))
            for i, score in enumerate(part.flatten())
            if mask.flatten()[i]
        )
        gone = round(schedules.linear(0, 4, final=0.8)(step) * 151) - sum(int((mask == 0).sum()) for mask in alive)
        for p, (module, _) in enumerate(params):
            expected = alive[p].clone().flatten()
            expected[[-i for _, q, i in order[:gone] if q == -p]] = 0
            now = module._buffers.get("weight_mask", torch.ones_like(owners[p]))
            assert torch.equal(now, expected.reshape(now.shape))
        model.zero_grad()


def test_nothing_happens_between_updates():
    model = network()
    schedule = schedules.linear(2, 8, every=3, final=0.6)
    pruner = tpe.GradualPruner(model, tpe.prunable_parameters(model), schedule)
    for step in range(10):
        picture = Snapshot(model)
        pruner.step()
        changes = step in (5, 8)  # at 2 the schedule still is at 0
        assert (picture.differences() != []) == changes


def test_masks_are_installed_once_and_then_only_their_values_change():
    model = network()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    pruner = tpe.GradualPruner(model, tpe.prunable_parameters(model), schedules.cubic(0, 20, final=0.7), min_keep=2)
    buffers = hooks = None
    for step in range(25):
        backward(model)
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
        if step == 1:
            buffers = [module.weight_mask for _, module, _ in tpe.pruned_parameters(model)]
            hooks = [dict(module._forward_pre_hooks) for _, module, _ in tpe.pruned_parameters(model)]
        for _, module, _ in tpe.pruned_parameters(model):
            fresh = torch.equal(module.weight, module.weight_orig * module.weight_mask)
            assert step > 12 or fresh  # each of these updates prunes
            assert step < 21 or not fresh  # as ever between forward passes
    assert all(
        a is b for a, b in zip(buffers, (m.weight_mask for _, m, _ in tpe.pruned_parameters(model)), strict=True)
    )
    assert hooks == [dict(module._forward_pre_hooks) for _, module, _ in tpe.pruned_parameters(model)]
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters()}
    for _, module, name in tpe.pruned_parameters(model):
        assert tpe.history(module, name) == [
            "GradualPruner(schedule='cubic(start=0, end=20, every=1, initial=0.0, final=0.7)', scope='global', "
            "min_keep=2, criterion='magnitude')"
        ]
        pickle.loads(pickle.dumps(tpe.copy_pruned(module)))
    kept = masks(model)
    tpe.remove_all(model)
    assert all(bool((m.weight[k == 0] == 0).all()) for m, k in zip(model[::2], kept, strict=True))


def test_what_others_did_in_between_counts():
    model = network()
    params = tpe.prunable_parameters(model)
    pruner = tpe.GradualPruner(model, params, schedules.linear(0, 6, final=0.6))
    for _ in range(3):
        pruner.step()
    prune.l1_unstructured(model[0], "weight", 4)
    assert dead(params)[0] == round(0.2 * 151) + 4
    pruner.step()
    assert dead(params)[0] == round(0.3 * 151)
    tpe.undo(model[2], "weight")
    pruner.step()
    assert dead(params)[0] == round(0.4 * 151)
    assert len(list(tpe.pruned_parameters(model))) == 3
    assert len(tpe.history(model[0], "weight")) == 2
    tpe.prune_to(params, 0.9)
    picture, steps = Snapshot(model), pruner.steps
    with pytest.raises(ValueError, match="pruned already"):
        pruner.step()
    assert picture.differences() == []
    assert pruner.steps == steps


@pytest.mark.parametrize("unit", [None, tpe.Vector(1)], ids=str)
def test_tied_weights_count_once_and_have_one_mask(unit):
    a, b, c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
    b.weight = a.weight
    model = nn.Sequential(a, b, c)
    params = [(a, "weight"), (b, "weight"), (c, "weight")]
    schedule = schedules.linear(0, 3, final=0.5)
    pruner = tpe.GradualPruner(model, params, schedule, "gradient", unit)
    for step in range(4):
        model(X).square().sum().backward()
        pruner.step()
        model.zero_grad()
        gone, total = dead([params[0], params[2]], unit)
        assert gone == round(schedule(step) * total)
    assert torch.equal(a.weight_mask, b.weight_mask)
    assert a.weight_orig is b.weight_orig


def test_a_schedule_for_some_of_the_tensors_counts_these():
    model = network()
    params = tpe.prunable_parameters(model)
    shares = {params[0]: 0.5, params[1]: 0.25}
    pruner = tpe.GradualPruner(model, params, schedules.linear(0, 2, final=0.3), scope=shares)
    for _ in range(3):
        pruner.step()
    assert dead(params[:2])[0] == round(0.3 * 130)
    assert pruner.sparsity == round(0.3 * 130) / 130
    assert not prune.is_pruned(model[4])


def test_accumulated_gradients_and_skipped_steps():
    model = network()
    params = tpe.prunable_parameters(model)
    schedule = schedules.linear(0, 4, final=0.8)
    pruner = tpe.GradualPruner(model, params, schedule, "gradient")
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    steps = skipped = 0
    for batch in range(20):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(X * (float("inf") if batch == 7 else 1)).square().mean() / 2
        scaler.scale(loss).backward()
        if batch % 2 == 1:  # two batches, one step
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            if scaler.get_scale() < scale:
                skipped += 1
                with pytest.raises(ValueError, match="GradScaler has skipped"):
                    pruner.step()
            else:
                pruner.step()
                assert dead(params)[0] == round(schedule(steps) * 151)
                steps += 1
            optimizer.zero_grad()
    assert (steps, skipped, pruner.steps) == (9, 1, 9)


@pytest.mark.parametrize(
    "first", [pytest.param("compiled", marks=compiled_then_pruned), "masked"], ids=["compiled first", "masked first"]
)
def test_compiled_code_is_compiled_anew_once(first):
    counter = pytest.importorskip("torch._dynamo.testing").CompileCounter()
    torch._dynamo.reset()
    schedule = schedules.cubic(1, 9, final=0.8)
    model, plain = network(), network()
    if first == "masked":
        tpe.prune_to(tpe.prunable_parameters(model), 0.0)
    pruner, other = (tpe.GradualPruner(m, tpe.prunable_parameters(m), schedule) for m in (model, plain))
    compiled = torch.compile(model, backend=counter)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (model, plain)]
    counts = []
    for _ in range(11):
        for run, optimizer, each in ((compiled, optimizers[0], pruner), (plain, optimizers[1], other)):
            backward(run)
            optimizer.step()
            each.step()
            optimizer.zero_grad()
        assert torch.equal(compiled(X), plain(X))
        counts.append(counter.frame_count)
    assert counts[0] <= 1  # torch 2.4 runs parts of it as they are
    assert counts[-1] <= 2
    assert all(torch.equal(a, b) for a, b in zip(masks(model), masks(plain), strict=True))
    torch._dynamo.reset()


def test_an_error_or_ctrl_c_leaves_no_trace(monkeypatch):
    model = network()
    pruner = tpe.GradualPruner(model, tpe.prunable_parameters(model), schedules.linear(0, 6, final=0.6))
    for _ in range(2):
        pruner.step()
    real, calls = writing.renew, []

    def interrupted(target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(target)

    picture = Snapshot(model)
    monkeypatch.setattr(writing, "renew", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pruner.step()
    assert picture.differences() == []
    monkeypatch.setattr(writing, "renew", real)
    pruner.step()
    assert pruner.sparsity == round(0.2 * 151) / 151
    model[0].weight_orig.data[0, 0] = float("nan")
    picture = Snapshot(model)
    with pytest.raises(ValueError, match=r"Linear.weight of shape \(10, 6\)"):
        pruner.step()
    assert picture.differences() == []
    assert pruner.steps == 3


MODEL = network()
PARAMS = tpe.prunable_parameters(MODEL)
LINEAR = schedules.linear(0, 4, final=0.5)


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        ({"model": "lenet"}, TypeError, "model='lenet'"),
        ({"params": MODEL}, TypeError, "params is a Sequential"),
        ({"params": []}, ValueError, r"params=\[\]"),
        ({"params": [(nn.Linear(2, 2), "weight")]}, ValueError, "not a part of the model Sequential"),
        ({"schedule": 0.9}, TypeError, "schedule=0.9 is a float"),
        ({"schedule": lambda step: 0.5}, TypeError, "is a function"),
        ({"criterion": "taylor"}, ValueError, "criterion='taylor' is unknown"),
        ({"criterion": 3}, TypeError, "criterion=3 is a int"),
        ({"criterion": {}}, ValueError, "has no entry for this tensor"),
        ({"unit": tpe.Channel}, TypeError, "is not a unit"),
        ({"unit": tpe.Kernel()}, ValueError, "has no kernels"),
        ({"scope": "tensor"}, ValueError, "scope='tensor' is unknown"),
        ({"scope": {}}, ValueError, "scope={} names no tensor"),
        ({"min_keep": 200}, ValueError, "min_keep=200"),
        (
            {"schedule": schedules.one_shot(5, 0.999)},
            ValueError,
            r"schedule=one_shot\(step=5, sparsity=0.999\): amounts",
        ),
    ],
)
def test_bad_arguments_are_named(bad, error, words):
    picture = Snapshot(MODEL)
    arguments = {"model": MODEL, "params": PARAMS, "schedule": LINEAR, **bad}
    with pytest.raises(error, match=words):
        tpe.GradualPruner(arguments.pop("model"), arguments.pop("params"), arguments.pop("schedule"), **arguments)
    assert picture.differences() == []


def test_a_schedule_below_what_is_pruned_is_refused_and_the_remedy_works():
    model = network()
    params = tpe.prunable_parameters(model)
    tpe.prune_to(params, 0.3)
    with pytest.raises(ValueError, match="less than what is pruned already") as error:
        tpe.GradualPruner(model, params, schedules.cubic(0, 4, final=0.8))
    initial = float(str(error.value).split("initial=")[2].split(",")[0])
    pruner = tpe.GradualPruner(model, params, schedules.cubic(0, 4, initial=initial, final=0.8))
    for _ in range(5):
        pruner.step()
    assert dead(params)[0] == round(0.8 * 151)
    tpe.GradualPruner(model, params, schedules.one_shot(3, 0.9))


def test_a_state_is_loaded_where_it_fits_or_not_at_all():
    model = network()
    params = tpe.prunable_parameters(model)
    pruner = tpe.GradualPruner(model, params, LINEAR)
    for _ in range(3):
        pruner.step()
    state = pruner.state_dict()
    assert state == {"steps": 3, "schedule": repr(LINEAR), "units": 151, "pruned": round(0.25 * 151)}
    fresh = network()
    other = tpe.GradualPruner(fresh, tpe.prunable_parameters(fresh), LINEAR)
    for bad, words in (
        (state, r"Load the model's state first, by load_pruned_state_dict\(model, ...\)"),
        ({**state, "schedule": "cubic"}, "saved with cubic"),
        ({**state, "units": 7}, "saved with 7 units"),
        ({**state, "pruned": 0, "steps": -1}, "is not a number of steps"),
        ({**state, "pruned": 0, "steps": True}, "is not a number of steps"),
        ({"steps": 3}, "has the keys"),
        ({**state, "pruned": 0, "steps": 2.5}, "is not a number of steps"),
    ):
        with pytest.raises(ValueError, match=words):
            other.load_state_dict(bad)
        assert other.steps == 0
    with pytest.raises(TypeError, match="is a list"):
        other.load_state_dict([1])
    tpe.load_pruned_state_dict(fresh, model.state_dict())
    other.load_state_dict(state)
    assert repr(other) == f"GradualPruner({LINEAR!r}, steps=3)"


SCRIPT = """
import os, signal, sys
import torch
from torch import nn
import torchprune_ext as tpe

def train(path, kill=None):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    schedule = tpe.schedules.cubic(start=3, end=24, every=4, final=0.8)
    pruner = tpe.GradualPruner(model, tpe.prunable_parameters(model), schedule, "gradient")
    first = 0
    if os.path.exists(path):
        checkpoint = torch.load(path, weights_only=True)
        tpe.load_pruned_state_dict(model, checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        pruner.load_state_dict(checkpoint["pruner"])
        first = checkpoint["step"]
    for step in range(first, 30):
        data = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 1, 6, 6, generator=data), torch.randint(5, (8,), generator=data)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
        parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "pruner": pruner.state_dict()}
        torch.save({**parts, "step": step + 1}, path + ".new")
        os.replace(path + ".new", path)
        if step + 1 == kill:
            os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    train(sys.argv[1], int(sys.argv[2]))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system knows no SIGKILL")
def test_killed_in_the_middle_and_resumed_it_ends_where_it_would_have(tmp_path):
    script, killed, whole = (tmp_path / name for name in ("train.py", "killed.pt", "whole.pt"))
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(tpe.__file__).parents[1])}
    ended = subprocess.run([sys.executable, str(script), str(killed), "13"], env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    middle = torch.load(killed, weights_only=True)
    assert middle["step"] == 13
    train = runpy.run_path(str(script))["train"]
    train(str(killed))
    train(str(whole))
    resumed, expected = (torch.load(path, weights_only=True) for path in (killed, whole))
    assert list(expected["model"]) == list(resumed["model"])
    assert all(torch.equal(expected["model"][key], resumed["model"][key]) for key in expected["model"])
    assert not torch.equal(middle["model"]["4.weight_mask"], expected["model"]["4.weight_mask"])
    assert expected["pruner"] == resumed["pruner"]
    for key, state in expected["optimizer"]["state"].items():
        assert all(torch.equal(value, resumed["optimizer"]["state"][key][name]) for name, value in state.items())
    gone = sum(int((expected["model"][f"{i}.weight_mask"] == 0).sum()) for i in (0, 4))
    assert gone == round(0.8 * (54 + 480))


def test_an_idle_step_costs_next_to_nothing():
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8)))
    pruner = tpe.GradualPruner(
        model, tpe.prunable_parameters(model), schedules.linear(0, 10**6, every=10**5, final=0.9)
    )
    pruner.step()

    def seconds(call):
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - start)
        return best

    assert not list(tpe.pruned_parameters(model))  # so the model itself costs what it did
    training = seconds(lambda: model(torch.randn(32, 256)).square().mean().backward())
    assert seconds(pruner.step) < 0.01 * training
