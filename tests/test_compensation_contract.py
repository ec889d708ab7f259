"""What a call of compensation leaves behind: what must change after success, nothing after an error."""

import functools
import os
import signal
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from compensating import (
    ALL,
    MARKS,
    Attention,
    Branching,
    Breaks,
    OtherOrder,
    Recurrent,
    Twice,
    build,
    compensate,
    data,
    equal,
    magnitude,
    pairs,
    prune_and_compensate,
    prune_in_rounds,
    pruned,
    sparsegpt,
    two,
    weights,
)
from snapshots import Snapshot
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe

pytestmark = MARKS

# ------------------------------------------------------------------------------------- what a successful call leaves


@pytest.mark.parametrize("name", ["linear", "(in, out)", "deep residual"])
@pytest.mark.parametrize("call", ["compensate", "prune", "units", "rounds", "sparsegpt"])
def test_only_what_must_change_changes(name, call):
    model, params = pruned(name, 0.3)
    model.train()
    model(data(ALL[name][1])[0][0]).square().sum().backward()
    next(model.modules()).extra = lambda: None
    hook = params[0][0].register_forward_hook(lambda *_: None)
    before = {
        "parameters": [(key, id(value)) for key, value in model.named_parameters()],
        "buffers": {key: value.clone() for key, value in model.named_buffers() if not key.endswith("_mask")},
        "buffer names": [key for key, _ in model.named_buffers()],
        "grads": [(id(p.grad), p.grad.clone()) for p in model.parameters() if p.grad is not None],
        "modes": [module.training for module in model.modules()],
        "flags": [p.requires_grad for p in model.parameters()],
        "hooks": [(list(m._forward_pre_hooks), list(m._forward_hooks)) for m in model.modules()],
        "strides": [p.stride() for p in model.parameters()],
    }
    origs, masks = ([getattr(m, f"weight_{part}").detach().clone() for m, _ in params] for part in ("orig", "mask"))
    batches, dense = data(ALL[name][1], (20, 12)), build(ALL[name][0])  # a backward pass under the masks has been seen
    if call == "compensate":
        compensate(model, batches, params, dense=dense)
        equal([module.weight_mask for module, _ in params], masks)
    elif call == "prune":
        prune_and_compensate(model, batches, params, target_sparsity=0.6, dense=dense)
    elif call == "units":
        unit = tpe.Channel(dim=0 if name == "(in, out)" else 1)
        prune_and_compensate(
            model,
            batches,
            params,
            target_sparsity={k: float(k[0].weight.shape[unit.dim] > 1) / 2 for k in params},
            unit=unit,
            dense=dense,
        )
    elif call == "rounds":
        prune_in_rounds(model, batches, params, magnitude, target_sparsity=0.6, steps=3, dense=dense)
    else:
        sparsegpt(model, batches, params, target_sparsity=0.6, dense=dense)
    hook.remove()
    assert [(key, id(value)) for key, value in model.named_parameters()] == before["parameters"]
    assert [key for key, _ in model.named_buffers()] == before["buffer names"]
    equal({k: v for k, v in model.named_buffers() if not k.endswith("_mask")}, before["buffers"])
    now = [(id(p.grad), p.grad) for p in model.parameters() if p.grad is not None]
    assert [i for i, _ in now] == [i for i, _ in before["grads"]]
    equal([grad for _, grad in now], [grad for _, grad in before["grads"]])
    assert [module.training for module in model.modules()] == before["modes"]
    assert [p.requires_grad for p in model.parameters()] == before["flags"]
    assert [p.stride() for p in model.parameters()] == before["strides"]
    assert all(p.is_leaf for p in model.parameters())
    hooks = [(list(m._forward_pre_hooks), list(m._forward_hooks)) for m in model.modules()]
    assert [pre for pre, _ in hooks] == [pre for pre, _ in before["hooks"]]
    for (module, _), orig, mask in zip(params, origs, masks, strict=True):
        assert "forward" not in vars(module)
        equal(module.weight.detach(), (module.weight_orig * module.weight_mask).detach())
        assert bool((module.weight_mask <= mask).all())
        gone = module.weight_mask == 0
        if call != "rounds":
            equal(module.weight_orig.detach()[gone], orig[gone])
        equal(module.weight_orig.detach()[mask == 0], orig[mask == 0])
    model(batches[0][0]).sum().backward()  # and it can be trained on
    assert all(p.grad is not None for p in model.parameters())


