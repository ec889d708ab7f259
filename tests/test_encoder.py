"""A pruned Transformer encoder computes and trains."""

import pytest
import torch
from globally import weights
from torch import nn

import torchprune_ext as tpe


def encoder():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(layer, 2)


TOKENS = torch.linspace(-1, 1, 3 * 5 * 8).reshape(3, 5, 8).sin()
CALLS = {
    tpe.global_unstructured: {},
    tpe.global_gradient_magnitude: {},
    tpe.global_vector_ln: {"dim": 0},
    tpe.global_ln_structured: {"dim": 0},
    tpe.global_nm_structured: {"m": 4},
}


# `self_attn.out_proj` is left out: MultiheadAttention reads its weight without calling it, so the product that the hook
# made is used again in the next step, and the second backward fails (native pruning does the same). Eval is fine.
@pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__name__)
def test_a_pruned_transformer_encoder_computes_and_trains(function):
    model, twin = encoder(), encoder()
    params = tpe.prunable_parameters(model, exclude=["layers.0.self_attn", "layers.1.self_attn"])
    assert params == weights(*(layer for block in model.layers for layer in (block.linear1, block.linear2)))
    model(TOKENS).square().sum().backward()
    model.zero_grad(set_to_none=False) if function is not tpe.global_gradient_magnitude else None
    function(params, amount=0.5, **CALLS[function])
    masks = {path: module.weight_mask.clone() for path, module, _ in tpe.pruned_parameters(model)}
    assert all(mask.any() for mask in masks.values())

    def same_as_dense():
        dense = {key.removesuffix("_orig"): value for key, value in model.state_dict().items() if "_mask" not in key}
        twin.load_state_dict({k: v * masks[k[:-7]] if k[:-7] in masks else v for k, v in dense.items()})
        for mode in (True, False):
            torch.testing.assert_close(model.train(mode)(TOKENS), twin.train(mode)(TOKENS))
        with torch.no_grad():  # the fused path reads the weights itself
            torch.testing.assert_close(model(TOKENS), twin(TOKENS))

    same_as_dense()
    for _ in range(3):
        model.zero_grad()
        model.train()(TOKENS).square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    model(TOKENS)  # renews the products
    same_as_dense()
    for path, mask in masks.items():
        layer = model.get_submodule(path)
        assert torch.equal(layer.weight_mask, mask)
        assert not layer.weight[mask == 0].any()


def test_all_layers_of_a_transformer_encoder_can_be_pruned_for_inference():
    model = encoder().eval()
    params = tpe.prunable_parameters(model)
    assert len(params) == 6
    tpe.global_unstructured(params, amount=0.5)
    with torch.no_grad():
        pruned = model(TOKENS)
        tpe.remove_all(model)
        torch.testing.assert_close(model(TOKENS), pruned)
