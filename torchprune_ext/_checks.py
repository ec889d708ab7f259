"""Checks of what users pass in, and the wording of the errors, shared by all modules.

The functions that compute know nothing of modules and names; they say what is wrong with a value. The call that
does know wraps them in :func:`errors_about`, which puts the name and shape in front. So each message names the
tensor, the parameter, its value, the reason and the remedy, and no function carries a label around.
"""

import math
import numbers
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@contextmanager
def errors_about(where: str) -> Iterator[None]:
    """Prefix every ``ValueError`` and ``TypeError`` raised inside with ``where``, e.g. ``Linear.weight of ...``."""
    try:
        yield
    except (ValueError, TypeError) as error:
        if type(error) not in (ValueError, TypeError):
            raise  # a subclass may carry more than a message
        raise type(error)(f"{where}: {error}") from error


def warn(message: str) -> None:
    """Warn at the line outside of this package that led here."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and Path(frame.f_code.co_filename).is_relative_to(Path(__file__).parent):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


def leave_out(tensor: str) -> str:
    """Return the remedy for a ``tensor``, called by its path, that a call cannot take: how to list the others.

    Example:
        >>> leave_out("layers.0.mlp.gate.weight")
        "Leave it out, e.g. by prunable_parameters(model, exclude='layers.*.mlp.gate')"
    """
    path = tensor.rpartition(".")[0]
    if not path:
        return "Leave it out"  # a tensor of the model itself
    pattern = re.sub(r"(?<![^.])\d+(?=\.)", "*", path)  # in all layers of a stack
    return f"Leave it out, e.g. by prunable_parameters(model, exclude={pattern!r})"


def check_module(param: str, module: nn.Module) -> None:
    """Raise ``TypeError`` unless ``module``, the caller's ``param``, is a module."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{param}={module!r} is a {type(module).__name__}. Pass a torch.nn.Module.")


def check_amount(amount: float, param: str = "amount") -> None:
    """Raise unless ``amount``, the caller's ``param``, is a float fraction in [0, 1] or an int >= 0, as in native."""
    if isinstance(amount, bool) or not isinstance(amount, numbers.Real):
        raise TypeError(
            f"{param}={amount!r} is a {type(amount).__name__}, neither a fraction (float) nor a number of units (int). "
            f"Pass e.g. {param}=0.3 or {param}=12."
        )
    if isinstance(amount, numbers.Integral):
        if amount < 0:
            raise ValueError(f"{param}={amount!r} is a negative number of units. Pass an int >= 0.")
    elif not 0 <= amount <= 1:  # False for NaN too
        raise ValueError(
            f"{param}={amount!r} is not a fraction: a float must lie in [0, 1]. Pass an int for a number of units."
        )


def resolve_amount(amount: float, left: int, units: str) -> int:
    """Return how many of the ``left`` unpruned ``units`` (plural noun) ``amount`` asks for; rounds as native does."""
    check_amount(amount)
    if not isinstance(amount, numbers.Integral):
        return round(amount * left)
    if amount > left:
        raise ValueError(
            f"amount={amount!r} asks for more than the {left} {units} not yet pruned. "
            f"Pass an int of at most {left}, or a fraction (float) of what is left."
        )
    return int(amount)


def check_fraction(param: str, value: float) -> None:
    """Raise unless ``value``, the caller's ``param``, is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{param}={value!r} is a {type(value).__name__}. Pass a fraction in [0, 1].")
    if not 0 <= value <= 1:
        raise ValueError(f"{param}={value!r} is not a fraction. Pass a number in [0, 1].")


def check_sparsity(param: str, value: float) -> None:
    """Raise unless ``value``, the caller's ``param``, is a number in [0, 1), which leaves something."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{param}={value!r} is a {type(value).__name__}. Pass a sparsity in [0, 1), e.g. 0.9.")
    if not 0 <= value < 1:
        raise ValueError(
            f"{param}={value!r} is not in [0, 1). Pass the fraction that shall be pruned, e.g. 0.9 for 90 %; 1 would "
            "leave nothing."
        )