def test_memory_format_is_kept():
    model = build(lambda: nn.Conv2d(4, 6, 3)).to(memory_format=torch.channels_last)
    tpe.every_other(model, "weight")
    strides = model.weight_orig.stride(), model.weight_mask.stride()
    compensate(model, data((4, 5, 5)), [(model, "weight")])
    assert (model.weight_orig.stride(), model.weight_mask.stride()) == strides


def test_a_forward_of_the_instance_is_kept():
    model, params = pruned("deep mlp")
    old = model[0].forward
    model[0].forward = patched = lambda x: old(x)
    compensate(model, data((6,), (9, 9)), params)
    assert vars(model[0])["forward"] is patched


def test_works_inside_no_grad_and_inference_mode():
    found = []
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        model, params = pruned("deep mlp")
        batches = data((6,), (9, 9))
        with context():
            compensate(model, batches, params)
        model(batches[0][0]).sum().backward()
        found.append(weights(model))
    equal(found[1:], [found[0], found[0]])


def test_a_lost_hook_does_not_hide_the_new_values():
    model, params = pruned("linear")
    model._forward_pre_hooks.clear()
    compensate(model, data((6,)), params)
    equal(model.weight.detach(), (model.weight_orig * model.weight_mask).detach())


# ----------------------------------------------------------------------------------------------- refused: all is back


def half_way(shape=(4,)):
    yield from data(shape, (5, 6))
    raise ArithmeticError("on purpose")


def no_bool(batch):
    return torch.ones(len(batch[0]))


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Standardised(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Dropping(Branching):
    def forward(self, x):
        return self.b(F.dropout(self.a(x), 0.5, training=True))


class PlusLinear(nn.Linear):
    def forward(self, x, residual=None):
        y = super().forward(x)
        return y if residual is None else y + residual


class Residue(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = PlusLinear(4, 4), PlusLinear(4, 4)

    def forward(self, x):
        return self.b(F.relu(self.a(x, residual=x)))


def no_outputs():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1, bias=False))
    model[1].weight = nn.Parameter(torch.empty(0, 4))
    return model


def spoilt_weight(value):
    model = two()
    model[2].weight.data[1, 1] = value
    return model


def spoilt_data(value):
    batches = [(x.clone(), y) for x, y in EIGHT]
    batches[1][0][0, 1] = value
    return batches


def halved():
    model = two()
    prune.custom_from_mask(model[2], "weight", 0.5 * (torch.rand(4, 4) < 0.5))
    return model


def at(*path):
    return lambda model: [(model.get_submodule(path[0]), path[1] if len(path) > 1 else "weight")]


def everything(model):
    found = [(m, n, p) for m in model.modules() for n, p in m.named_parameters(recurse=False)]
    return [(m, n.removesuffix("_orig")) for m, n, p in found if p.dim() > 1]


