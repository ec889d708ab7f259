"""A report says what the masks and zeros of a model say, counted by plain loops, and leaves no trace."""

import copy
import functools
import itertools
import json
import math
import pickle
import re
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from snapshots import Snapshot
from torch import nn
from torch.nn.utils import parametrizations, prune

import torchprune_ext as tpe
from torchprune_ext.patterns import NM, Channel
from torchprune_ext.reporting.structure import count_zero, patterns_in, tightest, units_of

x = torch.randn(2, 3, 8, 8)


class Net(nn.Module):
    """Something of everything that holds a weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv2d(3, 8, 3, groups=1), nn.BatchNorm2d(8)
        self.grouped, self.up = nn.Conv2d(8, 8, 3, groups=2), nn.ConvTranspose2d(8, 8, 2, groups=2)
        self.lstm, self.attention = nn.LSTM(8, 8, batch_first=True), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head, self.embed = nn.Linear(8, 12, bias=False), nn.Embedding(12, 8)
        self.head.weight = self.embed.weight
        nn.init.normal_(self.bn.bias)

    def forward(self, images):
        y = self.up(self.grouped(F.relu(self.bn(self.conv(images)))))
        y, _ = self.lstm(y.flatten(2).transpose(1, 2))
        y, _ = self.attention(y, y, y)
        return self.head(y).mean(1)


def network():
    return Net()


def natively(model):
    prune.l1_unstructured(model.conv, "weight", 0.3)
    prune.ln_structured(model.conv, "weight", 2, 2, 0)
    prune.l1_unstructured(model.lstm, "weight_ih_l0", 0.5)
    prune.l1_unstructured(model.attention, "in_proj_weight", 100)


def by_us(model):
    tpe.bn_scaling(model.conv, "weight", 2, bn=model.bn)
    tpe.nm_structured(model.up, "weight", 2, 4)
    tpe.global_unstructured([(model.head, "weight"), (model.embed, "weight")], amount=0.5)


def in_turn(model):
    natively(model)
    by_us(model)
    tpe.kernel_ln(model.grouped, "weight", 0.5)


STATES = [lambda model: None, natively, by_us, in_turn]
every_state = pytest.mark.parametrize("state", STATES, ids=["dense", "natively", "by_us", "in_turn"])


def in_state(state):
    model = network()
    state(model)
    return model


def kept_in(model):
    """Return, by name, which entries are kept, from the names of the state dict; tied ones under their first name."""
    state, found = model.state_dict(), {}
    for name, parameter in model.named_parameters():
        plain = name.removesuffix("_orig")
        mask = state.get(f"{plain}_mask")
        flags = (parameter if mask is None else mask).detach() != 0
        found[plain] = torch.ones_like(flags) if mask is None and parameter.dim() < 2 and not flags.any() else flags
    return found


# ------------------------------------------------------------------------------------------------ the counts


@every_state
def test_counts_are_those_of_masks_and_then_of_zeros(state):
    model = in_state(state)
    expected = kept_in(model)
    for permanent in (False, True):
        if permanent and prune.is_pruned(model):
            tpe.remove_all(model)
        found = tpe.report(model)
        assert {row.name for row in found} == set(expected)
        for name, flags in expected.items():
            row = found[name]
            assert (row.kept, row.total) == (int(flags.sum()), flags.numel())
            assert row.units["entries"] == (int((~flags).sum()), flags.numel())
            pruned = not flags.all()
            assert row.source == ("dense" if not pruned else "zeros" if permanent else "mask")
            assert row.shape == tuple(flags.shape)
            assert row.density == int(flags.sum()) / flags.numel()
        total = sum(flags.numel() for flags in expected.values())
        kept = sum(int(flags.sum()) for flags in expected.values())
        assert (found.kept, found.total, found.sparsity) == (kept, total, 1 - kept / total)
        assert (found.bytes, found.nonzero_bytes) == (4 * total, 4 * kept)
        assert found.total == sum(parameter.numel() for parameter in network().parameters())


def test_the_native_way_of_counting_says_that_nothing_is_pruned():
    layer = prune.l1_unstructured(nn.Linear(10, 10), "weight", 0.9)
    assert all(bool(parameter.all()) for parameter in layer.parameters())
    assert tpe.report(layer)["weight"].sparsity == 0.9


def test_history_names_every_call_and_ends_with_the_masks():
    model = in_state(in_turn)
    row = tpe.report(model)["conv.weight"]
    assert row.history == tuple(tpe.history(model.conv, "weight"))
    assert [call.partition("(")[0] for call in row.history] == ["L1Unstructured", "LnStructured", "BNScaling"]
    assert tpe.report(tpe.remove_all(model))["conv.weight"].history == ()


def test_what_is_whole_zero_by_name():
    model = network()
    prune.ln_structured(model.conv, "weight", 3, 2, 0)
    prune.ln_structured(model.grouped, "weight", 1, 2, 1)
    prune.ln_structured(model.up, "weight", 2, 2, 0)
    prune.ln_structured(model.attention, "in_proj_weight", 5, 2, 0)
    found = tpe.report(model)
    assert found["conv.weight"].units == {
        "entries": (81, 216),
        "kernels": (9, 24),
        "filters": (3, 8),
        "channels": (0, 3),
    }
    # column 1 of 4 in both groups of 4 filters: input channels j and 4 + j
    assert found["grouped.weight"].units["channels"] == (2, 8)
    assert found["grouped.weight"].units["filters"] == (0, 8)
    # (inputs, outputs / groups): what is gone on axis 0 is read from an input channel
    assert found["up.weight"].units["channels"] == (2, 8)
    assert found["up.weight"].units["filters"] == (0, 8)
    assert found["attention.in_proj_weight"].units == {"entries": (40, 192), "rows": (5, 24), "columns": (0, 8)}
    assert list(found["conv.bias"].units) == ["entries"]
    stack = nn.Module()
    stack.experts = nn.Parameter(torch.stack([torch.ones(2, 3), torch.zeros(2, 3)]))
    assert tpe.report(stack)["experts"].units == {"entries": (6, 12), "slices": (1, 2)}


def test_empty_and_full_layers():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    prune.random_unstructured(model[0], "weight", 1.0)
    prune.random_unstructured(model[1], "weight", 0.5)
    found = tpe.report(model)
    assert found.empty == ("0.weight",)
    assert found.full == ("0.bias", "1.bias", "2.weight", "2.bias")
    assert found["0.weight"].nm == ()
    assert "nothing left: 0.weight" in str(found)


def test_tied_weights_count_once_and_answer_to_every_name():
    model = in_state(by_us)
    found = tpe.report(model)
    row = found["head.weight"]
    assert row is found["embed.weight"]
    assert (row.name, row.tied) == ("head.weight", ("embed.weight",))
    assert row.kept == 48
    assert found.total == sum(parameter.numel() for parameter in model.parameters())
    shared = nn.Sequential(*[nn.Linear(3, 3)] * 2)
    assert [row.name for row in tpe.report(shared)] == ["0.weight", "0.bias"]
    assert tpe.report(shared)["1.bias"].total == 3


def test_tied_weights_under_different_masks_keep_what_one_of_them_keeps():
    model = network()
    prune.custom_from_mask(model.head, "weight", torch.arange(96).view(12, 8) % 2)
    assert tpe.report(model)["head.weight"].kept == 96  # the embedding reads all of it
    prune.custom_from_mask(model.embed, "weight", torch.arange(96).view(12, 8) % 3)
    assert tpe.report(model)["head.weight"].kept == sum(1 for i in range(96) if i % 2 or i % 3)


def test_kept_entries_that_are_zero_are_told():
    layer = nn.Linear(4, 4)
    layer.weight.data[0] = 0
    prune.custom_from_mask(layer, "weight", torch.tensor([1.0, 1, 1, 0]).repeat(4, 1))
    row = tpe.report(layer)["weight"]
    assert (row.kept, row.nonzero) == (12, 9)
    assert "mask, and 3 zeros" in str(tpe.report(layer))


def test_zeros_that_nobody_pruned_do_not_count():
    model = nn.Sequential(nn.Embedding(5, 4, padding_idx=2), nn.Linear(4, 2), nn.BatchNorm1d(2))
    nn.init.zeros_(model[1].bias)
    found = tpe.report(model)
    assert found.sparsity == 0
    assert {row.source for row in found} == {"dense"}
    model[0].weight.data[3, :2] = 0
    assert (tpe.report(model)["0.weight"].kept, tpe.report(model)["0.weight"].source) == (18, "zeros")
    model[1].bias.data[0] = 1.0  # one of two is zero: not as it was initialized
    assert (tpe.report(model)["1.bias"].kept, tpe.report(model)["1.bias"].source) == (1, "zeros")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.complex64])
def test_dtypes(dtype):
    layer = nn.Linear(4, 2, bias=False, dtype=dtype)
    layer.weight.data[0] = 0
    layer.weight.data[1, 0] = -0.0
    row = tpe.report(layer)["weight"]
    assert (row.kept, row.dtype) == (3, dtype)
    assert tpe.report(layer).bytes == 8 * dtype.itemsize


def test_parametrized_weights_are_read_where_they_are_stored():
    layer = parametrizations.weight_norm(nn.Linear(6, 4))
    prune.l1_unstructured(layer.parametrizations.weight, "original1", 0.5)
    found = tpe.report(layer)
    assert found["parametrizations.weight.original1"].sparsity == 0.5
    with pytest.raises(KeyError, match=r"'weight'.*Did you mean 'parametrizations\.weight\.original"):
        found["weight"]


def test_what_lost_its_hook_is_pruned_all_the_same():
    layer = prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)
    layer._forward_pre_hooks.clear()
    row = tpe.report(layer)["weight"]
    assert (row.source, row.kept, row.history) == ("mask", 8, ())


def test_our_sparse_layers_are_read():
    model = nn.Sequential(nn.Linear(64, 64))
    prune.l1_unstructured(model[0], "weight", 0.9)
    layer = tpe.CSRLinear(tpe.remove_all(model)[0].weight.detach(), model[0].bias.detach())
    found = tpe.report(nn.Sequential(layer), torch.ones(1, 64), rounds=2)
    assert found.kept == 410 + 64
    assert found.macs == found.effective_macs == 410


# ------------------------------------------------------------------------------------------------ structure


masks = st.builds(
    lambda shape, bits, keep: (
        torch.tensor(list(itertools.islice(itertools.cycle(bits), math.prod(shape)))) < keep
    ).view(shape),
    st.lists(st.integers(1, 9), min_size=2, max_size=4).map(tuple),
    st.lists(st.integers(0, 3), min_size=1, max_size=37),
    st.integers(0, 4),
)


def groups_of(alive, axis, m, parts):
    """Yield how many entries each group of m keeps, and whether it is as long as m."""
    size = alive.shape[axis] // parts
    others = [range(size) if place == axis else range(length) for place, length in enumerate(alive.shape)]
    for index in itertools.product(*[other for place, other in enumerate(others) if place != axis]):
        for part in range(parts):
            line = [bool(alive[(*index[:axis], part * size + i, *index[axis:])]) for i in range(size)]
            for start in range(0, size, m):
                yield sum(line[start : start + m]), size % m == 0


def patterns_by_loops(alive, parts):
    found, kept = [], int(alive.sum())
    if kept in (0, alive.numel()):
        return found
    density = kept / alive.numel()
    for axis in range(alive.dim()):  # whole rows, kernels, ...: one entry stands for all
        if all(torch.equal(alive.select(axis, 0), alive.select(axis, i)) for i in range(alive.shape[axis])):
            alive = alive.narrow(axis, 0, 1)
    for axis in range(alive.dim()):
        own, holding = parts if axis == 0 else 1, []
        for m in (2, 4, 8, 16):
            if m > alive.shape[axis] // own:
                continue
            counts, even = zip(*groups_of(alive, axis, m, own), strict=True)
            for n in range(1, m):
                exact = all(count == n for count in counts) and all(even)
                if exact or (n in (1, 2, 4, 8) and 2 * n <= m and max(counts) <= n):
                    which = [n] if exact else range(n + 1)
                    one = sum(math.comb(m, k) * density**k * (1 - density) ** (m - k) for k in which)
                    holding.append((NM(n, m, axis, not all(even), own), one ** len(counts)))
        for pattern, chance in holding:
            follows = any(
                other_chance < 0.05 and implied(other, pattern) for other, other_chance in holding if other != pattern
            )
            if chance < 0.05 or follows:
                found.append(pattern)
    return found


@functools.cache
def implied(one, other):
    """Return whether every group of ``other.m`` has at most ``other.n`` if all lines obey ``one``, tried out."""
    longest = max(one.m, other.m)
    for line in itertools.product((0, 1), repeat=longest):
        obeys = all(sum(line[i : i + one.m]) <= one.n for i in range(0, longest, one.m))
        if obeys and any(sum(line[i : i + other.m]) > other.n for i in range(0, longest, other.m)):
            return False
    return True


@settings(max_examples=80, deadline=None)
@given(masks, st.booleans())
def test_patterns_are_those_of_plain_loops(alive, grouped):
    parts = 2 if grouped and alive.shape[0] % 2 == 0 else 1
    assert list(patterns_in(alive, parts)) == patterns_by_loops(alive, parts)
    assert list(patterns_in(alive.transpose(0, 1).contiguous().transpose(0, 1), parts)) == patterns_by_loops(
        alive, parts
    )


@settings(max_examples=40, deadline=None)
@given(masks)
def test_from_the_tightest_patterns_all_others_follow(alive):
    every = patterns_in(alive)
    few = tightest(every)
    for pattern in every:
        others = [other for other in every if other.dim == pattern.dim and other != pattern]
        assert (pattern in few) != any(implied(other, pattern) for other in others)


@pytest.mark.parametrize(("n", "m"), [(1, 2), (1, 4), (2, 4), (3, 4), (1, 8), (4, 8), (5, 8), (8, 16)])
@pytest.mark.parametrize("layer", [nn.Linear(32, 16), nn.Conv2d(32, 8, 3), nn.ConvTranspose2d(32, 8, 3, groups=2)])
def test_a_layer_pruned_by_n_of_m_is_said_to_be_that(layer, n, m):
    layer = tpe.nm_structured(copy.deepcopy(layer), "weight", n, m)
    axis, parts = (0, 2) if isinstance(layer, nn.ConvTranspose2d) else (1, 1)
    for permanent in (False, True):
        if permanent:
            tpe.remove(layer, "weight")
        found = tpe.report(layer)
        assert tightest(found["weight"].nm) == [NM(n, m, axis, False, parts)]
        assert f"{n}:{m} dim {axis}" in str(found)


def test_patterns_that_others_follow_from_and_stacked_ones():
    layer = tpe.nm_structured(nn.Linear(32, 16), "weight", 1, 4)
    assert {(p.n, p.m) for p in tpe.report(layer)["weight"].nm if p.dim == 1} == {
        *[(1, 2), (1, 4), (2, 4), (2, 8), (4, 8), (4, 16), (8, 16)]
    }
    layer = tpe.nm_structured(nn.Linear(32, 16), "weight", 2, 4)
    prune.l1_unstructured(layer, "weight", 0.3)
    assert NM(2, 4, 1) in tpe.report(layer)["weight"].nm
    padded = tpe.nm_structured(nn.Linear(30, 16), "weight", 2, 4, pad=True)
    assert NM(2, 4, 1, pad=True) in tpe.report(padded)["weight"].nm
    assert NM(2, 4, 1) not in tpe.report(padded)["weight"].nm


def test_no_pattern_is_claimed_of_what_is_dense_empty_or_without_one():
    torch.manual_seed(0)
    for amount in (0.0, 0.5, 0.9, 1.0):
        layer = prune.random_unstructured(nn.Linear(256, 256), "weight", amount)
        assert tpe.report(layer)["weight"].nm == (), amount
    for columns in (1, 16, 32, 60):  # strewn over 64: no pattern
        layer = prune.random_structured(nn.Linear(64, 64), "weight", columns, 1)
        assert tpe.report(layer)["weight"].nm == ()
    layer = prune.ln_structured(nn.Linear(4, 64), "weight", 1, 2, 1)  # one column of 4 is not 3:4
    assert tpe.report(layer)["weight"].nm == ()
    layer = tpe.every_other(nn.Linear(64, 64), "weight")  # but every other column of 64 is 1:2
    assert tightest(tpe.report(layer)["weight"].nm) == [NM(1, 2, 1)]


def test_the_last_entry_of_a_large_tensor_counts():
    alive = torch.zeros(400, 400, dtype=torch.bool)
    alive[:, torch.arange(0, 400, 4)] = True
    alive[::2] = alive[::2].roll(1, 1)
    assert tightest(patterns_in(alive)) == [NM(1, 2, 0), NM(1, 4, 1)]
    alive[399, 399] = True
    assert NM(1, 4, 1) not in patterns_in(alive)
    assert NM(2, 4, 1) in patterns_in(alive)
    alive[399, 396:] = True
    assert NM(2, 4, 1) not in patterns_in(alive)


@settings(max_examples=60, deadline=None)
@given(masks)
def test_whole_units_are_those_of_plain_loops(alive):
    for name, unit in units_of(nn.Conv2d(1, 1, 1) if alive.dim() == 3 else nn.Linear(1, 1), alive.dim()).items():
        axes = {"rows": (0,), "columns": (1,), "kernels": (0, 1), "filters": (0,), "channels": (1,)}[name]
        every = list(itertools.product(*[range(alive.shape[axis]) for axis in axes]))
        gone = 0
        for place in every:
            part = alive
            for axis, index in reversed(list(zip(axes, place, strict=True))):
                part = part.select(axis, index)
            gone += not part.any()
        assert count_zero(alive, unit) == (gone, len(every))
    assert count_zero(torch.ones(0, 3, dtype=torch.bool), Channel(1)) == (3, 3)


# ------------------------------------------------------------------------------------------------ the costs


def test_multiplications_are_counted_dense_and_by_density():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    prune.l1_unstructured(model[0], "weight", 0.75)
    prune.l1_unstructured(model[3], "weight", 0.5)
    found = tpe.report(model, x, rounds=2, threads=1)
    conv, linear = 2 * 36 * 216, 2 * 2880
    assert found.macs == conv + linear
    assert (found["0.weight"].macs, found["3.weight"].macs, found["0.bias"].macs) == (conv, linear, 0)
    assert found.effective_macs == conv // 4 + linear // 2
    assert (found.threads, found.rounds) == (1, 2)
    assert found.latency > 0
    assert found.spread >= 0
    assert f"{found.macs / 1e3:.1f} k" in str(found)
    assert "theoretical" in str(found)


def test_products_without_weights_count_in_full():
    model = in_state(in_turn)
    found = tpe.report(model, x, rounds=2)
    with_weights = sum(row.macs for row in found)
    assert 0 < with_weights < found.macs  # attention multiplies queries and keys
    saved = sum(row.macs * row.sparsity for row in found)
    assert found.effective_macs == round(found.macs - saved)
    assert found["embed.weight"].macs == 2 * 25 * 96  # as head, the embedding itself multiplies nothing
    dense = tpe.report(network(), x, rounds=2)
    assert dense.macs == dense.effective_macs == found.macs


def test_weights_that_share_memory_are_told_apart():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
    flat = torch.randn(24)
    model[0].weight.data, model[1].weight.data = flat[:16].view(4, 4), flat[16:].view(2, 4)
    found = tpe.report(model, torch.ones(1, 4), rounds=2)
    assert [row.macs for row in found] == [16, 8]


def test_in_inference_mode_the_same_is_counted():
    model = prune.l1_unstructured(nn.Linear(16, 8), "weight", 0.5)
    with torch.inference_mode():
        found = tpe.report(model, torch.ones(2, 16), rounds=2)
    assert (found.macs, found.effective_macs) == (256, 128)


def test_of_compiled_models_too():
    model = prune.l1_unstructured(nn.Linear(16, 8), "weight", 0.5)
    found = tpe.report(torch.compile(model, backend="eager"), torch.ones(2, 16), rounds=2)
    assert found["_orig_mod.weight"].sparsity == 0.5
    assert found.macs in (None, 256)  # older releases do not count what is compiled
    assert found.effective_macs in (None, 128)


def test_weights_that_are_cast_or_computed_first_are_named():
    class Casts(nn.Linear):
        def forward(self, inputs):
            return F.linear(inputs.double(), self.weight.double())

    model = prune.l1_unstructured(Casts(16, 8), "weight", 0.5)
    found = tpe.report(model, torch.ones(2, 16), rounds=2)
    assert (found.macs, found.effective_macs, found["weight"].macs) == (256, 256, 0)
    assert "counted in full, as no product is with them as they are stored: weight" in str(found)


def test_without_inputs_nothing_is_run_and_costs_are_not_known():
    class Refuses(nn.Linear):
        def forward(self, inputs):
            raise AssertionError("run")

    found = tpe.report(Refuses(2, 2))
    assert (found.macs, found.effective_macs, found.latency, found.threads) == (None,) * 4
    assert "MACs" not in str(found)
    assert "latency" not in str(found)


def test_what_is_not_known_is_said():
    class Unknown(nn.Linear):
        def forward(self, inputs):
            return torch.special.bessel_j0(inputs)

    found = tpe.report(Unknown(2, 2), torch.ones(1, 2), rounds=2)
    assert (found.macs, found.effective_macs) == (None, None)
    assert "MACs: not known" in str(found)
    assert found.latency > 0


# ------------------------------------------------------------------------------------------------ no traces


@every_state
@pytest.mark.parametrize("inputs", [None, x], ids=["without_inputs", "with_inputs"])
def test_nothing_is_changed_and_nothing_printed(state, inputs, capfd):
    model = in_state(state)
    model.train()
    model(x).sum().backward()
    before, random = Snapshot(model), torch.get_rng_state()
    found = tpe.report(model, inputs, rounds=2)
    assert before.differences() == []
    assert torch.equal(random, torch.get_rng_state())
    assert capfd.readouterr() == ("", "")
    assert str(found)


def test_nothing_is_changed_by_a_forward_that_fails():
    model = in_state(in_turn)
    before = Snapshot(model)
    with pytest.raises(RuntimeError, match=r"model, a Net of torch\.float32, failed on example_inputs"):
        tpe.report(model, torch.ones(1, 2))
    assert before.differences() == []


def test_while_frozen():
    model = in_state(in_turn)
    with tpe.frozen(model):
        before = Snapshot(model)
        found = tpe.report(model, x, rounds=2)
        assert before.differences() == []
    assert found.kept == tpe.report(model).kept


# ------------------------------------------------------------------------------------------------ how it is told


def test_tables_show_weights_and_what_is_pruned():
    model = in_state(in_turn)
    found = tpe.report(model)
    lines = str(found).splitlines()
    shown = [row for row in found if len(row.shape) > 1 or row.source != "dense"]
    assert [line.split()[0] for line in lines[1 : 1 + len(shown)]] == [row.name for row in shown]
    assert {"bn.weight", "bn.bias"} <= {row.name for row in shown}
    assert f"not shown: {len(found) - len(shown)} dense vectors" in str(found)
    for row, line in zip(shown, lines[1:], strict=False):
        assert f" {row.kept:,} " in line
        assert f" {100 * row.density:.1f} %" in line
    totals = lines[1 + len(shown) :]
    assert f"{found.kept:,} of {found.total:,}, {100 * (1 - found.sparsity):.2f} %" in totals[1]


def test_shares_that_are_almost_all_are_not_called_all():
    layer = prune.l1_unstructured(nn.Linear(100, 100), "weight", 1)
    assert ">99.9 %" in str(tpe.report(layer))
    layer = prune.l1_unstructured(nn.Linear(100, 100), "weight", 9_999)
    assert "<0.1 %" in str(tpe.report(layer))


def test_notebooks_get_the_same_cells_with_all_escaped():
    model = nn.Sequential()
    model.add_module("<script>alert(1)</script>", nn.Linear(4, 2))
    html = tpe.report(model)._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    model = in_state(in_turn)
    html, text = tpe.report(model)._repr_html_(), str(tpe.report(model))
    cells = re.findall(r"<t[dh][^>]*>([^<]*)</t[dh]>", html)
    assert len(cells) % len(re.findall("<th ", html)) == 0
    for cell in cells:
        assert cell in text


def test_dictionaries_are_plain():
    found = tpe.report(in_state(in_turn), x, rounds=2)
    told = json.loads(json.dumps(found.to_dict()))
    assert (told["kept"], told["macs"], told["effective_macs"]) == (found.kept, found.macs, found.effective_macs)
    rows = {row["name"]: row for row in told["rows"]}
    assert list(rows) == [row.name for row in found]
    assert rows["conv.weight"]["units"]["filters"] == {
        "zero": found["conv.weight"].units["filters"].zero,
        "total": 8,
    }
    assert rows["up.weight"]["nm"][0].keys() == {"n", "m", "dim", "pad", "groups"}
    assert told["latency"] == found.latency


def test_rows_in_pandas():
    pytest.importorskip("pandas", reason="needs pandas")
    found = tpe.report(in_state(in_turn))
    frame = found.to_pandas()
    assert list(frame.index) == [row.name for row in found]
    assert frame["kept"].sum() == found.kept
    assert frame.loc["conv.weight", "zero_filters"] == found["conv.weight"].units["filters"].zero
    assert frame.loc["conv.weight", "source"] == "mask"


def test_without_pandas_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install torchprune-ext\[pandas\]"):
        tpe.report(nn.Linear(2, 2)).to_pandas()


def test_values_are_frozen_and_can_be_kept():
    found = tpe.report(in_state(in_turn))
    with pytest.raises(AttributeError):
        found.macs = 3
    with pytest.raises(AttributeError):
        found["conv.weight"].kept = 3
    assert pickle.loads(pickle.dumps(found)) == copy.deepcopy(found) == found


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("conv", r"'conv' is not the name of a tensor of Net\. Did you mean 'conv\.weight' or 'conv\.bias'\?"),
        ("conv.wieght", r"Did you mean 'conv\.weight'"),
        ("conv.weight_orig", r"Did you mean 'conv\.weight'"),
        ("attention.in_proj", r"'attention\.in_proj_weight'"),
        ("zzz", r"Choose one of \['conv\.weight'"),
        (0, r"0 is not the name.*Pass a name, as 'conv\.weight'"),
    ],
)
def test_names_that_are_not_there_are_met_by_those_that_are(name, words):
    found = tpe.report(network())
    with pytest.raises(KeyError, match=words):
        found[name]


def test_models_without_anything():
    assert "0 of 0" in str(tpe.report(nn.ReLU()))
    assert tpe.report(nn.ReLU()).sparsity == 0
    assert "1 dense vector" in str(tpe.report(nn.PReLU()))
    with pytest.warns(UserWarning, match="zero-element"):
        empty = nn.Linear(0, 3)
    assert tpe.report(empty)["weight"].units == {"entries": (0, 0)}
    assert tpe.report(empty).empty == ()
    with pytest.raises(KeyError, match="It has none"):
        tpe.report(nn.ReLU())[0]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (lambda: ([nn.Linear(2, 2)],), TypeError, "model=.*is a list"),
        (lambda: (nn.LazyLinear(2),), ValueError, "has no shape yet"),
        (lambda: (nn.Linear(2, 2, device="meta"),), ValueError, "weight is on the meta device"),
        (lambda: (nn.Linear(2, 2), None, {"rounds": 1}), ValueError, "rounds=1 is too small"),
        (lambda: (nn.Linear(2, 2), None, {"threads": 0.5}), TypeError, "threads=0.5 is a float"),
    ],
)
def test_refusals(arguments, error, words):
    model, inputs, options = (*arguments(), None, {})[:3]
    with pytest.raises(error, match=words):
        tpe.report(model, inputs, **(options or {}))


def test_a_thousand_layers_are_read_in_seconds():
    mask = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) < 0.1
    layers = [prune.custom_from_mask(nn.Linear(64, 64), "weight", mask) for _ in range(1000)]
    model = nn.Sequential(*layers)
    start = time.process_time()  # of this process, whatever else the machine does
    assert len(tpe.report(model)) == 2000
    assert time.process_time() - start < 5  # 0.7 where nothing else runs; quadratic code would take minutes
