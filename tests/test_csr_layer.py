"""A ``CSRLinear`` is an ``nn.Linear`` for inference: same outputs, same state dict, wherever a module goes."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from snapshots import Snapshot
from torch import nn
from torch.nn import functional as F

import torchprune_ext as tpe

LEADING = st.sampled_from([(), (0,), (1,), (2,), (1, 1), (3, 5), (2, 0, 3), (15,), (16,), (17,), (33,), (2, 1, 8)])


def sparse_weight(rows, columns, sparsity, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=dtype)
    weight[torch.rand(rows, columns, generator=generator) < sparsity] = 0
    weight[torch.rand(rows, generator=generator) < 0.2] = 0  # whole rows
    weight[:, torch.rand(columns, generator=generator) < 0.2] = -0.0
    return weight


def layer(rows=6, columns=5, sparsity=0.7, bias=True, dtype=torch.float32):
    weight = sparse_weight(rows, columns, sparsity, 0, dtype)
    dense = nn.Linear(columns, rows, bias=bias, dtype=dtype)
    dense.weight.data.copy_(weight)
    return dense, tpe.CSRLinear(dense.weight, dense.bias)


def bound(x, weight, bias):
    """Return how far a product in the dtype of ``x`` can be from the exact one, in whatever order it is summed."""
    size = F.linear(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
    return (weight.shape[1] + 2) * torch.finfo(x.dtype).eps * size


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    leading=LEADING,
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    mode=st.sampled_from([torch.no_grad, torch.inference_mode, torch.enable_grad]),
    strided=st.booleans(),
    seed=st.integers(0, 99),
    block=st.sampled_from([1, 1, 2, 4, 8]),
)
def test_it_computes_what_linear_does(rows, columns, sparsity, leading, bias, dtype, mode, strided, seed, block):
    rows, columns = -(-rows // block) * block, -(-columns // block) * block
    weight = sparse_weight(rows, columns, sparsity, seed, dtype)
    offset = torch.randn(rows, dtype=dtype) if bias else None
    sparse = tpe.CSRLinear(weight, offset, block=block)
    with mode():
        x = torch.randn(*leading, columns, dtype=dtype)
        x = torch.stack([x, x], -1)[..., 0] if strided else x
        out = sparse(x)
        expected = F.linear(x, weight, offset)
    assert out.shape == expected.shape
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert not out.requires_grad
    exact = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
    assert ((out.double() - exact).abs() <= bound(x, weight, offset)).all()
    assert torch.equal(sparse.weight, weight)


@pytest.mark.parametrize("leading", [(), (1,), (4,), (3, 7)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("block", [1, 2])
def test_the_gradient_reaches_the_input(leading, bias, block):
    dense, _ = layer(columns=4, bias=bias, dtype=torch.float64)
    sparse = tpe.CSRLinear(dense.weight, dense.bias, block=block)
    x = torch.randn(*leading, 4, dtype=torch.float64)
    grads = []
    for module in (dense, sparse):
        given = x.clone().requires_grad_()
        module(given).square().sum().backward()
        grads.append(given.grad)
    torch.testing.assert_close(*grads)
    assert [parameter.grad for parameter in sparse.parameters()] == [None] * (1 + bias)


@pytest.mark.parametrize(
    ("block", "error", "match"),
    [
        (4, ValueError, r"block=4 does not divide weight of shape \(8, 6\)"),
        (0, ValueError, "block=0"),
        (2.0, TypeError, "block=2.0"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(block, error, match):
    with pytest.raises(error, match=match):
        tpe.CSRLinear(torch.zeros(8, 6), block=block)


def test_blocks_are_stored_whole_and_kept_by_copies_and_loading():
    weight = torch.zeros(8, 6)
    weight[0, 0] = weight[5, 3] = 1
    sparse = tpe.CSRLinear(weight, block=2)
    assert sparse.values.shape == (2, 2, 2)
    assert "sparsity=83.3%, block=2" in repr(sparse)
    clone = copy.deepcopy(sparse)
    clone.load_state_dict({"weight": torch.eye(8, 6)})
    assert clone.block == 2
    assert torch.equal(clone.weight, torch.eye(8, 6))
    assert torch.equal(sparse.weight, weight)


def test_a_zero_times_anything_is_zero():
    sparse = tpe.CSRLinear(torch.tensor([[0.0, 1.0]]))
    assert sparse(torch.tensor([[float("nan"), 2.0], [float("inf"), 3.0]])).tolist() == [[2.0], [3.0]]
    assert sparse(torch.tensor([1.0, float("nan")])).isnan().all()


@pytest.mark.parametrize("shape", [(4,), (2, 4), (30,), (5, 1), (0, 4), ()])
def test_an_input_of_another_width_is_refused(shape):
    _, sparse = layer()
    with pytest.raises(ValueError, match=r"input.shape=.* does not end in in_features=5 of this CSRLinear"):
        sparse(torch.zeros(shape))


def test_an_input_of_another_dtype_is_refused_as_by_linear():
    dense, sparse = layer()
    for module in (dense, sparse):
        with pytest.raises(RuntimeError):
            module(torch.zeros(2, 5, dtype=torch.float64))


def test_a_weight_that_wants_a_gradient_is_refused():
    _, sparse = layer()
    sparse.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"CSRLinear.values requires a gradient.*to_linear.*requires_grad_\(False\)"):
        sparse(torch.zeros(5))
    with torch.no_grad():
        sparse(torch.zeros(5))
    sparse.requires_grad_(False)(torch.zeros(5))  # the remedy


@pytest.mark.parametrize(
    ("weight", "bias", "error", "match"),
    [
        (torch.zeros(2, 3, dtype=torch.float16), None, TypeError, "float16.*Pass a dense tensor of float32 or float64"),
        (torch.zeros(2, 3).to_sparse(), None, TypeError, "sparse_coo"),
        ([[1.0]], None, TypeError, "list"),
        (torch.zeros(3), None, ValueError, r"shape=\(3,\) is not \(out_features, in_features\)"),
        (torch.zeros(2, 3), torch.zeros(3), ValueError, r"bias of shape \(3,\)"),
        (torch.zeros(2, 3), torch.zeros(2, dtype=torch.float64), ValueError, "float64 does not fit weight"),
    ],
)
def test_a_weight_that_does_not_fit_is_refused(weight, bias, error, match):
    with pytest.raises(error, match=match):
        tpe.CSRLinear(weight, bias)


def test_it_shares_no_memory_with_what_it_was_made_of():
    dense, sparse = layer(sparsity=0.0)
    before = sparse(torch.ones(5))
    with torch.no_grad():
        dense.weight.zero_()
        dense.bias.zero_()
    assert torch.equal(sparse(torch.ones(5)), before)


def test_to_linear_gives_a_layer_that_trains():
    dense, sparse = layer()
    back = sparse.eval().to_linear()
    assert type(back) is nn.Linear
    assert not back.training
    assert torch.equal(back.weight, dense.weight)
    assert torch.equal(back.bias, dense.bias)
    back(torch.ones(5)).sum().backward()
    assert back.weight.grad is not None
    assert tpe.CSRLinear(dense.weight).to_linear().bias is None
    with torch.inference_mode():
        back = sparse.to_linear()
    back(torch.ones(5)).sum().backward()


@pytest.mark.parametrize("bias", [True, False])
def test_the_state_dict_is_that_of_linear_both_ways(bias):
    dense, sparse = layer(bias=bias)
    assert list(sparse.state_dict()) == list(dense.state_dict())
    fresh = nn.Linear(5, 6, bias=bias)
    fresh.load_state_dict(sparse.state_dict())
    assert torch.equal(fresh.weight, dense.weight)
    other = nn.Sequential(tpe.CSRLinear(torch.ones(6, 5), torch.ones(6) if bias else None))
    other.load_state_dict(nn.Sequential(dense).state_dict())  # with another number of zeros
    x = torch.randn(3, 5)
    assert torch.equal(other(x), sparse(x))
    assert torch.equal(tpe.dense_state_dict(other)["0.weight"], dense.weight)
    assert not other[0].values.requires_grad


@pytest.mark.parametrize("assign", [True, False])
def test_a_state_dict_of_another_dtype_is_converted(assign):
    dense, sparse = layer()
    state = {key: value.double() for key, value in dense.state_dict().items() if key != "bias"}
    sparse.load_state_dict(state, strict=False, assign=assign)
    assert sparse.values.dtype == torch.float32
    sparse(torch.zeros(5))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda state: state.update(weight=torch.zeros(5, 6)), r"size mismatch for 0.weight: \(5, 6\).*\(6, 5\)"),
        (lambda state: state.pop("weight"), 'Missing key.*"0.weight"'),
        (lambda state: state.update(values=torch.zeros(3)), 'Unexpected key.*"0.values"'),
        (lambda state: state.update(weight_mask=torch.zeros(6, 5)), 'Unexpected key.*"0.weight_mask"'),
        (lambda state: state.update(bias=torch.zeros(7)), "size mismatch for 0.bias"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused(change, match):
    dense, sparse = layer()
    before = sparse.weight
    state = dict(dense.state_dict())
    state["weight"] = state["weight"].clone()
    change(state)
    with pytest.raises(RuntimeError, match=match):
        nn.Sequential(sparse).load_state_dict({f"0.{key}": value for key, value in state.items()})
    assert torch.equal(sparse.weight, before)
    assert list(sparse._parameters) == ["bias", "values"]


def test_loading_not_strictly_takes_what_is_there():
    _, sparse = layer()
    result = sparse.load_state_dict({"weight": torch.eye(6, 5)}, strict=False)
    assert result.missing_keys == ["bias"]
    assert torch.equal(sparse.weight, torch.eye(6, 5))
    result = sparse.load_state_dict({"bias": torch.ones(6)}, strict=False)
    assert result.missing_keys == ["weight"]
    assert torch.equal(sparse.bias, torch.ones(6))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), tpe.copy_pruned])
def test_copies_are_the_same_and_their_own(again):
    _, sparse = layer()
    x = torch.randn(3, 5)
    with torch.no_grad():
        sparse(x)
    clone = again(sparse)
    assert torch.equal(clone(x), sparse(x))
    before = sparse(x)
    with torch.no_grad():
        clone.values.zero_()
    assert torch.equal(sparse(x), before)
    assert torch.equal(clone(x), clone.bias.expand(3, 6))  # a write into the values is seen


def test_a_saved_module_is_small_and_loads_in_a_new_process_without_a_warning(tmp_path):
    dense, sparse = layer(200, 300, 0.95)
    torch.save(sparse, tmp_path / "layer.pt")
    assert (tmp_path / "layer.pt").stat().st_size < 0.25 * 4 * dense.weight.numel()
    code = (
        "import torch, torchprune_ext\n"
        f"layer = torch.load({str(tmp_path / 'layer.pt')!r}, weights_only=False)\n"
        "with torch.inference_mode():\n"
        "    print(layer(torch.ones(2, 300)).sum().item())"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(sparse(torch.ones(2, 300)).sum().item(), rel=1e-4)


def test_a_state_dict_goes_through_a_file():
    _, sparse = layer()
    file = io.BytesIO()
    torch.save(sparse.state_dict(), file)
    file.seek(0)
    nn.Linear(5, 6).load_state_dict(torch.load(file, weights_only=True))


def test_changes_of_dtype_are_followed_or_refused():
    dense, sparse = layer()
    x = torch.randn(3, 5)
    out = sparse.double()(x.double())
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, dense.double()(x.double()))
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(TypeError, match=rf"values.dtype={dtype}.*Call .float\(\) or .double\(\)"):
            sparse.to(dtype)(x.to(dtype))
    sparse.float()(x)  # the remedy


@pytest.mark.parametrize("leading", [(5,), (3, 5)])
def test_autocast_gives_its_dtype(leading):
    dense, sparse = layer()
    x = torch.randn(leading)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, out = dense(x), sparse(x)
        again = sparse(x.bfloat16())
    assert out.dtype == expected.dtype == again.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, atol=0.05, rtol=0.05)
    assert sparse(x).dtype == torch.float32


@pytest.mark.filterwarnings("ignore:(?s).*Graph break due to unsupported builtin")  # torch 2.4: the layer runs as it is
@pytest.mark.parametrize("shape", [(5,), (2, 20, 5)])
def test_compiled_code_computes_the_same(shape):
    torch._dynamo.reset()
    _, sparse = layer()
    model = nn.Sequential(nn.ReLU(), sparse, nn.ReLU())
    x = torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))


def test_train_changes_nothing_and_other_values_by_functional_call_are_used():
    _, sparse = layer()
    x = torch.randn(3, 5)
    assert torch.equal(sparse.train()(x), sparse.eval()(x))
    other = {"values": torch.zeros_like(sparse.values)}
    assert torch.equal(torch.func.functional_call(sparse, other, (x,)), sparse.bias.expand(3, 6))


def test_made_in_inference_mode_it_works_outside_of_it():
    with torch.inference_mode():
        weight = torch.eye(6, 5)
        sparse = tpe.CSRLinear(weight, torch.ones(6))
        sparse.load_state_dict({"weight": weight, "bias": torch.ones(6)})
    x = torch.randn(3, 5, requires_grad=True)
    sparse(x).sum().backward()
    assert x.grad.tolist() == torch.ones(3, 5).tolist()


def test_a_rejected_call_leaves_no_trace():
    _, sparse = layer()
    snapshot = Snapshot(sparse)
    for call in (lambda: sparse(torch.zeros(4)), lambda: sparse.load_state_dict({"weight": torch.zeros(2)})):
        with pytest.raises((ValueError, RuntimeError)):
            call()
    assert snapshot.differences() == []
