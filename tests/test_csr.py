"""``to_csr``: a copy whose sparse layers are converted where that is measured to be faster, and why others are not."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from snapshots import Snapshot
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe
from torchprune_ext.deploy import conversion
from torchprune_ext.deploy.timing import Times


@pytest.fixture
def clock(monkeypatch):
    """Let times be told by a rule, not measured: here sparse takes half of dense's time, blocks a third."""
    calls = []

    def medians(given, **_):
        for call in given.values():
            calls.append((call.func, call.args[0]))
            call()
        return {name: Times(clock.seconds(call.func), 0.0, 1) for name, call in given.items()}

    def seconds(layer):
        return 6e-3 if isinstance(layer, nn.Linear) else 3e-3 if layer.block == 1 else 2e-3

    clock = type("Clock", (), {"seconds": staticmethod(seconds), "calls": calls})
    monkeypatch.setattr(conversion, "medians", medians)
    return clock


def sparse(layer, sparsity=0.9):
    return prune.l1_unstructured(layer, "weight", amount=sparsity)


def network():
    torch.manual_seed(0)
    return nn.Sequential(sparse(nn.Linear(20, 30)), nn.ReLU(), sparse(nn.Linear(30, 20), 0.5), nn.Linear(20, 4))


def reasons(report):
    return {row.layer: row.reason for row in report.rows}


def test_a_large_layer_is_measured_to_be_faster_and_a_small_one_is_not():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2048, 4096), nn.ReLU(), nn.Linear(4096, 8))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.mul_(torch.rand(layer.weight.shape) < 0.02)
    report = tpe.csr_report(model)
    assert [row.converted for row in report.rows] == [True, False]
    large, small = report.rows
    assert large.sparse_ms < large.dense_ms
    assert small.sparse_ms > small.dense_ms
    assert small.reason.startswith("dense is faster: sparse has 0.")
    assert "on (1, 4096), 1 thread(s)" in small.reason
    fast = tpe.to_csr(model)
    assert isinstance(fast[0], tpe.CSRLinear)
    assert type(fast[2]) is nn.Linear
    x = torch.randn(3, 2048)
    torch.testing.assert_close(fast(x), model(x))


@pytest.mark.usefixtures("clock")
def test_only_what_is_sparse_enough_is_converted_and_the_original_stays():
    model = network()
    snapshot = Snapshot(model)
    fast = tpe.to_csr(model, min_sparsity=0.8)
    assert snapshot.differences() == []
    assert [type(layer).__name__ for layer in fast] == ["CSRLinear", "ReLU", "Linear", "Linear"]
    x = torch.randn(5, 20)
    torch.testing.assert_close(fast(x), model(x))
    assert prune.is_pruned(fast[2])
    assert torch.equal(fast[2].weight_mask, model[2].weight_mask)
    mine = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    assert not mine & {id(tensor) for tensor in [*fast.parameters(), *fast.buffers()]}


@settings(max_examples=30)
@given(zeros=st.integers(0, 40), least=st.sampled_from([0.0, 0.1, 0.3, 0.7, 0.8, 0.9, 1.0]))
def test_exactly_as_many_zeros_are_enough(zeros, least):
    layer = nn.Linear(8, 5)
    with torch.no_grad():
        layer.weight.fill_(1).view(-1)[:zeros] = 0
        layer.weight[0, 0] *= -1  # a negative zero is a zero
    (row,) = tpe.csr_report(layer, min_sparsity=least).rows
    assert row.sparsity == pytest.approx(zeros / 40)
    assert ("min_sparsity" in row.reason) == (zeros < least * 40 - 1e-9)


@pytest.mark.usefixtures("clock")
def test_masks_count_and_so_do_plain_zeros():
    masked, plain = network(), network()
    tpe.remove_all(plain)
    for model in (masked, plain):
        assert [row.converted for row in tpe.csr_report(model).rows] == [True, False, False]
        assert torch.equal(tpe.to_csr(model)[0].weight, plain[0].weight)


