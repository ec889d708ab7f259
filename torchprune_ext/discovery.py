"""Find what a model has to prune: its tensors, and which BatchNorm stands behind which layer."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy

from torchprune_ext._checks import check_module, warn
from torchprune_ext._host import Target, targets_in
from torchprune_ext._runs import left_as_it_was, refuse_lazy

NO_PRODUCT = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)  # whose weight is not a factor of a product


def prunable_parameters(
    model: nn.Module,
    types: type[nn.Module] | tuple[type[nn.Module], ...] | None = None,
    exclude: str | nn.Module | Iterable[str | nn.Module] = (),
    name: str = "weight",
    *,
    tied: bool = True,
) -> list[tuple[nn.Module, str]]:
    """Return the ``(module, name)`` pairs of ``model`` that a global call takes.

    Args:
        model: any module.
        types: types of the modules whose tensor is wanted; by default ``Linear``, all convolutions, transposed ones
            included, and every other module in which the tensor has two axes, as ``Conv1D`` of transformers, but no
            embeddings and norms.
        exclude: modules to leave out with all that is below them: paths, e.g. ``"classifier"`` or ``"layer1.0"``,
            patterns of paths, e.g. ``"*.attention.*"`` or ``"*lora_*"`` (the adapters of peft), or modules.
        name: name of the tensor.
        tied: with False, leave out tensors that several modules share, e.g. a head tied to the embedding.

    Returns:
        Pairs in the order of the model. A tensor that another module of the model shares (tied weights) is followed
        by that module, whatever its type, so that both are pruned alike; exclude either to leave both out. Left out is
        ``out_proj`` of ``MultiheadAttention``, whose weight is read without calling it, so that PyTorch's hook alone
        does not do (add it by hand: calls of this package make it work); and what is in scripted modules.

    Warns:
        UserWarning: by default ``types``, less than half of the model's matrices (entries of parameters with two axes
            or more, excluded ones aside) are found. Tells the types that are left out, their shares, and how to list
            them: fused experts, ``in_proj_weight``, recurrent and parametrized weights have other names than ``name``.

    Raises:
        TypeError: ``model`` is not a module, or ``types`` or ``exclude`` hold something else than said above.
        ValueError: something in ``exclude`` is not in the model, or nothing is left.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> prunable_parameters(model, exclude="2")
        [(Linear(in_features=4, out_features=4, bias=True), 'weight')]
    """
    check_module("model", model)
    for kind in types if isinstance(types, tuple) else (types,):
        if kind is not None and not isinstance(kind, type):
            raise TypeError(f"types={types!r} must be a type of modules, e.g. nn.Linear, or a tuple of types.")
    excluded = _excluded(model, exclude)
    owners: dict[int, list[tuple[nn.Module, str]]] = {}  # of each parameter, by all its names
    parameters: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for target in targets_in(module):
            parameters[id(target.parameter)] = target.parameter
            owners.setdefault(id(target.parameter), []).append((module, target.name))

    found: dict[tuple[nn.Module, str], None] = {}
    total, left_out = 0, dict[tuple[type[nn.Module], str], int]()  # entries of matrices
    for key, group in owners.items():
        if any(module in excluded for module, _ in group):
            continue
        parameter, axes = parameters[key], _axes(parameters[key])
        wanted = any(own == name and _is_wanted(module, types, axes) for module, own in group)
        if wanted and (tied or len(group) == 1):
            found |= dict.fromkeys(group)
        if axes >= 2:
            total += parameter.numel()
            if not wanted:
                label = (type(group[0][0]), group[0][1])
                left_out[label] = left_out.get(label, 0) + parameter.numel()
    if not found:
        raise ValueError(
            f"types={types!r}, exclude={exclude!r}, tied={tied!r} leave no {name!r} in {type(model).__name__}."
        )
    if types is None and name == "weight":
        _warn_of_shares(model, total, left_out)
    return list(found)


def _axes(parameter: nn.Parameter) -> int:
    """Return the number of axes of ``parameter``; 0 if it is not known yet."""
    return 0 if is_lazy(parameter) else parameter.dim()


def _is_wanted(module: nn.Module, types: type[nn.Module] | tuple[type[nn.Module], ...] | None, axes: int) -> bool:
    """Return whether a tensor with so many ``axes`` of ``module`` is to be listed."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    if isinstance(module, NonDynamicallyQuantizableLinear):  # out_proj: its parent reads the weight, and runs no hook
        return types is NonDynamicallyQuantizableLinear
    if types is not None:
        return isinstance(module, types)
    if isinstance(module, (nn.Linear, _ConvNd)):
        return True
    return axes == 2 and not isinstance(module, NO_PRODUCT) and "Embed" not in type(module).__name__


