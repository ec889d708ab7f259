"""Zeros that no mask holds: turned into masks, and warned of."""

import copy
import io
import warnings

import pytest
import torch
from globally import Tied, weights
from snapshots import Snapshot
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe

same_at_the_cut = pytest.mark.filterwarnings("ignore:.* score the same at the cut")  # zeros do
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def sparse(share=0.7, size=20, dtype=torch.float32):
    """Return a layer whose weight has exact zeros and no mask."""
    layer = prune.l1_unstructured(nn.Linear(size, size, dtype=dtype), "weight", amount=share)
    prune.remove(layer, "weight")
    return layer


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_become_masks(dtype):
    layer, other = sparse(dtype=dtype), nn.Linear(20, 2, dtype=dtype)
    layer.weight.data[0] *= -1.0  # some zeros are negative
    dense, other_before = layer.weight.detach().clone(), Snapshot(other)
    tpe.mask_zeros(weights(layer, other))
    assert torch.equal(layer.weight_mask, (dense != 0).to(dtype))
    assert torch.equal(layer.weight_orig, dense)
    assert tpe.history(layer, "weight") == ["mask_zeros()"]
    assert other_before.differences() == []
    before = Snapshot(layer, other)
    tpe.mask_zeros(weights(layer, other))
    assert before.differences() == []


def test_zeros_under_a_mask_are_nothing_new_and_others_are_added():
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    prune.l1_unstructured(layer, "weight", amount=1)
    layer.weight_orig.data = torch.tensor([[0.0, 2.0, 0.0, 4.0]])
    tpe.mask_zeros(weights(layer))
    assert torch.equal(layer.weight_mask, torch.tensor([[0.0, 1.0, 0.0, 1.0]]))
    assert tpe.history(layer, "weight") == ["L1Unstructured(amount=1)", "mask_zeros()"]
    layer.weight_orig.data[0, 0] = 5.0
    tpe.mask_zeros(weights(layer))
    assert torch.equal(layer.weight_mask, torch.tensor([[0.0, 1.0, 0.0, 1.0]]))
    assert len(tpe.history(layer, "weight")) == 2


def test_tied_tensors_get_one_mask():
    model = Tied()
    model.decoder.weight.data[::2] = 0
    tpe.mask_zeros(weights(model.embedding, model.layer, model.decoder))
    assert torch.equal(model.embedding.weight_mask, model.decoder.weight_mask)
    assert float(model.embedding.weight_mask.mean()) == 0.5
    assert not prune.is_pruned(model.layer)


def test_a_tensor_of_zeros_only_is_told():
    layer, zero = sparse(), nn.Linear(3, 3)
    nn.init.zeros_(zero.weight)
    with pytest.warns(UserWarning, match=r"params\[1\], Linear\.weight of shape \(3, 3\).*undo") as caught:
        tpe.mask_zeros(weights(layer, zero))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert not zero.weight_mask.any()
    again = nn.Linear(3, 3)
    nn.init.zeros_(again.weight)
    before = Snapshot(layer, again)
    with pytest.raises(UserWarning, match="mask_zeros"):  # as an error it leaves no trace
        tpe.mask_zeros(weights(layer, again))
    assert before.differences() == []


@pytest.mark.parametrize(("bad", "error"), [([], ValueError), (3, TypeError), ([3], TypeError)], ids=repr)
def test_bad_lists_are_refused(bad, error):
    with pytest.raises(error, match="params"):
        tpe.mask_zeros(bad)


def test_an_error_at_the_last_tensor_leaves_the_first_alone():
    layer = sparse()
    before = Snapshot(layer)
    with pytest.raises(ValueError, match=r"params\[1\].*nothing"):
        tpe.mask_zeros([(layer, "weight"), (layer, "nothing")])
    assert before.differences() == []


def test_masks_from_zeros_survive_a_file():
    layer = sparse()
    tpe.mask_zeros(weights(layer))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert tpe.history(again, "weight") == ["mask_zeros()"]
    assert torch.equal(again.weight_mask, layer.weight_mask)


