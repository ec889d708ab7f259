"""Small models of the transformers library with random weights: each call works and is right, or says what to do."""

import copy
import functools
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
import toys
from cases import flat
from snapshots import Snapshot
from torch import nn

import torchprune_ext as tpe

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded: the models are made from their configurations
tf = pytest.importorskip("transformers", reason="these are models of the transformers library")
if not tf.utils.is_torch_available():
    pytest.skip("this release of transformers does not take this torch", allow_module_level=True)

pytestmark = [*toys.unwarned, pytest.mark.filterwarnings("ignore:torch.func cannot vectorize this model:UserWarning")]
BATCHES, SAMPLES, TOKENS, WORDS = 4, 8, 12, 64
TEXT = {"vocab_size": WORDS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
PICTURES = {"image_size": 16, "patch_size": 4}


def bert():
    return tf.BertForSequenceClassification(tf.BertConfig(**TEXT, **SIZES, num_labels=3))


def gpt2():
    return tf.GPT2LMHeadModel(tf.GPT2Config(**TEXT, n_embd=32, n_layer=2, n_head=4, n_positions=32))


def llama():
    return tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, **SIZES, num_key_value_heads=2))


def mixtral():
    config = tf.MixtralConfig(**TEXT, **SIZES, num_key_value_heads=2, num_local_experts=4)
    return tf.MixtralForCausalLM(config)


def vit():
    return tf.ViTForImageClassification(tf.ViTConfig(**SIZES, **PICTURES, num_labels=3))


def t5():
    config = tf.T5Config(
        vocab_size=WORDS, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return tf.T5ForConditionalGeneration(config)


def whisper():
    sides = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 64))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_mel_bins": 8}
    positions = {"max_source_positions": 16, "max_target_positions": 32}
    config = tf.WhisperConfig(**TEXT, **sides, **heads, **positions, d_model=32, decoder_start_token_id=1)
    return tf.WhisperForConditionalGeneration(config)


def clip():
    text = {**TEXT, **SIZES, "max_position_embeddings": 32}
    return tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config={**SIZES, **PICTURES}, projection_dim=16))


def words(length=TOKENS):
    return torch.randint(3, WORDS, (SAMPLES, length))


def pictures():
    return torch.randn(SAMPLES, 3, 16, 16)


