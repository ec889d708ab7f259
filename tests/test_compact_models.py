"""compact on models of torchvision and transformers."""

from typing import Any

import pytest
import torch
from compacting import close, open_groups
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe
from torchprune_ext._graph import call, outputs_in

torchvision = pytest.importorskip("torchvision")
transformers = pytest.importorskip("transformers")
models = torchvision.models


def trained(model: nn.Module) -> nn.Module:
    """Give norms statistics and scales as after training."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                nn.init.normal_(tensor, std=0.1)
    return model.eval()


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def halved(model: nn.Module, inputs: Any, round_to: int = 1) -> tuple[float, float]:
    """Prune every other channel, compact, and return the largest difference over the largest output, and the share."""
    before = size(model)
    for group in open_groups(model, inputs):
        close(group, [*range(0, group.size, 2)], "unread")
    with torch.no_grad():
        dense = [tensor for _, tensor in outputs_in(call(model, inputs))]
        small = tpe.compact(model, inputs, round_to=round_to)
        given = [tensor for _, tensor in outputs_in(call(small, inputs))]
    apart = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(dense, given, strict=True))
    return apart, size(small) / before


def bottlenecks() -> nn.Module:
    """A small ResNeXt: grouped convolutions between others."""
    return models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=9, groups=4, width_per_group=4)


def convnext() -> nn.Module:
    """A small ConvNeXt: scales and LayerNorms of its own."""
    config = models.convnext.CNBlockConfig
    return models.ConvNeXt([config(16, 32, 1), config(32, None, 1)], num_classes=9, layer_scale=0.5)


VISION = {
    "resnet18": (models.resnet18, 0.27),
    "mobilenet_v3_small": (models.mobilenet_v3_small, 0.45),
    "densenet": (lambda: models.DenseNet(8, (2, 2), 16, num_classes=5), 0.31),
    "bottlenecks": (bottlenecks, 0.35),
    "convnext": (convnext, 0.7),
}


@pytest.mark.parametrize("name", VISION)
def test_vision(name):
    make, share = VISION[name]
    apart, left = halved(trained(make()), torch.randn(2, 3, 64, 64))
    assert apart < 1e-4
    assert left < share


def test_vision_transformers():
    vit = models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=5).eval()
    nn.init.normal_(vit.heads.head.weight)  # torchvision starts with zeros
    apart, left = halved(vit, torch.randn(2, 3, 32, 32))
    assert (apart < 1e-4, left < 0.9) == (True, True)
    swin = models.SwinTransformer([4, 4], 16, [2, 1], [2, 4], [4, 4], num_classes=5).eval()
    groups = open_groups(swin, torch.randn(2, 3, 32, 32))
    assert [group.size for group in groups] == [2, 64, 2, 64, 4, 128]  # heads, hidden units


def test_inner_channels_of_residual_blocks():
    resnet = trained(models.resnet18())
    for name, module in resnet.named_modules():
        if name.endswith("conv2"):
            prune.ln_structured(module, "weight", amount=0.5, n=2, dim=1)
    x = torch.randn(1, 3, 64, 64)
    small = tpe.compact(resnet, x)
    assert [block.conv1.out_channels for block in small.layer3] == [128, 128]
    assert small.layer3[0].downsample[0].out_channels == 256  # the stream between blocks keeps its width
    with torch.no_grad():
        torch.testing.assert_close(small(x), resnet(x), rtol=1e-4, atol=1e-4)


def tiny(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A small model of random weights."""
    ids = torch.randint(3, 50, (2, 7))
    common = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    if name == "bert":
        model = transformers.BertModel(transformers.BertConfig(**common, **sizes))
        return model.eval(), {"input_ids": ids, "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2])}
    if name == "gpt2":
        config = transformers.GPT2Config(**common, n_embd=32, n_layer=2, n_head=4)
        return transformers.GPT2LMHeadModel(config).eval(), {"input_ids": ids, "use_cache": False}
    if name == "t5":
        config = transformers.T5Config(**common, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        return transformers.T5EncoderModel(config).eval(), {"input_ids": ids}
    if name == "vit":
        config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8)
        return transformers.ViTModel(config).eval(), {"pixel_values": torch.randn(2, 3, 16, 16)}
    kinds = {"llama": ("LlamaForCausalLM", "LlamaConfig"), "qwen3": ("Qwen3ForCausalLM", "Qwen3Config")}
    if not hasattr(transformers, kinds[name][0]):
        pytest.skip(f"transformers {transformers.__version__} does not have {kinds[name][0]}")
    kind, config = (getattr(transformers, each) for each in kinds[name])
    made = config(**common, **sizes, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)
    return kind(made).eval(), {"input_ids": ids}


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "qwen3", "t5", "vit"])
def test_transformers(name):
    torch.manual_seed(0)
    model, inputs = tiny(name)
    groups = open_groups(model, inputs)
    heads = [group.size for group in groups if group.heads]  # of T5, all layers share the biases of positions
    assert heads == {"llama": [2, 2], "qwen3": [2, 2], "t5": [4]}.get(name, [4, 4])
    assert len(groups) == len(heads) + 2
    apart, left = halved(model, inputs)
    assert apart < 1e-4
    assert left < 0.85