EIGHT = data((4,), (5, 3))
TOKENS = data((3, 4), (5, 3))
IDS = [(torch.randint(5, (6, 3)), None)]
REFUSED = {
    "loader raises": (two, half_way, {}, pairs, ArithmeticError, "on purpose"),
    "no data": (two, list, {}, pairs, ValueError, "gave no batch"),
    "an empty generator": (two, lambda: iter(()), {}, pairs, ValueError, "gave no batch"),
    "a batch without samples": (
        two,
        lambda: [*EIGHT, (torch.zeros(0, 4).double(), None)],
        {},
        pairs,
        ValueError,
        "a batch without samples",
    ),
    "a batch instead of batches": (two, lambda: EIGHT[0][0], {}, pairs, TypeError, "loader is a Tensor"),
    "max_batches": (two, lambda: EIGHT, {"max_batches": 0}, pairs, ValueError, "max_batches=0"),
    "no params": (two, lambda: EIGHT, {}, lambda model: [], ValueError, "lists no tensor"),
    "no such": (
        two,
        lambda: EIGHT,
        {},
        lambda model: [(nn.Linear(4, 4).double(), "weight")],
        ValueError,
        "is not a part of the model",
    ),
    "bias": (two, lambda: EIGHT, {}, at("0", "bias"), TypeError, "0.bias, .* does not multiply"),
    "tied": (tied, lambda: EIGHT, {}, at("0"), ValueError, "is tied: 0.weight_orig and 2.weight"),
    "twice": (Twice, lambda: EIGHT, {}, pairs, ValueError, "a.weight is called more than once"),
    "never called": (Attention, lambda: TOKENS, {}, at("mix.out_proj"), ValueError, "out_proj.weight, .* never called"),
    "in_proj": (
        Attention,
        lambda: TOKENS,
        {},
        at("mix", "in_proj_weight"),
        (TypeError, ValueError),
        "called with 4 arguments",
    ),
    "lstm": (Recurrent, lambda: TOKENS, {}, at("lstm", "weight_ih_l0"), TypeError, "a LSTM, which does not multiply"),
    "lstm, all": (Recurrent, lambda: TOKENS, {}, everything, TypeError, "one of several tensors"),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)),
        lambda: IDS,
        {},
        at("0"),
        TypeError,
        "a Embedding, which does not multiply",
    ),
    "bilinear": (
        lambda: nn.Bilinear(4, 4, 3),
        lambda: [((torch.ones(3, 4).double(), torch.ones(3, 4).double()), None)],
        {},
        at(""),
        TypeError,
        "called with 2 arguments",
    ),
    "layer norm": (
        lambda: nn.Sequential(nn.LayerNorm(4)),
        lambda: EIGHT,
        {},
        at("0"),
        TypeError,
        "a LayerNorm, which does not multiply",
    ),
    "transposed": (
        lambda: nn.ConvTranspose2d(2, 3, 3),
        lambda: data((2, 5, 5)),
        {},
        at(""),
        TypeError,
        "a ConvTranspose2d, which does not",
    ),
    "conv3d": (
        lambda: nn.Conv3d(2, 3, 2),
        lambda: data((2, 4, 4, 4)),
        {},
        at(""),
        TypeError,
        "a Conv3d, which does not multiply",
    ),
    "no plain linear": (
        lambda: Scaled(4, 3),
        lambda: EIGHT,
        {},
        at(""),
        TypeError,
        "a Scaled, which does not multiply",
    ),
    "no plain convolution": (
        lambda: Standardised(2, 3, 3),
        lambda: data((2, 5, 5)),
        {},
        at(""),
        TypeError,
        "a Standardised, which does not",
    ),
    "no bool": (two, lambda: EIGHT, {"sample_mask": no_bool}, pairs, TypeError, "sample_mask gave torch.float32"),
    "nothing": (two, lambda: EIGHT, {"sample_mask": lambda batch: None}, pairs, TypeError, "sample_mask gave NoneType"),
    "mask raises": (two, lambda: EIGHT, {"sample_mask": lambda batch: 1 / 0}, pairs, ZeroDivisionError, "by zero"),
    "no sample": (
        two,
        lambda: EIGHT,
        {"sample_mask": lambda b: torch.zeros(len(b[0])) > 0},
        pairs,
        ValueError,
        "leaves out every sample",
    ),
    "other way, shorter": (Branching, lambda: data((4,), (5, 1)), {}, pairs, ValueError, "take different ways"),
    "other way, longer": (Branching, lambda: data((4,), (1, 5)), {}, pairs, ValueError, "b.weight, .* never called"),
    "other way, in the middle": (
        Branching,
        lambda: data((4,), (5, 1, 5)),
        {},
        pairs,
        ValueError,
        "take different ways",
    ),
    "other order": (OtherOrder, lambda: data((4,), (5, 1, 5)), {}, pairs, ValueError, "take different ways"),
    "process_group": (two, lambda: EIGHT, {"process_group": object()}, pairs, TypeError, "process_group="),
    "unknown option": (two, lambda: EIGHT, {"epochs": 3}, pairs, TypeError, "epochs"),
    "second batch raises": (Breaks, lambda: data((4,), (5, 2, 4)), {}, pairs, ArithmeticError, "on purpose"),
    "first batch raises": (Breaks, lambda: data((4,), (2, 5)), {}, pairs, ArithmeticError, "on purpose"),
    "last batch raises": (Breaks, lambda: data((4,), (5, 3, 2)), {}, pairs, ArithmeticError, "on purpose"),
    "dropout that is always on": (
        Dropping,
        lambda: EIGHT,
        {},
        pairs,
        ValueError,
        "b.weight gets another input .* again",
    ),
    "more arguments": (Residue, lambda: EIGHT, {}, pairs, TypeError, "called with 2 arguments"),
    "original1": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))),
        lambda: EIGHT,
        {},
        at("1.parametrizations.weight", "original1"),
        TypeError,
        "called with 0 arguments",
    ),
    "no outputs": (no_outputs, lambda: EIGHT, {}, at("1"), ValueError, "1.weight, which has no entries"),
    "NaN in a weight": (
        lambda: spoilt_weight(float("nan")),
        lambda: EIGHT,
        {},
        at("2"),
        ValueError,
        "2.weight or its bias holds NaN|has 1 NaN or infinite",
    ),
    "infinity in a weight": (
        lambda: spoilt_weight(float("inf")),
        lambda: EIGHT,
        {},
        at("2"),
        ValueError,
        "2.weight or its bias holds NaN|has 1 NaN or infinite",
    ),
    "NaN in the data": (two, lambda: spoilt_data(float("nan")), {}, pairs, ValueError, "0.weight gets inputs, .* NaN"),
    "infinity in the data": (
        two,
        lambda: spoilt_data(float("inf")),
        {},
        pairs,
        ValueError,
        "0.weight gets inputs, .* NaN",
    ),
    "squares out of range": (
        two,
        lambda: [(EIGHT[0][0] * 1e160, None)],
        {},
        pairs,
        ValueError,
        "0.weight gets inputs, .* squares",
    ),
    "mask of halves": (halved, lambda: EIGHT, {}, pairs, ValueError, "values besides 0 and 1"),
    "sample_mask too long": (
        two,
        lambda: EIGHT,
        {"sample_mask": lambda b: torch.ones(99) > 0},
        pairs,
        ValueError,
        r"shape \(99,\) for a batch of 5",
    ),
    "sample_mask of no token": (
        lambda: nn.Sequential(nn.Linear(4, 4)),
        lambda: TOKENS,
        {"sample_mask": lambda batch: torch.ones(len(batch[0]), 2) > 0},
        pairs,
        ValueError,
        "gave 2 values .* 3 rows",
    ),
    "wrong shape": (two, lambda: data((5,), (4, 4)), {}, pairs, RuntimeError, "cannot be multiplied"),
}
CALLS = {
    "compensate": compensate,
    "admm": functools.partial(prune_and_compensate, target_sparsity=0.5),
    "units": functools.partial(prune_and_compensate, target_sparsity=0.5, unit=tpe.Channel(dim=1)),
    "rounds": functools.partial(
        prune_in_rounds,
        target_sparsity=0.7,
        steps=2,
        criterion=lambda model: {(m, n): getattr(m, n).detach().abs() for m, n in everything(model)},
    ),
    "sparsegpt": functools.partial(sparsegpt, target_sparsity=0.5),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("why", REFUSED)
def test_refused_calls_leave_no_trace(why, call):
    make, loader, options, listed, error, words = REFUSED[why]
    model = build(make)
    for module, name in pairs(model)[:1]:
        prune.l1_unstructured(module, name, amount=0.3)
    params = listed(model)
    function = CALLS[call]
    if call == "rounds":
        options = {**options, "criterion": lambda model: {(m, n): getattr(m, n).detach().abs() for m, n in params}}
    before, threads = Snapshot(model), threading.active_count()
    with pytest.raises(error, match=words):
        function(model, loader(), params, **options)
    assert not before.differences()
    assert threading.active_count() == threads
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"criterion": "best", "target_sparsity": 0.5}, ValueError),
        ({}, TypeError),
        ({"target_sparsity": 0.5, "pattern": tpe.NM(2, 4)}, TypeError),
        ({"pattern": (2, 4)}, TypeError),
        ({"pattern": tpe.NM(2, 3)}, ValueError),
        ({"target_sparsity": 1.5}, ValueError),
        ({"target_sparsity": -0.1}, ValueError),
        ({"target_sparsity": "x"}, TypeError),
        ({"target_sparsity": 0.5, "steps": 0}, ValueError),
        ({"target_sparsity": 0.5, "steps": 1.5}, TypeError),
        ({"target_sparsity": 0.5, "criterion": magnitude}, TypeError),
        ({"target_sparsity": 0.5, "steps": 5}, ValueError),
    ],
)
def test_bad_arguments_leave_no_trace(options, error):
    model, params = pruned("deep mlp", 0.2)
    before = Snapshot(model)
    with pytest.raises(error):
        prune_and_compensate(model, data((6,)), params, **options)
    assert not before.differences()