def text():
    x = words()
    return {"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x.clone()}


@dataclass(frozen=True)
class Case:
    """A model, what it is called with, and what is said of it.

    Args:
        make: the model.
        batch: a batch, with the labels from which the model computes a loss.
        found: at least this share of the entries of its matrices is found.
        left_out: the type that is named where that is less than half.
        no_inputs: the type of a listed module that does not multiply with its weight as Linear does.
        refusals: what compensation says of what is found, one after the other, as its remedies are followed.
        contrastive: whether the loss is not a mean over samples.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Any]]
    found: float
    left_out: str | None = None
    no_inputs: str | None = None
    refusals: tuple[str, ...] = ()
    contrastive: bool = False


FUSED = hasattr(tf.models.mixtral.modeling_mixtral, "MixtralExperts")  # all experts in one tensor
TIED = (r"is tied: .* prunable_parameters\(model, tied=False\)",)
ROUTER = "a MixtralTopKRouter, which does not multiply"
CASES = {
    "BERT": Case(bert, lambda: {**text(), "labels": torch.randint(3, (SAMPLES,))}, 0.48, left_out="Embedding"),
    "GPT-2": Case(gpt2, text, 0.95, no_inputs="Embedding", refusals=TIED),
    "Llama": Case(llama, text, 0.90),
    "Mixtral": Case(mixtral, text, 0.13, left_out="MixtralExperts", no_inputs="MixtralTopKRouter", refusals=(ROUTER,))
    if FUSED
    else Case(mixtral, text, 0.96, refusals=("as with the experts of a mixture",) * 3),
    "ViT": Case(vit, lambda: {"pixel_values": pictures(), "labels": torch.randint(3, (SAMPLES,))}, 0.96),
    "T5": Case(t5, lambda: {"input_ids": words(), "labels": words()}, 0.98, no_inputs="Embedding", refusals=TIED),
    "Whisper": Case(
        whisper,
        lambda: {"input_features": torch.randn(SAMPLES, 8, 32), "labels": words(10)},
        0.96,
        no_inputs="Embedding",
        refusals=TIED,
    ),
    "CLIP": Case(
        clip,
        lambda: {"input_ids": words(), "pixel_values": pictures(), "return_loss": True},
        0.90,
        contrastive=True,
    ),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@functools.cache
def made(case):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = case.make().eval()
        for name, parameter in model.named_parameters():
            if "bias" in name:
                nn.init.normal_(parameter, std=0.02)  # they all start at 0, which would hide what becomes of them
        return model, [case.batch() for _ in range(BATCHES)]


def fresh(case):
    """Return a copy of the model, which a test may change, and its data."""
    model, batches = made(case)
    return copy.deepcopy(model), batches


def loss(output, batch):
    return output.loss


def listed(model, **how):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "prunable_parameters finds", UserWarning)
        return tpe.prunable_parameters(model, **how)


def refused_then(call, model, params, refusal, words):
    """Expect that ``call`` refuses ``params``; return what its message says to list instead."""
    before = Snapshot(model)
    with pytest.raises(refusal, match=words) as caught:
        call(params)
    assert not before.differences()
    remedy = re.search(r"prunable_parameters\(model, .*?\)", str(caught.value))[0]
    return eval(remedy, {"prunable_parameters": listed, "model": model})


def watched(model, modules, batches, *, whole=False):
    """Return what each of ``modules`` is given, first or as a ``whole``, and what it returns, for each batch."""
    seen = {module: [] for module in modules}
    hooks = [
        module.register_forward_hook(
            lambda module, args, output: seen[module].append((args if whole else args[0], output))
        )
        for module in modules
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    return seen


def rows(values):
    """Return values as (rows, features); the features of convolutions stand on axis 1, elsewhere they stand last."""
    return values.reshape(-1, values.shape[-1])


def channels_last(module, values):
    return values.movedim(1, -1) if isinstance(module, (nn.Conv1d, nn.Conv2d)) else values


def probed_axis(module, x, output):
    """Return the axis of the weight that the product with ``x`` sums over, from the definition of the product."""
    weight, output = module.weight.detach(), output[0] if isinstance(output, tuple) else output
    if isinstance(module, nn.Embedding):  # tied to a head, which multiplies with it
        return 1
    if weight.dim() > 2:
        product = {3: F.conv1d, 4: F.conv2d}[weight.dim()](x, weight, module.bias, module.stride, module.padding)
        assert torch.allclose(output, product, atol=1e-5)
        return 1
    bias = 0 if getattr(module, "bias", None) is None else module.bias
    fitting = []
    for axis, matrix in ((0, weight), (1, weight.t())):
        if x.shape[-1] == weight.shape[axis]:
            product = rows(x @ matrix + bias)
            fitting += [axis] * (
                product.shape == rows(output).shape and torch.allclose(product, rows(output), atol=1e-5)
            )
    [axis] = fitting
    return axis


# --- discovery


@each_case
def test_most_matrices_are_found_or_the_others_are_named(case):
    model, _ = made(case)
    total = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)
    if case.left_out is None:
        params = tpe.prunable_parameters(model)
    else:
        with pytest.warns(UserWarning, match=rf"of the matrices of .* Left out are {case.left_out}\."):
            params = tpe.prunable_parameters(model)
    found = {id(getattr(module, name)): getattr(module, name).numel() for module, name in params}
    assert sum(found.values()) >= case.found * total
    assert (2 * sum(found.values()) < total) == (case.left_out is not None)


def test_the_embeddings_of_bert_are_added_or_left_out_as_the_warning_says():
    model, _ = fresh(CASES["BERT"])
    params = tpe.prunable_parameters(model, exclude="*embeddings")  # no warning
    with pytest.warns(UserWarning, match="prunable_parameters finds") as caught:
        tpe.prunable_parameters(model)
    remedy = re.search(r"prunable_parameters\(model, .*?\)", str(caught[0].message))[0]
    params += eval(remedy, {**vars(nn), **vars(tpe), "model": model})
    tpe.global_unstructured(params, target_sparsity=0.5)
    total = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)
    assert sum(int((module.weight_mask == 0).sum()) for module, _ in params) == total // 2


# --- budgets and patterns


@each_case
def test_half_of_all_is_exactly_half(case):
    model, batches = fresh(case)
    params = listed(model)
    size = {id(module.weight): module.weight.numel() for module, _ in params}
    tpe.global_unstructured(params, target_sparsity=0.5)
    masks = {id(module.weight_orig): module.weight_mask for module, _ in params}
    assert sum(int((mask == 0).sum()) for mask in masks.values()) == sum(size.values()) // 2
    with torch.no_grad():
        assert model(**batches[0]).loss.isfinite()


@each_case
def test_two_of_four_run_along_the_inputs(case):
    model, batches = fresh(case)
    params = listed(model)
    seen = watched(model, [module for module, _ in params], batches[:1])
    checked = set()
    for module, name in params:
        axis = 1 if isinstance(module, nn.Embedding) else probed_axis(module, *seen[module][0])
        shape, weight = tuple(module.weight.shape), module.weight.detach().clone()
        tpe.nm_structured(module, name, 2, 4, pad=bool(shape[axis] % 4))
        if (type(module), shape) not in checked:  # the oracle is a slow loop
            units = oracles.runs(shape, 4, axis)
            expected = oracles.keep_n_of_m(units, flat(weight), [1] * weight.numel(), 2)
            assert flat(module.weight_mask) == expected
        else:
            groups = module.weight_mask.movedim(axis, -1).unflatten(-1, (-1, 4)).sum(-1)
            assert (groups == 2).all()
        checked.add((type(module), shape))


def test_the_axis_is_that_of_the_inputs_in_conv1d_of_gpt2():
    model, batches = made(CASES["GPT-2"])
    layers = [module for module in model.modules() if type(module).__name__ == "Conv1D"]
    seen = watched(model, layers, batches[:1])
    assert [probed_axis(module, *seen[module][0]) for module in layers] == [0] * 8


# --- statistics


@each_case
def test_activations_measure_the_inputs(case):
    model, batches = fresh(case)

    def call(params):
        return tpe.calibration.activations(model, batches, params, progress=False)

    params = listed(model)
    if case.no_inputs:
        params = refused_then(call, model, params, TypeError, f"a {case.no_inputs}, which does not multiply")
    scores = call(params)
    seen = watched(model, [module for module, _ in params], batches)
    for module, name in params:
        inputs = torch.cat([rows(channels_last(module, x)) for x, _ in seen[module]])
        norm, weight = inputs.double().norm(dim=0).float(), module.weight.detach()
        axis = probed_axis(module, *seen[module][0])
        expected = weight.abs() * norm.view([-1 if i == axis else 1 for i in range(weight.dim())])
        torch.testing.assert_close(scores[module, name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.contrastive])
def test_fisher_is_the_mean_square_of_the_gradients_of_single_samples(name):
    model, batches = fresh(CASES[name])
    params = listed(model)
    found = tpe.calibration.fisher(model, loss, batches[:1], params, progress=False)
    tensors = [getattr(module, name) for module, name in params]
    expected = [torch.zeros_like(tensor) for tensor in tensors]
    for i in range(SAMPLES):
        sample = {key: value[i : i + 1] for key, value in batches[0].items()}
        grads = torch.autograd.grad(model(**sample).loss, tensors)
        for total, grad in zip(expected, grads, strict=True):
            total += grad.square() / SAMPLES
    for key, total in zip(params, expected, strict=True):
        torch.testing.assert_close(found[key], total, rtol=1e-3, atol=1e-4 * float(total.max()))


def test_the_loss_of_clip_has_no_statistics_of_single_samples_and_those_of_batches_work():
    model, batches = fresh(CASES["CLIP"])
    params = listed(model)
    before = Snapshot(model)
    with pytest.raises(ValueError, match=r"no mean over independent samples .* gradients\(\), taylor\(per='batch'\)"):
        tpe.calibration.fisher(model, loss, batches, params, progress=False)
    assert not before.differences()
    gradients = tpe.calibration.gradients(model, loss, batches, params, progress=False)
    scores = tpe.calibration.taylor(model, loss, batches, params, per="batch", progress=False)
    tensors = [getattr(module, name) for module, name in params]
    expected = torch.autograd.grad(sum(model(**batch).loss for batch in batches) / BATCHES, tensors)
    for key, grad in zip(params, expected, strict=True):
        torch.testing.assert_close(gradients[key], grad.abs(), rtol=1e-3, atol=1e-5)
        assert scores[key].any()


# --- compensation


STREAMS = [  # what a layer's output is added to: the layer, and a module that is called with that and its argument
    (r"(.*)attention\.output\.dense", r"\1attention.output", 1),
    (r"(.*layer\.\d+\.)output\.dense", r"\1output", 1),
    (r"(.*)attn\.c_proj", r"\1ln_1", 0),
    (r"(.*)mlp\.c_proj", r"\1ln_2", 0),
    (r"(.*)self_attn\.o_proj", r"\1input_layernorm", 0),
    (r"(.*)mlp\.down_proj", r"\1post_attention_layernorm", 0),
    (r"(.*)attention\.o_proj", r"\1layernorm_before", 0),
    (r"(.*)mlp\.fc2", r"\1layernorm_after", 0),
    (r"(.*)(?:Self|EncDec)Attention\.o", r"\1layer_norm", 0),
    (r"(.*)DenseReluDense\.wo", r"\1layer_norm", 0),
    (r"(.*)self_attn\.out_proj", r"\1self_attn_layer_norm", 0),
    (r"(.*)encoder_attn\.out_proj", r"\1encoder_attn_layer_norm", 0),
    (r"(.*layers\.\d+\.)fc2", r"\1final_layer_norm", 0),
    (r"(.*)self_attn\.out_proj", r"\1layer_norm1", 0),
    (r"(.*)mlp\.fc2", r"\1layer_norm2", 0),
]


def stream_of(path, names):
    """Return the module and the argument in which what the layer's output is added to passes by, if there is one."""
    for layer, module, place in STREAMS:
        found = re.fullmatch(layer, path)
        if found and found.expand(module) in names:
            return found.expand(module), place
    return None


def assert_fits(fits, model, dense, batches):
    """Compare the error that each fit reports with that of what the layer gives for its inputs in both models.

    Where its output is added to a stream, what the pruned model lacks there is wanted of it too.
    """
    names = dict(model.named_modules())
    pruned = {path: module for path, module in names.items() if any(module is owner for owner, _ in fits)}
    streams = {path: stream_of(path, names) for path in pruned}
    wanted = {*pruned, *(stream[0] for stream in streams.values() if stream)}
    now = watched(model, [names[path] for path in wanted], batches, whole=True)
    then = watched(dense, [dense.get_submodule(path) for path in wanted], batches, whole=True)
    assert any(streams.values())
    for path, module in pruned.items():
        reference = dense.get_submodule(path)
        with torch.no_grad():
            gives = [output for _, output in now[module]] + [module(args[0]) for args, _ in then[reference]]
        should = [output for _, output in then[reference]] * 2
        if streams[path] is not None:
            holder, place = streams[path]
            parts = zip(then[dense.get_submodule(holder)], now[names[holder]], strict=True)
            lacks = [ours[place] - theirs[place] for (ours, _), (theirs, _) in parts]
            should[: len(lacks)] = [y + lack for y, lack in zip(should, lacks, strict=False)]
        y, found = (torch.cat([rows(channels_last(module, y)) for y in each]).double() for each in (should, gives))
        error = float((found - y).square().sum() / (y - y.mean(0)).square().sum())
        [fit] = [fit for (owner, _), fit in fits.items() if owner is module]
        assert error == pytest.approx(fit.after, rel=2e-2, abs=1e-6), path
        assert fit.after <= fit.before * (1 + 1e-6) + 1e-9, path


def linear_layers(case, call, model):
    """Return the tensors that compensation takes, as its refusals say."""
    params = listed(model)
    for words in case.refusals:
        rest = refused_then(call, model, params, (TypeError, ValueError), words)
        params = [pair for pair in params if pair in rest]
    return params


@each_case
def test_compensate_reports_the_true_errors(case):
    model, batches = fresh(case)
    dense = made(case)[0]

    def call(params):
        return tpe.compensate(model, batches, params, dense=dense, progress=False)

    params = linear_layers(case, call, model)
    tpe.global_unstructured(params, target_sparsity=0.5)
    masks = [module.weight_mask.clone() for module, _ in params]
    fits = call(params)
    assert list(fits) == params
    assert all(torch.equal(module.weight_mask, mask) for (module, _), mask in zip(params, masks, strict=True))
    assert_fits(fits, model, dense, batches)


@each_case
def test_prune_and_compensate_reports_the_true_errors(case):
    model, batches = fresh(case)

    def call(params):
        return tpe.prune_and_compensate(model, batches, params, target_sparsity=0.5, progress=False)

    params = linear_layers(case, call, model)
    size = sum(module.weight.numel() for module, _ in params)
    fits = call(params)
    assert sum(int((module.weight_mask == 0).sum()) for module, _ in params) == pytest.approx(size / 2, abs=len(params))
    assert_fits(fits, model, made(case)[0], batches)


@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_two_of_four_is_kept_along_the_inputs_when_it_is_compensated(name):
    model, batches = fresh(CASES[name])
    params = listed(model, tied=False)
    seen = watched(model, [module for module, _ in params], batches[:1])
    axes = [probed_axis(module, *seen[module][0]) for module, _ in params]
    fits = tpe.prune_and_compensate(model, batches, params, pattern=tpe.NM(2, 4), progress=False)
    for (module, _), axis in zip(params, axes, strict=True):
        groups = module.weight_mask.movedim(axis, -1).unflatten(-1, (-1, 4))
        assert (groups.sum(-1) == 2).all()
    assert_fits(fits, model, made(CASES[name])[0], batches)


# --- fused experts


@pytest.mark.skipif(not FUSED, reason="this release of transformers keeps each expert as Linear layers")
def test_fused_experts_are_pruned_by_their_own_names():
    case = CASES["Mixtral"]
    model, batches = fresh(case)
    experts = model.model.layers[0].mlp.experts
    params = [
        pair
        for name in ("gate_up_proj", "down_proj")
        for pair in tpe.prunable_parameters(model, types=type(experts), name=name)
    ]
    assert len(params) == 4
    fisher = tpe.calibration.fisher(model, loss, batches[:1], params, progress=False)
    assert all(fisher[key].any() for key in params)
    for call in (tpe.calibration.activations, tpe.compensate):
        taken = partial(call, model, batches, progress=False)
        rest = refused_then(taken, model, params, TypeError, "is called with 3|several tensors of its module")
        assert not {module for module, _ in rest} & {module for module, _ in params}
    with pytest.raises(ValueError, match=r"dim=2 for a stack of \(outputs, inputs\)"):
        tpe.nm_structured(*params[0], 2, 4)
    for module, name in params:
        tpe.nm_structured(module, name, 2, 4, dim=2)
    with torch.no_grad():
        pruned = model(**batches[0]).logits
        for module, name in params:
            weight = getattr(module, name + "_orig")
            weight *= getattr(module, name + "_mask")
        tpe.remove_all(model)
        torch.testing.assert_close(model(**batches[0]).logits, pruned)
