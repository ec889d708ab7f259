"""``to_semi_structured``: what fits the 2:4 format is told on any machine; a GPU computes with it."""

import copy
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from snapshots import Snapshot
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.sparse import SparseSemiStructuredTensor

import torchprune_ext as tpe
from torchprune_ext.deploy import conversion, semi_structured
from torchprune_ext.deploy.semi_structured import packed_and_back
from torchprune_ext.deploy.timing import Times

HALVES = [torch.float16, torch.bfloat16]
gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="needs an NVIDIA GPU with sparse tensor cores (compute capability 8.0 or newer)",
)


def two_of_four(rows, columns, seed=0, dtype=torch.float16):
    """Return a matrix with at most two of each four in a row; some groups have fewer, or zeros with a sign."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randn(rows, columns // 4, 4, generator=generator)
    keep = torch.rand(groups.shape, generator=generator).argsort(-1) < 2
    keep &= torch.rand(groups.shape, generator=generator) < 0.8
    return (groups * keep).reshape(rows, columns).to(dtype)


def linear(weight):
    layer = nn.Linear(*weight.shape[::-1], dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    return layer


def reason(layer):
    (row,) = tpe.semi_structured_report(layer).rows
    assert not row.converted
    return row.reason


@pytest.fixture
def pretend(monkeypatch):
    """Let the CPU take part, with dense tensors as packed ones, and times that say that sparse is twice as fast."""

    class Pretend:
        seconds = staticmethod(lambda layer: 2e-3 if isinstance(layer, nn.Linear) else 1e-3)

    def medians(given, **_):
        for call in given.values():
            call()
        return {name: Times(Pretend.seconds(call.func), 0.0, 1) for name, call in given.items()}

    monkeypatch.setattr(conversion, "medians", medians)
    monkeypatch.setattr(semi_structured, "off_device", lambda weight: None)
    monkeypatch.setattr(semi_structured, "pack", torch.clone)
    return Pretend


@given(rows=st.integers(1, 70), groups=st.integers(1, 40), seed=st.integers(0, 99), dtype=st.sampled_from(HALVES))
def test_two_of_four_survives_packing_and_only_that(rows, groups, seed, dtype):
    weight = two_of_four(rows, 4 * groups, seed, dtype)
    assert torch.equal(packed_and_back(weight), weight)
    row, group = seed % rows, seed % groups
    weight[row, 4 * group : 4 * group + 4] = torch.tensor([1, 2, 3, 0], dtype=dtype)
    lost = packed_and_back(weight) != weight
    assert lost.sum() == 1  # as the host does: without a word
    assert lost[row, 4 * group : 4 * group + 4].any()


@given(
    rows=st.sampled_from([32, 64]),
    columns=st.sampled_from([64, 128]),
    seed=st.integers(0, 99),
    broken=st.integers(0, 5),
    dtype=st.sampled_from(HALVES),
)
def test_each_group_that_has_more_than_two_is_counted(rows, columns, seed, broken, dtype):
    weight = two_of_four(rows, columns, seed, dtype)
    groups = weight.view(-1, 4)
    groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))[:broken]] = 1.0
    more = sum(sum(value != 0 for value in group) > 2 for group in groups.tolist())
    told = reason(linear(weight))
    assert more == broken
    if broken:
        assert told.startswith(f"is not 2:4: {broken} of {len(groups)} groups of four along in_features")
    else:
        assert told.startswith("fits, and packs without loss, but is on cpu")


@pytest.mark.parametrize(
    ("layer", "told"),
    [
        (nn.Linear(64, 64), "is of torch.float32; the format takes float16 and bfloat16"),
        (nn.Linear(64, 64, dtype=torch.float64), "is of torch.float64"),
        (nn.Linear(64, 64, dtype=torch.float16, device="meta"), "is on the meta device"),
        (linear(two_of_four(24, 64)), "is not a multiple of"),
        (linear(two_of_four(64, 40)), "is not a multiple of"),
        (linear(two_of_four(64, 64).t()), "is not 2:4"),
        (nn.MultiheadAttention(64, 2).half().out_proj, "whose weight its parent reads"),
    ],
)
def test_what_does_not_fit_is_told(layer, told):
    assert told in reason(layer)
    with pytest.raises(ValueError, match="has no layer to convert"):
        tpe.to_semi_structured(layer)


@pytest.mark.parametrize("forced", [True, False])
def test_sizes_are_those_that_the_kernels_in_use_need(monkeypatch, forced):
    monkeypatch.setattr(SparseSemiStructuredTensor, "_FORCE_CUTLASS", forced)
    told = reason(linear(two_of_four(16, 16)))
    assert ("is not a multiple of 32x64, which cutlass needs" in told) == forced
    assert told.startswith("fits") == (not forced)


def test_nan_is_not_packed():
    weight = two_of_four(64, 64)
    weight[0, :4] = torch.tensor([float("nan"), 0, 0, 0])
    assert "does it hold NaN?" in reason(linear(weight))


def test_masks_along_the_axis_that_the_layer_sums_over_fit():
    masked = tpe.nm_structured(nn.Linear(128, 64), "weight", n=2, m=4).half()
    assert reason(masked).startswith("fits")
    snapshot = Snapshot(masked)
    tpe.semi_structured_report(masked, example_inputs=torch.ones(2, 128).half())
    assert snapshot.differences() == []
    assert reason(tpe.nm_structured(nn.Linear(128, 64), "weight", n=2, m=4, dim=0).half()).startswith("is not 2:4")


def test_a_layer_by_hand_is_refused_without_a_gpu_or_where_it_does_not_fit():
    with pytest.raises(ValueError, match="fits, and packs without loss, but is on cpu"):
        tpe.SemiStructuredLinear(two_of_four(64, 64))
    with pytest.raises(ValueError, match="is not 2:4"):
        tpe.SemiStructuredLinear(torch.ones(64, 64).half())
    with pytest.raises(TypeError, match="Pass a dense tensor of float16 or bfloat16"):
        tpe.SemiStructuredLinear(torch.ones(64, 64))


@pytest.mark.usefixtures("pretend")
@pytest.mark.parametrize("dtype", HALVES)
def test_the_model_around_the_kernels_is_right(dtype):
    first = prune.custom_from_mask(nn.Linear(64, 128), "weight", two_of_four(128, 64) != 0).to(dtype)
    model = nn.Sequential(first, nn.ReLU(), nn.Linear(128, 64, dtype=dtype))
    snapshot = Snapshot(model)
    fast = tpe.to_semi_structured(model, example_inputs=torch.ones(16, 64, dtype=dtype))
    assert snapshot.differences() == []
    assert [type(layer).__name__ for layer in fast] == ["SemiStructuredLinear", "ReLU", "Linear"]
    near = {"rtol": 0.0, "atol": 16 * torch.finfo(dtype).eps}  # rows are padded, so sums may run in another order
    with torch.inference_mode():
        for shape in [(64,), (0, 64), (3, 64), (2, 0, 64), (2, 3, 64)]:
            x = torch.randn(shape, dtype=dtype)
            torch.testing.assert_close(fast(x), model(x), **near)
        x = torch.randn(64, 5, dtype=dtype).t()
        torch.testing.assert_close(fast(x), model(x), **near)
    fast.load_state_dict(tpe.dense_state_dict(model))
    nn.Linear(64, 128, dtype=dtype).load_state_dict(fast[0].state_dict())
    with pytest.raises(ValueError, match=r"input.shape=\(2, 32\) does not end in in_features=64"):
        fast[0](torch.ones(2, 32, dtype=dtype))


@pytest.mark.usefixtures("pretend")
def test_a_state_dict_that_is_not_2_to_4_is_refused_and_not_loaded():
    layer = tpe.to_semi_structured(linear(two_of_four(64, 64)))
    before = layer.weight.clone()
    with pytest.raises(RuntimeError, match=r"weight: weight of shape \(64, 64\) is not 2:4"):
        layer.load_state_dict({"weight": torch.ones(64, 64), "bias": torch.zeros(64)})
    assert torch.equal(layer.weight, before)


@pytest.mark.usefixtures("pretend")
def test_what_the_device_packs_otherwise_is_not_used(monkeypatch):
    monkeypatch.setattr(semi_structured, "pack", lambda weight: weight * 2)
    with pytest.raises(ValueError, match="is not what the device unpacks again"):
        tpe.SemiStructuredLinear(two_of_four(64, 64))
    told = tpe.semi_structured_report(linear(two_of_four(64, 64))).rows[0].reason
    assert "is not what the device unpacks again" in told


def test_what_is_slower_is_left_dense_and_said(pretend):
    pretend.seconds = lambda layer: 1e-3 if isinstance(layer, nn.Linear) else 2e-3
    (row,) = tpe.semi_structured_report(linear(two_of_four(64, 64)), example_inputs=torch.ones(8, 64).half()).rows
    assert row.reason == "dense is faster: sparse has 0.50 times its speed on (8, 64), 1 thread(s)"


def test_an_old_gpu_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    weight = type("OnGPU", (), {"is_cuda": True, "device": "cuda:0"})()
    assert semi_structured.off_device(weight).endswith("compute capability 7.5; sparse tensor cores begin with 8.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert semi_structured.off_device(weight) is None


@gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_gpu_computes_what_linear_does(dtype, bias):
    weight = two_of_four(256, 512, dtype=dtype).cuda()
    offset = torch.randn(256, dtype=dtype, device="cuda") if bias else None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = tpe.SemiStructuredLinear(weight, offset)
    assert torch.equal(layer.weight, weight)
    for shape in [(512,), (0, 512), (1, 512), (3, 7, 512), (128, 512)]:
        x = torch.randn(shape, dtype=dtype, device="cuda")
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                torch.testing.assert_close(layer(x), F.linear(x, weight, offset), atol=0.1, rtol=0.02)
    layer.load_state_dict(copy.deepcopy(layer.state_dict()))
    assert torch.equal(layer.to_linear().weight, weight)


@gpu
def test_a_gpu_times_layers_and_converts_those_that_are_faster():
    model = nn.Sequential(linear(two_of_four(4096, 4096)), nn.ReLU(), linear(two_of_four(64, 4096))).cuda()
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.float16)
    report = tpe.semi_structured_report(model, example_inputs=x)
    assert all(row.dense_ms is not None for row in report.rows)
    if any(row.converted for row in report.rows):
        with torch.inference_mode():
            fast = tpe.to_semi_structured(model, example_inputs=x)
            torch.testing.assert_close(fast(x), model(x), atol=0.5, rtol=0.05)