@pytest.mark.parametrize(
    ("criterion", "options", "error", "words"),
    [
        ("magnitude", {}, TypeError, "criterion='magnitude'"),
        (None, {}, TypeError, "criterion=None"),
        (magnitude, {"steps": 0}, ValueError, "steps=0"),
        (magnitude, {"target_sparsity": 1.0}, ValueError, "target_sparsity=1.0"),
        (magnitude, {"target_sparsity": -0.1}, ValueError, "target_sparsity=-0.1"),
        (lambda model: {}, {}, ValueError, r"criterion\(model\)"),
        (lambda model: None, {}, TypeError, r"criterion\(model\)"),
        (lambda model: {k: -v for k, v in magnitude(model).items()}, {}, ValueError, r"criterion\(model\)"),
        (lambda model: {k: v[:1] for k, v in magnitude(model).items()}, {}, ValueError, r"criterion\(model\)"),
    ],
)
def test_bad_arguments_of_rounds_leave_no_trace(criterion, options, error, words):
    model, params = pruned("deep mlp", 0.2)
    before = Snapshot(model)
    with pytest.raises(error, match=words):
        prune_in_rounds(model, data((6,)), params, criterion, **{"target_sparsity": 0.5, **options})
    assert not before.differences()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pattern": (2, 4)},
        {"target_sparsity": 0.5, "pattern": tpe.NM(2, 4)},
        {"target_sparsity": 2.0},
        {"target_sparsity": {}},
        {"pattern": tpe.NM(2, 4)},
        {"pattern": tpe.NM(2, 4, dim=0, pad=True)},
    ],
)
def test_bad_arguments_of_sparsegpt_leave_no_trace(options):
    model, params = pruned("deep mlp", 0.2)
    before = Snapshot(model)
    with pytest.raises((TypeError, ValueError)):
        sparsegpt(model, data((6,)), params, **options)
    assert not before.differences()


