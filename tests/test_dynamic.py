"""Dynamic sparse training: what goes and what grows is what the papers say, and nothing else changes."""

import copy
import math

import pytest
import torch
import toys
from growing import Tied, alike, batches, masks, network, train
from hypothesis import given
from hypothesis import strategies as st
from snapshots import Snapshot
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import torchprune_ext as tpe
from torchprune_ext.workflow import dynamic

pytestmark = [
    *toys.unwarned,
    pytest.mark.filterwarnings("ignore:`torch.cpu.amp.autocast:FutureWarning"),  # checkpoints of torch 2.4 use it
]
LEVELS = (0.0, 0.0, 0.5, -0.5, 1.0, -1.0, 2.0, -3.0)


def rigl(weights, mask, gradient, k):
    """Return mask and weights after one update, as algorithm 1 of the paper has it, on plain lists."""
    kept = [i for i, alive in enumerate(mask) if alive]
    dropped = sorted(kept, key=lambda i: (abs(weights[i]), -i))[:k]
    stays = [i for i in kept if i not in dropped]
    candidates = [i for i in range(len(mask)) if i not in stays]
    grown = sorted(candidates, key=lambda i: (-abs(gradient[i]), i))[:k]
    new = [float(i in stays or i in grown) for i in range(len(mask))]
    return new, [0.0 if now and not before else w for w, before, now in zip(weights, mask, new, strict=True)]


def iteration(layer, gradient):
    """Let the loss have this gradient with respect to the weight."""
    (layer(torch.eye(layer.in_features)) * gradient.t()).sum().backward()


def masked(layer):
    return layer.weight_mask.flatten().tolist()


# ------------------------------------------------------------------------------------------- what goes, what grows


@given(st.data())
def test_an_update_is_that_of_the_paper(data):
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    size = rows * columns
    sparsity = data.draw(st.integers(0, size - 1)) / size
    alpha, every = data.draw(st.sampled_from([0.0, 0.3, 0.5, 1.0])), data.draw(st.integers(1, 3))
    end = data.draw(st.none() | st.integers(every + 1, 8))
    layer = nn.Linear(columns, rows, bias=False)
    seed = data.draw(st.integers(0, 9))
    dst = tpe.DynamicSparse(layer, [(layer, "weight")], sparsity, every=every, end=end, alpha=alpha, seed=seed)
    mask = masked(layer)
    assert mask.count(0.0) == round(sparsity * size)
    for step in range(1, 8):
        weights = data.draw(st.lists(st.sampled_from(LEVELS), min_size=size, max_size=size))
        parts = [data.draw(st.lists(st.sampled_from(LEVELS), min_size=size, max_size=size)) for _ in range(2)]
        with torch.no_grad():
            layer.weight_orig.copy_(torch.tensor(weights).view(rows, columns))
        for part in parts:  # accumulated
            iteration(layer, torch.tensor(part).view(rows, columns))
        due = step % every == 0 and (end is None or step < end)
        assert dst.step() == due
        layer.zero_grad()
        if due:
            fraction = alpha if end is None else alpha / 2 * (1 + math.cos(math.pi * step / end))
            gradient = [a + b for a, b in zip(*parts, strict=True)]
            mask, weights = rigl(weights, mask, gradient, round(fraction * mask.count(1.0)))
        assert masked(layer) == mask
        assert layer.weight_orig.flatten().tolist() == weights
        assert torch.equal(layer.weight, layer.weight_orig * layer.weight_mask)


@given(st.integers(0, 99), st.sampled_from([0.0, 0.3, 1.0]))
def test_random_growth_drops_the_smallest_and_grows_anything_else(seed, alpha):
    layer = nn.Linear(6, 5, bias=False)
    dst = tpe.DynamicSparse(layer, [(layer, "weight")], 0.6, "random", every=1, alpha=alpha, seed=seed)
    before, weights = layer.weight_mask.clone() != 0, layer.weight_orig.detach().clone()
    k = round(alpha * 12)
    assert dst.step()  # needs no gradient
    after = layer.weight_mask != 0
    assert int(after.sum()) == 12
    smallest = set(sorted(torch.where(before.flatten())[0].tolist(), key=lambda i: abs(weights.flatten()[i]))[:k])
    gone = set(torch.where((before & ~after).flatten())[0].tolist())
    assert gone <= smallest
    assert not layer.weight_orig[after & ~before].any()
    assert torch.equal(layer.weight_orig[~after | before], weights[~after | before])


