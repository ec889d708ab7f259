"""Run a model over data to collect statistics, and leave it exactly as it was.

While a :class:`Run` is open, every pruned tensor of the model is a plain parameter that holds its effective weights, so
that gradients are dense: they tell what a pruned entry would be worth too. The model is in eval mode.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchprune_ext._checks import check_finite, check_module, check_whole
from torchprune_ext._host import Target, as_plain, targets_of
from torchprune_ext._ranks import Ranks

PER_SAMPLE = 1 << 24  # most numbers in the gradients of the samples that are computed at once
Key = tuple[nn.Module, str]
LossFn = Callable[[Any, Any], Tensor]
Statistics = dict[Key, Tensor]


class Options(TypedDict, total=False):
    """How the data is read; the same for all functions of :mod:`torchprune_ext.calibration`.

    Args:
        prepare: turns a batch of the loader into ``(inputs, targets)``; not needed for batches that are such pairs, or
            dictionaries, which are passed to the model as keywords and to the loss as targets.
        max_batches: stop after so many batches.
        progress: show a progress bar, which needs ``tqdm``; by default if that is installed.
        keep_rng: put torch's random state back to what it was.
        process_group: ``torch.distributed`` group whose ranks call this together, each with its own share of the data
            and a replica of the model; all get the statistics of all data.
        sample_mask: from a batch of the loader to a bool tensor, False where the leading axes of an input hold no
            sample, as for padded tokens.
    """

    prepare: Callable[[Any], tuple[Any, Any]] | None
    max_batches: int | None
    progress: bool | None
    keep_rng: bool
    process_group: Any
    sample_mask: Callable[[Any], Tensor] | None


class Batch:
    """Inputs and targets on the model's device, and how many samples they hold."""

    def __init__(self, batch: Any, prepare: Callable[[Any], tuple[Any, Any]] | None, device: torch.device) -> None:
        if prepare is not None:
            batch = prepare(batch)
        elif isinstance(batch, Mapping):
            batch = (batch, batch)
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            raise TypeError(
                f"loader gave a {type(batch).__name__}, not (inputs, targets) or a dictionary. "
                "Pass prepare= to turn a batch into (inputs, targets)."
            )
        self.inputs, self.targets = (tree_map(lambda leaf: leaf.to(device), part) for part in batch)
        sizes = [leaf.shape[0] for leaf in leaves(self.inputs) if leaf.dim()]
        if not sizes or not sizes[0]:
            raise ValueError("loader gave a batch without samples. Drop empty batches, or pass prepare=.")
        self.size = sizes[0]


