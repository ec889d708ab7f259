"""How much a model loses with each layer, measured by pruning one at a time."""

import numbers
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from torchprune_ext._checks import check_module, check_sparsity, errors_about, number_from
from torchprune_ext._loading import with_progress
from torchprune_ext._restoring import contents_of, restore
from torchprune_ext._runs import Written, refuse_lazy
from torchprune_ext._statistics import Key
from torchprune_ext._tables import percent, table
from torchprune_ext.discovery import NO_PRODUCT
from torchprune_ext.global_pruning.budget import Listed, Params, groups_of, refuse_empty
from torchprune_ext.patterns import Unit
from torchprune_ext.workflow.targets import Criterion, paths_in, plan, prune_to

__all__ = ["Sensitivity", "SensitivityRow", "sensitivity"]

TENTHS = tuple(tenth / 10 for tenth in range(1, 10))


@dataclass(frozen=True, slots=True)
class SensitivityRow:
    """What one evaluation has given.

    Args:
        layer: path of the tensor, as ``"conv1.weight"``.
        sparsity: fraction of its units that should be pruned.
        reached: fraction that was, in whole units, of which one at least stays.
        metric: what the model then reached, everything else being as it was.
    """

    layer: str
    sparsity: float
    reached: float
    metric: float


@dataclass(frozen=True, slots=True)
class _Layer:
    """A tensor: its path and names, its numbers of entries and units, and how many products an entry is a factor of."""

    path: str
    keys: tuple[Key, ...] = field(repr=False)
    entries: int
    units: int
    uses: int | None

    @property
    def macs(self) -> int | None:
        """Multiplications and additions of the evaluation; None if not known."""
        return None if self.uses is None else self.entries * self.uses


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """The curve that :func:`sensitivity` has measured; prints as a table.

    Args:
        dense: the metric of the model as it is.
        rows: one for each layer and sparsity, in the order of the layers.
        units: what was pruned, in the plural.
    """

    dense: float
    rows: tuple[SensitivityRow, ...]
    units: str
    layers: tuple[_Layer, ...] = field(repr=False)

    def drops(self, layer: str) -> list[tuple[float, float]]:
        """Return, for each sparsity that ``layer`` was measured at, what was reached and what the metric lost."""
        return [(row.reached, self.dense - row.metric) for row in self.rows if row.layer == layer]

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings and lists, as for a JSON file."""
        layers = [
            {"layer": each.path, "entries": each.entries, "units": each.units, "macs": each.macs}
            for each in self.layers
        ]
        rows = [{**asdict(row), "drop": self.dense - row.metric} for row in self.rows]
        return {"dense": self.dense, "units": self.units, "layers": layers, "rows": rows}

    def __str__(self) -> str:
        """Return a table of the metric: a line for each layer, a column for each sparsity."""
        columns = list(dict.fromkeys(row.sparsity for row in self.rows))
        found = {(row.layer, row.sparsity): f"{row.metric:.4g}" for row in self.rows}
        lines = [
            [each.path, f"{each.units:,}", f"{self.dense:.4g}", *(found[each.path, sparsity] for sparsity in columns)]
            for each in self.layers
        ]
        return table(["layer", self.units, "dense", *map(percent, columns)], lines)


def sensitivity(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    params: Params,
    sparsities: Iterable[float] = TENTHS,
    *,
    criterion: Criterion = "magnitude",
    unit: Unit | None = None,
    progress: bool | None = None,
) -> Sensitivity:
    """Measure what the model loses when one layer alone is pruned, for each layer and sparsity.

    The model is evaluated once as it is, and once for each layer and sparsity. In between and afterwards, also after
    an error and Ctrl-C, it is what it was: pruning, mode, hooks, buffers and values that the evaluation writes into.

    Args:
        model: any module, pruned or not.
        evaluate: from the model to a number, larger is better, such as the accuracy on held-out data; for a loss,
            return its negative. Sets the mode that it needs.
        params: ``(module, name)`` pairs within the model.
        sparsities: fractions to prune each tensor to, in [0, 1), what is pruned already counted in.
        criterion: as for :func:`.prune_to`.
        unit: as for :func:`.prune_to`.
        progress: show a progress bar with the time left, which needs ``tqdm``; by default if that is installed.

    Returns:
        The metric of the model, and a row for each layer and sparsity; see :class:`Sensitivity`.

    Raises:
        TypeError: an argument of the wrong type, or ``evaluate`` gives something else than a number.
        ValueError: as :func:`.prune_to`, before anything is evaluated; a tensor that is not in the model; or
            ``evaluate`` gives NaN or infinity.

    Source: Li et al. 2017, *Pruning Filters for Efficient ConvNets*, arXiv:1608.08710, section 3.2; Han et al. 2015,
    arXiv:1506.02626, figure 6.

    Example:
        >>> import torch
        >>> import torchprune_ext as tpe
        >>> model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 1, bias=False))
        >>> _ = model[0].weight.data.copy_(torch.arange(1.0, 17.0).view(4, 4) / 16)
        >>> _ = model[1].weight.data.copy_(torch.tensor([[0.4, 0.3, 0.2, 0.1]]))
        >>> x = torch.ones(1, 4)
        >>> curve = tpe.allocation.sensitivity(
        ...     model, lambda model: model(x).item(), tpe.prunable_parameters(model), (0.25, 0.5), progress=False
        ... )
        >>> print(curve)
        layer     entries  dense  25.0 %  50.0 %
        0.weight       16  1.625   1.375  0.8875
        1.weight        4  1.625   1.263  0.7375
    """
    check_module("model", model)
    if not callable(evaluate):
        raise TypeError(f"evaluate={evaluate!r} is a {type(evaluate).__name__}. Pass a function of the model.")
    refuse_lazy(model)
    asked = _checked(sparsities)
    params = list(params) if isinstance(params, Iterable) and not isinstance(params, nn.Module) else params
    groups = groups_of(params)
    refuse_empty(groups)
    paths = paths_in(model, groups)
    plans = {}
    for sparsity in asked:
        with errors_about(f"sparsities hold {sparsity!r}"):
            amounts = {key: sparsity for listed in groups for key in listed.pairs()}
            plans[sparsity] = plan(params, amounts, criterion, unit, min_keep=0).rows
    with _put_back(model) as (written, put_back):
        with _counting(groups) as uses, written.first_forward():
            dense = number_from(evaluate(model), "evaluate(model)")
        put_back()
        layers = tuple(
            _Layer(path, tuple(listed.pairs()), listed.target.parameter.numel(), row.units, used)
            for path, listed, row, used in zip(paths, groups, plans[asked[0]], uses, strict=True)
        )
        rows = []
        todo = [(place, layer, sparsity) for place, layer in enumerate(layers) for sparsity in asked]
        bar: Any = with_progress(todo, "sensitivity", None, progress)
        for place, layer, sparsity in bar:
            wanted = plans[sparsity][place].pruned + plans[sparsity][place].to_prune
            reached = min(wanted, max(layer.units - 1, 0)) / max(layer.units, 1)
            prune_to(params, dict.fromkeys(layer.keys, reached), criterion, unit)
            metric = number_from(evaluate(model), f"evaluate(model) with {layer.path} at a sparsity of {sparsity!r}")
            put_back()
            rows.append(SensitivityRow(layer.path, sparsity, reached, metric))
    return Sensitivity(dense, tuple(rows), "entries" if unit is None else unit.units, layers)


def _checked(sparsities: Iterable[float]) -> list[float]:
    """Return the different ``sparsities`` in rising order."""
    if isinstance(sparsities, (str, numbers.Real)) or not isinstance(sparsities, Iterable):
        raise TypeError(f"sparsities={sparsities!r} is a {type(sparsities).__name__}. Pass several, e.g. (0.5, 0.9).")
    asked = list(sparsities)
    for place, sparsity in enumerate(asked):
        check_sparsity(f"sparsities[{place}]", sparsity)
    if not asked:
        raise ValueError("sparsities=() leaves nothing to measure. Pass e.g. (0.5, 0.9).")
    return sorted({float(sparsity) for sparsity in asked})


@contextmanager
def _put_back(model: nn.Module) -> Iterator[tuple[Written, Callable[[], None]]]:
    """Yield what watches the first evaluation, and a function that puts the model back, as is done at the end too."""
    before = [(module, contents_of(module)) for module in model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    written = Written(model)

    def put_back() -> None:
        for module, contents in before:
            restore(module, contents)
        written.restore()
        for parameter, gradient in gradients:
            parameter.grad = gradient

    try:
        yield written, put_back
    finally:
        put_back()


@contextmanager
def _counting(groups: Sequence[Listed]) -> Iterator[list[int | None]]:
    """Yield a list that gets, while the body runs models, how many products an entry of each tensor is a factor of."""
    uses: list[int | None] = [None] * len(groups)
    hooks = []

    def count(place: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if x is None or not isinstance(output, Tensor):
                return
            if isinstance(module, _ConvNd):
                swapped = isinstance(module, _ConvTransposeNd)
                positions = x.numel() // module.in_channels if swapped else output.numel() // module.out_channels
            else:
                positions = x.numel() // max(x.shape[-1], 1) if x.dim() else 0
            uses[place] = (uses[place] or 0) + positions

        return hook

    try:
        for place, listed in enumerate(groups):
            for target in listed.everywhere():
                if target.name == "weight" and target.parameter.dim() > 1 and not isinstance(target.module, NO_PRODUCT):
                    hooks.append(target.module.register_forward_hook(count(place), with_kwargs=True))
        yield uses
    finally:
        for handle in hooks:
            handle.remove()