def test_random_growth_takes_every_candidate_equally_often():
    counts = torch.zeros(3, 4)
    for seed in range(250):
        layer = nn.Linear(4, 3, bias=False)
        prune.custom_from_mask(layer, "weight", torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]))
        layer.weight_orig.data.copy_(torch.arange(12.0).view(3, 4))
        dst = tpe.DynamicSparse(layer, [(layer, "weight")], 8 / 12, "random", every=1, alpha=0.5, seed=seed)
        dst.step()
        counts += layer.weight_mask
    assert counts[0, 2:].tolist() == [250, 250]  # the larger half stays
    free = torch.cat([counts[0, :2], counts[1:].flatten()])  # 2 of 10 each time: 50, standard deviation 6.3
    assert float((free - 50).abs().max()) < 5 * 6.3


@pytest.mark.parametrize("growth", ["gradient", "random"])
def test_the_sparsity_of_each_tensor_is_exact_after_every_update(growth):
    model = network()
    params = tpe.prunable_parameters(model)
    amounts = tpe.allocation.erk(params, 0.8)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)
    dst = tpe.DynamicSparse(model, params, amounts, growth, every=2, end=15, optimizer=optimizer)
    seen, changed = [], []
    for x in batches(20):
        before = masks(model)
        [due] = train(model, dst, optimizer, [x])
        seen.append(due)
        for module, name in params:
            assert int((module.weight_mask == 0).sum()) == round(amounts[module, name] * module.weight_mask.numel())
        changed.append(not alike(before, masks(model)))
        assert due or not changed[-1]
    assert sum(changed) >= 4  # at last the fraction is that of less than one entry
    assert [step for step, due in enumerate(seen, 1) if due] == [2, 4, 6, 8, 10, 12, 14]


# -------------------------------------------------------------------------------------------------------- the start


def test_a_fraction_is_that_of_each_tensor_and_of_all_exactly():
    model = network()
    params = tpe.prunable_parameters(model)
    uniform = tpe.allocation.uniform(params, 0.77)
    state = torch.get_rng_state()
    tpe.DynamicSparse(model, params, 0.77)
    assert torch.equal(state, torch.get_rng_state())
    gone = {key: int((key[0].weight_mask == 0).sum()) for key in params}
    assert gone == {key: round(uniform[key] * key[0].weight_mask.numel()) for key in params}
    assert sum(gone.values()) == round(0.77 * (12 * 16 + 16 * 8 + 8 * 2))


def test_seeds():
    drawn = []
    for seed in (0, 0, 1):
        model = network()
        tpe.DynamicSparse(model, tpe.prunable_parameters(model), 0.7, seed=seed)
        drawn.append(masks(model))
    assert alike(drawn[0], drawn[1])
    assert not alike(drawn[0], drawn[2])


def test_what_is_pruned_already_counts_and_stays_at_first():
    model = network()
    prune.random_unstructured(model[0], "weight", 0.75)  # as much as asked for
    prune.random_unstructured(model[2], "weight", 0.5)  # less
    before = masks(model)
    tpe.DynamicSparse(model, tpe.prunable_parameters(model), 0.75)
    assert torch.equal(model[0].weight_mask, before["0"])
    assert not model[2].weight_mask[before["2"] == 0].any()
    assert int(model[2].weight_mask.sum()) == 32
    assert [len(tpe.history(model[i], "weight")) for i in (0, 2, 4)] == [2, 2, 1]


