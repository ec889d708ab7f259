"""N:M groups run along the axis that the layer's product sums over, whatever the layer; an explicit axis is obeyed."""

import copy
import math
import warnings

import oracles
import pytest
import torch
from cases import flat
from snapshots import Snapshot
from torch import nn
from torch.nn.utils import parametrizations, prune

import torchprune_ext as tpe


class Conv1D(nn.Module):
    """As Hugging Face's: a linear layer whose weight is (inputs, outputs)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        size_out = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size_out)


class Eventful(Conv1D):
    """A transposed layer whose forward leaves traces wherever a forward can."""

    def __init__(self, nf, nx):
        super().__init__(nf, nx)
        self.register_buffer("calls", torch.zeros(()))
        self.drop = nn.Dropout(0.9)
        self.seen, self.number, self.last = [], 0, torch.zeros(1)

    def forward(self, x):
        self.calls += 1
        self.last += 1
        self.seen.append(len(x))
        self.number += 1
        self.register_buffer("new", x)
        return super().forward(self.drop(x)) + torch.randn(()), None


class Batched(nn.Module):
    """A layer that takes (batch, time, features) only, (inputs, outputs)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(nx, nf))

    def forward(self, x):
        return torch.einsum("bti,io->bto", x, self.weight)


class Turned(nn.Linear):
    """A subclass of Linear that keeps its weight the other way round."""

    def __init__(self, nf, nx):
        super().__init__(nf, nx, bias=False)  # a weight of shape (nx, nf)

    def forward(self, x):
        return x @ self.weight


class Scaled(nn.Linear):
    """A subclass of Linear with a forward of its own, (outputs, inputs)."""

    def forward(self, x):
        return torch.relu(super().forward(x) * 0.5 + 100)


class Gate(nn.Module):
    """A router: (outputs, inputs), a softmax over the outputs, several results."""

    def __init__(self, nf, nx):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(nf, nx))

    def forward(self, x):
        scores = (x.reshape(-1, x.shape[-1]) @ self.weight.t()).softmax(-1)
        return scores, scores.argmax(-1)