class Run:
    """An open calibration: the tensors asked for as leaves, and passes over the data.

    Use :func:`calibrating` to open one.
    """

    def __init__(self, model: nn.Module, targets: Sequence[Target], options: Options) -> None:
        self.model, self.options = model, options
        self.keys: list[Key] = [(target.module, target.name) for target in targets]
        self.tensors = [target.parameter for target in targets]
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for (module, name), tensor in zip(self.keys, self.tensors, strict=True):
            if id(tensor) not in names:
                raise ValueError(f"params holds {type(module).__name__}.{name}, which is no part of the model.")
        self.names = [names[id(tensor)] for tensor in self.tensors]
        self.ranks = Ranks(options.get("process_group"))
        self.vectorized, self.reached = True, False

    def zeros(self) -> list[Tensor]:
        """Return a zero for each tensor, at least float32, to sum up in."""
        return [torch.zeros_like(t, dtype=wide(t.dtype)) for t in self.tensors]

    def batches(self, loader: Iterable[Any], what: str) -> Iterator[Batch]:
        """Yield the batches that the options ask for; an empty loader is refused."""
        most = self.options.get("max_batches")
        if most is not None:
            check_whole("max_batches", most, 1)
        device = self.tensors[0].device
        count = 0
        for raw in with_progress(loader, what, most, self.options.get("progress")):
            yield Batch(raw, self.options.get("prepare"), device)
            count += 1
            if count == most:
                break
        if not count:
            raise ValueError("loader gave no batch. Pass data, or a loader that is not exhausted.")

    def output(self, inputs: Any) -> Any:
        """Return what the model makes of ``inputs``."""
        if isinstance(inputs, Mapping):
            return self.model(**inputs)
        return self.model(*inputs) if isinstance(inputs, (tuple, list)) else self.model(inputs)

    def loss(self, loss_fn: LossFn, batch: Batch) -> Tensor:
        """Return the loss of ``batch``; anything but a finite number is refused."""
        return check_loss(loss_fn(self.output(batch.inputs), batch.targets))

    def grads(
        self, scalar: Tensor, tensors: Sequence[Tensor] | None = None, *, create_graph: bool = False
    ) -> list[Tensor]:
        """Return the gradient of ``scalar`` for each tensor; a tensor that it does not depend on is refused.

        Args:
            scalar: a number.
            tensors: what stands in for the tensors, once for each name; by default the tensors themselves.
            create_graph: let the gradients be differentiable.
        """
        if not scalar.requires_grad:
            raise ValueError("loss_fn gave a value that depends on no parameter. Compute it from the model's output.")
        found = torch.autograd.grad(
            scalar,
            self.tensors if tensors is None else tensors,
            create_graph=create_graph,
            retain_graph=create_graph,
            allow_unused=True,
        )
        names = self.names if tensors is None else dict.fromkeys(self.names)
        for name, gradient in zip(names, found, strict=True):
            if gradient is None:
                raise ValueError(f"params holds {name}, which the loss does not depend on. Leave it out.")
        return [gradient.to_dense() if gradient.is_sparse else gradient for gradient in found]

    def differentiable_grads(self, loss_fn: LossFn, batch: Batch) -> list[Tensor]:
        """Return the gradient of the loss of ``batch`` for each tensor, to be differentiated again."""
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no second derivative
            return self.grads(self.loss(loss_fn, batch), create_graph=True)

    def check_reached(self, scalar: Callable[[Any, Any], Tensor], batch: Batch, extra: Any) -> None:
        """Refuse tensors that ``scalar`` does not depend on, once; torch.func would give zeros for them."""
        if not self.reached:
            self.grads(check_loss(scalar(self.output(batch.inputs), extra)))
            self.reached = True

    def sample_grads(self, scalar: Callable[[Any, Any], Tensor], batch: Batch, extra: Any) -> Iterator[list[Tensor]]:
        """Yield, for some samples at a time, the gradients of each sample, shape ``(samples, *tensor.shape)``.

        Args:
            scalar: from the model's output for one sample (with a batch axis of 1) and that sample's part of
                ``extra`` to a number.
            batch: the samples.
            extra: tree of tensors with a row for each sample.
        """
        self.check_reached(scalar, batch, extra)
        step = min(batch.size, PER_SAMPLE // max(1, sum(tensor.numel() for tensor in self.tensors)))
        if step > 1 and self.vectorized:
            try:
                first = self._vectorized(scalar, batch, extra, slice(0, step))
            except (RuntimeError, NotImplementedError) as error:
                self.vectorized = False
                warnings.warn(f"torch.func cannot vectorize this model, samples go one by one: {error}", stacklevel=2)
            else:
                yield first
                for start in range(step, batch.size, step):
                    yield self._vectorized(scalar, batch, extra, slice(start, start + step))
                return
        for i in range(batch.size):
            inputs, rest = part(batch.inputs, slice(i, i + 1)), part(extra, slice(i, i + 1))
            found = self.grads(check_loss(scalar(self.output(inputs), rest)))
            yield [gradient.unsqueeze(0).to(wide(gradient.dtype)) for gradient in found]

    def _vectorized(
        self, scalar: Callable[[Any, Any], Tensor], batch: Batch, extra: Any, samples: slice
    ) -> list[Tensor]:
        def one(named: dict[str, Tensor], inputs: Any, rest: Any) -> Tensor:
            inputs, rest = part(inputs, None), part(rest, None)
            if isinstance(inputs, Mapping):
                return check_shape(scalar(functional_call(self.model, named, kwargs=dict(inputs)), rest))
            args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
            return check_shape(scalar(functional_call(self.model, named, args), rest))

        detached = {name: tensor.detach() for name, tensor in zip(self.names, self.tensors, strict=True)}
        inputs, rest = part(batch.inputs, samples), part(extra, samples)
        per_sample = vmap(grad_and_value(one), in_dims=(None, axes(inputs), axes(rest)), randomness="different")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")  # still faster than one by one
            found, losses = per_sample(detached, inputs, rest)
        check_loss(losses.to(wide(losses.dtype)).sum())
        return [found[name].to(wide(found[name].dtype)) for name in self.names]

    def mean(self, sums: list[Tensor], count: float) -> dict[Key, Tensor]:
        """Divide ``sums`` over all ranks by ``count`` over all ranks; keyed as native pruning wants scores."""
        number = float(self.ranks.sum(torch.tensor(count, dtype=torch.float64)))
        found = {key: self.ranks.sum(total).div_(number) for key, total in zip(self.keys, sums, strict=True)}
        for (module, name), scores in found.items():
            check_finite(f"{type(module).__name__}.{name}: the statistic", scores)
        return found


@contextmanager
def calibrating(model: nn.Module, params: Iterable[Key], options: Options) -> Iterator[Run]:
    """Open a :class:`Run` over the tensors ``params`` of ``model`` and put everything back at its end.

    What is put back, also after an error: the mode of each module, buffers, pruning, ``requires_grad``, and with
    ``keep_rng`` the random state. Gradients are not touched.
    """
    check_module("model", model)
    unknown = set(options) - set(Options.__annotations__)
    if unknown:
        raise TypeError(f"unknown arguments {sorted(unknown)}. Known: {sorted(Options.__annotations__)}.")
    with ExitStack() as stack:
        stack.enter_context(Ranks(options.get("process_group")).together())
        stack.enter_context(torch.random.fork_rng() if options.get("keep_rng") else nullcontext())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):  # cuDNN's have no backward in eval mode
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)  # it would pass the layers of a transformer by
        targets = list(targets_of(params).values())
        if not targets:
            raise ValueError(
                "params=[] lists no tensor. Pass (module, name) pairs, e.g. of prunable_parameters(model)."
            )
        stack.enter_context(as_plain(model))
        stack.enter_context(_same_buffers(model))  # the masks are none of them now
        model.eval()
        run = Run(model, [Target.of(target.module, target.name) for target in targets], options)
        flags = [(tensor, tensor.requires_grad) for tensor in run.tensors]
        try:
            for tensor, _ in flags:
                tensor.requires_grad_(True)
            yield run
        finally:
            for tensor, flag in flags:
                tensor.requires_grad_(flag)


