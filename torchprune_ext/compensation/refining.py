"""Fit what survived of whole blocks, or of the whole model, to the reference model's outputs by gradient steps."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Unpack

from torchprune_ext._batches import Batch, check_mask
from torchprune_ext._checks import check_module, check_whole, errors_about
from torchprune_ext._host import install, remember_dense, rewrite
from torchprune_ext._loading import Options, taken
from torchprune_ext._restoring import all_or_nothing
from torchprune_ext._runs import calibrating, refuse_lazy
from torchprune_ext.compensation.block_fitting import Recipe, Refined, Task
from torchprune_ext.compensation.block_outputs import Loss, counted, found_blocks, given_blocks
from torchprune_ext.compensation.descent import MakeOptimizer, adam
from torchprune_ext.compensation.reference import Dense, reference_tables
from torchprune_ext.compensation.streams import Tables
from torchprune_ext.compensation.survivors import Held, held_parameters, standing_in
from torchprune_ext.methods import GlobalPruning


def refine(
    model: nn.Module,
    loader: Iterable[Any],
    blocks: Iterable[nn.Module | str] | None = None,
    *,
    dense: Dense | None = None,
    epochs: int = 5,
    whole: bool = False,
    held_out: float | Iterable[Any] = 0.1,
    optimizer: MakeOptimizer | None = None,
    loss: Loss | None = None,
    **options: Unpack[Options],
) -> Refined:
    r"""Fit what survived, biases and norms by gradient steps to the reference model's outputs, without labels.

    Masks stay. :func:`.compensate` solves each layer by itself; this lets the tensors of a block, or of the whole
    model, make up for each other, and starts best from there. What is fitted to is what a block gives in the
    reference model on the same batch, in squares relative to their variation,
    :math:`\lVert y - \hat y \rVert^2 / \lVert y - \bar y \rVert^2`, where rows that ``sample_mask`` leaves out do not
    count.

    - One block after the other, each on what the blocks before it give when they are fitted. Gradients and an
      optimizer's state are held for one block at a time, and between two blocks the activations of all batches.
    - With ``whole``, all at once, to the mean error of the outputs of all blocks and of the model. What one batch
      needs is held, as in training; the reference model runs again for each batch.

    A part of the batches is kept aside. After each epoch the error on them is taken. It ends when that rises; with ten
    or more epochs, when it rises from epoch to epoch for a fifth of them, as the first steps of a good optimizer cost
    something that later ones win back. The best values are kept, those that were there if none are better. In sequence,
    where the model's output is worse in the end although each block is better, all is as it was too; as a whole, the
    output must not get worse for the sake of the blocks, but single blocks may.

    What may change is what requires grad: the survivors of pruned tensors, biases, norms, layers that are not pruned;
    in sequence those that only a block holds. The tables of embeddings stay, as most of their rows are not in the
    data, and so do tensors that are frozen, zeros that :func:`.remove` has remembered by ``keep_zeros``, and buffers:
    the model is in eval mode. Tensors in half precision are fitted in float32.

    Args:
        model: any module, commonly pruned, and not compiled.
        loader: at least two batches as for :mod:`torchprune_ext.calibration`; targets are not used. Each is a step.
        blocks: modules of the model or their names, each called once by every batch. By default the members of the
            model's lists of modules, such as the layers of a transformer, if they hold most of what is pruned; else the
            model is one block, as ``[model]`` is.
        dense: the reference model, see :func:`.compensate`; by default the model as it is, with the values under all of
            its masks.
        epochs: most passes over the batches that are not kept aside; each in another order, the same in every call.
        whole: fit all at once.
        held_out: fraction of the batches that is kept aside, in (0, 1); one at least. Or other batches for that: if
            ``loader`` is what :func:`.prune_and_compensate` has fitted to, the error there is too low from the start to
            tell what would get better elsewhere.
        optimizer: from a list of parameters to an optimizer of torch, whose ``step`` calls the closure that it is
            given. By default ``Adam(parameters, lr=1e-4, betas=(0.9, 0.98))``. The learning rate of any rises linearly
            in the first tenth of the steps, at most 30, and falls linearly to 0.
        loss: for the model's output instead of the relative error, from a tensor of it and that of the reference model
            to a number, such as a divergence of logits. With ``sample_mask`` it gets the rows that count. Where the
            blocks are fitted in sequence it only decides, and needs no gradient.
        **options: see :class:`.Options`, without ``process_group``.

    Returns:
        The errors on the batches kept aside, before and after, of each block and of the model; prints as a table.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range; ``dense`` does not fit, or is missing although a tensor has changed since
            it was pruned; a block that is called twice or never, is random, or holds nothing that could get better; a
            loss or an optimizer that does not do what it should; or what :func:`.compensate` refuses of data. The model
            is as it was then, as after any other error.

    Source: Hinton, Vinyals & Dean 2015, arXiv:1503.02531, for learning from a model's outputs; block by block as in
    Li et al. 2021, *BRECQ*, arXiv:2102.05426, section 3.2, there for quantization.

    Example:
        >>> import torchprune_ext as tpe
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> data, params = list(torch.randn(512, 8).split(32)), tpe.prunable_parameters(model)
        >>> tpe.global_unstructured(params, target_sparsity=0.5)
        >>> done = tpe.refine(
        ...     model, data, epochs=10, optimizer=lambda p: torch.optim.Adam(p, lr=1e-2), progress=False
        ... )
        >>> done.model.after < done.model.before / 2, int((model[0].weight == 0).sum()) > 0
        (True, True)
    """
    _check(model, epochs, held_out, optimizer, loss, whole, options)
    listed = found_blocks(model) if blocks is None else given_blocks(model, blocks)
    everything = held_parameters(model)
    fitted = [held for held in everything if held.fitted]
    if not fitted:
        raise ValueError("nothing in the model may change: all of it is frozen. Let what shall be fitted require grad.")
    if dense is None and not any(held.mask is not None for held in everything):
        raise ValueError(
            "nothing in the model is pruned, and without dense= the values under the masks are what it is fitted to. "
            "Pass dense=: a copy of the model made before pruning, or its state dict."
        )
    reference = _completed(reference_tables(model, [t for held in everything for t in held.listed], dense), fitted)
    raw = taken(loader, options)
    others = None
    if not isinstance(held_out, (int, float)):
        with errors_about("held_out"):
            others = taken(held_out, {**options, "max_batches": None})
    quiet: Options = {**options, "progress": False}  # the bar counts blocks or epochs
    with calibrating(model, None, quiet) as run, standing_in(everything) as free, _no_old_casts():
        batches, aside = (
            [_checked(batch) for batch in run.batches(each, "")] if each else [] for each in (raw, others)
        )
        task = Task(run, free, reference, Recipe(epochs, optimizer or adam, options.get("progress")), loss)
        batches, aside = ([batch for batch in each if counted(batch)] for each in (batches, aside))
        fit, kept_aside = _split(batches, held_out) if isinstance(held_out, (int, float)) else (batches, aside)
        for name, each in (("loader", fit), ("held_out", kept_aside)):
            if not each:
                raise ValueError(f"{name}: sample_mask leaves out every sample. Let it be True where a sample counts.")
        task.prepare(listed, fit, kept_aside, found=blocks is None, sequence=not whole)
        done = task.whole() if whole or not task.calls.inner else task.sequence()
        found = [(held, each.parameter.detach()) for held, each in free.items()] if done.model.best else []
    _install(found, reference, epochs)
    return done


def _check(
    model: nn.Module, epochs: int, held_out: object, optimizer: object, loss: object, whole: object, options: Options
) -> None:
    """Raise unless the arguments fit."""
    check_module("model", model)
    refuse_lazy(model)
    check_whole("epochs", epochs, 1)
    if isinstance(held_out, (bool, str)) or not isinstance(held_out, (int, float, Iterable)):
        raise TypeError(
            f"held_out={held_out!r} is a {type(held_out).__name__}. Pass a fraction of the batches, or other batches."
        )
    if isinstance(held_out, (int, float)) and not 0 < held_out < 1:
        raise ValueError(
            f"held_out={held_out!r} is not in (0, 1). Pass the fraction of the batches that is kept aside to tell "
            "whether the model gets better, e.g. 0.1."
        )
    if not isinstance(whole, bool):
        raise TypeError(f"whole={whole!r} is a {type(whole).__name__}. Pass True or False.")
    if optimizer is not None and (not callable(optimizer) or isinstance(optimizer, Optimizer)):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}. Pass a function that makes one of the parameters that it "
            "gets, e.g. lambda parameters: torch.optim.Adam(parameters, lr=1e-4)."
        )
    if loss is not None and not callable(loss):
        raise TypeError(f"loss={loss!r} is a {type(loss).__name__}. Pass a function of two tensors.")
    if options.get("process_group") is not None:
        raise ValueError("process_group= is not supported here: a model is fitted in one process. Leave it out.")
    for name, module in model.named_modules():
        inside = f"{name}._orig_mod".lstrip(".")
        if "_orig_mod" in module._modules:
            raise ValueError(
                f"{name or 'model'} is compiled, so its blocks cannot be watched. Pass what was compiled, which shares "
                f"its tensors: model.{inside}."
            )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("model is wrapped for several processes. Pass the model inside, model.module.")


def _checked(batch: Batch) -> Batch:
    """Return ``batch``, with a mask that fits it."""
    check_mask(batch.mask, batch.size)
    return batch


@contextmanager
def _no_old_casts() -> Iterator[None]:
    """Let autocast cast parameters anew each time, as they change while the caller's autocast lasts."""
    before = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _split(batches: Sequence[Batch], held_out: float) -> tuple[list[Batch], list[Batch]]:
    """Return the batches to fit to and those to keep aside, which are spread evenly over all."""
    if len(batches) < 2:
        raise ValueError(
            f"loader gave {len(batches)} batch that counts, but one is kept aside to tell whether the model gets "
            "better. Pass at least two, smaller ones if need be."
        )
    number = min(max(round(held_out * len(batches)), 1), len(batches) - 1)
    aside = {int((place + 0.5) * len(batches) / number) for place in range(number)}
    return (
        [batch for place, batch in enumerate(batches) if place not in aside],
        [batch for place, batch in enumerate(batches) if place in aside],
    )