class Normed(nn.Module):
    """A layer that normalizes its input first, (inputs, outputs)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(nx, nf))

    def forward(self, x):
        return nn.functional.layer_norm(x, x.shape[-1:]) @ self.weight


def rows_hold(mask, axis, n, m):
    """Say whether each group of ``m`` along ``axis`` keeps ``n``."""
    moved = mask.movedim(axis, -1)
    return bool((moved.reshape(-1, m).sum(1) == n).all())


TRANSPOSED = {"Conv1D": Conv1D, "eventful": Eventful, "batched": Batched, "turned": Turned, "normed": Normed}


@pytest.mark.parametrize("sizes", [(8, 8), (8, 12), (12, 8), (4, 20)], ids=str)
@pytest.mark.parametrize("kind", TRANSPOSED)
def test_layers_that_keep_inputs_first_are_grouped_along_inputs(kind, sizes):
    layer = TRANSPOSED[kind](*sizes)
    tpe.nm_structured(layer, "weight", 2, 4)
    assert rows_hold(layer.weight_mask, 0, 2, 4)
    [hook] = layer._forward_pre_hooks.values()
    assert hook.dim == 0
    params = [(TRANSPOSED[kind](*sizes), "weight"), (nn.Linear(8, 8), "weight")]
    tpe.global_nm_structured(params, m=4, amount=0.5, choices=[2])
    assert [rows_hold(layer.weight_mask, axis, 2, 4) for (layer, _), axis in zip(params, (0, 1), strict=True)] == [
        True,
        True,
    ]
    assert ["dim=0" in repr(h) for layer, _ in params for h in layer._forward_pre_hooks.values()] == [True, False]


@pytest.mark.parametrize("values", ["zeros", "eye", "symmetric", "nan_free_half", "bfloat16", "double"])
@pytest.mark.parametrize("kind", [Scaled, Gate, nn.Linear])
def test_the_values_of_a_square_weight_do_not_matter(values, kind):
    layer, linear = Conv1D(8, 8), kind(8, 8)
    dtypes = {"nan_free_half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}
    for each in (layer, linear):
        each.to(dtypes.get(values, torch.float32))
        with torch.no_grad():
            if values == "zeros":
                each.weight.zero_()
            elif values == "eye":
                each.weight.copy_(torch.eye(8))
            elif values == "symmetric":
                each.weight.add_(each.weight.t().clone())
        tpe.nm_structured(each, "weight", 2, 4)
    assert rows_hold(layer.weight_mask, 0, 2, 4)
    assert rows_hold(linear.weight_mask, 1, 2, 4)


@pytest.mark.parametrize("past", ["fresh", "native", "inference", "frozen", "no_grad", "half_dead"])
def test_a_layer_with_a_past_is_tried_out_all_the_same(past):
    layer = Conv1D(8, 8)
    if past == "native":
        prune.l1_unstructured(layer, "weight", amount=3)
    if past == "half_dead":
        prune.custom_from_mask(layer, "weight", torch.arange(64).view(8, 8) < 32)
    layer.weight.requires_grad_(past != "frozen") if past in ("fresh", "frozen") else None
    with torch.inference_mode(past == "inference"), torch.set_grad_enabled(past != "no_grad"):
        tpe.nm_structured(layer, "weight", 2, 4)
    moved = layer.weight_mask.movedim(0, -1).reshape(-1, 4).sum(1)
    assert moved.max() == 2
    [hook] = [h for h in layer._forward_pre_hooks.values() if isinstance(h, prune.BasePruningMethod)]
    assert (hook[1] if isinstance(hook, prune.PruningContainer) else hook).dim == 0


def test_trying_out_leaves_no_trace():
    layer = Eventful(8, 8).train()
    events = []
    layer.register_forward_hook(lambda *_: events.append("hook"))
    layer.drop.register_forward_pre_hook(lambda *_: events.append("child's hook"))
    before, state = Snapshot(layer, layer.drop), torch.get_rng_state()
    held = copy.deepcopy((layer.seen, layer.number, layer.last, layer.calls, layer.training, layer.drop.training))
    weight = layer.weight
    with pytest.raises(ValueError, match=r"m=5.*dim=0"):
        tpe.nm_structured(layer, "weight", 2, 5)
    assert before.differences() == []
    assert torch.equal(state, torch.get_rng_state())
    assert held == (layer.seen, layer.number, layer.last, layer.calls, layer.training, layer.drop.training)
    assert "new" not in layer._buffers
    assert events == []
    assert layer.weight is weight
    assert weight.grad is None


def test_torchs_own_layers_have_inputs_on_axis_1():
    tied = nn.Embedding(8, 12)
    lstm, attention = nn.LSTM(8, 4), nn.MultiheadAttention(8, 2)
    for module, name in [
        (nn.Linear(8, 8), "weight"),
        (nn.Conv1d(8, 8, 3), "weight"),
        (nn.Conv2d(8, 4, 3, groups=2), "weight"),
        (nn.Conv3d(4, 4, 2), "weight"),
        (tied, "weight"),
        (lstm, "weight_ih_l0"),
        (lstm, "weight_hh_l0"),
        (nn.GRUCell(8, 4), "weight_hh"),
        (nn.RNN(8, 8), "weight_ih_l0"),
        (attention, "in_proj_weight"),
        (nn.Bilinear(4, 8, 2), "weight"),
    ]:
        tpe.nm_structured(module, name, 2, 4)
        assert rows_hold(module.get_buffer(f"{name}_mask"), 1, 2, 4)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions_are_grouped_along_their_inputs(dims, groups):
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    layer, twin = (kind(8, 6, 2, groups=groups) for _ in range(2))
    tpe.nm_structured(layer, "weight", 1, 4)
    assert rows_hold(layer.weight_mask, 0, 1, 4)
    tpe.global_nm_structured([(twin, "weight")], m=4, target_sparsity=0.75, choices=[1])
    assert rows_hold(twin.weight_mask, 0, 1, 4)


def test_no_group_crosses_the_groups_of_a_transposed_convolution():
    layer = nn.ConvTranspose2d(12, 4, 1, groups=2)  # two blocks of 6 inputs
    before = Snapshot(layer)
    with pytest.raises(ValueError, match=r"m=4 does not divide the 6 entries .* 2 groups .*1, 2, 3, 6.*pad=True"):
        tpe.nm_structured(layer, "weight", 2, 4)
    with pytest.raises(ValueError, match=r"params\[0\].*m=4 does not divide the 6 entries"):
        tpe.global_nm_structured([(layer, "weight")], m=4, amount=0.5)
    assert before.differences() == []
    weight, shape = flat(layer.weight), tuple(layer.weight.shape)
    tpe.nm_structured(layer, "weight", 2, 4, pad=True)
    runs = oracles.collect(shape, lambda at: (at[0] // 6, at[0] % 6 // 4, *at[1:]))
    assert flat(layer.weight_mask) == oracles.keep_n_of_m(runs, weight, [1] * math.prod(shape), 2)
    explicit = nn.ConvTranspose2d(12, 4, 1, groups=2)
    tpe.nm_structured(explicit, "weight", 2, 4, dim=0)  # as asked
    assert rows_hold(explicit.weight_mask, 0, 2, 4)


@pytest.mark.parametrize("dim", [0, 1, -1, -2])
def test_an_explicit_axis_is_obeyed(dim):
    for layer in (nn.Linear(8, 8), Conv1D(8, 8)):
        tpe.nm_structured(layer, "weight", 1, 4, dim=dim)
        assert rows_hold(layer.weight_mask, dim, 1, 4)
        twin = copy.deepcopy(Conv1D(8, 8))
        tpe.global_nm_structured([(twin, "weight")], m=4, amount=0.5, choices=[2], dim=dim)
        assert rows_hold(twin.weight_mask, dim, 2, 4)


class Stack(nn.Module):
    """Weights of several experts, which no type tells how to read."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 8, 4))

    def forward(self, x, expert):
        return x @ self.weight[expert].t()


