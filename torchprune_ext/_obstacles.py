"""Why a tensor of a module cannot be pruned, and what to do about it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod


def obstacle(name: str, parameter: nn.Parameter) -> str | None:
    """Return why a mask would not fit ``parameter``, called ``name``, and what to do; None if it would."""
    kind = type(parameter)
    if hasattr(parameter, "device_mesh"):
        return (
            "is a DTensor, already sharded over a device mesh, and the host's mask would not be. "
            "Prune first, then call fully_shard or parallelize_module."
        )
    if hasattr(parameter, "ds_id") or getattr(parameter, "_fsdp_flattened", False):
        return (
            "is a placeholder or a shard of DeepSpeed ZeRO-3 or FSDP, which does not hold all of its weights. "
            "Prune first, then call deepspeed.initialize or wrap the model."
        )
    if parameter.layout != torch.strided:
        return (
            f"has layout={parameter.layout}, which a mask would not fit. "
            f"Make it dense first: module.{name} = nn.Parameter(module.{name}.detach().to_dense())."
        )
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return (
            f"is a {kind.__name__}, which stands for weights in another format (quantized, sparse, or fake), and a "
            "mask would not reach them. Prune first, then convert."
        )
    if parameter.is_inference():
        return (
            "was made inside torch.inference_mode(), so that it can never be trained. Make it anew outside of it: "
            f"module.{name} = nn.Parameter(module.{name}.detach().clone())."
        )
    return None


def masks_by_itself(module: nn.Module, name: str) -> bool:
    """Return whether the class of ``module``, or a hook of the user's on it, names the mask of ``name`` in its code."""
    hooks = [hook for hook in module._forward_pre_hooks.values() if not isinstance(hook, BasePruningMethod)]
    classes = [kind for part in (module, *hooks) for kind in type(part).__mro__ if kind is not nn.Module]
    members = [member for kind in classes for member in vars(kind).values()]
    for function in (*members, *hooks, vars(module).get("forward")):
        function = getattr(function, "fget", function)  # of a property
        code = getattr(getattr(function, "__func__", function), "__code__", None)
        if code is not None and {f"{name}_mask", "_mask"} & {*code.co_names, *code.co_consts}:
            return True
    return False


def why_not(module: nn.Module, name: str) -> str:
    """Return why tensor ``name`` of ``module`` cannot be pruned, and what can."""
    kind = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        return (
            "the module is scripted (torch.jit), so no hook can apply a mask. "
            "Prune before scripting, and make it permanent by remove_all(model)."
        )
    if name not in module._parameters and {f"{name}_orig", f"{name}_mask"} <= {*module._parameters, *module._buffers}:
        return (
            f"{kind} computes name={name!r} from {name + '_orig'!r} by a mask of its own, not by torch.nn.utils.prune. "
            f"Prune {name + '_orig'!r}, or what is zero in its own mask."
        )
    if is_parametrized(module, name):
        parametrizations: Any = module.parametrizations
        parts = [n for n, _ in parametrizations[name].named_parameters(recurse=False)]
        # of weight_norm's two, the second holds the directions; a single one is simply called "original"
        return (
            f"name={name!r} is computed by a parametrization. "
            f"Prune what it is computed from: module.parametrizations.{name}, {parts[-1]!r}."
        )
    sources = [n for n in (f"{name}_v", f"{name}_orig") if n in module._parameters]
    if sources:
        return (
            f"name={name!r} is not a parameter but computed from {sources[0]!r} at every forward, by an old-style "
            "weight_norm or spectral_norm. Use torch.nn.utils.parametrizations instead and prune what that computes "
            f"from: 'original1' (weight_norm) or 'original' (spectral_norm) of module.parametrizations.{name}."
        )
    known = [n.removesuffix("_orig") for n, p in module.named_parameters(recurse=False)]
    if name in module._parameters:
        return f"name={name!r} is None in this {kind}. Choose one of {known}."
    hint = f"Choose one of {known}." if known else "It has none of its own; pass the submodule that owns it."
    return f"name={name!r} is not a parameter of this {kind}. {hint}"
