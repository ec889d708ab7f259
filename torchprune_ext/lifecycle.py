"""What happens to pruned modules afterwards: find them, tell their past, make pruning permanent, or take it back."""

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from torchprune_ext._checks import check_module, warn
from torchprune_ext._host import (
    Target,
    modules_holding,
    pruned,
    refuse_half_tied,
    rest_of,
    targets_of,
    uninstall,
    was_refitted,
)

UNTIE = (
    "Prune both by one global call that lists both, or untie them first: "
    "module.weight_orig = nn.Parameter(module.weight_orig.detach().clone())."
)


def pruned_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield path, module and tensor name of all that is pruned in ``model``, by whatever method.

    Args:
        model: any module; one that occurs twice in it is visited once.

    Yields:
        The module's path, e.g. ``"features.3"`` (empty for ``model`` itself), the module, and the tensor's name
        without suffix, e.g. ``"weight"``.

    Raises:
        TypeError: ``model`` is not a module.

    Example:
        >>> from torch.nn.utils import prune
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> _ = prune.l1_unstructured(model[0], "weight", 0.5)
        >>> [(path, name) for path, _, name in pruned_parameters(model)]
        [('0', 'weight')]
    """
    check_module("model", model)
    for path, module in model.named_modules():
        for target in pruned(module, recurse=False):
            yield path, module, target.name


def history(module: nn.Module, name: str) -> list[str]:
    """Return the calls that pruned a tensor, oldest first, each as its name and arguments.

    Args:
        module: any module.
        name: the tensor's name without suffix, e.g. ``"weight"``.

    Returns:
        One entry for each call, native ones included, that pruned more than was pruned before. Tensors are told by
        ``...`` only. Empty for a tensor that is not pruned, and for one whose hook a failed native call has deleted.

    Raises:
        TypeError: ``module`` is not a module or ``name`` not a string.
        ValueError: the module has no such tensor.

    Example:
        >>> import torch
        >>> from torch.nn.utils import prune
        >>> from torchprune_ext import nm_structured
        >>> layer = prune.l1_unstructured(nn.Linear(8, 4), "weight", amount=0.2)
        >>> _ = nm_structured(layer, "weight", 2, 4, importance_scores=torch.rand(4, 8))
        >>> history(layer, "weight")
        ['L1Unstructured(amount=0.2)', 'NMStructured(n=2, m=4, dim=1, pad=False, groups=1, importance_scores=...)']
    """
    target = Target.found(module, name) or Target.of(module, name)  # which tells why there is no such tensor
    return target.told()


def remove(module: nn.Module, name: str, *, keep_zeros: bool = False) -> nn.Module:
    """Make pruning permanent: ``weight`` becomes a plain parameter again, with zeros where it was pruned.

    As :func:`torch.nn.utils.prune.remove`, but the order of the parameters stays. The parameter is the same object as
    before pruning, so optimizers keep it. Unless they are kept, its zeros change as soon as training goes on.

    Args:
        module: module with a pruned tensor.
        name: the tensor's name without suffix, e.g. ``"weight"``.
        keep_zeros: remember where the zeros are, in a boolean buffer ``weight_zeros`` that is not in the state dict,
            for :func:`~torchprune_ext.deploy.zeros.keep_zeros`, which holds them at 0 while an optimizer trains.

    Returns:
        The module.

    Warns:
        UserWarning: ``weight`` was written to since the last forward, as merging an adapter (LoRA) does, which is lost.

    Raises:
        TypeError: ``module`` is not a module or ``name`` not a string.
        ValueError: the tensor is not pruned, or another module holds the same parameter (tied weights) and would be
            zeroed too.

    Example:
        >>> from torchprune_ext import every_other
        >>> layer = remove(every_other(nn.Linear(2, 2), "weight"), "weight")
        >>> list(dict(layer.named_parameters())), int((layer.weight == 0).sum())
        (['weight', 'bias'], 2)
    """
    target = _only(module, name)
    holders = [(type(other).__name__, other) for other in modules_holding(target.parameter)]
    refuse_half_tied(holders, [target], UNTIE)
    _end([target], keep_masked=True, keep_zeros=keep_zeros)
    return module


def undo(module: nn.Module, name: str) -> nn.Module:
    """Take pruning back: ``weight`` becomes a plain parameter again, with its dense values as trained so far.

    Args:
        module: module with a pruned tensor.
        name: the tensor's name without suffix, e.g. ``"weight"``.

    Returns:
        The module; the parameter is the same object as before pruning.

    Warns:
        UserWarning: other tensors that the same call pruned as one with this (bias and BatchNorm of :func:`.bn_scaling`
            and :func:`.global_bn_scaling`, the other places of a tied tensor) stay pruned; or as :func:`remove`.

    Raises:
        TypeError: ``module`` is not a module or ``name`` not a string.
        ValueError: the tensor is not pruned.

    Example:
        >>> from torchprune_ext import every_other
        >>> layer = nn.Linear(2, 2)
        >>> weight, dense = layer.weight, layer.weight.detach().clone()
        >>> layer = undo(every_other(layer, "weight"), "weight")
        >>> layer.weight is weight, bool((layer.weight == dense).all())
        (True, True)
    """
    _end([_only(module, name)], keep_masked=False)
    return module


def remove_all(
    model: nn.Module, params: Iterable[tuple[nn.Module, str]] | None = None, *, keep_zeros: bool = False
) -> nn.Module:
    """Make all pruning in ``model`` permanent, or none on any error; see :func:`remove`.

    Args:
        model: any module.
        params: ``(module, name)`` pairs within ``model`` to restrict it to; by default everything that is pruned.
        keep_zeros: as in :func:`remove`.

    Returns:
        The model.

    Raises:
        TypeError: ``model`` is not a module, or a pair is not a pair of a module and a string.
        ValueError: nothing is pruned, a pair is not pruned or not in the model, or another module of the model shares
            a parameter and would be zeroed with it (tied weights).

    Example:
        >>> from torchprune_ext import every_other
        >>> model = nn.Sequential(every_other(nn.Linear(2, 2), "weight"), every_other(nn.Linear(2, 2), "bias"))
        >>> list(remove_all(model).state_dict())
        ['0.weight', '0.bias', '1.weight', '1.bias']
    """
    targets = _all(model, params)
    refuse_half_tied(
        model.named_modules(),
        targets,
        UNTIE,
    )
    _end(targets, keep_masked=True, keep_zeros=keep_zeros)
    return model


def undo_all(model: nn.Module, params: Iterable[tuple[nn.Module, str]] | None = None) -> nn.Module:
    """Take all pruning in ``model`` back, or none on any error; see :func:`undo`.

    Args:
        model: any module.
        params: ``(module, name)`` pairs within ``model`` to restrict it to; by default everything that is pruned.

    Returns:
        The model.

    Raises:
        TypeError: ``model`` is not a module, or a pair is not a pair of a module and a string.
        ValueError: nothing is pruned, or a pair is not pruned or not in the model.

    Example:
        >>> from torchprune_ext import every_other
        >>> model = nn.Sequential(every_other(nn.Linear(2, 2), "weight"), nn.ReLU())
        >>> any((p == 0).any() for p in undo_all(model).parameters())
        False
    """
    _end(_all(model, params), keep_masked=False)
    return model


def _end(targets: list[Target], *, keep_masked: bool, keep_zeros: bool = False) -> None:
    """Uninstall the pruning of ``targets``, and warn of what a user would not expect of that."""
    written = [target.where for target in targets if _was_written(target)]
    if written:
        warn(
            f"{'; '.join(written)}: the tensor was written to since the last forward, as it is not zero where its mask "
            "is. Where an adapter (LoRA) was merged into it, that is lost, as the dense values count: end pruning "
            "before you merge. Where a checkpoint was loaded, all is well."
        )
    if not keep_masked and (rest := rest_of(targets)):
        warn(
            f"undo of {'; '.join(target.where for target in targets)}: pruned as one with it, and still pruned, are "
            f"{'; '.join(rest)}. Undo these too, or all at once by undo_all(model)."
        )
    if not keep_masked and (mixed := [target.where for target in targets if was_refitted(target)]):
        warn(
            f"undo of {'; '.join(mixed)}: the survivors were re-fitted to make up for what now comes back, so this is "
            "not the dense model. To have that, load a copy or a state dict from before pruning."
        )
    uninstall(targets, keep_masked=keep_masked, keep_zeros=keep_zeros)


def _was_written(target: Target) -> bool:
    """Return whether the product of the last forward holds values that the host has not put there."""
    product = vars(target.module).get(target.name)
    if target.mask is None or not isinstance(product, Tensor) or product.shape != target.mask.shape:
        return False
    return bool((product.detach() != 0).logical_and_(target.mask == 0).any())


def _pruned(module: nn.Module, name: str) -> Target | None:
    target = Target.found(module, name)
    return None if target is None or target.mask is None else target


def _only(module: nn.Module, name: str) -> Target:
    """Return tensor ``name`` of ``module``, or say why there is nothing to do."""
    target = _pruned(module, name)
    if target is None:
        names = [known for path, _, known in pruned_parameters(module) if not path]
        raise ValueError(
            f"name={name!r} of {type(module).__name__} is not pruned, so there is nothing to end. "
            + (f"Choose one of {names}." if names else "Pass a module that pruned_parameters(model) finds.")
        )
    return target


def _all(model: nn.Module, params: Iterable[tuple[nn.Module, str]] | None) -> list[Target]:
    """Return the pruned tensors of ``model``, or those of ``params``, each once."""
    found = {(module, name): path for path, module, name in pruned_parameters(model)}
    if not found:
        raise ValueError(f"model of type {type(model).__name__} has nothing pruned. Prune first, or skip this call.")
    if params is None:
        return [_only(module, name) for module, name in found]
    targets = list(targets_of(params).values())
    for target in targets:
        _only(target.module, target.name)
        if (target.module, target.name) not in found:
            raise ValueError(
                f"params holds {target.where}, which is not a part of the model {type(model).__name__}. "
                "Pass pairs of modules within the model."
            )
    return targets