def test_what_has_no_known_axis_is_refused_with_what_to_pass():
    stack, linear = Stack(), nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"^Stack\.weight of shape \(2, 8, 4\): dim=None .*Pass dim=1.*dim=2"):
        tpe.nm_structured(stack, "weight", 2, 4)
    with pytest.raises(ValueError, match=r"^Linear\.bias of shape \(4,\): dim=None .*Pass dim=0"):
        tpe.nm_structured(linear, "bias", 2, 4)
    with pytest.raises(ValueError, match=r"params\[1\], Stack\.weight.*dim=None"):
        tpe.global_nm_structured([(linear, "weight"), (stack, "weight")], m=4, amount=0.5)
    wrapped = parametrizations.weight_norm(nn.ConvTranspose1d(4, 4, 3))
    with pytest.raises(ValueError, match=r"original1.*dim=None"):
        tpe.nm_structured(wrapped.parametrizations.weight, "original1", 2, 4)
    assert not prune.is_pruned(linear)
    tpe.nm_structured(stack, "weight", 2, 4, dim=2)
    assert rows_hold(stack.weight_mask, 2, 2, 4)


class Scales(nn.Module):
    """A layer that cannot be called with one input."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x, scale):
        return x @ self.weight * scale


@pytest.mark.parametrize("kind", [Scales, lambda: nn.ParameterDict({"weight": torch.randn(8, 8)})])
def test_what_trying_out_does_not_tell_is_taken_for_torchs_with_a_warning(kind):
    with pytest.warns(UserWarning, match=r"weight of shape \(8, 8\): dim=None .*Pass dim=1 .* else dim=0") as caught:
        layer = tpe.nm_structured(kind(), "weight", 2, 4)
    assert caught[0].filename == __file__
    assert rows_hold(layer.get_buffer("weight_mask"), 1, 2, 4)
    quiet = tpe.nm_structured(kind(), "weight", 2, 4, dim=0)
    assert rows_hold(quiet.get_buffer("weight_mask"), 0, 2, 4)
    listed = kind()
    before = Snapshot(listed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="dim=None"):
            tpe.global_nm_structured([(listed, "weight")], m=4, amount=0.5)
    assert before.differences() == []


def test_tied_tensors_whose_layers_read_different_axes_are_refused():
    linear, turned = nn.Linear(8, 8), Turned(8, 8)
    turned.weight = linear.weight
    params = [(linear, "weight"), (turned, "weight")]
    before = Snapshot(linear, turned)
    with pytest.raises(ValueError, match=r"params\[0\].*tied.*dim="):
        tpe.global_nm_structured(params, m=4, amount=0.5)
    assert before.differences() == []
    tpe.global_nm_structured(params, m=4, amount=0.5, choices=[2], dim=1)
    assert rows_hold(linear.weight_mask, 1, 2, 4)


def test_a_pattern_is_resolved_once():
    assert tpe.NM(2, 4).along(0, 2) == tpe.NM(2, 4, 0, groups=2)
    assert tpe.NM(2, 4, dim=1).along(0, 2) == tpe.NM(2, 4, dim=1)
    assert tpe.NM(2, 4).axis(torch.Size((3, 8))) == 1  # where no layer is known
    with pytest.raises(ValueError, match="groups=3"):
        tpe.NM(2, 4, 0, groups=3).axis(torch.Size((8, 2)))
    mask = tpe.NMStructured(2, 4).compute_mask(torch.arange(16.0).view(2, 8), None)
    assert mask.tolist() == [[0, 0, 1, 1] * 2] * 2
