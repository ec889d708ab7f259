"""Every method, on drawn tensors: fresh, on top of native pruning, and below it, against the loops of ``oracles``."""

import contextlib
import warnings

import oracles
import pytest
import torch
import toys
from cases import CASES, DTYPES, LAYOUTS, NM_STRUCTURED, alive, build, draw_tensor, flat, layout, output_axis, rescaled
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

pytestmark = toys.unwarned

SHAPES = {
    1: st.tuples(st.integers(0, 9)),
    2: st.tuples(st.integers(0, 4), st.integers(0, 9)),
    3: st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(0, 3)),
    4: st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 2), st.integers(1, 3)),
    5: st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 2), st.integers(1, 2), st.integers(1, 2)),
}
every_method = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


@contextlib.contextmanager
def empty_tensors_may_warn():
    """Let pass what torch says about empty layers, and our own warning that nothing is left."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        warnings.simplefilter("ignore", UserWarning)
        yield


def draw_layer(draw, case):
    """Draw a layer with one weight, of any shape, dtype and memory layout that the method has to take."""
    dims = draw(st.sampled_from(case.dims))
    shape = draw(SHAPES[dims])
    if not case.empty:
        shape = tuple(max(size, 1) for size in shape)
    transposed = dims > 2 and draw(st.booleans())
    groups = draw(st.sampled_from([g for g in (1, 2, 3) if shape[0] % g == 0])) if transposed else 1
    with empty_tensors_may_warn():
        layer = build(shape, transposed=transposed, groups=groups)
    form = draw(st.sampled_from(LAYOUTS))
    layer.weight = nn.Parameter(draw_tensor(draw, shape, dtype=draw(st.sampled_from(DTYPES)), kind=form))
    return layer


def draw_native(draw, layer):
    """Prune natively by a method that copes with the layout, and train the weight afterwards."""
    shape, dense = layer.weight.shape, layer.weight.is_contiguous()
    methods = ["mask", "mask", "mask", *(["l1", "random"] if dense else [])]
    if layer.weight.dim() > 1 and layer.weight.numel():
        methods.append("ln")
    chosen = draw(st.sampled_from(methods))
    if chosen == "mask":
        prune.custom_from_mask(layer, "weight", draw_tensor(draw, shape, (0, 1)))
    elif chosen == "l1":
        prune.l1_unstructured(layer, "weight", amount=draw(st.floats(0, 1)))
    elif chosen == "random":
        amount = draw(st.floats(0, 1))
        torch.manual_seed(0)  # hypothesis repeats what it draws, and what follows depends on the random mask
        prune.random_unstructured(layer, "weight", amount=amount)
    else:
        prune.ln_structured(layer, "weight", amount=draw(st.floats(0, 1)), n=2, dim=draw(st.integers(0, 1)))
    orig = layer.weight_orig
    orig.data = draw_tensor(draw, shape, dtype=orig.dtype, kind=draw(st.sampled_from(LAYOUTS)))  # now stale: weight


def values(layer):
    """Return the shape, the effective weight as of now and the mask as lists."""
    if "weight_orig" in layer._parameters:
        mask = flat(layer.weight_mask)
        weight = [w * m for w, m in zip(flat(layer.weight_orig), mask, strict=True)]
        return tuple(layer.weight_orig.shape), weight, mask
    return tuple(layer.weight.shape), flat(layer.weight), [1] * layer.weight.numel()


def check_prune(case, layer, args):
    """Prune and compare with the oracle, to the last bit and in every promise about the mask itself."""
    shape, weight, before = values(layer)
    host = layer._parameters.get("weight_orig", layer._parameters.get("weight"))
    expected = case.oracle(layer, shape, weight, before, args)
    with empty_tensors_may_warn():
        assert case.function(layer, "weight", **args) is layer
    mask = layer.weight_mask
    assert (mask.shape, mask.dtype, mask.device) == (host.shape, host.dtype, host.device)
    strides = zip(shape, mask.stride(), torch.empty_like(host).stride(), strict=True)
    assert mask.numel() == 0 or all(size == 1 or ours == theirs for size, ours, theirs in strides)
    assert not mask.requires_grad
    assert set(flat(mask)) <= {0, 1}
    assert torch.equal(mask, torch.tensor(expected, dtype=mask.dtype).reshape(shape))
    assert all(new <= old for new, old in zip(flat(mask), before, strict=True)), "something came back to life"
    units = case.units(layer, shape, args)
    if case.amount:
        left = alive(units, before)
        assert alive(units, flat(mask)) == left - oracles.how_many(args["amount"], left)
    if case.whole:
        for unit in units:
            assert [flat(mask)[i] for i in unit] in ([0] * len(unit), [before[i] for i in unit])
    assert layer.weight_orig is host
    assert torch.equal(layer.weight, host * mask)


@every_method
@given(data=st.data())
def test_a_fresh_layer_is_pruned_as_defined(case, data):
    layer = draw_layer(data.draw, case)
    shape, _, mask = values(layer)
    check_prune(case, layer, case.draw(data.draw, layer, shape, mask))


@every_method
@given(data=st.data())
def test_a_layer_that_native_has_pruned_is_pruned_further_as_defined(case, data):
    layer = draw_layer(data.draw, case)
    draw_native(data.draw, layer)
    (first,) = layer._forward_pre_hooks.values()
    least = 1
    for most in (2, 3):  # entries of the history: one more for each call that prunes something
        shape, _, mask = values(layer)
        check_prune(case, layer, case.draw(data.draw, layer, shape, mask))
        least += values(layer)[2] != mask
        (hook,) = layer._forward_pre_hooks.values()
        past = [*hook] if isinstance(hook, prune.PruningContainer) else [hook]
        assert past[0] is first
        assert least <= len(past) <= most
        assert all(type(method) is case.cls for method in past[1:])


@every_method
@given(data=st.data())
def test_native_prunes_further_what_we_have_pruned(case, data):
    layer = draw_layer(data.draw, case)
    shape, _, mask = values(layer)
    with empty_tensors_may_warn():
        case.function(layer, "weight", **case.draw(data.draw, layer, shape, mask))
    before = layer.weight_mask.clone()
    survivors = int(before.sum())
    (ours,) = layer._forward_pre_hooks.values()
    assert type(ours) is case.cls
    k = data.draw(st.integers(0, survivors))
    native = data.draw(st.sampled_from([prune.l1_unstructured, prune.random_unstructured]))
    torch.manual_seed(0)  # as above
    native(layer, "weight", amount=k)
    (hook,) = layer._forward_pre_hooks.values()
    assert hook[0] is ours
    assert len(hook) == 2
    assert torch.all(layer.weight_mask <= before)
    assert int(layer.weight_mask.sum()) == survivors - k
    shape, _, mask = values(layer)
    check_prune(case, layer, case.draw(data.draw, layer, shape, mask))


@every_method
@given(data=st.data(), power=st.sampled_from([-4, -1, 1, 3]))
def test_the_mask_does_not_change_when_all_scores_are_scaled(case, data, power):
    layer = draw_layer(data.draw, case)
    if data.draw(st.booleans()):
        draw_native(data.draw, layer)
    shape, _, before = values(layer)
    args = case.draw(data.draw, layer, shape, before)
    masks = []
    orig = layer._parameters.get("weight_orig", layer._parameters.get("weight"))
    for factor in (1.0, 2.0**power):
        twin = build_like(layer, orig * factor, before)
        with empty_tensors_may_warn():
            case.function(twin, "weight", **rescaled(args, factor))
        masks.append(twin.weight_mask)
    assert torch.equal(*masks)


def build_like(layer, weight, mask):
    """Return a layer of the same kind with this weight and, unless it is all ones, this mask."""
    dim, groups = output_axis(layer)
    with empty_tensors_may_warn():
        twin = build(weight.shape, transposed=dim == 1, groups=groups)
    twin.weight = nn.Parameter(weight.detach().clone())
    if not all(mask):
        prune.custom_from_mask(twin, "weight", torch.tensor(mask).reshape(weight.shape))
    return twin


@given(data=st.data())
def test_n_of_m_is_exact_and_repeating_it_changes_nothing(data):
    case = NM_STRUCTURED
    layer = draw_layer(data.draw, case)
    if data.draw(st.booleans()):
        draw_native(data.draw, layer)
    shape, _, before = values(layer)
    args = case.draw(data.draw, layer, shape, before)
    case.function(layer, "weight", **args)
    mask = flat(layer.weight_mask)
    for run in oracles.runs(shape, args["m"], args["dim"]):
        assert sum(mask[i] for i in run) == min(args["n"], sum(before[i] for i in run))
    case.function(layer, "weight", **args)
    assert flat(layer.weight_mask) == mask


@pytest.mark.parametrize("case", [case for case in CASES if case.host_weight], ids=lambda case: case.id)
@given(data=st.data())
def test_the_class_computes_the_same_mask_outside_of_a_module(case, data):
    layer = draw_layer(data.draw, case)
    shape = tuple(layer.weight.shape)
    default = draw_tensor(data.draw, shape, (0, 1), layer.weight.dtype, data.draw(st.sampled_from(LAYOUTS)))
    args = case.draw(data.draw, layer, shape, flat(default))
    kept = {k: v for k, v in args.items() if not torch.is_tensor(v)}
    scores = draw_tensor(data.draw, shape, (0, 1, 2), layer.weight.dtype, data.draw(st.sampled_from(LAYOUTS)))
    effective = [s * m for s, m in zip(flat(scores), flat(default), strict=True)]
    asked = {**kept, "grad": scores, "hessian_diag": scores}
    expected = case.oracle(layer, shape, case.host_weight(effective), flat(default), asked)
    untouched = default.clone()
    with empty_tensors_may_warn():
        mask = case.cls(**kept).compute_mask(scores, default)
    assert torch.equal(mask, torch.tensor(expected, dtype=mask.dtype).reshape(shape))
    assert torch.equal(default, untouched)
    assert mask is not default
    with empty_tensors_may_warn():
        pruned = case.cls(**kept).prune(layer.weight, default, scores)
    assert torch.equal(pruned, layer.weight * mask)


def test_layouts_are_what_they_are_called():
    tensor = torch.arange(24.0).reshape(2, 3, 2, 2)
    assert layout(tensor, "channels_last").is_contiguous(memory_format=torch.channels_last)
    assert not layout(tensor, "transposed").is_contiguous()
    assert layout(tensor, "sliced").stride() == (24, 8, 4, 2)
    assert layout(tensor, "expanded").stride(0) == 0
    assert all(torch.equal(layout(tensor, kind), tensor) for kind in LAYOUTS if kind != "expanded")
