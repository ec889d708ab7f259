"""What models cost and what they are worth, side by side: the table that says whether pruning has gained anything."""

import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from torchprune_ext._batches import call, tree_map
from torchprune_ext._checks import check_module, check_whole, errors_about
from torchprune_ext._restoring import contents_of, restore
from torchprune_ext._runs import Written, refuse_lazy
from torchprune_ext._tables import html, quantity, significant, table
from torchprune_ext.deploy.counting import count_bytes, count_macs, count_parameters
from torchprune_ext.deploy.timing import medians

Evaluate = Callable[[Any], Any]
COSTS = ("latency", "macs", "parameters", "nonzero", "nbytes")
HEADS = {"macs": "MACs", "nbytes": "bytes"}


@dataclass(frozen=True, slots=True)
class Row:
    """What one model costs and what it is worth.

    Args:
        name: the model's.
        metrics: what ``evaluate`` gave, by name; empty without it.
        latency: median seconds of a forward pass.
        spread: interquartile range of these, in seconds.
        macs: multiplications of a forward pass in matrix products, convolutions and attention, also those with zero;
            None where that is not known.
        parameters: numbers that its parameters hold.
        nonzero: those that are not zero, or under a mask.
        nbytes: bytes of its state dict.
    """

    name: str
    metrics: dict[str, float]
    latency: float
    spread: float
    macs: int | None
    parameters: int
    nonzero: int
    nbytes: int

    def values(self) -> dict[str, float | None]:
        """Return what is compared with the first model, by name."""
        return {**self.metrics, **{name: getattr(self, name) for name in COSTS}}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Models side by side, as :func:`compare` returns them; ``str`` makes a table of it.

    Args:
        rows: one for each model, in the order given.
        threads: how many torch had on the CPU.
        rounds: how often each latency was measured.
    """

    rows: tuple[Row, ...]
    threads: int
    rounds: int

    def ratios(self, row: Row) -> dict[str, float | None]:
        """Return each value of ``row`` as a fraction of the first row's; None where there is no such number."""
        pairs = [(name, value, self.rows[0].values()[name]) for name, value in row.values().items()]
        found = {name: value / base if value is not None and base else math.nan for name, value, base in pairs}
        return {name: ratio if math.isfinite(ratio) else None for name, ratio in found.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return all of it in plain dicts, lists and numbers, with the ``"ratios"`` to the first model in each row."""
        rows = [{**asdict(row), "ratios": self.ratios(row)} for row in self.rows]
        return {"threads": self.threads, "rounds": self.rounds, "rows": rows}

    def __str__(self) -> str:
        """Return the table, with ratios to the first model in percent."""
        heads, *rows = self._lines()
        return f"{table(heads, rows)}\n{self._note()}"

    def _repr_html_(self) -> str:
        """Return the table for notebooks."""
        heads, *rows = self._lines()
        return html(heads, rows, [self._note()], words=[0])

    def _lines(self) -> list[list[str]]:
        """Return the heads of the table and its rows."""
        names = list(self.rows[0].values())
        lines = [["", *(cell for name in names for cell in (HEADS.get(name, name), ""))]]
        for row in self.rows:
            shares = self.ratios(row)
            cells = [(cell(row, name), _share(shares[name])) for name in names]
            lines.append([row.name, *(cell for pair in cells for cell in pair)])
        return lines

    def _note(self) -> str:
        """Return the line below the table."""
        return (
            f"latency: median ± interquartile range of {self.rounds} rounds, {self.threads} "
            f"thread{'s' * (self.threads != 1)}; percent: of {self.rows[0].name}"
        )


def compare(
    models: Mapping[str, nn.Module],
    example_inputs: Any,
    *,
    evaluate: Evaluate | None = None,
    threads: int | None = None,
    rounds: int = 15,
) -> Comparison:
    """Compare models: what they are worth, how long they take, and how large they are.

    Latency is that of a forward pass in eval mode without gradients, measured by :mod:`torch.utils.benchmark`, in
    rounds in which the models take turns, so that a busy machine hits all alike. Multiplications (MACs) are half of
    what :mod:`torch.utils.flop_counter` counts; only those of matrix products, convolutions and attention are, not
    those of activations, normalization and masks. What is zero is multiplied all the same, and counts.

    Models and inputs are left as they were, also after an error: modes, buffers, gradients, hooks, torch's random
    state. What ``evaluate`` itself does to parameters stays.

    Args:
        models: by name; the others are compared with the first. They may be pruned, compacted, converted or compiled.
        example_inputs: one batch, which all models take: a tensor, a tuple of positional arguments, or a dictionary of
            keywords. It is copied to the device of each model.
        evaluate: from a model, in the mode that it is in, to a number or ``{name: number}``; called once for each.
        threads: of torch on the CPU while latency is measured; by default as many as now.
        rounds: how often each model is measured, at least 2.

    Returns:
        A row for each model. ``print`` it for the table.

    Raises:
        TypeError: an argument, or what ``evaluate`` returned, is of the wrong type.
        ValueError: no models, a model without data (lazy or on the meta device), or ``evaluate`` returned NaN.
        RuntimeError: a model, or ``evaluate``, raised; the message names the model.

    Example:
        >>> import copy
        >>> from torchprune_ext import global_unstructured, remove_all
        >>> dense = nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 10, bias=False))
        >>> zeros = copy.deepcopy(dense)
        >>> global_unstructured([(zeros[0], "weight"), (zeros[2], "weight")], target_sparsity=0.75)
        >>> _ = remove_all(zeros)
        >>> found = compare({"dense": dense, "zeros": zeros}, torch.ones(1, 64), rounds=2)
        >>> found.rows[1].macs, found.rows[1].parameters, found.rows[1].nonzero  # zeros are stored and multiplied
        (4736, 4736, 1184)
    """
    _check(models, evaluate)
    check_whole("rounds", rounds, 2)
    threads = torch.get_num_threads() if threads is None else threads
    check_whole("threads", threads, 1)
    calls = {name: forward_of(model, example_inputs) for name, model in models.items()}
    with forward_only(models.values()), with_threads(threads):
        macs = {name: first_forward(f"models[{name!r}]", models[name], call) for name, call in calls.items()}
    metrics = {name: {} if evaluate is None else _evaluated(name, model, evaluate) for name, model in models.items()}
    _refuse_other_names(metrics)
    with forward_only(models.values()):
        times = medians(calls, rounds=rounds, threads=threads)
    rows = []
    for name, model in models.items():
        time, numbers_ = times[name], (macs[name], *count_parameters(model), count_bytes(model))
        rows.append(Row(name, metrics[name], time.median, time.spread, *numbers_))
    return Comparison(tuple(rows), threads, rounds)


# ----------------------------------------------------------------------------------------------------------- arguments


def _check(models: Mapping[str, nn.Module], evaluate: Evaluate | None) -> None:
    """Raise unless ``models`` are named modules that hold data, and ``evaluate`` can be called."""
    if not isinstance(models, Mapping):
        raise TypeError(f"models is a {type(models).__name__}. Pass a dictionary, e.g. {{'dense': a, 'pruned': b}}.")
    if not models:
        raise ValueError("models={} names no model. Pass e.g. {'dense': a, 'pruned': b}.")
    for name, model in models.items():
        if not isinstance(name, str):
            raise TypeError(f"models has the key {name!r}, a {type(name).__name__}. Use names as keys.")
        check_runs(f"models[{name!r}]", model)
    if evaluate is not None and not callable(evaluate):
        raise TypeError(f"evaluate is a {type(evaluate).__name__}. Pass a function of a model.")


def check_runs(param: str, model: nn.Module) -> None:
    """Raise unless ``model``, the caller's ``param``, is a module whose tensors hold data."""
    check_module(param, model)
    with errors_about(param):
        refuse_lazy(model)
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise ValueError(f"{param}: {key} is on the meta device. Load the model's values first.")


