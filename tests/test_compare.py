"""The table of models: what it says, that it says nothing wrong, and that it leaves no trace."""

import copy
import json
import os
import sys
import time
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from snapshots import Snapshot
from torch import nn

import torchprune_ext as tpe
from torchprune_ext.deploy.counting import count_bytes, count_macs, count_parameters

x = torch.randn(4, 1, 8, 8)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(), nn.Flatten(), nn.Linear(4 * 36, 10)
    )


def pruned(sparsity=0.75):
    model = network()
    tpe.global_unstructured(tpe.prunable_parameters(model), target_sparsity=sparsity)
    return model


def compare(*models, inputs=x, **options):
    return tpe.compare(dict(zip("abcdef", models, strict=False)), inputs, rounds=2, **options)


# ----------------------------------------------------------------------------------------------------------- the table


def test_the_table_says_what_pruning_has_and_has_not_gained():
    found = compare(network(), pruned(), evaluate=lambda model: {"accuracy": 90 + len(list(model.buffers()))})
    dense, sparse = found.rows
    weights = 4 * 9 + 4 * 36 * 10
    assert (dense.name, dense.metrics, sparse.metrics) == ("a", {"accuracy": 93}, {"accuracy": 95})
    assert dense.macs == sparse.macs == 4 * (36 * 36 + 1440)
    assert dense.parameters == sparse.parameters == weights + 4 + 8 + 10
    assert sparse.nonzero == dense.parameters - 4 - round(0.75 * weights)  # four of BatchNorm's are zero
    assert dense.nbytes == 4 * (dense.parameters + 8) + 8
    assert sparse.nbytes == dense.nbytes + 4 * weights  # the masks
    assert 0 < dense.latency < 1
    assert dense.spread >= 0


def test_text_and_dict_hold_the_same_and_ratios_to_the_first():
    found = compare(network(), pruned(), evaluate=lambda model: 50.0, threads=1)
    lines = str(found).splitlines()
    assert len(lines) == 1 + 2 + 1
    assert lines[0].split() == ["metric", "latency", "MACs", "parameters", "nonzero", "bytes"]
    assert len({len(line) for line in lines[1:-1]}) == 1  # aligned
    assert lines[-1] == "latency: median ± interquartile range of 2 rounds, 1 thread; percent: of a"
    assert lines[2].split()[-4:] == ["11.9", "kB", "198", "%"]
    assert lines[1].split()[1:4] == ["50", "100", "%"]
    told = json.loads(json.dumps(found.to_dict()))
    assert (told["threads"], told["rounds"]) == (1, 2)
    first, second = told["rows"]
    assert first["ratios"] == dict.fromkeys(["metric", "latency", "macs", "parameters", "nonzero", "nbytes"], 1.0)
    assert second["nbytes"] == found.rows[1].nbytes
    assert second["ratios"]["nbytes"] == found.rows[1].nbytes / found.rows[0].nbytes
    with pytest.raises(AttributeError):
        found.rows[0].macs = 3


def test_what_takes_longer_has_the_longer_latency():
    class Slow(nn.Linear):
        def forward(self, inputs):
            time.sleep(0.01)
            return super().forward(inputs)

    fast, slow = compare(nn.Linear(2, 2), Slow(2, 2), inputs=torch.ones(1, 2)).rows
    assert fast.latency < 0.01 <= slow.latency


def test_latency_is_that_of_eval_mode_without_gradients_with_the_threads_asked_for():
    seen = set()

    class Spy(nn.Linear):
        def forward(self, inputs):
            seen.add((self.training, torch.is_grad_enabled(), torch.get_num_threads()))
            return super().forward(inputs)

    before = torch.get_num_threads()
    compare(Spy(2, 2), inputs=torch.ones(1, 2), threads=before + 1)
    assert seen == {(False, False, before + 1)}
    assert torch.get_num_threads() == before


def test_bytes_are_those_of_the_file_but_for_its_frame(tmp_path):
    model = pruned()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    assert 0 < os.path.getsize(tmp_path / "model.pt") - count_bytes(model) < 500 * len(model.state_dict()) + 2000