@pytest.mark.parametrize("create_bias", [False, True])
@pytest.mark.parametrize("fails_in", [1, 2, 3])
def test_a_criterion_that_raises_in_a_later_round_leaves_no_trace(fails_in, create_bias):
    model, params = pruned("deep residual", 0.2)
    for module, name in params[:2]:
        tpe.undo(module, name)
    rounds = []

    def criterion(model):
        rounds.append(tpe.pruned_parameters(model))
        if len(rounds) == fails_in:
            raise ArithmeticError("on purpose")
        return magnitude(model)

    before = Snapshot(model)
    options = {"target_sparsity": 0.6, "steps": 3, "create_bias": create_bias}
    with pytest.raises(ArithmeticError, match="on purpose"):
        prune_in_rounds(model, data((2, 5, 5), (9, 9)), params, criterion, **options)
    assert len(rounds) == fails_in
    assert not before.differences()


def test_errors_name_the_layer():
    cases = [
        (spoilt_weight(float("nan")), EIGHT, "2.weight or its bias holds NaN|has 1 NaN or infinite"),
        (two(), spoilt_data(float("inf")), "0.weight gets inputs"),
        (Dropping(), EIGHT, "b.weight gets another input"),
    ]
    for model, batches, text in cases:
        model = model.double()
        for module, name in pairs(model):
            prune.identity(module, name)
        with pytest.raises(ValueError, match=text):
            compensate(model, batches, pairs(model))


@pytest.mark.parametrize("started", [0, 1, 3])
def test_too_many_threads_leave_none(started, monkeypatch):
    model, params = pruned("deep mlp")
    before, threads, start = Snapshot(model), [], threading.Thread.start

    def fails(thread):
        if len(threads) == started:
            raise RuntimeError("can't start new thread")
        threads.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fails)
    with pytest.raises(RuntimeError, match="can't start"):
        compensate(model, data((6,), (5, 5, 5, 5)), params)
    assert not any(thread.is_alive() for thread in threads)
    assert not before.differences()


class Interrupts(Branching):
    """Lets Ctrl-C be pressed while the second batch is on its way."""

    def forward(self, x):
        x = self.a(x)
        if x.shape[0] == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
        return self.b(x)


@pytest.fixture
def ctrl_c_is_heard():
    """A job that is started in the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_is_heard")
def test_ctrl_c_twice_leaves_no_trace():
    model = build(Interrupts)
    prune.l1_unstructured(model.a, "weight", amount=0.5)
    before = Snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        compensate(model, data((4,), (5, 3, 5)), pairs(model))
    assert not before.differences()
