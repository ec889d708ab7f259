"""Whatever a forward does to a model, a pass over data leaves no trace of it, also after an error."""

import contextlib
import functools

import pytest
import torch
import torch.nn.functional as F
from snapshots import Snapshot
from torch import nn
from torch.ao.quantization import MinMaxObserver, PerChannelMinMaxObserver
from torch.utils.checkpoint import checkpoint

import torchprune_ext as tpe

calibration = tpe.calibration
quiet = {"progress": False}


def activations(model, loss_fn, loader, params, **options):
    """Run ``activations`` with the arguments of the others, and with their errors."""

    def prepare(batch):
        loss_fn(torch.zeros(2, 3), torch.zeros(2).long())
        return batch

    return calibration.activations(model, loader, params, prepare=prepare, **options)


CALLS = {
    "gradients": calibration.gradients,
    "taylor": calibration.taylor,
    "fisher": calibration.fisher,
    "ggn": calibration.hessian_diagonal,
    "hutchinson": functools.partial(calibration.hessian_diagonal, method="hutchinson", samples=2),
    "snip": calibration.snip,
    "grasp": calibration.grasp,
    "activations": activations,
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.ao.quantization:DeprecationWarning")


class PlantedError(Exception):
    pass


class Grows(nn.Module):
    """Changes shape, dtype and presence of its buffers, as observers and caches do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("resized", torch.ones(2))
        self.register_buffer("replaced", torch.ones(3))
        self.register_buffer("retyped", torch.ones(3))
        self.register_buffer("dropped", torch.ones(3))
        self.register_buffer("counter", torch.zeros((), dtype=torch.long))
        self.register_buffer("nothing", None)
        self.held = torch.zeros(4)
        self.cache = []

    def forward(self, x):
        with torch.no_grad():
            self.resized.resize_(len(x) + 3).fill_(7)
            self.replaced = torch.zeros(5)
            self.retyped.data = torch.zeros(3, dtype=torch.float64)
            if "dropped" in self._buffers:
                del self.dropped
            self.register_buffer("appeared", torch.zeros(1))
            self.nothing = torch.ones(1)
            self.counter += 1
            self.held += 1
            self.cache.append(len(x))
        return x


class Clips(nn.Linear):
    """Writes into its weight before it uses it."""

    def forward(self, x):
        self.weight.data.clamp_(-0.1, 0.1)
        return super().forward(x)


class ClipsARow(nn.Linear):
    """Writes into a part of its weight, and into its bias by other means."""

    def forward(self, x):
        with torch.no_grad():
            self.weight[1].mul_(0.5)
            torch._foreach_add_([self.bias], 1)
            torch.mul(self.bias.detach(), 2, out=self.bias.detach())
        return super().forward(x)


class Observed(nn.Module):
    def __init__(self):
        super().__init__()
        self.whole, self.rows = MinMaxObserver(), PerChannelMinMaxObserver(ch_axis=1)

    def forward(self, x):
        return self.rows(self.whole(x))


class Words(nn.Module):
    """Tokens whose embeddings a forward renormalizes, one of them only in a later batch."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(9, 4, max_norm=0.5)
        with torch.no_grad():
            self.words.weight[:4] *= 1e-3

    def forward(self, x):
        return self.words(x.abs().argmax(1)) if x.dim() == 2 and x.shape[1] == 9 else self.words(x).squeeze(1)


def prepared(kind):
    """Return a model, batches and what to list."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    if kind == "renormalized":
        model = nn.Sequential(Words(), nn.Linear(4, 3))
        x = torch.tensor([[0], [1], [2], [3], [4], [5], [6], [7]])
    else:
        extra = {"grows": Grows, "observed": Observed, "clips": lambda: Clips(4, 4), "part": lambda: ClipsARow(4, 4)}[
            kind
        ]()
        model = nn.Sequential(extra, nn.Linear(4, 3))
    return model, [(x[:4], y[:4]), (x[4:], y[4:])], [(model[1], "weight")]


@every_call
@pytest.mark.parametrize("kind", ["grows", "observed", "renormalized", "clips", "part"])
@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.filterwarnings("ignore:torch.func cannot vectorize")
def test_what_a_forward_writes_is_put_back(call, kind, broken):
    model, batches, params = prepared(kind)
    seen = []

    def loss_fn(output, target):
        seen.append(0)
        if broken and len(seen) == 2:
            raise PlantedError
        return F.cross_entropy(output, target)

    tensors = {name: (value, value.clone()) for name, value in [*model.named_buffers(), *model.named_parameters()]}
    held = None if kind != "grows" else model[0].held.clone()
    before = Snapshot(model)
    with pytest.raises(PlantedError) if broken else contextlib.nullcontext():
        call(model, loss_fn, batches, params, **quiet)
    assert before.differences() == []
    now = dict([*model.named_buffers(), *model.named_parameters()])
    assert list(now) == list(tensors)
    for name, (value, old) in tensors.items():
        assert now[name] is value, name
        assert value.dtype == old.dtype, name
        torch.testing.assert_close(value, old, rtol=0, atol=0)
    if held is not None:
        assert torch.equal(model[0].held, held)
        assert model[0].cache == []


@pytest.mark.parametrize("kind", ["grows", "observed", "renormalized", "clips"])
def test_compensation_puts_it_back_too(kind):
    model, batches, params = prepared(kind)
    tpe.threshold(*params[0], 0.1)
    tensors = {
        name: (value, value.clone()) for name, value in [*model[0].named_buffers(), *model[0].named_parameters()]
    }
    tpe.compensate(model, batches, params, **quiet)
    now = dict([*model[0].named_buffers(), *model[0].named_parameters()])
    assert list(now) == list(tensors)
    for name, (value, old) in tensors.items():
        assert now[name] is value, name
        torch.testing.assert_close(value, old, rtol=0, atol=0)


@every_call
def test_lazy_layers_anywhere_are_refused_before_anything_runs(call):
    model = nn.Sequential(nn.Linear(4, 5), nn.LazyLinear(3), nn.LazyBatchNorm1d())
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(0))
    with pytest.raises(ValueError, match=r"model\.1, a LazyLinear, has no shape yet"):
        call(model, F.cross_entropy, [(torch.randn(6, 4), torch.arange(6) % 3)], [(model[0], "weight")], **quiet)
    assert seen == []
    assert isinstance(model[1], nn.LazyLinear)
    assert isinstance(model[2].weight, nn.UninitializedParameter)


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant):
        super().__init__()
        self.first, self.second, self.reentrant = nn.Linear(4, 5), nn.Linear(5, 3), reentrant

    def forward(self, x):
        x = self.first(x)
        return checkpoint(self.second, x, use_reentrant=self.reentrant)


@pytest.mark.filterwarnings("ignore:.*autocast.* is deprecated:FutureWarning")  # by torch 2.4 itself
@pytest.mark.parametrize("name", [name for name in CALLS if name != "activations"])
def test_reentrant_checkpointing_is_named(name):
    torch.manual_seed(0)
    model = Checkpointed(reentrant=True)
    batches, params = [(torch.randn(6, 4), torch.arange(6) % 3)], [(model.first, "weight"), (model.second, "weight")]
    with pytest.raises(ValueError, match=r"reentrant activation checkpointing.*use_reentrant=False"):
        CALLS[name](model, F.cross_entropy, batches, params, **quiet)
    model.reentrant = False
    if name in ("gradients", "snip"):
        assert CALLS[name](model, F.cross_entropy, batches, params, **quiet)
