"""Reads from a model what a report says, and leaves it as it was."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from torchprune_ext._checks import check_module, check_whole, errors_about
from torchprune_ext._host import Target, as_plain, outside_of_inference, targets_in
from torchprune_ext._runs import refuse_lazy
from torchprune_ext.deploy.compare import check_runs, first_forward, forward_of, forward_only, with_threads
from torchprune_ext.deploy.counting import macs_by_weight
from torchprune_ext.deploy.timing import medians
from torchprune_ext.reporting.structure import count_zero, patterns_in, units_of
from torchprune_ext.reporting.values import Count, Report, Row


def report(model: nn.Module, example_inputs: Any = None, *, threads: int | None = None, rounds: int = 15) -> Report:
    """Tell what pruning did to a model, tensor by tensor: how much is left, in which structure, and what it costs.

    Every parameter is read, whatever module owns it. An entry counts as pruned where its mask is 0, by whatever method
    and in however many steps it was made; in a tensor without a mask, where its value is exactly 0, so that a model
    says the same after :func:`.remove_all`. Not counted as pruned are a vector of nothing but zeros, as biases are
    initialized, and the padding row of an ``Embedding``. A tensor that several modules share counts once; if they prune
    it by different masks, an entry is kept that one of them keeps. Where a parametrization computes a weight, what it
    computes it from is read, under its own name, as ``"0.parametrizations.weight.original1"``.

    A row's ``nm`` holds the N:M patterns of its tensor, for groups of M = 2, 4, 8 and 16 consecutive entries along each
    axis that is as long: no group keeps more than N, where N is a power of two and at most M / 2, or each group keeps
    exactly N < M. So 2:4 is also 4:8, and 1:4 is also 2:4; the table shows those that the others follow from. A short
    last group counts as filled with zeros (``pad=True`` there). Left out is what says nothing: a pattern that as many
    entries (or rows, or kernels, where whole ones are gone), strewn at random, would show with a probability of 5 % or
    more. So a tensor of which all or nothing is kept has none, and one that is almost empty has not each loose one;
    whether a layer *can* run as 2:4 is what :func:`.semi_structured_report` tells.

    Args:
        model: any module, pruned or not, by whatever method.
        example_inputs: one batch, to count multiplications and to measure latency as :func:`.deploy.compare.compare`
            does: a tensor, a tuple of positional arguments or a dictionary of keywords. Without it nothing is run.
        threads: of torch on the CPU while latency is measured; by default as many as now.
        rounds: how often it is measured, at least 2.

    Returns:
        The report; ``print`` it for the table.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a parameter has no data (lazy, or on the meta device), or other processes hold parts of it.
        RuntimeError: the model fails on ``example_inputs``.

    Example:
        >>> import torchprune_ext as tpe
        >>> model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
        >>> _ = tpe.nm_structured(model[0], "weight", n=2, m=4)
        >>> _ = torch.nn.utils.prune.ln_structured(model[2], "weight", amount=3, n=2, dim=1)
        >>> found = report(model)
        >>> found["2.weight"].units["columns"], found["0.weight"].history
        (Count(zero=3, total=64), ('NMStructured(n=2, m=4, dim=1, pad=False, groups=1)',))
        >>> print(found)
        tensor    layer   shape  kept  entries  density  whole zeros      N:M        by
        0.weight  Linear  64x8    256      512   50.0 %                   2:4 dim 1  mask
        2.weight  Linear  2x64    122      128   95.3 %  3 of 64 columns             mask
        weights: 378 of 640 entries kept, 59.06 %
        all parameters: 444 of 706, 62.89 %; not shown: 2 dense vectors
        bytes: 1.78 kB kept of 2.82 kB, masks and indices aside
    """
    check_module("model", model)
    check_whole("rounds", rounds, 2)
    threads = torch.get_num_threads() if threads is None else threads
    check_whole("threads", threads, 1)
    if example_inputs is not None:
        check_runs("model", model)
    with errors_about("model"):
        refuse_lazy(model)
    with torch.no_grad():
        rows = tuple(_rows(model))
    found = Report(type(model).__name__, rows)
    return found if example_inputs is None else _with_costs(found, model, example_inputs, threads, rounds)


def _rows(model: nn.Module) -> Iterator[Row]:
    """Yield a row for each parameter, in the order of the model."""
    holders: dict[int, list[tuple[str, Target]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for target in targets_in(module):
            name = f"{path}.{target.name}".lstrip(".")
            holders.setdefault(id(target.parameter), []).append((name, target))
    for places in holders.values():
        names = list(dict.fromkeys(name for name, _ in places))
        yield _row(names, list({(id(target.module), target.name): target for _, target in places}.values()))


def _row(names: list[str], targets: list[Target]) -> Row:
    """Return the row of one parameter, called ``names``, which each of ``targets`` holds."""
    first = targets[0]
    parameter, module = first.parameter, first.module
    alive, source, nonzero = _alive(names[0], targets)
    total = parameter.numel()
    kept = total if alive is None else int(alive.count_nonzero())
    units = {"entries": Count(total - kept, total)}
    shape = tuple(parameter.shape) if alive is None else tuple(alive.shape)
    for kind, unit in units_of(module, len(shape)).items():
        if alive is not None and total:
            units[kind] = Count(*count_zero(alive, unit))
    parts = module.groups if isinstance(module, _ConvTransposeNd) and len(shape) > 2 else 1
    masked = next((target for target in targets if target.mask is not None), None)
    return Row(
        names[0],
        type(module).__name__,
        shape,
        parameter.dtype,
        "dense" if source == "zeros" and kept == total else source,
        kept,
        total,
        kept if nonzero is None else nonzero,
        units,
        () if alive is None else patterns_in(alive, parts, kept),
        () if masked is None else tuple(masked.told()),
        tuple(names[1:]),
    )


def _alive(name: str, targets: list[Target]) -> tuple[Tensor | None, str, int | None]:
    """Return which entries of a parameter are kept, where that is read, and how many of these are not zero.

    None instead of entries if its format does not show them, and instead of a number if all are not zero.
    """
    parameter = targets[0].parameter.detach()
    if parameter.is_meta:
        raise ValueError(f"model: {name} is on the meta device and has no values to count. Load them first.")
    given = targets[0].parameter
    if any(hasattr(given, mark) for mark in ("device_mesh", "ds_id")) or getattr(given, "_fsdp_flattened", False):
        raise ValueError(
            f"model: {name} is sharded, so that other processes hold parts of it. Report on the model before it is "
            "sharded, or on one that its full state dict was loaded into."
        )
    if is_traceable_wrapper_subclass(parameter) or parameter.is_quantized:
        return None, "unread", None
    try:
        nonzero = (parameter if parameter.layout == torch.strided else parameter.to_dense()).to(torch.bool)
    except NotImplementedError:  # of packed dtypes, as float4
        return None, "unread", None
    masks = [target.mask for target in targets if target.mask is not None]
    if len(masks) == len(targets):
        alive = masks[0].to(nonzero.device, torch.bool)
        for mask in masks[1:]:
            alive = alive | mask.to(alive.device, torch.bool)
        return alive, "mask", int((alive & nonzero).count_nonzero())
    if masks:  # a module that does not prune it reads all of it
        return torch.ones_like(nonzero), "mask", int(nonzero.count_nonzero())
    if nonzero.dim() < 2 and not nonzero.any():
        return torch.ones_like(nonzero), "zeros", 0
    padding = getattr(targets[0].module, "padding_idx", None)
    if isinstance(targets[0].module, (nn.Embedding, nn.EmbeddingBag)) and padding is not None:
        written = int(nonzero.count_nonzero())
        nonzero[padding] = True
        return nonzero, "zeros", written
    return nonzero, "zeros", None


def _with_costs(found: Report, model: nn.Module, example_inputs: Any, threads: int, rounds: int) -> Report:
    """Return the report with what a forward pass of ``model`` costs."""
    call = forward_of(model, example_inputs)
    with outside_of_inference(), forward_only([model]):  # in inference mode, layers are not taken to their products
        with with_threads(threads):
            macs = first_forward("model", model, call)
            by_name = None if macs is None else _macs_by_name(model, call, macs)
        times = medians({"": call}, rounds=rounds, threads=threads)[""]
    costs: dict[str, Any] = {"latency": times.median, "spread": times.spread, "threads": threads, "rounds": rounds}
    if by_name is None:
        return replace(found, macs=macs, **costs)
    rows = tuple(replace(row, macs=sum(by_name.get(name, 0) for name in (row.name, *row.tied))) for row in found.rows)
    saved = sum((row.macs or 0) * row.sparsity for row in rows)
    return replace(found, rows=rows, macs=macs, effective_macs=round((macs or 0) - saved), **costs)


def _macs_by_name(model: nn.Module, call: Callable[[], object], macs: int) -> dict[str, int] | None:
    """Return how many of the multiplications that ``call`` makes are with each parameter; None if not all are seen."""
    try:
        with as_plain(model):  # in which weights, and no products with masks, are multiplied with
            found, total = macs_by_weight(model, call)
    except Exception:  # of what cannot be taken to its parts
        return None
    return found if total == macs else None
