"""Find what a model has to prune: its tensors, and which BatchNorm stands behind which layer."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from torchprune_ext._checks import check_module, warn
from torchprune_ext._host import Target, pruned


def prunable_parameters(
    model: nn.Module,
    types: type[nn.Module] | tuple[type[nn.Module], ...] = (nn.Linear, _ConvNd),
    exclude: str | Iterable[str] = (),
    name: str = "weight",
) -> list[tuple[nn.Module, str]]:
    """Return the ``(module, name)`` pairs of ``model`` that a global call takes.

    Args:
        model: any module.
        types: types of the modules whose tensor is wanted; by default ``Linear`` and all convolutions, transposed
            ones included.
        exclude: paths of modules to leave out with all that is below them, e.g. ``"classifier"`` or ``"layer1.0"``.
        name: name of the tensor.

    Returns:
        Pairs in the order of the model. A tensor that another module of the model shares (tied weights) is followed
        by that module, whatever its type, so that both are pruned alike; exclude either path to leave both out.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a path in ``exclude`` is no module of the model, or nothing is left.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> prunable_parameters(model, exclude="2")
        [(Linear(in_features=4, out_features=4, bias=True), 'weight')]
    """
    check_module("model", model)
    left_out = [exclude] if isinstance(exclude, str) else list(exclude)
    paths = dict(model.named_modules())
    for path in left_out:
        if path not in paths:
            raise ValueError(f"exclude={path!r} is no module of {type(model).__name__}. Its modules: {list(paths)}.")

    sharers: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, module in paths.items():
        target = Target.found(module, name)
        if target is not None:
            sharers.setdefault(id(target.parameter), []).append((path, module))
    found: dict[tuple[nn.Module, str], None] = {}
    for group in sharers.values():
        wanted = any(isinstance(module, types) for _, module in group)
        if wanted and not any(f"{path}.".startswith(f"{out}.") for path, _ in group for out in left_out):
            found |= {(module, name): None for _, module in group}
    if not found:
        raise ValueError(f"types={types!r}, exclude={left_out!r} leave no {name!r} in {type(model).__name__}.")
    return list(found)


def bn_pairs(model: nn.Module, example_inputs: Any) -> list[tuple[nn.Module, nn.Module]]:
    """Find the ``(layer, bn)`` pairs in which a BatchNorm reads the output of a ``Linear`` or convolution directly.

    Runs the model once, in eval mode and without gradients, and watches which tensors go from module to module; the
    model is left as it was. What happens between modules (a ReLU called as a function, say) separates a pair.

    Args:
        model: any module.
        example_inputs: what to call it with: a tensor, a tuple of positional or a dictionary of keyword arguments.

    Returns:
        Pairs in the order of the forward pass. Left out are BatchNorms without scales and, with a warning, layers and
        BatchNorms that occur in several pairs, since no channel belongs to one pair only. What else reads a layer's
        output (``bn(y) + y``) is not noticed.

    Raises:
        TypeError: ``model`` is no module.
        Exception: whatever the model raises.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        >>> bn_pairs(model, torch.ones(1, 1, 8, 8)) == [(model[0], model[1])]
        True
    """
    check_module("model", model)
    made: dict[int, tuple[Tensor, int, nn.Module]] = {}  # holds the tensors, so that no id is used twice
    pairs: dict[tuple[nn.Module, nn.Module], None] = {}

    def remember(module: nn.Module, _: Any, output: Any) -> None:
        # what a Linear counts last is not what a BatchNorm counts, unless there are two axes
        if isinstance(output, Tensor) and (output.dim() == 2 or not isinstance(module, nn.Linear)):
            made[id(output)] = (output, output._version, module)

    def look_up(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        read = inputs[0] if inputs else keywords.get("input")
        _, version, layer = made.get(id(read), (None, -1, None))
        if (
            layer is not None and isinstance(read, Tensor) and version == read._version
        ):  # an in-place operation would separate the two
            pairs[layer, module] = None

    training = {module: module.training for module in model.modules()}
    products = [(vars(target.module), target.name, vars(target.module).get(target.name)) for target in pruned(model)]
    hooks = []
    try:
        for module in training:
            if isinstance(module, _BatchNorm) and Target.found(module, "weight") is not None:
                hooks.append(module.register_forward_pre_hook(look_up, with_kwargs=True))
            elif isinstance(module, (nn.Linear, _ConvNd)):
                hooks.append(module.register_forward_hook(remember))
        model.eval()
        with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng():
            if isinstance(example_inputs, Mapping):
                model(**example_inputs)
            elif isinstance(example_inputs, (tuple, list)):
                model(*example_inputs)
            else:
                model(example_inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
        for attributes, name, product in products:  # the forward pass has made new ones, without gradients
            attributes[name] = product

    layers, norms = [layer for layer, _ in pairs], [bn for _, bn in pairs]
    single = [(layer, bn) for layer, bn in pairs if layers.count(layer) == norms.count(bn) == 1]
    if len(single) < len(pairs):
        shared = [
            f"{type(layer).__name__} with {type(bn).__name__}" for layer, bn in pairs if (layer, bn) not in single
        ]
        warn(f"bn_pairs leaves out layers or BatchNorms used in several pairs: {shared}.")
    return single
