"""Pruned models of Hugging Face: saved, brought back, with adapters."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of other packages
TOKENS = torch.arange(2, 12).reshape(2, 5)


def gpt2():
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=32, n_positions=16)
    )


def bert():
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=32, max_position_embeddings=16, **sizes))


def inner(model):
    """Return the matrices between the embeddings and the head."""
    names = ("h.", "layer.")
    return [
        (module, "weight")
        for path, module in model.named_modules()
        if any(name in path for name in names)
        and getattr(module, "weight", None) is not None
        and module.weight.dim() == 2
    ]


def whole(model):
    """Return these and the tied head."""
    head = model.get_output_embeddings()
    return [*inner(model), (head, "weight"), (model.get_input_embeddings(), "weight")]


def ours(params):
    tpe.global_unstructured(params, 0.5)


def native(params):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module, name in params:
            prune.custom_from_mask(module, name, (module.weight.abs() > module.weight.abs().median()).float())


MODELS = pytest.mark.parametrize("make", [gpt2, bert], ids=lambda make: make.__name__)
BY = pytest.mark.parametrize("by", [ours, native], ids=lambda by: by.__name__)
LISTS = pytest.mark.parametrize("params", [inner, whole], ids=lambda params: params.__name__)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


@MODELS
@BY
@LISTS
@pytest.mark.parametrize("removed", [False, True], ids=["pruned", "removed"])
def test_save_pretrained(tmp_path, make, by, params, removed):
    model = make()
    dense = logits(model)
    by(params(model))
    want = logits(model)
    assert not torch.allclose(want, dense)
    if removed:
        tpe.remove_all(model)
        model.save_pretrained(tmp_path)
    else:
        model.save_pretrained(tmp_path, state_dict=tpe.dense_state_dict(model))
        assert torch.equal(logits(model), want)
    back, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(logits(back), want)


@MODELS
@BY
def test_what_happens_without(tmp_path, make, by):
    model = make()
    by(inner(model))
    want = logits(model)
    model.save_pretrained(tmp_path)
    back, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"]
    assert not torch.allclose(logits(back), want)  # random, without an error
    # the file is not lost: it comes back with its masks
    files = pytest.importorskip("safetensors.torch")
    fresh = make()
    tpe.load_pruned_state_dict(fresh, files.load_file(tmp_path / "model.safetensors"))
    assert torch.equal(logits(fresh), want)
    assert len(list(tpe.pruned_parameters(fresh))) == len(inner(model))


@MODELS
@BY
def test_adapters_on_a_pruned_base(tmp_path, make, by):
    peft = pytest.importorskip("peft")
    model = make()
    by(inner(model))
    modules = ["c_attn", "c_proj"] if make is gpt2 else ["query", "value"]
    masks = [module.weight_mask.clone() for module, _ in inner(model)]
    config = peft.LoraConfig(r=2, target_modules=modules, fan_in_fan_out=make is gpt2, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], 0.01)
    for _ in range(3):
        adapted.train()(input_ids=TOKENS).logits.square().mean().backward()
        optimizer.step()
    pruned = [module for _, module, _ in tpe.pruned_parameters(adapted)]
    assert len(pruned) == len(masks)
    for module, mask in zip(pruned, masks, strict=True):
        assert torch.equal(module.weight_mask, mask)
    want = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    base = make()
    state = {k.replace("base_model.model.", "").replace("base_layer.", ""): v for k, v in adapted.state_dict().items()}
    tpe.load_pruned_state_dict(base, {k: v for k, v in state.items() if "lora_" not in k})
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(again), want)
    # merging writes weight.data: remove first
    tpe.remove_all(adapted)
    torch.testing.assert_close(logits(adapted.merge_and_unload()), want)


@MODELS
def test_the_whole_life(make):
    model = make()
    ours(whole(model))
    want = logits(model)
    clone = tpe.copy_pruned(model)
    assert torch.equal(logits(clone), want)
    with tpe.frozen(model):
        assert torch.equal(logits(model), want)
    optimizer = torch.optim.AdamW(clone.parameters(), 0.01)
    tpe.remove_all(clone, keep_zeros=True)
    zeros = {name: p == 0 for name, p in clone.named_parameters() if p.dim() == 2 and bool((p == 0).any())}
    tpe.keep_zeros(clone, optimizer)
    for _ in range(3):
        clone.train()(input_ids=TOKENS).logits.square().mean().backward()
        nn.utils.clip_grad_norm_(clone.parameters(), 1.0)
        optimizer.step()
    assert zeros
    for name, where in zeros.items():
        assert bool((clone.get_parameter(name)[where] == 0).all()), name
    assert torch.equal(logits(model), want)