def forward_of(model: nn.Module, inputs: Any) -> Callable[[], object]:
    """Return the forward pass of ``model`` on a copy of ``inputs``, on its device."""
    device = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), None)
    copied = tree_map(
        lambda tensor: tensor.detach().to(device, copy=True),
        inputs,
        lambda leaf: leaf.to(device) if isinstance(leaf, PackedSequence) else leaf,  # type: ignore[arg-type]
    )
    return partial(call, model, copied)


def _evaluated(name: str, model: nn.Module, evaluate: Evaluate) -> dict[str, float]:
    """Return what ``evaluate`` says of ``model``, as numbers by their names."""
    with untouched(model):
        try:
            found = evaluate(model)
        except Exception as error:
            raise RuntimeError(f"evaluate failed on models[{name!r}]: {type(error).__name__}: {error}") from error
    given = found if isinstance(found, Mapping) else {"metric": found}
    return {str(key): _number(f"evaluate on models[{name!r}]", value) for key, value in given.items()}


def _number(what: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{what} gave a {type(value).__name__}. Let it return a number, or a dictionary of numbers.")
    if math.isnan(value):
        raise ValueError(f"{what} gave NaN, which compares with nothing. Check the model's outputs.")
    return float(value)


def _refuse_other_names(metrics: Mapping[str, Mapping[str, float]]) -> None:
    """Raise ``ValueError`` unless all models have the same metrics, which do not have the names of costs."""
    first, *others = metrics
    for name in others:
        if set(metrics[name]) != set(metrics[first]):
            raise ValueError(
                f"evaluate gave {sorted(metrics[name])} for {name!r}, but {sorted(metrics[first])} for {first!r}. "
                "Let it return the same names for all models."
            )
    taken = set(COSTS) & set(metrics[first])
    if taken:
        raise ValueError(f"evaluate gave {sorted(taken)}, which is a column already. Use another name.")


# ------------------------------------------------------------------------------------------------------- forward passes


def first_forward(what: str, model: nn.Module, call: Callable[[], object]) -> int | None:
    """Run ``model``, in errors ``what``, for the first time, name it if it fails, and return its MACs."""
    try:
        call()
    except Exception as error:
        floats = sorted({str(tensor.dtype) for tensor in model.parameters() if tensor.is_floating_point()})
        raise RuntimeError(
            f"{what}, a {type(model).__name__} of {' and '.join(floats) or 'no parameters'}, failed on "
            f"example_inputs: {type(error).__name__}: {error}. Pass one batch that all models take: a tensor, a tuple "
            "of positional arguments or a dictionary of keywords, without targets, in the dtype of the models."
        ) from error
    try:
        return count_macs(model, call)
    except Exception:  # of what cannot be taken to its parts
        return None


@contextmanager
def forward_only(models: Iterable[nn.Module]) -> Iterator[None]:
    """Let ``models`` be in eval mode, without gradients, and leave them as they were."""
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(untouched(model))
            if any(getattr(module, "training", False) for module in model.modules()):
                model.eval()
        stack.enter_context(torch.no_grad())
        yield


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put back at the end what ``model`` is: its modules' modes, attributes and hooks, buffers, gradients.

    Also torch's random state. Values of parameters are not copied.
    """
    modules = list(model.modules())
    scripted = [module for module in modules if isinstance(module, torch.jit.ScriptModule)]
    modes = [(module, module.training) for module in scripted if hasattr(module, "training")]
    plain = [(module, contents_of(module, data=False)) for module in modules if module not in scripted]
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    written = Written(model)
    cuda = sorted({t.device.index for t in [*model.parameters(), *model.buffers()] if t.is_cuda})
    with torch.random.fork_rng(devices=cuda):
        try:
            yield
        finally:
            for module, contents in plain:
                restore(module, contents)
            for module, mode in modes:
                module.training = mode
            for parameter, grad in grads:
                parameter.grad = grad
            written.restore()


@contextmanager
def with_threads(number: int) -> Iterator[None]:
    """Let torch have ``number`` threads on the CPU."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(number)
        yield
    finally:
        torch.set_num_threads(before)


# -------------------------------------------------------------------------------------------------------------- table


def cell(row: Row, name: str) -> str:
    """Return a value as the table shows it."""
    value = row.values()[name]
    if name == "latency":
        return f"{significant(1e3 * row.latency)} ms ± {significant(1e3 * row.spread)}"
    if value is None:
        return "-"
    if name in row.metrics:
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.3e}"
    return quantity(value, "B" if name == "nbytes" else "")


def _share(ratio: float | None) -> str:
    return "" if ratio is None else f"{100 * ratio:.{0 if ratio >= 0.1 else 1}f} %"
