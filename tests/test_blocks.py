"""More batches than wait in threads, and more than memory holds, give what few give, bit for bit."""

import copy
import os
import threading
import warnings

import compensating as c
import pytest
import torch
import torch.nn.functional as F
from calibrating import PlantedError
from snapshots import Snapshot
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe
from torchprune_ext._runs import calibrating
from torchprune_ext.compensation import blocks, coroutines

pytestmark = c.MARKS


class Block(nn.Module):
    """Pre-norm attention and a network, which tell the ways that a transformer's layers are called."""

    def __init__(self, width=8):
        super().__init__()
        self.q, self.k, self.o = (nn.Linear(width, width) for _ in range(3))
        self.up, self.down = nn.Linear(width, 12), nn.Linear(12, width)

    def forward(self, x, scale, cache=None):
        h = F.layer_norm(x, x.shape[-1:])
        if cache is not None:
            cache.append(h)
        x = x + self.o(torch.softmax(self.q(h) @ self.k(h).mT * scale, -1) @ h)
        h = F.layer_norm(x, x.shape[-1:])
        return x + self.down(F.silu(self.up(h)))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.layers, self.head = nn.Linear(4, 8), nn.ModuleList(Block() for _ in range(3)), nn.Linear(8, 3)

    def forward(self, x):
        x, scale, cache = self.embed(x), x.shape[1] ** -0.5, []
        for layer in self.layers:
            x = layer(x, scale, cache)
        return self.head(x)


class Skipping(Transformer):
    """The last layer reads what the first has given, as in a U-Net."""

    def forward(self, x):
        first = x = self.layers[0](self.embed(x), 1.0)
        x = self.layers[1](x, 1.0)
        return self.head(self.layers[2](x + first, 1.0))


class InPlace(Transformer):
    """What a block gives is written into behind it."""

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x, 0.5).add_(1).mul_(2)
        return self.head(x)


class Aside(Transformer):
    """A block leaves something on itself that a later one reads."""

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            layer.kept = x.mean(1, keepdim=True)
            x = layer(x + self.layers[0].kept, 0.5)
        return self.head(x)


class Told(Block):
    """Leaves something on itself."""

    def forward(self, x, scale):
        self.told = x.mean(1, keepdim=True)
        return super().forward(x, scale)


class Behind(Transformer):
    """What a block has left on itself is read behind the next."""

    def __init__(self):
        super().__init__()
        self.layers[0] = Told()

    def forward(self, x):
        x = self.layers[1](self.layers[0](self.embed(x), 0.5), 0.5)
        return self.head(self.layers[2](x + self.layers[0].told, 0.5))


class Counting(Transformer):
    """Blocks read a list that all of them write into."""

    def forward(self, x):
        x, seen = self.embed(x), []
        for layer in self.layers:
            x = layer(x, 0.5, seen) + sum(h.mean() for h in seen)
        return self.head(x)


class Refuses(Transformer):
    """Looks for NaN itself."""

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x, 0.5)
            if x.isnan().any():
                raise ArithmeticError("NaN")
        return self.head(x)


class Tuples(Transformer):
    """Blocks give a tuple with a mask and what is no tensor."""

    class Layer(Block):
        def forward(self, x):
            return super().forward(x, 0.5), {"mask": x[..., 0] > 0, "name": "layer", "none": None}

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(self.Layer() for _ in range(3))

    def forward(self, x):
        x, masks = self.embed(x), []
        for layer in self.layers:
            x, more = layer(x)
            masks.append(more["mask"])
        return self.head(x * torch.stack(masks).all(0).unsqueeze(-1))


def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 7), nn.ReLU(True), nn.Linear(7, 3))


def stack():
    return nn.Sequential(
        *[nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(True)) for _ in "abc"]
    )


class Leaves(nn.Linear):
    def forward(self, x):
        self.left = x
        return super().forward(x)


MODELS = {  # which blocks are found, and whether each reads no more than the one before
    "transformer": (Transformer, Block, True),
    "skipping": (Skipping, nn.Module, False),
    "in place": (InPlace, Block, True),
    "aside": (Aside, Block, None),
    "behind": (Behind, nn.Module, None),
    "counting": (Counting, nn.Module, None),
    "refuses": (Refuses, Block, False),
    "tuples": (Tuples, Tuples.Layer, True),
    "mlp": (mlp, nn.Linear, True),
    "residual": (c.Residual, nn.Module, False),
    "nested": (lambda: nn.Sequential(Transformer(), nn.Tanh()), Block, True),
}  # fmt: skip


