"""Blocks of a model: which there are, what they give, and how far that is from what they gave in another model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from torchprune_ext._batches import Batch, leaves, mask_rows, tree_map
from torchprune_ext._host import pruned
from torchprune_ext._rows import MIXED, sample_axis, seen
from torchprune_ext._runs import Run, wide
from torchprune_ext.compensation.attributes import Attributes
from torchprune_ext.compensation.blocks import replaced

Loss = Callable[[Tensor, Tensor], Tensor]
Blocks = dict[nn.Module, str]  # each with how it is called
SAME = 1e-4  # relative squared error below which two outputs are one
SCALES = 2.0**16, 2.0**8, 1.0  # of an error while it is differentiated, the first whose gradient is finite


# ----------------------------------------------------------------------------------------------------- which there are


def given_blocks(model: nn.Module, blocks: Iterable[nn.Module | str]) -> Blocks:
    """Return the modules of ``model`` that a user lists by themselves or by their names.

    Raises:
        TypeError: something else is listed.
        ValueError: it is not in the model, or stands within another; or nothing is listed.
    """
    if isinstance(blocks, (str, nn.Module)) and not isinstance(blocks, (nn.ModuleList, nn.Sequential)):
        raise TypeError(f"blocks is a {type(blocks).__name__}. Pass a list of modules or of their names.")
    if not isinstance(blocks, Iterable):
        raise TypeError(f"blocks is a {type(blocks).__name__}. Pass a list of modules or of their names.")
    names = {module: name for name, module in model.named_modules()}
    modules = {name: module for module, name in names.items()}
    found: Blocks = {}
    for place, block in enumerate(blocks):
        if not isinstance(block, (str, nn.Module)):
            raise TypeError(f"blocks[{place}]={block!r} is a {type(block).__name__}. Pass a module or its name.")
        module = modules.get(block) if isinstance(block, str) else block
        if module is None or module not in names:
            near = get_close_matches(block, modules, 1) if isinstance(block, str) else []
            raise ValueError(
                f"blocks[{place}]={block if isinstance(block, str) else type(block).__name__!r} is not in the model"
                + (f"; {near[0]!r} is." if near else ". Pass modules of this model, not of a copy.")
            )
        found[module] = names[module] or type(model).__name__
    if not found:
        raise ValueError("blocks=[] lists nothing. Pass [model] to compare nothing but its output.")
    for module, name in found.items():
        for inner in module.modules():
            if inner is not module and inner in found:
                raise ValueError(f"blocks lists {name} and {found[inner]}, which is a part of it. List one of them.")
    return found


def found_blocks(model: nn.Module) -> Blocks:
    """Return the members of lists of modules that hold more than half of what can be pruned of what is pruned.

    A list is a ``ModuleList`` or ``Sequential`` of at least two modules that hold something pruned and are made of
    others; of lists within lists the outermost counts. Nothing is returned where they hold less.
    """
    sizes = {id(target.parameter): target.parameter.numel() for target in pruned(model)}
    found: Blocks = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{path}.") for path in found.values())
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and not inside:
            members = [(f"{name}.{key}".lstrip("."), child) for key, child in module.named_children()]
            made = [(path, child) for path, child in members if any(child.children()) and any(pruned(child))]
            if len(made) > 1:
                found |= {child: path for path, child in made}
    held = {id(target.parameter) for block in found for target in pruned(block)}
    return found if 2 * sum(sizes[each] for each in held) > sum(sizes.values()) else {}


# ------------------------------------------------------------------------------------------------------------- watching


class Calls:
    """What the blocks of a model give in one forward.

    Args:
        run: the open model.
        blocks: to watch; the model itself may be among them.
    """

    def __init__(self, run: Run, blocks: Blocks) -> None:
        self.run, self.blocks = run, blocks
        self.inner = [block for block in blocks if block is not run.model]
        self.seen: dict[nn.Module, list[tuple[Any, ...]]] = {}

    def outputs(self, inputs: Any, attributes: Attributes | None = None) -> list[Any]:
        """Return copies of the last output of each block, and the model's own behind them.

        With ``attributes``, what each block was called with, and what modules kept then, stands in ``seen`` by calls.
        """
        self.seen = {block: [] for block in self.inner}

        def look(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            given: tuple[Any, ...] = ()
            if attributes is not None:
                attributes.look()
                given = *copied((args, kwargs)), attributes.now()
            output = forward(*args, **kwargs)
            self.seen[block].append((*given, copied(output)))  # what follows may write into it
            return output

        with replaced(self.inner, look):
            whole = self.run.output(inputs)
        return [*(self.seen[block][-1][-1] if self.seen[block] else None for block in self.inner), whole]


def copied(tree: Any) -> Any:
    """Return ``tree`` with copies of its tensors."""
    return tree_map(torch.clone, tree)


# ------------------------------------------------------------------------------------------------------------ comparing


def tensors_of(output: Any) -> list[Tensor]:
    """Return the floating-point tensors of what a module gives: a tensor, or any tree or dataclass of such."""
    if is_dataclass(output) and not isinstance(output, (type, Mapping)):
        output = [getattr(output, field.name) for field in fields(output)]
    if isinstance(output, (list, tuple)):
        return [tensor for part in output for tensor in tensors_of(part)]
    return [leaf for leaf in leaves(output) if leaf.is_floating_point() and leaf.dim()]


def relative_error(output: Tensor, dense: Tensor) -> Tensor:
    """Return the sum of the squared differences relative to that of ``dense`` from its mean."""
    dtype = wide(dense.dtype)
    output, dense = output.to(dtype), dense.to(dtype)
    variation = (dense - dense.mean()).square().sum()
    return (output - dense).square().sum() / torch.where(variation > 0, variation, 1)


class Distance:
    """Compares what a block gives with what it gives in the reference model.

    Args:
        where: how errors call the block.
        axes: on which axis samples stand in each of its tensors; None where all rows count.
        loss: from a tensor and that of the reference model to a number.
        remedy: what errors advise where there is nothing to compare.
    """

    def __init__(
        self,
        where: str,
        axes: Sequence[int] | None,
        loss: Loss | None = None,
        *,
        remedy: str = "Leave it out of blocks.",
    ) -> None:
        self.where, self.axes, self.loss, self.remedy = where, axes, loss, remedy

    def __call__(self, output: Any, dense: Any, batch: Batch) -> Tensor:
        """Return the mean error of all tensors of ``output``, over what counts of ``batch``."""
        mine, others = tensors_of(output), tensors_of(dense)
        shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (mine, others)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{self.where} gives tensors of shapes {shapes[0]}, but in the reference model {shapes[1]}, so they "
                f"cannot be compared. {self.remedy}"
            )
        if not mine:
            raise ValueError(f"{self.where} gives no floating-point tensor to compare. {self.remedy}")
        errors = []
        for place, (a, b) in enumerate(zip(mine, others, strict=True)):
            if batch.mask is not None and self.axes is not None:
                a, b = (self._counted(tensor, self.axes[place], batch.mask) for tensor in (a, b))
            errors.append(relative_error(a, b) if self.loss is None else _number(self.loss(a, b), a))
        return torch.stack(errors).mean()

    def _counted(self, tensor: Tensor, axis: int, mask: Tensor) -> Tensor:
        """Return the rows of ``tensor``, along its last axis, that count."""
        rows = _wide(tensor).movedim(axis, 0).flatten(0, -2)
        return rows[mask_rows(mask, len(rows) // len(mask), self.where).to(rows.device)]


def _number(loss: object, output: Tensor) -> Tensor:
    """Return what ``loss=`` gave for ``output``, without axes, a number with a gradient where one is needed."""
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"loss= gave a {type(loss).__name__}, not a tensor. Return what torch computes, without item()."
        )
    if loss.numel() != 1:
        raise ValueError(f"loss= gave a tensor of shape {tuple(loss.shape)}, not a number. Return its mean.")
    if not loss.is_floating_point():
        raise ValueError(f"loss= gave a tensor of {loss.dtype}, not of floating point. Return it as float().")
    if torch.is_grad_enabled() and output.requires_grad and not loss.requires_grad:
        raise ValueError(
            "loss= gave a number that has no gradient. Compute it from its first argument by what has one, without "
            "detach(); one that counts can only decide, as it does where the blocks are fitted one after the other."
        )
    return loss.reshape(())


def gradients(
    error: Callable[[], Tensor], tensors: Sequence[Tensor], refusal: str
) -> tuple[Tensor, list[Tensor | None]]:
    """Return an error and its gradient for each of ``tensors``, in float32 at least; None where there is none.

    The error is scaled by a power of two meanwhile, as in mixed precision training: in half precision, the gradient of
    a mean over many outputs would be too small to be told from 0.

    Args:
        error: computes it.
        tensors: what to differentiate for.
        refusal: what to say where it depends on none of them.

    Source: Micikevicius et al. 2018, *Mixed Precision Training*, arXiv:1710.03740, section 3.2.
    """
    for scale in SCALES:
        total = error()
        if not total.requires_grad:
            raise ValueError(refusal)
        each = torch.autograd.grad(total * scale, tensors, allow_unused=True)
        found: list[Tensor | None] = [None if part is None else part.to(wide(part.dtype)) / scale for part in each]
        if all(part is None or part.isfinite().all() for part in found):
            break
    return total, found


def counted(batch: Batch) -> int:
    """Return how many samples or tokens of ``batch`` count."""
    return batch.size if batch.mask is None else int(batch.mask.sum())


# ------------------------------------------------------------------------------------------------------------ rehearsal


@torch.no_grad()
def sample_axes(calls: Calls, batch: Batch, once: Sequence[Any], names: Sequence[str]) -> list[list[int]]:
    """Return, for each of ``names``, on which axis of each of its tensors the samples of ``batch`` stand.

    Args:
        calls: what watches the blocks.
        batch: a batch to rehearse with.
        once: what the blocks gave for it.
        names: how errors call the blocks.

    Raises:
        ValueError: samples mix.
    """
    try:
        twice = calls.outputs(batch.with_first_behind())
    except (RuntimeError, IndexError) as error:
        raise ValueError(
            f"loader: the model fails on a batch that is given twice over. {MIXED.format(size=batch.size)}"
        ) from error
    found = []
    for name, a, b in zip(names, once, twice, strict=True):
        pairs = zip(tensors_of(a), tensors_of(b), strict=False)
        wide_pairs = [(_wide(x), _wide(y)) for x, y in pairs]
        found.append([sample_axis(name, batch.size, seen(x), seen(y), x.dim() - 2) for x, y in wide_pairs])
    return found


def _wide(tensor: Tensor) -> Tensor:
    """Return ``tensor`` with an axis behind that of the samples, if it has no other."""
    return tensor if tensor.dim() > 1 else tensor.unsqueeze(-1)


def same(once: Any, again: Any) -> bool:
    """Return whether two outputs are the same but for rounding."""
    a, b = tensors_of(once), tensors_of(again)
    return len(a) == len(b) and all(
        x.shape == y.shape and bool(torch.isnan(x).any() or relative_error(y, x) <= SAME)
        for x, y in zip(a, b, strict=True)
    )