def test_shared_tensors_count_once_and_parts_of_memory_as_the_whole():
    tied = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    tied[1].weight = tied[0].weight
    assert count_parameters(tied) == (64, 64)
    assert count_bytes(tied) == 256
    part = nn.Linear(2, 8, bias=False)
    part.weight = nn.Parameter(torch.ones(8, 8)[:, :2])
    assert count_parameters(part) == (16, 16)
    assert count_bytes(part) == 256  # torch.save writes all of it


# ---------------------------------------------------------------------------------------------------------------- MACs


class Attention(nn.Module):
    def forward(self, q):
        return F.scaled_dot_product_attention(q, q, q)


class Products(nn.Module):
    def forward(self, a):
        return torch.mv(a, a[0]) + torch.dot(a[0], a[0])


class Recorded(nn.Linear):
    def forward(self, inputs):
        with torch.profiler.record_function("product"):
            return super().forward(inputs)


class Sparse(nn.Module):
    """A product with a matrix of 3 stored entries."""

    def __init__(self, product):
        super().__init__()
        self.product = product
        indices = torch.tensor([0, 1, 3]), torch.tensor([0, 1, 3])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse (CSR tensor support|invariant checks)")
            self.weight = torch.sparse_csr_tensor(*indices, torch.ones(3), (2, 4))

    def forward(self, inputs):
        return self.product(self.weight, inputs)


def macs(model, *inputs):
    model.eval()
    with torch.no_grad():
        return count_macs(model, lambda: model(*inputs))


MACS = {
    "linear": (nn.Linear(8, 4), torch.ones(3, 8), 3 * 8 * 4),
    "linear, one sample without an axis": (nn.Linear(8, 4), torch.ones(8), 8 * 4),
    "linear, recorded for a profiler": (Recorded(8, 4), torch.ones(3, 8), 3 * 8 * 4),
    "convolution in groups": (nn.Conv2d(4, 8, 3, groups=2), torch.ones(2, 4, 8, 8), 2 * 36 * 8 * 2 * 9),
    "transposed convolution": (nn.ConvTranspose2d(4, 8, 3, groups=2), torch.ones(1, 4, 8, 8), 64 * 4 * 4 * 9),
    "attention": (Attention(), torch.ones(2, 2, 5, 4), 2 * 2 * (2 * 5 * 5 * 4)),
    "transformer layer": (
        nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True),
        torch.ones(3, 5, 8),
        3 * (5 * 8 * 24 + 2 * 5 * 5 * 8 + 5 * 8 * 8 + 2 * 5 * 8 * 16),
    ),
    "LSTM": (nn.LSTM(8, 4, batch_first=True), torch.ones(3, 5, 8), 3 * 5 * (8 * 16 + 4 * 16)),
    "GRU": (nn.GRU(8, 4, batch_first=True), torch.ones(3, 5, 8), 3 * 5 * (8 * 12 + 4 * 12)),
    "matrix and vector": (Products(), torch.ones(2, 8), 2 * 8 + 8),
    "half precision": (nn.Conv1d(2, 3, 3).bfloat16(), torch.ones(1, 2, 5, dtype=torch.bfloat16), 3 * 3 * 2 * 3),
    "sparse, linear": (Sparse(lambda w, a: F.linear(a, w)), torch.ones(5, 4), 5 * 3),
    "sparse, on the left": (Sparse(lambda w, a: w @ a.T), torch.ones(5, 4), 5 * 3),
    "sparse, of torch.sparse": (Sparse(lambda w, a: torch.sparse.mm(w, a.T)), torch.ones(5, 4), 5 * 3),
    "sparse, with a vector": (Sparse(lambda w, a: w @ a), torch.ones(4), 3),
    "not known: bilinear": (nn.Bilinear(4, 4, 3), (torch.ones(2, 4), torch.ones(2, 4)), None),
    "not known: without a product": (nn.ReLU(), torch.ones(2), None),
    "not known: distances": (Sparse(lambda w, a: torch.cdist(a, a)), torch.ones(30, 4), None),
}


@pytest.mark.parametrize(("model", "inputs", "expected"), MACS.values(), ids=MACS)
def test_macs_are_the_products_that_are_done_or_not_known(model, inputs, expected):
    assert macs(model, *(inputs if isinstance(inputs, tuple) else [inputs])) == expected