def batches(name, sizes=(3, 2, 4, 1)):
    if name == "residual":
        return c.data((2, 5, 5), sizes)
    if name == "mlp":
        return c.data((4,), tuple(5 * size for size in sizes))
    return [batch for place, size in enumerate(sizes) for batch in c.data((5 + place % 2, 4), (size,), seed=place)]


def fitted(name, window, monkeypatch, **options):
    monkeypatch.setattr(coroutines, "WINDOW", window)
    model = c.build(MODELS[name][0])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*run from the start")
        fits = c.prune_and_compensate(
            model, batches(name), c.pairs(model), target_sparsity=0.5, criterion="wanda", **options
        )
    return dict(model.state_dict()), [(fit.before, fit.after, fit.rows) for fit in fits.values()]


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("mlp", "refuses", "nested")])
def test_batches_that_begin_anew_give_the_same(name, monkeypatch, tmp_path):
    wanted, errors = fitted(name, 100, monkeypatch)
    in_files = [(100, {"offload": tmp_path})] * (name in ("skipping", "tuples", "residual"))
    for window, options in [(1, {}), *in_files]:
        found, others = fitted(name, window, monkeypatch, **options)
        assert others == errors
        c.equal(found, wanted)
    assert not list(tmp_path.iterdir())


def found_in(name):
    model = c.build(MODELS[name][0])
    with calibrating(model, c.pairs(model), {"progress": False}) as run, torch.no_grad():
        given = list(run.batches(batches(name), ""))
        return blocks.find_blocks(run, [module for module, _ in c.pairs(model)], given)


@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_what_is_called_in_sequence(name):
    _, kind, last = MODELS[name]
    found = found_in(name)
    if name in ("transformer", "in place", "refuses", "tuples", "nested"):
        assert len(found.modules) == 3
        assert all(isinstance(module, kind) for module in found.modules)
    if last is not None:
        assert found.last is last
    for module in found.modules if found else ():
        assert not hasattr(module, "told"), "what a block leaves on itself would be another batch's"


def count(model, calls):
    for module, _ in c.pairs(model):
        module.register_forward_hook(lambda module, *_: calls.append(module))


def test_time_is_linear_in_the_depth(monkeypatch):
    """Each layer of a block is come by once for each layer of the same block, however many blocks there are."""
    monkeypatch.setattr(coroutines, "WINDOW", 0)
    seen = {}
    for depth in (1, 3):
        model, calls = c.build(Transformer), []
        model.layers = nn.ModuleList(Block().double() for _ in range(depth))
        count(model, calls)
        c.prune_and_compensate(
            model, batches("transformer", (2,) * 4), c.pairs(model), target_sparsity=0.5, criterion="wanda"
        )
        seen[depth] = len(calls)
    assert seen[3] < 3.5 * seen[1]


def test_threads_do_not_grow_with_the_data():
    model, most = c.build(Transformer), []
    model.layers[1].register_forward_hook(lambda *_: most.append(threading.active_count()))
    before = threading.active_count()
    c.compensate(model, batches("transformer", (1,) * 70), [(model.layers[1].up, "weight")])
    assert max(most) <= before + 2 * 32
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4)).double()
    net[2].register_forward_hook(lambda *_: most.append(threading.active_count()))
    most.clear()
    tpe.recalibrate_bn(net, [x for x, _ in c.data((4,), (2,) * 70)], progress=False)
    assert max(most) <= before + 32


def test_nothing_is_held_but_what_the_last_block_gave(monkeypatch):
    monkeypatch.setattr(coroutines, "WINDOW", 0)
    held, make = [], blocks.Output.__init__

    def watched(self, *args):
        make(self, *args)
        held.append(self)
        alive.append(sum(output.held is not None for output in held))

    alive = []
    monkeypatch.setattr(blocks.Output, "__init__", watched)
    model = c.build(Transformer)
    c.compensate(model, batches("transformer"), c.pairs(model))
    assert max(alive[-2:]) <= 2 * 4 + 1  # two streams of four batches, and the next, just made
    assert all(output.held is None for output in held)


def test_models_that_are_not_of_blocks_are_told(monkeypatch):
    monkeypatch.setattr(coroutines, "WINDOW", 2)
    odd = c.build(lambda: nn.Sequential(Leaves(4, 4), Leaves(4, 4)))
    params = [(module, "weight") for module in odd]
    with pytest.warns(UserWarning, match="3 of the 5 batches are run from the start.* each of the 2 layers.*larger"):
        c.compensate(odd, c.data((4,), (5,) * 5), params)