def test_the_report_tells_of_every_layer(clock):
    clock.seconds = lambda layer: 6e-3 if isinstance(layer, nn.Linear) else 4e-3
    report = tpe.csr_report(network(), example_inputs=torch.zeros(7, 20))
    first = report.rows[0]
    assert (first.layer, first.shape, first.converted) == ("0", (30, 20), True)
    assert (first.dense_ms, first.sparse_ms) == (pytest.approx(6), pytest.approx(4))
    assert first.reason == "1.50 times as fast as dense on (7, 20), 1 thread(s)"
    assert reasons(report)["2"] == "has 300 zeros of 600, less than min_sparsity=0.8"
    assert str(report).splitlines() == [
        "layer  shape  zeros             dense ms  sparse ms  why",
        "0      30x20  90.0%  converted  6.000     4.000      1.50 times as fast as dense on (7, 20), 1 thread(s)",
        "2      20x30  50.0%  left                            has 300 zeros of 600, less than min_sparsity=0.8",
        "3      4x20   0.0%   left                            has 0 zeros of 80, less than min_sparsity=0.8",
    ]
    assert report.to_dict()["2"]["converted"] is False
    with pytest.raises(AttributeError):
        first.reason = ""


def test_layers_are_timed_on_the_inputs_that_they_get(clock):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = sparse(nn.Linear(8, 8))

        def forward(self, x, *, scale):
            return self.layer(self.layer(x)) + self.layer(input=x[0] * scale)

    model = Twice()
    (row,) = tpe.csr_report(model, example_inputs={"x": torch.ones(3, 5, 8), "scale": 2.0}).rows
    assert {tuple(x.shape) for _, x in clock.calls} == {(3, 5, 8), (5, 8)}
    assert row.dense_ms == pytest.approx(3 * 6)
    assert row.sparse_ms == pytest.approx(3 * 3)
    clock.calls.clear()
    tpe.csr_report(model)
    assert {tuple(x.shape) for _, x in clock.calls} == {(1, 8)}
    clock.calls.clear()
    tpe.csr_report(nn.Sequential(sparse(nn.Linear(8, 8))), example_inputs=(torch.ones(2, 8),))
    assert {tuple(x.shape) for _, x in clock.calls} == {(2, 8)}


def test_blocks_are_tried_where_they_are_whole(clock):
    weight = torch.zeros(64, 96)
    weight[:16, 16:32] = 1
    layer = nn.Linear(96, 64)
    layer.weight.data.copy_(weight)
    assert tpe.to_csr(layer, min_sparsity=0.9).block == 16  # of 32, only 5 of 6 are zero
    assert tpe.to_csr(layer, min_sparsity=0.95).block == 16
    assert tpe.to_csr(layer, min_sparsity=0.8).block == 32
    clock.seconds = lambda layer: 6e-3 if isinstance(layer, nn.Linear) else 2e-3 + 1e-3 * (layer.block > 1)
    assert tpe.to_csr(layer, min_sparsity=0.8).block == 1


@pytest.mark.usefixtures("clock")
def test_a_layer_at_two_places_stays_one_and_a_tied_weight_is_copied():
    layer = sparse(nn.Linear(8, 8))
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)})
    model.alias = (layer,)
    fast = tpe.to_csr(model)
    assert fast["a"] is fast["b"][0] is fast.alias[0]
    assert isinstance(fast["a"], tpe.CSRLinear)
    tied = nn.Sequential(nn.Embedding(8, 6), nn.Linear(6, 8, bias=False))
    tied[0].weight.data[:, 1:] = 0
    tied[1].weight = tied[0].weight
    fast = tpe.to_csr(tied)
    x = torch.tensor([[1, 2], [0, 7]])
    torch.testing.assert_close(fast(x), tied(x))
    assert [row.layer for row in tpe.csr_report(model).rows] == ["a"]


@pytest.mark.usefixtures("clock")
def test_a_model_that_is_a_layer_becomes_one():
    layer = sparse(nn.Linear(8, 8)).eval()
    fast = tpe.to_csr(layer)
    assert isinstance(fast, tpe.CSRLinear)
    assert not fast.training
    assert tpe.csr_report(layer).rows[0].layer == ""
    assert "(the model)" in str(tpe.csr_report(layer))


