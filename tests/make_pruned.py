"""Make ``data/pruned_<version>.pt``: layers pruned by every method and every global call, as a user would save them.

Run ``python tests/make_pruned.py`` once per version whose files shall open in later ones, and never again for the
same version: the file is what that version wrote. ``tests/test_pickles.py`` opens it.
"""

import pathlib

import torch
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe
from torchprune_ext.methods import Method

FILE = pathlib.Path(__file__).parent / "data" / f"pruned_{tpe.__version__.replace('.', '_')}.pt"


def linears():
    return [nn.Linear(4, 4), nn.Linear(4, 4)]


def convolutions():
    return [nn.Conv2d(2, 2, 2), nn.Conv2d(2, 2, 2)]


def with_gradients(layers):
    for layer in layers:
        layer.weight.grad = torch.ones_like(layer.weight)
    return [(layer, "weight") for layer in layers]


def with_zeros(layer):
    layer.weight.data[0] = 0
    return layer


def weights(layers):
    return [(layer, "weight") for layer in layers]


ONE = {
    "nm_structured": (nn.Linear, (4, 4), lambda m: tpe.nm_structured(m, "weight", 2, 4)),
    "kernel_ln": (nn.Conv2d, (2, 2, 2), lambda m: tpe.kernel_ln(m, "weight", 0.5)),
    "vector_ln": (nn.Linear, (4, 4), lambda m: tpe.vector_ln(m, "weight", 0.5, 1, 0)),
    "block_ln": (nn.Linear, (4, 4), lambda m: tpe.block_ln(m, "weight", 0.5, block=(2, 1))),
    "gradient_magnitude": (
        nn.Linear,
        (4, 4),
        lambda m: tpe.gradient_magnitude(m, "weight", 0.5, grad=m.weight.detach()),
    ),
    "obd_saliency": (
        nn.Linear,
        (4, 4),
        lambda m: tpe.obd_saliency(m, "weight", 0.5, hessian_diag=torch.ones(4, 4)),
    ),
    "bn_scaling": (nn.Conv2d, (2, 2, 2), lambda m: tpe.bn_scaling(m, "weight", 1, nn.BatchNorm2d(2))),
    "threshold": (nn.Linear, (4, 4), lambda m: tpe.threshold(m, "weight", 0.25)),
    "every_other": (nn.Linear, (4, 4), lambda m: tpe.every_other(m, "weight", 3, 1)),
}
MANY = {
    "global_unstructured": (linears, lambda ms: tpe.global_unstructured(weights(ms), 0.5)),
    "global_gradient_magnitude": (linears, lambda ms: tpe.global_gradient_magnitude(with_gradients(ms), 0.5)),
    "global_obd_saliency": (
        linears,
        lambda ms: tpe.global_obd_saliency(
            weights(ms), 0.5, hessian_diag={pair: torch.ones(4, 4) for pair in weights(ms)}
        ),
    ),
    "global_kernel_ln": (convolutions, lambda ms: tpe.global_kernel_ln(weights(ms), 0.5)),
    "global_vector_ln": (linears, lambda ms: tpe.global_vector_ln(weights(ms), 0.5)),
    "global_block_ln": (linears, lambda ms: tpe.global_block_ln(weights(ms), 0.5, block=2)),
    "global_ln_structured": (convolutions, lambda ms: tpe.global_ln_structured(weights(ms), 0.5)),
    "global_bn_scaling": (convolutions, lambda ms: tpe.global_bn_scaling([(m, nn.BatchNorm2d(2)) for m in ms], 0.5)),
    "global_nm_structured": (linears, lambda ms: tpe.global_nm_structured(weights(ms), 0.5, m=4)),
    "mask_zeros": (lambda: [with_zeros(layer) for layer in linears()], lambda ms: tpe.mask_zeros(weights(ms))),
    "compensate": (
        linears,
        lambda ms: (
            tpe.global_unstructured(weights(ms), 0.5),
            tpe.compensate(nn.Sequential(*ms), [(torch.randn(32, 4), None)], weights(ms), progress=False),
        ),
    ),
    "sparsegpt": (
        linears,
        lambda ms: tpe.sparsegpt(
            nn.Sequential(*ms), [(torch.randn(32, 4), None)], weights(ms), target_sparsity=0.5, progress=False
        ),
    ),
    "prune_and_compensate": (
        linears,
        lambda ms: tpe.prune_and_compensate(
            nn.Sequential(*ms), [(torch.randn(32, 4), None)], weights(ms), pattern=tpe.NM(2, 4), progress=False
        ),
    ),
}


def make():
    """Return the layers by the name of the call, each also stacked between two native calls."""
    torch.manual_seed(0)
    model = nn.ModuleDict()
    for name, (kind, sizes, call) in ONE.items():
        alone, stacked = kind(*sizes), kind(*sizes)
        call(alone)
        prune.l1_unstructured(stacked, "weight", 1)
        call(stacked)
        prune.l1_unstructured(stacked, "weight", 1)
        model[name] = nn.ModuleList([alone, stacked])
    for name, (layers, call) in MANY.items():
        model[name] = nn.ModuleList(layers())
        call(list(model[name]))
    return model


def outputs(model):
    """Return what each layer computes from ones."""
    with torch.no_grad():
        return {
            path: layer(torch.ones(1, 4) if isinstance(layer, nn.Linear) else torch.ones(1, 2, 2, 2))
            for path, layer in model.named_modules()
            if isinstance(layer, (nn.Linear, nn.Conv2d))
        }


def histories(model):
    """Return the pruning methods of each tensor in words, oldest first."""
    said = {}
    for path, layer in model.named_modules():
        for hook in layer._forward_pre_hooks.values():
            methods = hook if isinstance(hook, prune.PruningContainer) else [hook]
            said[f"{path}.{hook._tensor_name}"] = [
                repr(method) if isinstance(method, Method) else type(method).__name__ for method in methods
            ]
    return said


if __name__ == "__main__":
    model = make()
    for parameter in model.parameters():
        parameter.grad = None
    torch.save({"model": model, "outputs": outputs(model), "histories": histories(model)}, FILE)
    print(FILE, FILE.stat().st_size, "bytes")