def check_whole(param: str, value: int, least: int) -> None:
    """Raise unless ``value``, the caller's ``param``, is an int of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{param}={value!r} is a {type(value).__name__}. Pass an int >= {least}.")
    if value < least:
        raise ValueError(f"{param}={value!r} is too small. Pass an int >= {least}.")


def check_weight(param: str, value: float) -> None:
    """Raise unless ``value``, the caller's ``param``, is a finite number that is not negative."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{param}={value!r} is a {type(value).__name__}. Pass a number >= 0.")
    if not 0 <= value < math.inf:
        raise ValueError(f"{param}={value!r} is negative or not finite. Pass a finite number >= 0.")


def check_generator(generator: torch.Generator | None) -> None:
    """Raise ``TypeError`` unless ``generator`` is one, or None."""
    if not isinstance(generator, torch.Generator | None):
        raise TypeError(
            f"generator={generator!r} is a {type(generator).__name__}. Pass e.g. torch.Generator().manual_seed(0), or "
            "leave it out."
        )


def number_from(value: object, call: str) -> float:
    """Return the ``value`` that ``call``, of a function of the user's, gave, if it is a finite number; else raise."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{call} gave a {type(value).__name__}. Let it return a number, larger is better.")
    if not math.isfinite(value):
        raise ValueError(f"{call} gave {float(value)!r}. Let it return a finite number, such as an accuracy.")
    return float(value)


def check_order(n: float) -> None:
    """Raise unless ``n`` is an order that :func:`torch.linalg.vector_norm` takes."""
    if isinstance(n, bool) or not isinstance(n, numbers.Real):
        raise TypeError(f"n={n!r} is not an order of a norm. Pass a number, e.g. n=1, n=2 or n=float('inf').")
    if math.isnan(n):
        raise ValueError(f"n={n!r} is not an order of a norm. Pass a number, e.g. n=1, n=2 or n=float('inf').")


def check_tensor(param: str, tensor: Tensor, shape: torch.Size) -> None:
    """Raise unless ``tensor``, the caller's ``param``, is real floating point, holds data and has ``shape``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{param} is a {type(tensor).__name__}. Pass a tensor of shape {tuple(shape)}.")
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"{param}.dtype={tensor.dtype} cannot be ranked. Use one of {', '.join(str(d) for d in FLOATS)}."
        )
    if tensor.shape != shape:
        raise ValueError(
            f"{param}.shape={tuple(tensor.shape)} does not match: each entry of the tensor needs its own value. "
            f"Pass {param} in the shape {tuple(shape)}."
        )
    if tensor.is_meta:
        raise ValueError(f"{param}.device=meta holds no data to rank. Materialize the module first.")


def check_finite(param: str, tensor: Tensor) -> None:
    """Raise ``ValueError`` if ``tensor``, the caller's ``param``, holds a NaN or an infinity."""
    if tensor.numel() and not all(math.isfinite(end) for end in torch.stack(tensor.detach().aminmax()).tolist()):
        bad = int((~tensor.isfinite()).sum())
        raise ValueError(
            f"{param} has {bad} NaN or infinite entries of {tensor.numel()}, which have no rank. "
            f"Find out where they come from (a diverged training run, an overflow), and pass finite values."
        )


def check_scores(param: str, scores: Tensor, shape: torch.Size) -> None:
    """Raise unless ``scores``, the caller's ``param``, fit ``shape`` and are finite and >= 0."""
    check_tensor(param, scores, shape)
    check_finite(param, scores)
    if scores.numel() and (least := float(scores.detach().amin())) < 0:
        raise ValueError(
            f"{param} has the negative entry {least:g}, but a score says how much an entry is worth: it must be >= 0. "
            f"Pass {param}.abs() if the size is what counts, or shift the scores."
        )
