"""Where one global budget falls: sparsity per layer of a ResNet-18 and a transformer encoder, by every global call.

The weights are random (no download), so the table shows how the calls spread a budget of 50 %, not what a trained
network would lose. The gradient is that of a random target, the curvature its square, and the BatchNorm scales are
drawn at random, as all ones would be one large tie.
Run: ``python examples/global_sparsity.py``.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

import torchprune_ext as tpe

AMOUNT = 0.5
Params = list[tuple[nn.Module, str]]


def gradients_of(model: nn.Module, inputs: Tensor) -> None:
    """Leave the gradient of a mean squared error with a random target in the parameters."""
    output = model(inputs)
    nn.functional.mse_loss(output, torch.randn_like(output)).backward()


def convolutional() -> tuple[nn.Module, Params, Tensor]:
    """Return a ResNet-18, its convolutions and an input."""
    model = resnet18()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
    return model, tpe.prunable_parameters(model, types=nn.Conv2d), torch.randn(4, 3, 64, 64)


def transformer() -> tuple[nn.Module, Params, Tensor]:
    """Return an encoder of two layers, its matrices and an input.

    ``out_proj`` stays dense: attention reads its weight without calling it, so the hook that makes masked weights
    follow training would never run. ``in_proj_weight`` is a tensor of the attention itself, which is called.
    """
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 256, batch_first=True), 2)
    params: Params = []
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            params.append((module, "in_proj_weight"))
        elif isinstance(module, nn.Linear) and not path.endswith("out_proj"):
            params.append((module, "weight"))
    return model, params, torch.randn(2, 10, 64)


def calls(model: nn.Module, inputs: Tensor) -> dict[str, Callable[[Params], None]]:
    """Return the global calls that make sense for ``model``."""

    def obd(params: Params) -> None:
        curvature = {(module, name): module.get_parameter(name).grad.square() for module, name in params}
        tpe.global_obd_saliency(params, amount=AMOUNT, hessian_diag=curvature)

    found: dict[str, Callable[[Params], None]] = {
        "unstruct.": lambda params: tpe.global_unstructured(params, amount=AMOUNT),
        "gradient": lambda params: tpe.global_gradient_magnitude(params, amount=AMOUNT),
        "OBD": obd,
        "vector": lambda params: tpe.global_vector_ln(params, amount=AMOUNT, n=2, dim=-1),
        "dim=0": lambda params: tpe.global_ln_structured(params, amount=AMOUNT, n=2, dim=0),
        "dim=1": lambda params: tpe.global_ln_structured(params, amount=AMOUNT, n=2, dim=1),
        "n of 4": lambda params: tpe.global_nm_structured(params, m=4, amount=AMOUNT, pad=True),
    }
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        found["kernel"] = lambda params: tpe.global_kernel_ln(params, amount=AMOUNT, n=2)
        found["BN"] = lambda params: tpe.global_bn_scaling(tpe.bn_pairs(model, inputs), amount=AMOUNT)
    return found


def table(title: str, make: Callable[[], tuple[nn.Module, Params, Tensor]]) -> None:
    """Print the sparsity of each layer, in percent of its entries, under each call."""
    torch.manual_seed(0)
    dense, params, inputs = make()
    paths = {module: path for path, module in dense.named_modules()}
    names = [f"{paths[module]}.{name}" for module, name in params]
    gradients_of(dense, inputs)

    columns: dict[str, list[float]] = {}
    totals, entries = {}, sum(module.get_parameter(name).numel() for module, name in params)
    for call in calls(dense, inputs):
        model = copy.deepcopy(dense)
        for ours, theirs in zip(model.parameters(), dense.parameters(), strict=True):
            ours.grad = None if theirs.grad is None else theirs.grad.clone()
        copied = [(model.get_submodule(paths[module]), name) for module, name in params]
        calls(model, inputs)[call](copied)
        masks = [module.get_buffer(f"{name}_mask") for module, name in copied]
        columns[call] = [100 - 100 * float(mask.mean()) for mask in masks]
        totals[call] = 100 - 100 * sum(float(mask.sum()) for mask in masks) / entries

    width = max(map(len, names))
    print(f"\n{title}: entries pruned, in percent, amount {AMOUNT:.0%} of the units of each call")
    print(" " * width + "".join(f"{call:>10}" for call in columns))
    for row, name in enumerate(names):
        print(f"{name:<{width}}" + "".join(f"{column[row]:>10.1f}" for column in columns.values()))
    print(f"{'all':<{width}}" + "".join(f"{total:>10.1f}" for total in totals.values()))
    print(f"emptied layers: {sum(value == 100 for column in columns.values() for value in column)}")


if __name__ == "__main__":
    table("ResNet-18", convolutional)
    table("TransformerEncoder of 2 layers", transformer)