@pytest.mark.parametrize("masked", [False, True])
def test_five_rounds_that_are_made_permanent(masked):
    """Prune 20 %, make it permanent, train on: with masks from the zeros this adds up to 1 - 0.8^5 = 67 %."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 10))
    params, x = weights(model[0], model[2]), torch.randn(64, 30)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore" if not masked else "error", "Zeros without a mask")
        for _ in range(5):
            if masked:
                tpe.mask_zeros(params)
                model(x).square().mean().backward()
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter -= 0.01 * parameter.grad
                        parameter.grad = None
            tpe.global_unstructured(params, amount=0.2)
            tpe.remove_all(model)
    zeros = sum(int((module.weight == 0).sum()) for module, _ in params)
    share = zeros / sum(module.weight.numel() for module, _ in params)
    assert round(share, 2) == (0.67 if masked else 0.2)


CALLS = {
    "global_unstructured": lambda params: tpe.global_unstructured(params, amount=0.1),
    "global_vector_ln": lambda params: tpe.global_vector_ln(params, amount=2),
    "global_nm_structured": lambda params: tpe.global_nm_structured(params, amount=0.2, m=4),
    "vector_ln": lambda params: tpe.vector_ln(params[-1][0], "weight", amount=1),
    "gradient_magnitude": lambda params: tpe.gradient_magnitude(
        params[-1][0], "weight", amount=1, grad=torch.rand(20, 20)
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_zeros_without_a_mask_are_warned_of(call):
    params = weights(nn.Linear(20, 4), sparse(0.1))
    with pytest.warns(UserWarning, match=r"Linear\.weight of shape \(20, 20\) \(10%\).*mask_zeros") as caught:
        call(copy.deepcopy(params))
    assert "(4, 20)" not in str(caught[0].message)
    assert caught[0].filename == __file__
    before = Snapshot(*(module for module, _ in params))
    with pytest.raises(UserWarning, match="mask_zeros"):
        call(params)
    assert before.differences() == []
    tpe.mask_zeros(params)
    call(params)  # no warning any more


@same_at_the_cut
@pytest.mark.parametrize("share", [0.04, 1.0])
def test_few_zeros_and_tensors_of_zeros_only_are_not_warned_of(share):
    layer = nn.Linear(20, 20)
    layer.weight.data.view(-1)[: int(400 * share)] = 0
    tpe.global_unstructured(weights(layer, nn.Linear(20, 20)), amount=1)


@same_at_the_cut
def test_zeros_outside_of_a_mask_are_warned_of():
    layer = sparse(0.5)
    prune.identity(layer, "weight")
    with pytest.warns(UserWarning, match=r"50%"):
        tpe.global_unstructured(weights(layer), amount=0.1)
    tpe.global_unstructured(weights(sparse_masked()), target_sparsity=0.6)


def sparse_masked():
    layer = sparse(0.5)
    tpe.mask_zeros(weights(layer))
    return layer


def equal_scales(channels=64):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, channels, 1), nn.BatchNorm2d(channels))
    return model, [(model[0], model[1]), (model[2], model[3])]


def test_scales_that_were_never_trained_are_warned_of():
    model, pairs = equal_scales()
    words = r"72 of 72 channels score the same at the cut.*pairs\[0\], Conv2d.*pairs\[1\], Conv2d"
    with pytest.warns(UserWarning, match=words) as caught:
        tpe.global_bn_scaling(pairs, amount=0.5)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    tpe.undo_all(model)
    model[3].weight.data = torch.linspace(1, 2, 64)
    model[1].weight.data = torch.linspace(1, 2, 8)
    tpe.global_bn_scaling(pairs, amount=0.5)


def test_layers_at_their_floor_are_warned_of():
    small, large = nn.Linear(20, 20), nn.Linear(20, 20)
    small.weight.data *= 0.001
    with pytest.warns(UserWarning, match=r"params\[0\], Linear.*\(1 of 400\).*min_keep") as caught:
        tpe.global_unstructured(weights(small, large), amount=0.6)
    assert len(caught) == 1
    assert "params[1]" not in str(caught[0].message)
    tpe.global_unstructured(weights(small, large), amount=0.1)  # told once
    small, large = nn.Linear(20, 20), nn.Linear(20, 20)
    small.weight.data *= 0.001
    tpe.global_unstructured(weights(small, large), amount=0.6, min_keep=0.3)  # a floor that was chosen to be one


@pytest.mark.parametrize("how", [prune.l1_unstructured, lambda m, n, amount: tpe.global_unstructured([(m, n)], amount)])
def test_what_was_pruned_is_positive_zero_afterwards_even_if_it_was_not_a_number(how):
    layer = nn.Linear(6, 4)
    how(layer, "weight", amount=0.5)
    with torch.no_grad():
        layer.weight_orig[layer.weight_mask == 0] = torch.tensor([-1.0, float("nan"), -float("inf")]).repeat(4)
    gone = layer.weight_mask == 0
    tpe.remove(layer, "weight")
    assert not layer.weight[gone].any()
    assert not layer.weight[gone].signbit().any()
