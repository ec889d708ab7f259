"""Compact ResNet-18 and a sentence encoder, export them to ONNX, and measure ONNX Runtime on the CPU.

Half of the inner channels of each residual block, and half of the hidden units of each feed-forward block, are pruned
by magnitude and taken out. Accuracy is not the subject here: see prune_encoder.py for that. Beside them stands the
dense model with 90 % of the entries of each layer at zero, which is what a runtime gets when single entries are pruned.

Each row tells the latency of one forward pass, the median of runs that alternate between the three models, and how far
ONNX Runtime's outputs are from PyTorch's, as a share of the largest output.

    pip install "torchprune-ext[encoder,onnx]" torchvision
    python examples/export_onnx.py [--threads 2] [--rounds 15]
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from measure import seconds
from prune_encoder import default_model, sentences
from torch import Tensor, nn
from torch.nn.utils import prune

import torchprune_ext as tpe

Inputs = dict[str, Tensor]


def resnet() -> tuple[nn.Module, list[nn.Module], dict[str, Inputs]]:
    """Return ResNet-18 with random weights, the layers that read the inner channels of its blocks, and inputs."""
    from torchvision.models import resnet18

    model = resnet18().eval()
    readers = [module.conv2 for name, module in model.named_modules() if name.count(".") == 1 and "layer" in name]
    return model, readers, {f"batch of {n}": {"x": torch.randn(n, 3, 224, 224)} for n in (1, 8)}


class Encoder(nn.Module):
    """A sentence encoder whose output is one tensor."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        from transformers import AutoModel

        self.model = AutoModel.from_pretrained(folder).eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the hidden states of the last layer."""
        found: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return found


def encoder() -> tuple[nn.Module, list[nn.Module], dict[str, Inputs]]:
    """Return all-MiniLM-L6-v2, the layers that read its hidden units, and sentences."""
    from transformers import AutoTokenizer

    folder = default_model()
    model, tokenizer = Encoder(folder).eval(), AutoTokenizer.from_pretrained(folder)
    texts = sorted(sentences(), key=len)
    inputs = {}
    for count in (1, 8):
        chosen = texts[len(texts) // 2 :][:count]
        found = tokenizer(chosen, padding=True, return_tensors="pt")
        inputs[f"{count} sentence{'s' * (count > 1)}"] = {k: found[k] for k in ("input_ids", "attention_mask")}
    return model, [layer.output.dense for layer in model.model.encoder.layer], inputs


def variants(model: nn.Module, readers: list[nn.Module], example: Inputs) -> dict[str, nn.Module]:
    """Return the dense model, one with zeros, one whose units are taken out."""
    zeros = copy.deepcopy(model)
    for layer in zeros.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            prune.l1_unstructured(layer, "weight", amount=0.9)
    tpe.remove_all(zeros)
    pruned = copy.deepcopy(model)
    names = [name for name, module in model.named_modules() if any(module is reader for reader in readers)]
    for name in names:
        prune.ln_structured(pruned.get_submodule(name), "weight", amount=0.5, n=2, dim=1)
    return {"dense": model, "90 % zeros": zeros, "compacted": tpe.compact(pruned, example)}


def session(model: nn.Module, inputs: Inputs, path: Path, threads: int) -> Callable[[], Tensor]:
    """Export a model, and return a call that runs it in ONNX Runtime on the inputs."""
    import onnxruntime

    torch.onnx.export(model, kwargs=inputs, f=path, dynamo=True, verbose=False)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
    runtime = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    feed = {name: tensor.numpy() for name, tensor in inputs.items()}
    return lambda: torch.from_numpy(runtime.run(None, feed)[0])


@torch.no_grad()
def table(title: str, found: dict[str, nn.Module], inputs: dict[str, Inputs], options: argparse.Namespace) -> None:
    """Print the rows of one model."""
    with tempfile.TemporaryDirectory() as folder:
        for size, batch in inputs.items():
            runs = {
                name: session(model, batch, Path(folder) / f"{name[0]}.onnx", options.threads)
                for name, model in found.items()
            }
            torches = {name: partial(model, **batch) for name, model in found.items()}
            taken, torch_taken = seconds(runs, options.rounds), seconds(torches, options.rounds)
            for name, model in found.items():
                expected = model(**batch)
                far = float((runs[name]() - expected).abs().max() / expected.abs().max())
                cells = f"{sum(p.numel() for p in model.parameters()) / 1e6:>11.2f} M"
                cells += f"{1e3 * torch_taken[name]:>11.1f} ms{1e3 * taken[name]:>11.1f} ms"
                cells += f"{taken['dense'] / taken[name]:>10.2f}x{far:>12.1e}"
                print(f"{title + ', ' + size:<32}{name:<12}{cells}", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    import onnxruntime

    print(f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, CPU, {options.threads} threads")
    head = f"{'parameters':>13}{'PyTorch':>14}{'ONNX Runtime':>14}{'to dense':>11}{'difference':>12}"
    print(f"{'':<44}{head}")
    for title, make in (("ResNet-18", resnet), ("MiniLM-L6", encoder)):
        model, readers, inputs = make()
        table(title, variants(model, readers, next(iter(inputs.values()))), inputs, options)


if __name__ == "__main__":
    try:
        main()
    except (ImportError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