def _completed(reference: Tables, fitted: Sequence[Held]) -> Tables:
    """Return ``reference`` with what it does not have of ``fitted``, as that is now."""
    known = {(id(place), key) for place, key, _ in reference}
    more = [
        (target.module._parameters, target.name, nn.Parameter(target.weight(), requires_grad=False))
        for held in fitted
        for target in held.listed
        if (id(target.module._parameters), target.name) not in known
    ]
    return [*reference, *more]


def _install(found: Sequence[tuple[Held, Tensor]], reference: Tables, epochs: int) -> None:
    """Give parameters new values, and those that are pruned an entry in their history, or change nothing."""
    changed = [(held, new) for held, new in found if not torch.equal(held.listed[0].weight(), new)]
    dense = {(id(place), key): value for place, key, value in reference}
    with all_or_nothing(target.module for held, _ in changed for target in held.listed):
        entries = []
        for held, _ in changed:
            for target in held.listed:
                if target.mask is not None:
                    remember_dense(target, dense.get((id(target.module._parameters), target.name), target.parameter))
                    entries.append((target, GlobalPruning("refine", epochs=epochs), target.mask))
        install(entries, values_change=True)
        rewrite(
            [(target, values, None) for held, new in changed for values in [held.values(new)] for target in held.listed]
        )