def test_macs_of_custom_operations_are_not_known():
    with torch.library._scoped_library("torchprune_ext_test", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda a: a @ a, "CompositeExplicitAutograd")

        class Custom(nn.Module):
            def forward(self, a):
                return torch.ops.torchprune_ext_test.twice(a) @ a

        assert macs(Custom(), torch.ones(3, 3)) is None
        assert "-" in str(compare(nn.Linear(3, 3), Custom(), inputs=torch.ones(3, 3))).splitlines()[2].split()


def test_counting_leaves_the_fast_paths_as_they_were():
    def switches():
        return (
            torch.backends.mha.get_fastpath_enabled(),
            torch.backends.mkldnn.enabled,
            torch.backends.cudnn.enabled,
            torch.backends.cuda.flash_sdp_enabled(),
        )

    before = switches()
    macs(nn.LSTM(2, 2), torch.ones(3, 2))
    with pytest.raises(RuntimeError):
        macs(nn.LSTM(2, 2), torch.ones(3, 3))
    assert switches() == before == (True,) * 4


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 2]))
def test_macs_of_a_convolution_are_those_of_its_loops(size, width, batch, stride):
    layer = nn.Conv1d(2 * width, 4, min(3, size), stride=stride, padding=1, groups=2)
    inputs = torch.ones(batch, 2 * width, size)
    count = 0
    for _ in range(batch * layer(inputs).shape[-1]):
        for _ in range(layer.out_channels):
            count += layer.in_channels // layer.groups * layer.kernel_size[0]
    assert macs(layer, inputs) == count


# ------------------------------------------------------------------------------------------------------ what is called


@pytest.mark.parametrize("inputs", [(x, x), [x, x], {"a": x, "b": x}], ids=["tuple", "list", "keywords"])
def test_inputs_are_arguments_or_keywords(inputs):
    class Two(nn.Linear):
        def forward(self, a, b):
            return super().forward(a + b)

    assert compare(Two(8, 2), inputs=inputs).rows[0].macs == 4 * 8 * 8 * 2


def test_inputs_are_copied():
    given = torch.randn(4, 4)
    before = given.clone()
    compare(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 2)), inputs=given)
    assert torch.equal(given, before)


def test_evaluate_gets_each_model_once_in_its_mode_and_with_the_same_random_numbers():
    seen = []

    def evaluate(model):
        seen.append((model, model.training, float(torch.rand(()))))
        model.eval()
        return torch.tensor(0.5)

    models = network(), network().eval()
    found = compare(*models, evaluate=evaluate)
    assert [row.metrics for row in found.rows] == [{"metric": 0.5}] * 2
    assert [model for model, _, _ in seen] == list(models)
    assert [mode for _, mode, _ in seen] == [True, False]
    assert seen[0][2] == seen[1][2]
    assert models[0].training
    assert models[0][1].training


# ---------------------------------------------------------------------------------------------------- without a trace


class Counting(nn.Module):
    """Writes into a buffer and into attributes at every forward, has hooks, and modes of its own."""

    def __init__(self):
        super().__init__()
        self.inner = pruned()
        self.register_buffer("calls", torch.zeros(()))
        self.cache = {}
        self.inner[1].eval()
        self.inner[5].register_forward_hook(lambda *_: None)

    def forward(self, inputs):
        self.calls += 1
        self.last = self.cache["last"] = inputs + torch.rand(())
        return self.inner(self.last)


def trained():
    model = Counting()
    model.inner(x).sum().backward()
    return model


@pytest.mark.parametrize("fails", [None, "model", "evaluate", "interrupt"])
def test_models_and_random_state_are_left_as_they_were(fails):
    models = trained(), trained().eval()

    def evaluate(model):
        model.train()
        model(x)
        if fails == "interrupt":
            raise KeyboardInterrupt
        return math_error() if fails == "evaluate" else 1.0

    def math_error():
        raise ZeroDivisionError

    if fails == "model":
        models[1].inner[5].register_forward_pre_hook(lambda *_: math_error())
    before, state = Snapshot(*models), torch.get_rng_state()
    if fails is None:
        compare(*models, evaluate=evaluate)
    else:
        with pytest.raises(KeyboardInterrupt if fails == "interrupt" else RuntimeError):
            compare(*models, evaluate=evaluate)
    assert before.differences() == []
    assert torch.equal(torch.get_rng_state(), state)