def test_tensors_without_an_amount_are_left_alone():
    model = network()
    params = tpe.prunable_parameters(model)
    dst = tpe.DynamicSparse(model, params, {params[0]: 0.5}, every=1)
    train(model, dst, torch.optim.SGD(model.parameters(), 0.01), batches(2))
    assert [prune.is_pruned(model[i]) for i in (0, 2, 4)] == [True, False, False]
    assert "sparsity=0.5," in tpe.history(model[0], "weight")[0]


# ------------------------------------------------------------------------------------------------ dense gradients


class Uses(nn.Module):
    """Uses one layer twice, and another within a checkpoint."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, reentrant=False):
        x = self.a(self.a(x).tanh())
        with torch.no_grad():
            self.a(x)  # does not count
        return checkpoint(self.b, x, use_reentrant=reentrant)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(6, 2)

    def forward(self, x):
        return self.mha(x, x, x)[0]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 6)

    def forward(self, x):
        return self.lstm(x)[0]


class Listing(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6, 6))])

    def forward(self, x):
        return (x @ self.weights[0]).tanh() @ self.weights[1]


MODELS = {
    "uses": (Uses, lambda m: [(m.a, "weight"), (m.b, "weight")]),
    "attention": (Attention, lambda m: [(m.mha, "in_proj_weight"), (m.mha.out_proj, "weight")]),
    "recurrent": (Recurrent, lambda m: [(m.lstm, "weight_ih_l0"), (m.lstm, "weight_hh_l0")]),
    "list": (Listing, lambda m: [(m.weights, "0"), (m.weights, "1")]),
    "tied": (Tied, lambda m: [(m.a, "weight"), (m.b, "weight")]),
}


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_those_of_the_dense_model_with_the_same_weights(kind, monkeypatch):
    torch.manual_seed(0)
    make, listed = MODELS[kind]
    model = make()
    params = listed(model)
    dst = tpe.DynamicSparse(model, params, 0.7, every=1)
    twin = tpe.remove_all(tpe.copy_pruned(model))
    seen = []
    moved = dynamic.moved
    monkeypatch.setattr(dynamic, "moved", lambda t, f, g, generator: (seen.append(g), moved(t, f, g, generator))[1])
    x = torch.randn(5, 3, 6)
    for each in (model, twin):
        each(x).square().sum().backward()
        each(2 * x).sum().backward()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.step()
    assert dst.step()
    expected = [module._parameters[name].grad for module, name in listed(twin)]
    assert len(seen) == (1 if kind == "tied" else 2)
    for gradient, wanted in zip(seen, expected, strict=False):
        torch.testing.assert_close(gradient, wanted)
    kept = [int((module._buffers[f"{name}_mask"] != 0).sum()) for module, name in params]
    for _ in range(3):  # and it goes on
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        assert dst.step()
    assert kept == [int((module._buffers[f"{name}_mask"] != 0).sum()) for module, name in params]
    if kind == "tied":
        assert torch.equal(model.a.weight_mask, model.b.weight_mask)


def test_reentrant_checkpoints():
    torch.manual_seed(0)
    drawn, x = [], torch.randn(4, 6, requires_grad=True)
    for reentrant in (False, True):
        torch.manual_seed(0)
        model = Uses()
        dst = tpe.DynamicSparse(model, MODELS["uses"][1](model), 0.6, every=1)
        model(x, reentrant).square().sum().backward()
        dst.step()
        drawn.append(masks(model))
    assert alike(*drawn)


def test_between_updates_nothing_listens():
    model = network()
    params = tpe.prunable_parameters(model)
    dst = tpe.DynamicSparse(model, params, 0.8, every=3, end=7)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    listening = []
    for x in batches(9):
        hooks = [hook for module, _ in params for hook in module._forward_pre_hooks.values()]
        listening.append(["apply_mask" in vars(hook) for hook in hooks])
        train(model, dst, optimizer, [x])
    assert listening == [[step in (3, 6)] * 3 for step in range(1, 10)]


def test_one_that_is_given_up_listens_no_more():
    model = network()
    dst = tpe.DynamicSparse(model, tpe.prunable_parameters(model), 0.8, every=1)
    del dst
    model(batches(1)[0]).sum().backward()
    assert not any("apply_mask" in vars(hook) for m in (model[0], model[2]) for hook in m._forward_pre_hooks.values())


def test_a_tensor_without_gradient_keeps_its_mask_and_none_at_all_is_an_error():
    model = network()
    dst = tpe.DynamicSparse(model, tpe.prunable_parameters(model), 0.5, every=1, alpha=1.0)
    before, snapshot = masks(model), Snapshot(model)
    with pytest.raises(RuntimeError, match=r"no gradient has reached any of the 3 tensors.*step\(\) once in each"):
        dst.step()
    assert snapshot.differences() == []
    model[2](model[0](batches(1)[0]).detach()).square().sum().backward()
    assert dst.step()
    after = masks(model)
    assert [torch.equal(before[key], after[key]) for key in "024"] == [True, False, True]


def test_gradients_that_are_not_finite_put_the_update_off():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    dst = tpe.DynamicSparse(model, tpe.prunable_parameters(model), 0.8, every=3, optimizer=optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=100)
    before, done = masks(model), []
    for step, x in enumerate(batches(8), 1):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).float().square().sum()
        scaler.scale(loss * (float("inf") if step == 3 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        done.append(dst.step())
        assert alike(before, masks(model)) == (step < 4)
        optimizer.zero_grad()
    assert [step for step, due in enumerate(done, 1) if due] == [4, 6]


# ------------------------------------------------------------------------------------------- weights and momenta

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
    "fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
    "rprop": lambda p: torch.optim.Rprop(p, 0.01),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_moves_starts_anew_and_all_else_is_untouched(kind):
    model = network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    dst = tpe.DynamicSparse(model, tpe.prunable_parameters(model), 0.6, every=3, optimizer=optimizer)
    moved = 0
    for step, x in enumerate(batches(9), 1):
        model(x).square().sum().backward()
        optimizer.step()
        olds = masks(model)
        values = {key: model.get_submodule(key).weight_orig.detach().clone() for key in olds}
        states = {key: copy.deepcopy(optimizer.state[model.get_submodule(key).weight_orig]) for key in olds}
        assert dst.step() == (step % 3 == 0)
        for key, old in olds.items():
            layer = model.get_submodule(key)
            changed, grown = layer.weight_mask != old, (layer.weight_mask != 0) & (old == 0)
            moved += int(changed.sum())
            assert torch.equal(layer.weight_orig, values[key].masked_fill(grown, 0))
            state = optimizer.state[layer.weight_orig]
            shaped = [name for name, value in states[key].items() if getattr(value, "shape", None) == old.shape]
            assert shaped
            for name, value in states[key].items():
                wanted = value.masked_fill(changed, 0) if name in shaped else value
                assert (
                    state[name] is None
                    if value is None
                    else torch.equal(torch.as_tensor(state[name]), torch.as_tensor(wanted))
                )
        optimizer.zero_grad()
    assert moved


def test_before_the_first_optimizer_step_there_is_nothing_to_reset():
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    dst = tpe.DynamicSparse(model, tpe.prunable_parameters(model), 0.6, every=1, optimizer=optimizer)
    model(batches(1)[0]).sum().backward()
    assert dst.step()  # instead of the optimizer's step, as in the paper
    assert not optimizer.state


def test_any_memory_format_and_dtype():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)).to(memory_format=torch.channels_last)
    model[1].bfloat16()
    dst = tpe.DynamicSparse(model, tpe.prunable_parameters(model), 0.5, every=1, alpha=1.0)
    strides = [layer.weight_mask.stride() for layer in model]
    model[1](model[0](torch.randn(2, 3, 8, 8)).bfloat16()).float().square().sum().backward()
    before = masks(model)
    assert dst.step()
    assert [layer.weight_mask.dtype for layer in model] == [torch.float32, torch.bfloat16]
    assert [layer.weight_mask.stride() for layer in model] == strides
    assert not alike(before, masks(model))
    assert [int(layer.weight_mask.sum()) for layer in model] == [54, 72]
