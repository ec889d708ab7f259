"""Run a model over data to collect statistics, and leave it exactly as it was.

While a :class:`Run` is open, every pruned tensor of the model is a plain parameter that holds its effective weights, so
that gradients are dense: they tell what a pruned entry would be worth too. The model is in eval mode.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from torchprune_ext._batches import Batch, arguments, is_leaf, tree_map
from torchprune_ext._checks import check_finite, check_module, leave_out
from torchprune_ext._host import Target, as_plain, targets_of
from torchprune_ext._loading import Options, check_options, read, with_progress
from torchprune_ext._ranks import Ranks
from torchprune_ext._rehearsal import Rehearsal, lost
from torchprune_ext._statistics import Key

__all__ = ["Batch", "Key", "LossFn", "Options", "Run", "add", "calibrating", "tree_map", "with_progress"]

PER_SAMPLE = 1 << 24  # most numbers in the gradients of the samples that are computed at once
CPU = torch.device("cpu")
LossFn = Callable[[Any, Any], Tensor]


class Run:
    """An open calibration: the tensors asked for as leaves, and passes over the data.

    Use :func:`calibrating` to open one.
    """

    def __init__(
        self, model: nn.Module, targets: Sequence[Target], options: Options, loss_fn: LossFn | None = None
    ) -> None:
        self.model, self.options = model, options
        self.loss_fn: LossFn = loss_fn if loss_fn is not None else _no_loss
        self.keys: list[Key] = [(target.module, target.name) for target in targets]
        self.tensors = [target.parameter for target in targets]
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for (module, name), tensor in zip(self.keys, self.tensors, strict=True):
            if id(tensor) not in names:
                raise ValueError(f"params holds {type(module).__name__}.{name}, which is not a part of the model.")
        self.names = [names[id(tensor)] for tensor in self.tensors]
        self.ranks = Ranks(options.get("process_group"))
        self.vectorized, self.reached, self.rehearsed = True, False, 0
        self.device = next((t.device for t in [*self.tensors, *model.parameters(), *model.buffers()]), CPU)
        self.written: Written | None = None

    def zeros(self) -> list[Tensor]:
        """Return a zero for each tensor, at least float32, to sum up in."""
        return [torch.zeros_like(t, dtype=wide(t.dtype)) for t in self.tensors]

    def batches(self, loader: Iterable[Any], what: str) -> Iterator[Batch]:
        """Yield the batches that the options ask for, under a progress bar called ``what``; none at all is refused."""
        for raw in read(loader, self.options, what):
            yield Batch(raw, self.options, self.device)

    def output(self, inputs: Any, parameters: dict[str, Tensor] | None = None) -> Any:
        """Return what the model, or the model with other ``parameters``, makes of ``inputs``."""
        given, keywords = arguments(inputs)
        if parameters is None:
            with nullcontext() if self.written is None else self.written.first_forward():
                return self.model(*given, **keywords)
        return functional_call(self.model, parameters, given, keywords)

    def loss(self, batch: Batch) -> Tensor:
        """Return the loss of ``batch``; anything but a finite number is refused, and so is a sum over samples."""
        loss = check_depends(self._loss(batch))
        if not self.rehearsed:
            self.rehearsed = batch.size
            with self._aside():
                self._rehearsal(batch).refuse_sum()
        return loss

    def _loss(self, batch: Batch) -> Tensor:
        _, targets = batch.size, batch.targets  # refuses a batch without
        return check_loss(self.loss_fn(self.output(batch.inputs), targets))

    def check_samples(self, batch: Batch) -> None:
        """Refuse, once, tensors that the loss does not depend on, and a loss that is not a mean over single samples."""
        if not self.reached:
            self.grads(self._loss(batch))  # torch.func would give zeros for them
            self.reached = True
        if self.rehearsed < min(batch.size, 2):  # a single one tells less
            self.rehearsed = batch.size
            with self._aside():
                self._rehearsal(batch).refuse_mixed()

    def _rehearsal(self, batch: Batch) -> Rehearsal:
        dtypes = {tensor.dtype for tensor in self.tensors}
        if torch.is_autocast_enabled(self.device.type):
            dtypes.add(torch.get_autocast_dtype(self.device.type))
        eps = max(torch.finfo(dtype).eps for dtype in dtypes)
        return Rehearsal(self.output, lambda output, targets: check_shape(self.loss_fn(output, targets)), batch, eps)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Let a rehearsal build no graph and draw no random number of the pass."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices=devices), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "None of the inputs have requires_grad")  # of checkpointed modules
            yield

    def grads(
        self, scalar: Tensor, tensors: Sequence[Tensor] | None = None, *, create_graph: bool = False
    ) -> list[Tensor]:
        """Return the gradient of ``scalar`` for each tensor; a tensor that it does not depend on is refused.

        Args:
            scalar: a number.
            tensors: what stands in for the tensors, once for each name; by default the tensors themselves.
            create_graph: let the gradients be differentiable.
        """
        check_depends(scalar)
        try:
            found = torch.autograd.grad(
                scalar,
                self.tensors if tensors is None else tensors,
                create_graph=create_graph,
                retain_graph=create_graph,
                allow_unused=True,
            )
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise ValueError(
                "model uses reentrant activation checkpointing, which has no gradients for chosen tensors. Call "
                "torch.utils.checkpoint.checkpoint(..., use_reentrant=False), or switch checkpointing off."
            ) from error
        names = self.names if tensors is None else dict.fromkeys(self.names)
        for name, gradient in zip(names, found, strict=True):
            if gradient is None:
                raise ValueError(f"params holds {name}, which the loss does not depend on. {leave_out(name)}.")
        return [gradient.to_dense() if gradient.is_sparse else gradient for gradient in found]

    def differentiable_grads(self, batch: Batch) -> list[Tensor]:
        """Return the gradient of the loss of ``batch`` for each tensor, to be differentiated again."""
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no second derivative
            return self.grads(self.loss(batch), create_graph=True)

    def sample_grads(
        self, batch: Batch, scalar: Callable[[Any, Any], Tensor] | None = None, extra: Tensor | None = None
    ) -> Iterator[list[Tensor]]:
        """Yield, for some samples at a time, the gradients of each sample, shape ``(samples, *tensor.shape)``.

        Args:
            batch: the samples.
            scalar: from the model's output for one sample (with a batch axis of 1) and that sample's row of ``extra``
                to a number; by default the loss, of output and targets.
            extra: a row for each sample.
        """
        self.check_samples(batch)
        scalar = self.loss_fn if scalar is None else scalar
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
            inputs, targets = batch.gathered(slice(i, i + 1))
            loss = check_shape(scalar(self.output(inputs), targets if extra is None else extra[i : i + 1]))
            found = self.grads(check_losses(loss.reshape(1), i)[0])
            yield [gradient.unsqueeze(0).to(wide(gradient.dtype)) for gradient in found]

    def _vectorized(
        self, scalar: Callable[[Any, Any], Tensor], batch: Batch, extra: Tensor | None, samples: slice
    ) -> list[Tensor]:
        given, axes, alone = batch.split(samples)
        if any(is_leaf(leaf) for leaf in given):
            raise NotImplementedError("the inputs are a PackedSequence")

        def one(named: dict[str, Tensor], given: list[Tensor], rest: Tensor | None) -> Tensor:
            inputs, targets = alone(given)
            return check_shape(scalar(self.output(inputs, named), targets if rest is None else rest.unsqueeze(0)))

        detached = {name: tensor.detach() for name, tensor in zip(self.names, self.tensors, strict=True)}
        rest = None if extra is None else extra[samples]
        in_dims = (None, axes, None if extra is None else 0)
        per_sample = vmap(grad_and_value(one), in_dims=in_dims, randomness="different")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")  # still faster than one by one
            found, losses = per_sample(detached, given, rest)
        check_losses(losses, samples.start)
        return [found[name].to(wide(found[name].dtype)) for name in self.names]

    def refuse_zeros(self, found: Mapping[Key, Tensor], weights: Sequence[Tensor] | None = None) -> None:
        """Refuse a statistic that is 0 in every entry of a tensor, unless its ``weights`` are, by which it is scaled.

        Such a tensor would be the first to go, though nothing is known of it.
        """
        for place, (name, scores) in enumerate(zip(self.names, found.values(), strict=True)):
            if scores.numel() and not scores.any() and (weights is None or weights[place].any()):
                raise ValueError(
                    f"params holds {name}, whose statistic is 0 in every entry: here the loss of no sample changes "
                    "with it, as behind dead units or factors of 0, or where the loss is constant (a contrastive loss "
                    "of a single sample) or at its minimum. Repair that, or leave it out."
                )

    def mean(self, sums: list[Tensor], count: float) -> dict[Key, Tensor]:
        """Divide ``sums`` over all ranks by ``count`` over all ranks; keyed as native pruning wants scores."""
        number = float(self.ranks.sum(torch.tensor(count, dtype=torch.float64, device="cpu")))
        found = {key: self.ranks.sum(total).div_(number) for key, total in zip(self.keys, sums, strict=True)}
        for (module, name), scores in found.items():
            check_finite(f"{type(module).__name__}.{name}: the statistic", scores)
        return found


@contextmanager
def calibrating(
    model: nn.Module, params: Iterable[Key] | None, options: Options, loss_fn: LossFn | None = None
) -> Iterator[Run]:
    """Open a :class:`Run` over the tensors ``params`` of ``model``, None to look at none, and put everything back.

    That is done at the end, also after an error: the mode of each module, buffers, pruning, ``requires_grad``, and with
    ``keep_rng`` the random state. Gradients are not touched.
    """
    check_module("model", model)
    with ExitStack() as stack:
        stack.enter_context(Ranks(options.get("process_group")).together())
        check_options(options)
        if loss_fn is not None:
            _check_loss_options(loss_fn, options)
        refuse_lazy(model)
        stack.enter_context(torch.random.fork_rng() if options.get("keep_rng") else nullcontext())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):  # cuDNN's have no backward in eval mode
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)  # it would pass the layers of a transformer by
        targets = [] if params is None else list(targets_of(params).values())
        if not targets and params is not None:
            raise ValueError(
                "params=[] lists no tensor. Pass (module, name) pairs, e.g. of prunable_parameters(model)."
            )
        written = stack.enter_context(left_as_it_was(model))
        model.eval()
        run = Run(model, [Target.of(target.module, target.name) for target in targets], options, loss_fn)
        run.written = written
        flags = [(tensor, tensor.requires_grad) for tensor in run.tensors]
        try:
            for tensor, _ in flags:
                tensor.requires_grad_(True)
            yield run
        finally:
            for tensor, flag in flags:
                tensor.requires_grad_(flag)


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator["Written"]:
    """Let pruned tensors be plain, and put back at the end what modules hold and what a forward writes into."""
    with as_plain(model):
        written = Written(model)  # the masks are none of its buffers now
        try:
            yield written
        finally:
            written.restore()


def _no_loss(output: Any, targets: Any) -> Tensor:
    raise TypeError("no loss_fn was given.")


def _check_loss_options(loss_fn: LossFn, options: Options) -> None:
    """Refuse a loss that cannot be called, and what only calls without a loss take."""
    if not callable(loss_fn):
        raise TypeError(f"loss_fn is a {type(loss_fn).__name__}. Pass a function of the output and the targets.")
    if options.get("sample_mask") is not None:
        raise TypeError(
            "sample_mask= is for calls without a loss. Here the loss decides what counts: let loss_fn leave padding "
            "out, as cross_entropy does where the labels are -100."
        )


def refuse_lazy(model: nn.Module) -> None:
    """Raise ``ValueError`` if a module has tensors without shape, which its first forward would make."""
    for name, module in model.named_modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if is_lazy(tensor):
                where = f"model.{name}".rstrip(".")
                raise ValueError(
                    f"{where}, a {type(module).__name__}, has no shape yet. Run one forward first, then this."
                )


class Written(TorchDispatchMode):
    """The values of what a forward may write into: buffers, tensors that modules hold, and parameters.

    Parameters are copied only if the first forward, which this watches, has an operation that writes into them.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.watching = True
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.parameters: dict[int, list[Tensor]] = {}  # by their memory
        for module in model.modules():
            for tensor in [*module._buffers.values(), *vars(module).values()]:
                if isinstance(tensor, Tensor):
                    self._keep(tensor)
            for parameter in module._parameters.values():
                if parameter is not None:
                    self.parameters.setdefault(_memory(parameter), []).append(parameter)
        self.parameters.pop(0, None)

    def _keep(self, tensor: Tensor) -> None:
        if id(tensor) not in self.kept:
            self.kept[id(tensor)] = tensor, tensor.detach().clone()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Copy the parameters that ``func`` writes into, then call it."""
        known = func._schema.arguments
        given = [*zip(known, args, strict=False), *((arg, (kwargs or {}).get(arg.name)) for arg in known)]
        for arg, value in given:
            if arg.alias_info is not None and arg.alias_info.is_write:
                for tensor in value if isinstance(value, (list, tuple)) else [value]:
                    for parameter in self.parameters.pop(_memory(tensor), ()):
                        self._keep(parameter)
        return func(*args, **(kwargs or {}))

    @contextmanager
    def first_forward(self) -> Iterator[None]:
        """Watch the body, once."""
        with self if self.watching else nullcontext():
            self.watching = False
            yield

    def restore(self) -> None:
        """Put all values back, with shape and dtype."""
        with torch.no_grad():
            for tensor, value in self.kept.values():
                if tensor.shape != value.shape or tensor.dtype != value.dtype or tensor.device != value.device:
                    tensor.data = value
                elif not _equal(tensor, value):  # else a graph that has saved it stays valid
                    tensor.copy_(value)


def _memory(tensor: Any) -> int:
    """Return where the values of ``tensor`` are, with those of its views; 0 for what has none."""
    try:
        return tensor.untyped_storage().data_ptr() if isinstance(tensor, Tensor) else 0
    except RuntimeError:  # of a class without storage
        return 0


def _equal(tensor: Tensor, value: Tensor) -> bool:
    return tensor.shape == value.shape and tensor.dtype == value.dtype and torch.equal(tensor, value)


def check_loss(loss: Tensor) -> Tensor:
    """Return ``loss`` if it is a finite number, else raise."""
    loss = check_shape(loss)
    if not torch.isfinite(loss.detach()):
        raise ValueError(f"loss_fn gave {loss.item()}. Check the data and the model's output for NaN and infinity.")
    return loss


def check_depends(loss: Tensor) -> Tensor:
    """Return ``loss`` if it has a gradient, else raise."""
    if not loss.requires_grad:
        raise ValueError("loss_fn gave a value that depends on no parameter. Compute it from the model's output.")
    return loss


def check_losses(losses: Tensor, first: int) -> Tensor:
    """Return ``losses``, of sample ``first`` and those behind it, if they are finite, else raise."""
    finite = torch.isfinite(losses.detach())
    if not finite.all():
        i = int(finite.logical_not().nonzero()[0])
        raise ValueError(lost(first + i) if losses[i].isnan() else f"loss_fn gave inf for sample {first + i} alone.")
    return losses


def check_shape(loss: Tensor) -> Tensor:
    """Return ``loss`` as a tensor without axes; a loss that is not one number is refused."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"type {type(loss).__name__}"
        raise ValueError(f"loss_fn gave a value of {what}, not a number. Use reduction='mean'.")
    return loss.reshape(())


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to sum up values of ``dtype`` in."""
    return torch.promote_types(dtype, torch.float32)


def add(sums: list[Tensor], values: Iterable[Tensor], weight: float = 1) -> None:
    """Add ``values``, times ``weight``, to ``sums``."""
    for total, value in zip(sums, values, strict=True):
        total.add_(value.detach(), alpha=weight)