def test_in_a_frozen_scope_weights_stay_frozen():
    model = network()
    tpe.global_unstructured([(model[5], "weight")], target_sparsity=0.5)
    with tpe.frozen(model), torch.no_grad():
        model.eval()(x)
        kept = model[5].weight
        found = compare(network(), model)
        model(x)
        assert model[5].weight is kept
    assert found.rows[1].nonzero == found.rows[0].nonzero - 720


@pytest.mark.skipif(sys.platform != "linux", reason="torch.compile needs a C++ compiler")
def test_compiled_models_are_counted_as_what_was_compiled():
    model = network()
    found = compare(model, torch.compile(copy.deepcopy(model), backend="eager"))
    assert found.rows[0].values().keys() == found.rows[1].values().keys()
    assert found.rows[0].macs == found.rows[1].macs
    assert found.rows[0].parameters == found.rows[1].parameters
    assert found.rows[0].nbytes == found.rows[1].nbytes
    assert model.training


# --------------------------------------------------------------------------------------------------------------- errors


def lazy():
    return nn.LazyLinear(2)


BAD = {
    "a list": ([network()], {}, TypeError, "models is a list"),
    "a model": (network(), {}, TypeError, "models is a Sequential"),
    "none": ({}, {}, ValueError, "names no model"),
    "a name": ({1: network()}, {}, TypeError, "key 1, a int"),
    "not a module": ({"a": network(), "b": len}, {}, TypeError, r"models\['b'\]"),
    "meta": ({"a": nn.Linear(2, 2, device="meta")}, {}, ValueError, r"models\['a'\]: weight is on the meta device"),
    "rounds": ({"a": network()}, {"rounds": 1}, ValueError, "rounds=1"),
    "threads": ({"a": network()}, {"threads": 0}, ValueError, "threads=0"),
    "evaluate": ({"a": network()}, {"evaluate": 3}, TypeError, "evaluate is a int"),
    "text": ({"a": network()}, {"evaluate": lambda m: "good"}, TypeError, r"models\['a'\] gave a str"),
    "bool": ({"a": network()}, {"evaluate": lambda m: True}, TypeError, "gave a bool"),
    "nothing": ({"a": network()}, {"evaluate": lambda m: None}, TypeError, "gave a NoneType"),
    "nan": ({"a": network()}, {"evaluate": lambda m: {"f": float("nan")}}, ValueError, "gave NaN"),
    "a column": ({"a": network()}, {"evaluate": lambda m: {"macs": 1}}, ValueError, "macs"),
    "fails": ({"a": network()}, {"evaluate": lambda m: 1 / 0}, RuntimeError, r"models\['a'\]: ZeroDivisionError"),
    "other names": (
        {"a": network(), "b": network().eval()},
        {"evaluate": lambda m: {str(m.training): 1}},
        ValueError,
        r"\['False'\] for 'b', but \['True'\] for 'a'",
    ),
    "another shape": ({"a": network(), "b": nn.Linear(3, 2)}, {}, RuntimeError, r"models\['b'\], a Linear of torch"),
    "another dtype": ({"a": network(), "b": network().half()}, {}, RuntimeError, "of torch.float16, failed"),
}


@pytest.mark.parametrize(("models", "options", "error", "words"), BAD.values(), ids=BAD)
def test_what_cannot_be_compared_is_refused_by_name(models, options, error, words):
    with pytest.raises(error, match=words):
        tpe.compare(models, x, **{"rounds": 2, **options})


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_models_are_refused():
    with pytest.raises(ValueError, match=r"models\['a'\]: .*has no shape yet"):
        compare(nn.Sequential(nn.LazyLinear(2)))


def test_metrics_may_be_infinite_or_zero_and_have_no_ratio_then():
    found = compare(network(), network().eval(), evaluate=lambda m: {"loss": float("inf") if m.training else 0.0})
    assert found.to_dict()["rows"][1]["ratios"]["loss"] == 0.0
    assert found.ratios(found.rows[0])["loss"] is None
    lines = str(compare(network(), network().eval(), evaluate=lambda m: 0.0 if m.training else 2.0)).splitlines()
    assert [line.split()[1] for line in lines[1:3]] == ["0", "2"]
    assert len(lines[1].split()) == len(lines[2].split())