# ------------------------------------------------------------------------------------------------------------ BatchNorm


def test_statistics_of_many_batches_are_those_of_few(monkeypatch, tmp_path):
    data = [x for x, _ in c.data((2, 5, 5), (3, 4, 2, 5))]
    wanted = c.build(stack)
    tpe.recalibrate_bn(wanted, data, progress=False)
    for window, options in ((1, {}), (0, {}), (100, {"offload": str(tmp_path)})):
        monkeypatch.setattr(coroutines, "WINDOW", window)
        model = c.build(stack)
        tpe.recalibrate_bn(model, data, progress=False, **options)
        c.equal(dict(model.state_dict()), dict(wanted.state_dict()))
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------------- errors


class Fails(Transformer):
    """Fails on batches of seven tokens, in the last block."""

    error = PlantedError

    def forward(self, x):
        x, odd = self.embed(x), x.shape[1] == 7
        for place, layer in enumerate(self.layers):
            if odd and place == 2:
                raise self.error
            x = layer(x, 0.5)
        return self.head(x)


class Swaps(Transformer):
    """Calls its layers in another order on batches of seven tokens."""

    def forward(self, x):
        order, x = ((2, 1, 0) if x.shape[1] == 7 else (0, 1, 2)), self.embed(x)
        for place in order:
            x = self.layers[place](x, 0.5)
        return self.head(x)


class Again(Transformer):
    """Calls a block once more on batches of seven tokens."""

    def forward(self, x):
        odd, x = x.shape[1] == 7, self.embed(x)
        for layer in [*self.layers, *self.layers[1:2]] if odd else self.layers:
            x = layer(x, 0.5)
        return self.head(x)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (Fails, PlantedError, ""),
        (type("Interrupted", (Fails,), {"error": KeyboardInterrupt}), KeyboardInterrupt, ""),
        (Swaps, ValueError, "different ways"),
        (Again, ValueError, "different ways"),
    ],
    ids=["fails", "interrupted", "swaps", "again"],
)
@pytest.mark.parametrize("how", ["window", "offload"])
def test_errors_of_later_batches_leave_no_trace(make, error, words, how, monkeypatch, tmp_path):
    monkeypatch.setattr(coroutines, "WINDOW", 1)
    model = c.build(make)
    before = Snapshot(model)
    data = batches("transformer", (3, 2, 2)) + c.data((7, 4), (2,))
    with pytest.raises(error, match=words or None):
        c.prune_and_compensate(
            model, data, c.pairs(model), target_sparsity=0.5, **({"offload": tmp_path} if how == "offload" else {})
        )
    assert before.differences() == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("offload", "error", "words"),
    [(3, TypeError, "offload=3 is a int"), ("/no/such/folder", ValueError, "is not a folder. Make it first")],
)
def test_a_folder_must_be_one(offload, error, words):
    model = c.build(c.mlp)
    before = Snapshot(model)
    with pytest.raises(error, match=words):
        c.compensate(model, c.data((6,)), c.pairs(model), offload=offload)
    with pytest.raises(error, match=words):
        tpe.recalibrate_bn(nn.Sequential(nn.BatchNorm1d(3)), [torch.ones(2, 3)], offload=offload, progress=False)
    assert before.differences() == []


def test_offload_is_not_for_calls_that_hold_nothing():
    model = c.build(c.mlp)
    with pytest.raises(TypeError, match=r"unknown arguments.*offload"):
        tpe.calibration.activations(model, c.data((6,)), c.pairs(model), offload=os.curdir)


def test_autocast_and_default_device_reach_batches_that_begin_anew(monkeypatch):
    seen = []

    class Look(nn.Module):
        def forward(self, x):
            seen.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
            return x

    wanted = None
    for window in (100, 0):
        monkeypatch.setattr(coroutines, "WINDOW", window)
        model = nn.Sequential(nn.Linear(4, 4), Look(), nn.Linear(4, 4))
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        prune.l1_unstructured(model[2], "weight", 0.5)
        seen.clear()
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            c.compensate(
                model, c.data((4,), (9, 9, 9), dtype=torch.float32), [(model[0], "weight"), (model[2], "weight")]
            )
        assert set(seen) == {(True, False, False)}
        state = copy.deepcopy(dict(model.state_dict()))
        wanted = state if wanted is None else wanted
        c.equal(state, wanted)