def test_numbers_of_heads_follow():
    model, inputs = tiny("bert")
    for layer in model.encoder.layer:
        layer.attention.output.dense.weight.data[:, 8:16] = 0  # head 1
    small = tpe.compact(model, inputs, round_to=16)  # heads are not rounded
    attention = small.encoder.layer[0].attention.self
    assert (attention.num_attention_heads, attention.all_head_size, attention.attention_head_size) == (3, 24, 8)
    assert model.encoder.layer[0].attention.self.num_attention_heads == 4
    model, inputs = tiny("gpt2")
    for layer in model.transformer.h:
        layer.attn.c_proj.weight.data[8:16] = 0
    small = tpe.compact(model, inputs).transformer.h[0].attn
    assert (small.num_heads, small.split_size, small.c_attn.nf, small.c_proj.nx) == (3, 24, 72, 24)


def test_a_key_goes_with_all_its_queries():
    model, inputs = tiny("llama")
    attention = model.model.layers[0].self_attn
    attention.o_proj.weight.data[:, :8] = 0  # one of two queries of the first key
    with pytest.raises(ValueError, match=r"no dead channels|no channels that can be removed"):
        tpe.compact(model, inputs)
    attention.o_proj.weight.data[:, :16] = 0
    small = tpe.compact(model, inputs).model.layers[0].self_attn
    assert (small.q_proj.out_features, small.k_proj.out_features, small.v_proj.out_features) == (16, 8, 8)


def test_generation_goes_on():
    model, inputs = tiny("llama")
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data[:, :16] = 0
        layer.mlp.down_proj.weight.data[:, ::2] = 0
    small = tpe.compact(model, inputs)
    made = [each.generate(**inputs, max_new_tokens=5, do_sample=False) for each in (model, small)]
    assert torch.equal(*made)


def test_the_fast_path_of_encoder_layers():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    encoder, x = nn.TransformerEncoder(layer, 4).eval(), torch.randn(2, 5, 16)
    for each in encoder.layers:
        prune.ln_structured(each.linear2, "weight", amount=0.5, n=2, dim=1)
    tpe.refresh(encoder)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    small = tpe.compact(encoder, {"src": x, "src_key_padding_mask": padding})
    assert [each.linear1.out_features for each in small.layers] == [16] * 4
    with torch.no_grad():
        torch.testing.assert_close(small(x), encoder(x))
    torch.testing.assert_close(small(x), encoder(x))


def test_other_outputs_of_a_model_do_not_matter():
    model, inputs = tiny("bert")
    for layer in model.encoder.layer:
        layer.output.dense.weight.data[:, :9] = 0
    with_states = inputs | {"output_hidden_states": True, "output_attentions": True}
    assert tpe.compact(model, with_states).encoder.layer[1].intermediate.dense.out_features == 55
