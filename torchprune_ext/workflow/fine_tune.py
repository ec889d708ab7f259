"""A small loop that trains a pruned model, for scripts."""

import numbers
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from torchprune_ext._batches import Batch, call
from torchprune_ext._checks import check_fraction, check_module, check_whole, number_from
from torchprune_ext._host import Target, kept_zeros, pruned, targets_in, warn_of_zeros
from torchprune_ext._loading import read
from torchprune_ext._runs import check_depends, check_loss, refuse_lazy
from torchprune_ext._tables import percent, table
from torchprune_ext.deploy.checkpoint import load_pruned_state_dict

__all__ = ["FineTuneRow", "FineTuned", "Steps", "fine_tune"]


class Steps(Protocol):
    """What prunes while a model trains, such as :class:`.GradualPruner`."""

    def step(self) -> None:
        """Go on by one step of the optimizer."""


@dataclass(frozen=True, slots=True)
class FineTuneRow:
    """What an epoch has given.

    Args:
        epoch: its number, from 1 on.
        loss: mean of the losses of its batches, with the part of the teacher.
        sparsity: fraction of the entries of all pruned tensors that are held at zero at its end.
        metric: what ``evaluate`` has given at its end; None without.
    """

    epoch: int
    loss: float
    sparsity: float
    metric: float | None