def _excluded(model: nn.Module, exclude: str | nn.Module | Iterable[str | nn.Module]) -> set[nn.Module]:
    """Return the modules that ``exclude`` names, and all below them."""
    if not isinstance(exclude, (str, nn.Module, Iterable)):
        raise TypeError(
            f"exclude={exclude!r} is a {type(exclude).__name__}. Pass paths, patterns of paths, or modules."
        )
    paths = dict(model.named_modules(remove_duplicate=False))
    found: set[nn.Module] = set()
    for each in [exclude] if isinstance(exclude, (str, nn.Module)) else exclude:
        if isinstance(each, nn.Module):
            matches = [module for module in paths.values() if module is each]
            known = "Pass a module of the model, or its path."
        elif isinstance(each, str):
            matches = [module for path, module in paths.items() if path == each or fnmatchcase(path, each)]
            near = get_close_matches(each, paths, cutoff=0.5) or [path for path in paths if path][:5]
            known = f"Did you mean {near}? " if near else ""
            known += "Pass a path or a pattern of paths, such as named_modules() gives them."
        else:
            raise TypeError(
                f"exclude holds {each!r}, a {type(each).__name__}. Pass paths, patterns of paths, or modules."
            )
        if not matches:
            raise ValueError(f"exclude={each!r} matches no module of {type(model).__name__}. {known}")
        found |= {below for module in matches for below in module.modules()}
    return found


def _warn_of_shares(model: nn.Module, total: int, left_out: Mapping[tuple[type[nn.Module], str], int]) -> None:
    """Warn if ``left_out``, by type and name, is more than half of the ``total`` of entries of matrices."""
    found = total - sum(left_out.values())
    if 2 * found >= total:
        return
    largest = sorted(left_out, key=lambda key: -left_out[key])
    told = [f"{kind.__name__}.{own} ({left_out[kind, own] / total:.0%})" for kind, own in largest]
    kind, own = largest[0]
    warn(
        f"prunable_parameters finds {found / total:.0%} of the matrices of {type(model).__name__}. Left out are "
        f"{', '.join(told[:8])}{', ...' * (len(told) > 8)}. Add them where they are to be pruned, e.g. "
        f"prunable_parameters(model, types={kind.__name__}, name={own!r}), or leave them out by exclude=."
    )


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
        TypeError: ``model`` is not a module.
        ValueError: a lazy layer of the model has no shape yet.
        Exception: whatever the model raises.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        >>> bn_pairs(model, torch.ones(1, 1, 8, 8)) == [(model[0], model[1])]
        True
    """
    check_module("model", model)
    refuse_lazy(model)
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
    hooks = []
    try:
        for module in training:
            if isinstance(module, _BatchNorm) and Target.found(module, "weight") is not None:
                hooks.append(module.register_forward_pre_hook(look_up, with_kwargs=True))
            elif isinstance(module, (nn.Linear, _ConvNd)):
                hooks.append(module.register_forward_hook(remember))
        model.eval()
        with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(), left_as_it_was(model):
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

    layers, norms = [layer for layer, _ in pairs], [bn for _, bn in pairs]
    single = [(layer, bn) for layer, bn in pairs if layers.count(layer) == norms.count(bn) == 1]
    if len(single) < len(pairs):
        shared = [
            f"{type(layer).__name__} with {type(bn).__name__}" for layer, bn in pairs if (layer, bn) not in single
        ]
        warn(f"bn_pairs leaves out layers or BatchNorms used in several pairs: {shared}.")
    return single
