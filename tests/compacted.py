"""Models of each kind, with units that do nothing, for tests that compact them; as a script, loads those compacted."""

import pathlib
import sys

import torch
from cutting import bert, encoder
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe


def resnet18():
    from torchvision.models import resnet18

    return resnet18(num_classes=7).eval()


def mobilenet_v3_small():
    from torchvision.models import mobilenet_v3_small

    return mobilenet_v3_small(num_classes=7).eval()


def efficientnet():
    """Return an EfficientNet of few blocks: expansion, depthwise convolution, squeeze and excitation, SiLU."""
    from torchvision.models import efficientnet
    from torchvision.models.efficientnet import MBConvConfig

    settings = [MBConvConfig(1, 3, 1, 16, 16, 1), MBConvConfig(4, 5, 2, 16, 24, 2), MBConvConfig(4, 3, 2, 24, 40, 2)]
    return efficientnet.EfficientNet(settings, dropout=0.2, num_classes=7).eval()


def llama():
    from transformers import LlamaConfig, LlamaModel

    sizes = {"hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 24}
    return LlamaModel(LlamaConfig(vocab_size=50, num_hidden_layers=2, max_position_embeddings=20, **sizes)).eval()


def silence(model):
    """Let every BatchNorm give 0 in the first quarter of its channels."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            for tensor in (module.weight, module.bias):
                tensor.data[: len(tensor) // 4] = 0


def prune_columns(layer, columns):
    mask = torch.ones_like(layer.weight)
    mask[:, columns] = 0
    prune.custom_from_mask(layer, "weight", mask)


def prune_encoder(model):
    for layer in model.layers:
        prune_columns(layer.linear2, [0, 3, 5])


def prune_bert(model):
    for layer, heads in zip(model.encoder.layer, ([0], [1, 3]), strict=True):
        prune_columns(layer.attention.output.dense, [4 * head + i for head in heads for i in range(4)])
        prune_columns(layer.output.dense, range(7))


def prune_llama(model):
    """Prune the two queries of a key, whose heads have 4 columns each, and hidden units."""
    for layer, key in zip(model.layers, (0, 2), strict=True):
        prune_columns(layer.self_attn.o_proj, range(8 * key, 8 * key + 8))
        prune_columns(layer.mlp.down_proj, range(5))


def image():
    return {"x": torch.randn(2, 3, 32, 32)}


def tokens():
    return {"input_ids": torch.randint(50, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}


KINDS = {  # constructor of the dense model, what deadens units, inputs, the package that it comes with
    "resnet18": (resnet18, silence, image, "torchvision"),
    "mobilenet_v3_small": (mobilenet_v3_small, silence, image, "torchvision"),
    "efficientnet": (efficientnet, silence, image, "torchvision"),
    "encoder": (lambda: encoder().eval(), prune_encoder, lambda: {"src": torch.randn(2, 5, 16)}, "torch"),
    "bert": (lambda: bert().eval(), prune_bert, tokens, "transformers"),
    "llama": (llama, prune_llama, tokens, "transformers"),
}


def output(model, inputs):
    found = model(**inputs)
    return found if isinstance(found, torch.Tensor) else found[0]


def main(folder):
    """Load each model in ``folder`` by its constructor, and print whether it computes and trains as the saved one."""
    torch.set_num_threads(1)
    for path in sorted(pathlib.Path(folder).glob("*.safetensors")):
        small = tpe.load_compact(KINDS[path.stem][0], path)
        inputs, expected = torch.load(path.with_suffix(".pt"))
        with torch.no_grad():
            same = torch.equal(output(small, inputs), expected)
        optimizer = torch.optim.AdamW(small.parameters(), lr=1e-3)
        output(small.train(), inputs).square().mean().backward()
        optimizer.step()
        moved = not torch.equal(output(small.eval(), inputs), expected)
        print(path.stem, same, moved, [name for name in ("torch_pruning", "hypothesis") if name in sys.modules])


if __name__ == "__main__":
    main(sys.argv[1])