@dataclass(frozen=True, slots=True)
class FineTuned:
    """What :func:`fine_tune` has done; prints as a table.

    Args:
        rows: one for each epoch.
        best: number of the epoch whose values the model has now.
    """

    rows: tuple[FineTuneRow, ...]
    best: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists, as for a JSON file."""
        return {"best": self.best, "rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        """Return a table with a line for each epoch."""
        lines = [
            [
                f"{row.epoch}{' *' if row.epoch == self.best else ''}",
                f"{row.loss:.4g}",
                percent(row.sparsity),
                "" if row.metric is None else f"{row.metric:.4g}",
            ]
            for row in self.rows
        ]
        return table(["epoch", "loss", "sparsity", "metric"], lines)


def fine_tune(
    model: nn.Module,
    loader: Iterable[Any],
    loss_fn: Callable[[Any, Any], Tensor],
    optimizer: Optimizer,
    epochs: int,
    pruner: Steps | None = None,
    teacher: nn.Module | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    *,
    temperature: float = 2.0,
    distill: float = 0.5,
    progress: bool | None = None,
) -> FineTuned:
    r"""Train a pruned model, keep its best epoch, and make sure that its zeros stay.

    A loop for scripts: each batch is one step of ``optimizer`` and of ``pruner``. For anything else, such as mixed
    precision or a scheduler, write the loop; it has six lines.

    With a ``teacher``, commonly the dense model, the loss is :math:`(1 - \alpha) L + \alpha T^2 \,
    \mathrm{KL}(p_T \,\|\, q_T)` with the softmax of the logits of teacher and model over the temperature,
    :math:`p_T` and :math:`q_T`, averaged over all samples.

    With ``evaluate``, the model has in the end the values of the epoch with the largest metric, the first of several.
    Only epochs compete whose masks drop as much as those of the last one: while a pruner still prunes, a model is
    better because it is denser.

    All modules are in training mode meanwhile; at the end, also after an error, each gets back the mode that it had.
    When the loader, the loss or Ctrl-C interrupts the training, the model stays as it is trained so far. The state of
    the optimizer is that of the last step.

    Args:
        model: any module, pruned or not.
        loader: batches ``(inputs, targets)``, or dictionaries, which are passed to the model as keywords and to the
            loss as targets; read once for each epoch. Batches are moved to the device of the model.
        loss_fn: from the model's output and the targets to a number.
        optimizer: an optimizer of parameters of the model.
        epochs: how many times the loader is read.
        pruner: anything whose ``step()`` is called behind each step of the optimizer, such as
            :class:`.GradualPruner`.
        teacher: a model whose logits are learned too, in evaluation mode and without gradients.
        evaluate: from the model, in evaluation mode, to a number, larger is better; on data that is not the test data.
        temperature: :math:`T`, > 0.
        distill: :math:`\alpha`, in [0, 1].
        progress: show a progress bar, which needs ``tqdm``; by default if that is installed.

    Returns:
        A row for each epoch, and which one the model has the values of.

    Raises:
        TypeError: an argument of the wrong type, or a loader that gives its batches only once, for several epochs.
        ValueError: an argument out of range, an optimizer of other parameters, or a loss or metric that is not finite.
        RuntimeError: zeros have come back, since a mask was changed or removed, or without :func:`.keep_zeros`.

    Source: Hinton, Vinyals & Dean 2015, *Distilling the Knowledge in a Neural Network*, arXiv:1503.02531, section 2,
    for the teacher.

    Example:
        >>> import torchprune_ext as tpe
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Linear(4, 2)
        >>> tpe.prune_to([(model, "weight")], 0.5)
        >>> loader = [(torch.randn(8, 4), torch.randint(2, (8,))) for _ in range(3)]
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> done = tpe.fine_tune(model, loader, F.cross_entropy, optimizer, epochs=2, progress=False)
        >>> [(row.epoch, row.sparsity) for row in done.rows], int((model.weight == 0).sum())
        ([(1, 0.5), (2, 0.5)], 4)
    """
    _check(model, loader, loss_fn, optimizer, epochs, pruner, teacher, evaluate)
    if isinstance(temperature, bool) or not isinstance(temperature, numbers.Real) or not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature!r} is not a temperature. Pass a number > 0, e.g. 2.0.")
    check_fraction("distill", distill)
    device = next(iter(model.parameters())).device
    masks = _Masks(model, pruner is not None)
    rows: list[FineTuneRow] = []
    best = None
    with _modes(model), _modes(teacher), torch.enable_grad():
        if teacher is not None:
            teacher.eval()
        for epoch in range(1, epochs + 1):
            model.train()
            losses = []
            for raw in read(loader, {"progress": progress}, f"epoch {epoch} of {epochs}"):
                optimizer.zero_grad()
                loss = _loss(model, Batch(raw, {}, device), loss_fn, teacher, temperature, distill)
                loss.backward()
                optimizer.step()
                if pruner is not None:
                    pruner.step()
                losses.append(loss.detach())
            gone, sparsity = masks.verify()
            metric = None
            if evaluate is not None:
                model.eval()
                with torch.no_grad():
                    metric = number_from(evaluate(model), f"evaluate(model) after epoch {epoch}")
            rows.append(FineTuneRow(epoch, float(torch.stack(losses).double().mean()), sparsity, metric))
            if metric is not None and (best is None or best.gone != gone or metric > best.metric):
                best = _Best(epoch, metric, gone, {key: _copy(value) for key, value in model.state_dict().items()})
        if best is not None and best.epoch != epochs:
            load_pruned_state_dict(model, best.state)
    optimizer.zero_grad()
    return FineTuned(tuple(rows), epochs if best is None else best.epoch)


@dataclass(frozen=True, slots=True)
class _Best:
    """The best epoch so far: its number, its metric, how much was pruned, and the state of the model."""

    epoch: int
    metric: float
    gone: int
    state: dict[str, Any]


def _loss(
    model: nn.Module,
    batch: Batch,
    loss_fn: Callable[[Any, Any], Tensor],
    teacher: nn.Module | None,
    temperature: float,
    distill: float,
) -> Tensor:
    """Return the loss of ``batch``, with the part of the teacher."""
    targets = batch.targets  # refuses a batch without
    output = call(model, batch.inputs)
    loss = check_depends(check_loss(loss_fn(output, targets)))
    if teacher is None:
        return loss
    with torch.no_grad():
        wanted = _logits(call(teacher, batch.inputs), "teacher")
    apart = _divergence(_logits(output, "model"), wanted, temperature)
    return check_loss((1 - distill) * loss + distill * temperature**2 * apart)


def _check(
    model: nn.Module,
    loader: Iterable[Any],
    loss_fn: object,
    optimizer: Optimizer,
    epochs: int,
    pruner: Steps | None,
    teacher: nn.Module | None,
    evaluate: object,
) -> None:
    """Raise unless the arguments fit, before anything is trained."""
    check_module("model", model)
    refuse_lazy(model)
    check_whole("epochs", epochs, 1)
    for param, function in (("loss_fn", loss_fn), ("evaluate", evaluate)):
        if not callable(function) and not (param == "evaluate" and function is None):
            raise TypeError(f"{param}={function!r} is a {type(function).__name__}. Pass a function.")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}. Pass a torch.optim.Optimizer.")
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if held.isdisjoint(id(parameter) for parameter in model.parameters()):
        raise ValueError(
            f"optimizer holds no parameter of {type(model).__name__}. Make it of model.parameters(), of this model and "
            "not of a copy."
        )
    if pruner is not None and not callable(getattr(pruner, "step", None)):
        raise TypeError(f"pruner={pruner!r} has no step(). Pass e.g. a GradualPruner.")
    if teacher is not None:
        check_module("teacher", teacher)
        if teacher is model:
            raise ValueError("teacher is the model itself. Pass a copy of it from before it was pruned.")
    if isinstance(loader, Iterator) and epochs > 1:
        raise TypeError(
            f"loader is a {type(loader).__name__}, which gives its batches once, but epochs={epochs}. Pass "
            "list(loader), or a DataLoader."
        )


class _Masks:
    """What is pruned at the beginning, to see at the end of each epoch that it still is.

    Args:
        model: the model that trains.
        may_change: whether a pruner changes the masks.
    """

    def __init__(self, model: nn.Module, may_change: bool) -> None:
        self.model = model
        keep = {id(target.parameter) for target, _ in kept_zeros(model)}
        targets = {
            f"{path}.{target.name}".lstrip("."): target
            for path, module in model.named_modules()
            for target in targets_in(module)
            if target.parameter.dim() > 1 and id(target.parameter) not in keep
        }
        warn_of_zeros(targets)
        self.before = [] if may_change else [(target, _copy(target.mask)) for target in pruned(model)]

    def verify(self) -> tuple[int, float]:
        """Return how many entries are held at zero, and which fraction; raise if something that was zero is not."""
        for target, mask in self.before:
            now = {id(other.parameter): other.mask for other in pruned(nn.ModuleList([target.module]))}
            found = now.get(id(target.parameter))
            if found is None or not torch.equal(found != 0, mask != 0):
                raise RuntimeError(
                    f"{target.where} was pruned when training began, and its mask is "
                    f"{'gone' if found is None else 'another one'} now. Let nothing but pruner= change masks."
                )
        held: dict[int, tuple[Target, Tensor]] = {}
        for target in pruned(self.model):
            if target.mask is not None:
                zeros = target.mask == 0
                if target.hook()[1] is None or bool((target.weight()[zeros] != 0).any()):
                    raise RuntimeError(
                        f"{target.where}: the mask is not applied, as the hook is lost or a weight under it is not "
                        "finite. Prune it again, or undo_all(model) first."
                    )
                held[id(target.parameter)] = target, zeros
        for target, zeros in kept_zeros(self.model):
            if bool((target.parameter[zeros] != 0).any()):
                raise RuntimeError(
                    f"{target.where}: zeros that remove(..., keep_zeros=True) made have come back in training. Call "
                    "keep_zeros(model, optimizer) before."
                )
            held.setdefault(id(target.parameter), (target, zeros))
        gone = sum(int(zeros.sum()) for _, zeros in held.values())
        return gone, gone / max(sum(target.parameter.numel() for target, _ in held.values()), 1)


@contextmanager
def _modes(model: nn.Module | None) -> Iterator[None]:
    """Give each module its mode back."""
    before = [] if model is None else [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _logits(output: Any, who: str) -> Tensor:
    """Return logits with the classes on the last axis."""
    if isinstance(logits := getattr(output, "logits", None), Tensor):
        return logits.flatten(0, -2)
    if not isinstance(output, Tensor) or output.dim() != 2:
        what = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"type {type(output).__name__}"
        raise ValueError(
            f"{who} gave an output of {what}, but a teacher is for logits of shape (samples, classes), or an output "
            "with .logits. Leave teacher out, and let loss_fn compare with another model."
        )
    return output


def _divergence(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Return the mean divergence of the model from the teacher."""
    if logits.shape != wanted.shape:
        raise ValueError(
            f"model gave logits of shape {tuple(logits.shape)}, but teacher of shape {tuple(wanted.shape)}. Pass a "
            "teacher with the same classes."
        )
    p, q = ((values.float() / temperature).log_softmax(-1) for values in (wanted, logits))
    return F.kl_div(q, p, reduction="batchmean", log_target=True)


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