@pytest.mark.usefixtures("clock")
def test_the_state_dict_goes_into_the_model_and_back():
    model = network()
    fast = tpe.to_csr(model)
    dense = network()
    tpe.remove_all(dense)
    dense[2] = nn.Linear(30, 20)
    dense.load_state_dict(tpe.dense_state_dict(fast))
    x = torch.randn(5, 20)
    torch.testing.assert_close(dense(x), model(x))
    again = tpe.to_csr(network())
    with torch.no_grad():
        again[0].values.zero_()
    again.load_state_dict(fast.state_dict())
    assert torch.equal(again(x), fast(x))
    assert torch.equal(tpe.copy_pruned(fast)(x), fast(x))


class Scaled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def hooked():
    layer = sparse(nn.Linear(8, 8))
    layer.register_forward_hook(lambda *_: None)
    return layer


def own_forward():
    layer = sparse(nn.Linear(8, 8))
    layer.forward = lambda x: x
    return layer


def own_buffer():
    layer = sparse(nn.Linear(8, 8))
    layer.register_buffer("scale", torch.ones(1))
    return layer


def parametrized():
    return nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: sparse(Scaled(8, 8)), "is a Scaled, not a plain nn.Linear"),
        (lambda: nn.MultiheadAttention(8, 2).out_proj, "whose weight its parent reads without calling it"),
        (lambda: sparse(nn.MultiheadAttention(8, 2).out_proj), "whose weight its parent reads without calling it"),
        (hooked, "has hooks, which would be lost (_forward_hooks)"),
        (own_forward, "has a forward of its own"),
        (own_buffer, "has scale besides weight and bias"),
        (parametrized, "is a ParametrizedLinear"),
        (lambda: sparse(nn.Linear(8, 8)).half(), "is of torch.float16, for which torch has no sparse kernel"),
        (lambda: sparse(nn.Linear(8, 8)).bfloat16(), "is of torch.bfloat16"),
        (lambda: nn.Linear(8, 8, device="meta"), "is on meta"),
        (lambda: nn.Linear(8, 8, dtype=torch.complex64), "is of torch.complex64"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*zero-element")
def test_a_layer_that_does_not_qualify_is_left_with_the_reason(clock, layer, reason):
    model = nn.Sequential(layer(), sparse(nn.Linear(8, 8)))
    report = tpe.csr_report(model)
    assert reason in report.rows[0].reason
    assert [row.converted for row in report.rows] == [False, True]
    assert isinstance(tpe.to_csr(model)[1], tpe.CSRLinear)
    assert not isinstance(tpe.to_csr(model)[0], tpe.CSRLinear)


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    for child in (layer.linear1, layer.linear2):
        prune.remove(sparse(child), "weight")
    return layer


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("example", [None, torch.randn(2, 3, 8)])
def test_what_the_fast_path_of_the_encoder_passes_by_is_left_until_it_is_off(example):
    model = encoder()
    with pytest.raises(ValueError, match=r"set_fastpath_enabled\(False\)"):
        tpe.to_csr(model, example_inputs=example)
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        fast = tpe.to_csr(model, example_inputs=example)
        assert isinstance(fast.linear1, tpe.CSRLinear)
        x = torch.randn(2, 3, 8)
        with torch.no_grad():
            expected = model(x)
            torch.testing.assert_close(fast(x), expected)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), expected)  # the fast path reads .weight, slowly but rightly


