"""What the conversions to sparse formats share: layers that qualify, measured on their own inputs, put into a copy."""

import copy
import functools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from torchprune_ext._batches import call
from torchprune_ext._checks import check_module
from torchprune_ext._host import outside_of_inference
from torchprune_ext._runs import left_as_it_was, refuse_lazy
from torchprune_ext.deploy.copying import copyable, refresh
from torchprune_ext.deploy.timing import medians

M = TypeVar("M", bound=nn.Module)
Inputs = Counter[tuple[torch.Size, torch.dtype]]  # of a layer, and how often each
FEW = 20  # rows that an error shows
NOT_CALLED = (
    "is not called: the model does not need it for these inputs, or reads its weight for a kernel of its own, as "
    "TransformerEncoderLayer does; torch.backends.mha.set_fastpath_enabled(False), here and where the model serves, "
    "turns that off"
)
READ = "is called, but its parent reads its weight too, which would be made dense each time"


@dataclass(frozen=True, slots=True)
class Row:
    """What becomes of one layer.

    Args:
        layer: its path in the model; empty if it is the model.
        shape: shape of its weight, ``(out_features, in_features)``.
        sparsity: fraction of the weight that is 0, masked or plain.
        converted: whether it is converted, or else left as it is.
        dense_ms: milliseconds that it takes dense, for all its calls in one forward; None where it was not measured.
        sparse_ms: the same in the sparse format.
        reason: why.
    """

    layer: str
    shape: tuple[int, ...]
    sparsity: float
    converted: bool
    dense_ms: float | None
    sparse_ms: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class Report:
    """What becomes of each ``Linear`` layer of a model, and why; ``str()`` is a table.

    Args:
        rows: a row for each layer, in the order of the model.
    """

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        return "\n".join(_table(self.rows))

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return the rows by the path of the layer, as plain values."""
        return {row.layer: asdict(row) for row in self.rows}


class Format(Protocol):
    """A sparse format."""

    def obstacle(self, weight: Tensor) -> str | None:
        """Return why ``weight`` does not fit, as the end of a sentence that starts with the layer; None if it does."""

    def modules(self, weight: Tensor, bias: Tensor | None) -> Iterable[nn.Module]:
        """Return layers that compute the same from a copy of ``weight`` in this format, and of ``bias``, to choose."""


def examine(model: nn.Module, example_inputs: Any, form: Format) -> tuple[Report, dict[nn.Module, nn.Module]]:
    """Look at every ``Linear`` of ``model``, and measure those that fit. The model is left as it was.

    Args:
        model: any module.
        example_inputs: what to call it with; None to measure each layer on a single row.
        form: the format.

    Returns:
        What becomes of each layer, and by what to replace those that are faster.
    """
    check_module("model", model)
    refuse_lazy(model)
    linears: dict[nn.Linear, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            linears[module] = path
    if not linears:
        raise ValueError(f"model, a {type(model).__name__}, has no nn.Linear, and only those can be converted.")
    rows, replaced = [], dict[nn.Module, nn.Module]()
    with outside_of_inference(), torch.no_grad(), left_as_it_was(model):  # pruned weights are plain here
        reasons = {layer: _obstacle(layer, form) for layer in linears}
        candidates = [layer for layer, reason in reasons.items() if reason is None]
        uses = _single_rows(model, candidates) if example_inputs is None else _uses(model, candidates, example_inputs)
        for layer, path in linears.items():
            reason, times = reasons[layer], None
            if reason is None and not uses[layer].inputs:
                reason = NOT_CALLED
            elif reason is None and uses[layer].read:
                reason = READ
            if reason is None:
                new, reason, times = _measured(layer, form, uses[layer].inputs)
                if new is not None:
                    replaced[layer] = new.train(layer.training)
            weight = layer._parameters.get("weight")
            shape = () if weight is None else tuple(weight.shape)
            dense, sparse = (None, None) if times is None else (times[0] * 1e3, times[1] * 1e3)
            rows.append(Row(path, shape, _sparsity(weight), layer in replaced, dense, sparse, reason))
    return Report(tuple(rows)), replaced


def converted(model: M, report: Report, replaced: Mapping[nn.Module, nn.Module], call: str) -> M:
    """Return a copy of ``model`` with layers ``replaced``; an error that tells the ``report`` if there are none.

    Args:
        model: the model, which is left as it was. What is not replaced is copied with its pruning.
        report: why.
        replaced: the new layer for each old one, wherever the model refers to it.
        call: the call that reports, for the error.
    """
    if not replaced:
        rest = len(report.rows) - FEW
        more = f"\n... and {rest} more: print({call})" if rest > 0 else ""
        raise ValueError(
            f"model, a {type(model).__name__}, has no layer to convert:\n" + "\n".join(_table(report.rows[:FEW])) + more
        )
    with copyable(model), outside_of_inference():
        clone = copy.deepcopy(model, {id(old): new for old, new in replaced.items()})
    if not {*replaced.values()} <= {*clone.modules()}:
        raise TypeError(
            f"model, a {type(model).__name__}, has a __deepcopy__ of its own, or of one of its modules, which does not "
            "pass on its memo, so that no layer of the copy can be replaced. Pass the memo to copy.deepcopy there."
        )
    return refresh(clone)


@dataclass(slots=True)
class _Use:
    """How a model uses a layer.

    Args:
        inputs: shape and dtype of the inputs that it is called with.
        read: whether something else reads its weight.
        running: whether it runs just now, and reads its weight itself.
    """

    inputs: Inputs
    read: bool = False
    running: bool = False


class _Noted(nn.Linear):
    """A ``Linear`` layer, for one forward of its model, that notes its use; no hook, since parents look for hooks."""

    def forward(self, input: Tensor) -> Tensor:
        use = vars(self)["_use"]
        use.inputs[input.shape, input.dtype] += 1
        use.running = True
        try:
            return super().forward(input)
        finally:
            use.running = False

    def __getattr__(self, name: str) -> Any:
        use = vars(self)["_use"]
        use.read |= name == "weight" and not use.running
        return super().__getattr__(name)


def _uses(model: nn.Module, layers: Iterable[nn.Linear], example_inputs: Any) -> dict[nn.Linear, _Use]:
    """Return how one forward of ``model`` in eval mode uses each of ``layers``, which are plain ``nn.Linear``."""
    uses = {layer: _Use(Counter()) for layer in layers}
    devices = list({p.device for p in model.parameters() if p.device.type == "cuda"})
    training = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng(devices=devices):
        try:
            for layer, use in uses.items():
                vars(layer)["_use"] = use
                layer.__class__ = _Noted
            model.eval()
            call(model, example_inputs)
        finally:
            for layer in uses:
                layer.__class__ = nn.Linear
                vars(layer).pop("_use", None)
            for module, mode in training:
                module.training = mode
    return uses


def _single_rows(model: nn.Module, layers: Iterable[nn.Linear]) -> dict[nn.Linear, _Use]:
    """Return what stands in for the uses of ``layers`` without an example: a row each, where they are called at all."""
    passed_by: set[nn.Module] = set()
    if torch.backends.mha.get_fastpath_enabled():
        for parent in model.modules():
            if isinstance(parent, nn.TransformerEncoderLayer):
                passed_by |= {parent.linear1, parent.linear2}
    return {
        layer: _Use(Counter([] if layer in passed_by else [(torch.Size([1, layer.in_features]), layer.weight.dtype)]))
        for layer in layers
    }


def _measured(
    layer: nn.Linear, form: Format, inputs: Inputs
) -> tuple[nn.Module | None, str, tuple[float, float] | None]:
    """Return the converted layer, or None where it is not faster, the reason, and the seconds dense and sparse."""
    try:
        choices = [layer, *(choice.eval() for choice in form.modules(layer.weight, layer.bias))]
        seconds = [0.0] * len(choices)
        for (shape, dtype), number in inputs.items():
            x = torch.ones(shape, dtype=dtype, device=layer.weight.device)
            times = medians({str(i): functools.partial(choice, x) for i, choice in enumerate(choices)})
            for i, each in enumerate(times.values()):
                seconds[i] += number * each.median
    except (RuntimeError, ValueError) as error:  # what this build or this device does not have, or packs otherwise
        return None, f"cannot be computed so here: {str(error).strip().splitlines()[0]}", None
    dense, *others = seconds
    best = min(others)
    shapes = [str(tuple(shape)) for shape, _ in inputs]
    shown = ", ".join(shapes if len(shapes) < 4 else [*shapes[:2], f"{len(shapes) - 2} other shapes"])
    where = f"on {shown}, {torch.get_num_threads()} thread(s)"
    if best >= dense:
        return None, f"dense is faster: sparse has {dense / best:.2f} times its speed {where}", (dense, best)
    return choices[1 + others.index(best)], f"{dense / best:.2f} times as fast as dense {where}", (dense, best)


def _obstacle(layer: nn.Linear, form: Format) -> str | None:
    """Return why ``layer`` cannot be converted, None if it can."""
    kind, weight = type(layer).__name__, layer._parameters.get("weight")
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return f"is a {kind}, whose weight its parent reads without calling it"
    if type(layer) is not nn.Linear:
        return f"is a {kind}, not a plain nn.Linear, and may compute something else"
    if "forward" in vars(layer):
        return "has a forward of its own, set on the instance. Delete it"
    hooks = [name for name, value in vars(layer).items() if name.endswith("_hooks") and value]
    if hooks:
        return f"has hooks, which would be lost ({', '.join(hooks)}). Remove them first"
    own = {*layer._parameters, *layer._buffers, *layer._modules} - {"weight", "bias"}
    own = {name for name in own if name not in layer._non_persistent_buffers_set}
    if own:
        return f"has {', '.join(sorted(own))} besides weight and bias, which would be lost"
    if type(weight) is not nn.Parameter or weight.layout != torch.strided:
        return f"has a weight that is a {type(weight).__name__}, not a dense nn.Parameter"
    return form.obstacle(weight.detach())


def _sparsity(weight: Tensor | None) -> float:
    if weight is None or weight.is_meta or not weight.numel() or weight.layout != torch.strided:
        return 0.0
    return 1 - int(torch.count_nonzero(weight)) / weight.numel()


def _table(rows: Iterable[Row]) -> list[str]:
    cells: list[tuple[str, ...]] = [("layer", "shape", "zeros", "", "dense ms", "sparse ms", "why")]
    for row in rows:
        cells.append(
            (
                row.layer or "(the model)",
                "x".join(map(str, row.shape)),
                f"{row.sparsity:.1%}",
                "converted" if row.converted else "left",
                *("" if value is None else f"{value:.3f}" for value in (row.dense_ms, row.sparse_ms)),
                row.reason,
            )
        )
    widths = [max(len(line[i]) for line in cells) for i in range(6)]
    return ["  ".join([*map(str.ljust, line[:6], widths), line[6]]).rstrip() for line in cells]