@contextmanager
def _same_buffers(model: nn.Module) -> Iterator[None]:
    """Put back the values of all buffers."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):  # else a graph that has saved it stays valid
                    buffer.copy_(value)


def check_loss(loss: Tensor) -> Tensor:
    """Return ``loss`` if it is a finite number, else raise."""
    loss = check_shape(loss)
    if not torch.isfinite(loss.detach()):
        raise ValueError(f"loss_fn gave {loss.item()}. Check the data and the model's output for NaN and infinity.")
    return loss


def check_shape(loss: Tensor) -> Tensor:
    """Return ``loss`` as a tensor without axes; a loss that is not one number is refused."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"type {type(loss).__name__}"
        raise ValueError(f"loss_fn gave a value of {what}, not a number. Use reduction='mean'.")
    return loss.reshape(())


def tree_map(change: Callable[[Tensor], Any], tree: Any, other: Callable[[Any], Any] = lambda leaf: leaf) -> Any:
    """Return ``tree`` (nested dictionaries, tuples and lists) with ``change`` of its tensors, ``other`` of the rest."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        return {key: tree_map(change, value, other) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        found = [tree_map(change, value, other) for value in tree]
        return type(tree)(*found) if hasattr(tree, "_fields") else type(tree)(found)  # a named tuple takes its fields
    return other(tree)


def part(tree: Any, index: slice | int | None) -> Any:
    """Return ``leaf[index]`` for all tensors of ``tree``."""
    return tree_map(lambda leaf: leaf[index], tree)


def axes(tree: Any) -> Any:
    """Return ``tree`` with the axis of its samples, for ``vmap``, in place of each tensor; None for all else."""
    return tree_map(lambda _: 0, tree, lambda _: None)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to sum up values of ``dtype`` in."""
    return torch.promote_types(dtype, torch.float32)


def leaves(tree: Any) -> list[Tensor]:
    """Return the tensors of ``tree`` in order."""
    found: list[Tensor] = []
    tree_map(found.append, tree)
    return found


def with_progress(loader: Iterable[Any], what: str, most: int | None, progress: bool | None) -> Iterable[Any]:
    """Return ``loader`` with a progress bar called ``what``, if ``progress`` and what is installed allow it."""
    if progress is False:
        return loader
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]
    except ImportError as error:
        if progress is None:
            return loader
        raise ImportError("progress=True needs tqdm: pip install torchprune-ext[progress]") from error
    total = len(loader) if hasattr(loader, "__len__") else None  # type: ignore[arg-type]
    bar: Iterable[Any] = tqdm(
        loader, desc=what, total=most if total is None else min(total, most or total), leave=False
    )
    return bar


def add(sums: list[Tensor], values: Iterable[Tensor], weight: float = 1) -> None:
    """Add ``values``, times ``weight``, to ``sums``."""
    for total, value in zip(sums, values, strict=True):
        total.add_(value.detach(), alpha=weight)