class Peeking(nn.Module):
    """As T5's feed-forward block, which looks at the dtype of a weight before it calls the layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = sparse(nn.Linear(8, 8)), sparse(nn.Linear(8, 8))

    def forward(self, x):
        x = self.first(x)
        return self.second(x.to(self.second.weight.dtype))


@pytest.mark.usefixtures("clock")
def test_a_layer_whose_weight_its_parent_reads_is_left():
    model = Peeking()
    snapshot = Snapshot(model)
    report = tpe.csr_report(model, example_inputs=torch.ones(2, 8))
    assert [row.converted for row in report.rows] == [True, False]
    assert "its parent reads its weight too" in report.rows[1].reason
    assert snapshot.differences() == []
    assert type(model.first) is nn.Linear


@pytest.mark.usefixtures("clock")
def test_many_shapes_are_summed_up():
    class Lengths(nn.Sequential):
        def forward(self, *inputs):
            return [super(Lengths, self).forward(x) for x in inputs]

    (row,) = tpe.csr_report(
        Lengths(sparse(nn.Linear(8, 8))), example_inputs=[torch.ones(length, 8) for length in range(1, 6)]
    ).rows
    assert "on (1, 8), (2, 8), 3 other shapes, 1 thread(s)" in row.reason


@pytest.mark.usefixtures("clock")
def test_a_layer_that_is_not_called_is_left():
    model = network()
    model.spare = sparse(nn.Linear(8, 8))
    model.forward = lambda x: nn.Sequential.forward(nn.Sequential(*list(model)[:4]), x)
    assert "is not called" in reasons(tpe.csr_report(model, example_inputs=torch.ones(1, 20)))["spare"]
    assert tpe.csr_report(model).rows[-1].converted


def test_nothing_to_convert_is_an_error_that_tells_of_each_layer(clock):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"(?s)Sequential, has no layer to convert:.*\n0 .*0 zeros of 16.*\n1 .*of 8"):
        tpe.to_csr(model)
    with pytest.raises(ValueError, match=r"... and 5 more: print\(csr_report\(model, ...\)\)"):
        tpe.to_csr(nn.Sequential(*(nn.Linear(2, 2) for _ in range(25))))
    clock.seconds = lambda layer: 1e-3  # a draw
    with pytest.raises(ValueError, match="dense is faster"):
        tpe.to_csr(network())


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"model": 3}, TypeError, "model=3 is a int"),
        ({"model": nn.ReLU()}, ValueError, "model, a ReLU, has no nn.Linear"),
        ({"model": nn.Linear(2, 2), "min_sparsity": 1.2}, ValueError, "min_sparsity=1.2"),
        ({"model": nn.Linear(2, 2), "min_sparsity": "a"}, TypeError, "min_sparsity='a'"),
        ({"model": nn.Sequential(nn.LazyLinear(2))}, ValueError, "has no shape yet"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, match):
    for call in (tpe.to_csr, tpe.csr_report):
        with pytest.raises(error, match=match):
            call(**arguments)


class Failing(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error, self.norm, self.layer = error, nn.BatchNorm1d(8), sparse(nn.Linear(8, 8))

    def forward(self, x):
        x = self.layer(self.norm(x))
        if self.error:
            raise self.error
        return x


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, RuntimeError])
def test_an_error_of_the_model_leaves_it_as_it_was(error):
    model = Failing(error)
    snapshot = Snapshot(model)
    with pytest.raises(error):
        tpe.to_csr(model, example_inputs=torch.randn(4, 8))
    assert snapshot.differences() == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_error_while_timing_leaves_the_model_as_it_was(clock, error):
    def seconds(layer):
        raise error

    model = network()
    snapshot, clock.seconds = Snapshot(model), seconds
    with pytest.raises(error):
        tpe.to_csr(model, example_inputs=torch.randn(4, 20))
    assert snapshot.differences() == []


def test_a_kernel_that_torch_does_not_have_is_told(clock):
    def seconds(layer):
        raise NotImplementedError("no such kernel\nmore of it")

    clock.seconds = seconds
    (row, *_) = tpe.csr_report(network()).rows
    assert row.reason == "cannot be computed so here: no such kernel"


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_call_changes_no_statistics_mode_or_random_state_in_any_mode(mode):
    model = nn.Sequential(sparse(nn.Linear(8, 8)), nn.BatchNorm1d(8), nn.Dropout())
    model[1].eval()
    snapshot, state = Snapshot(model), torch.get_rng_state()
    with mode():
        fast = tpe.to_csr(model, example_inputs=torch.ones(4, 8))
    assert snapshot.differences() == []
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in fast] == [True, False, True]
    with mode():
        fast.eval()(torch.ones(4, 8))


@pytest.mark.usefixtures("clock")
def test_a_model_with_zeros_kept_in_training_is_converted():
    model = nn.Sequential(sparse(nn.Linear(8, 8)))
    tpe.remove_all(model, keep_zeros=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    tpe.keep_zeros(model, optimizer)
    assert isinstance(tpe.to_csr(model)[0], tpe.CSRLinear)


@pytest.mark.usefixtures("clock")
def test_a_copy_that_does_not_pass_the_memo_on_is_refused():
    class Own(nn.Sequential):
        def __deepcopy__(self, memo):
            return Own(*(copy.deepcopy(child) for child in self))

    with pytest.raises(TypeError, match="__deepcopy__ of its own"):
        tpe.to_csr(Own(sparse(nn.Linear(8, 8))))
