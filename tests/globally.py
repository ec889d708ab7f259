"""Models, arguments and the oracle that the tests of global calls share: sorting the whole list in plain Python."""

import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

import oracles
import pytest
import torch
from cases import (
    DTYPES,
    LAYOUTS,
    POSITIVE,
    batch_norm_for,
    build,
    draw_tensor,
    flat,
    output_axis,
    pair,
)
from hypothesis import assume
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe

# ----------------------------------------------------------------------------------------------------- the oracle


@dataclass
class Part:
    """One tensor of the list: its units, one score per unit, and its mask, all as lists."""

    units: list
    scores: list
    mask: list

    def alive(self):
        """Return the units that have an entry left."""
        return [u for u, unit in enumerate(self.units) if any(self.mask[i] for i in unit)]

    def floor(self, min_keep):
        """Return how many units stay at least."""
        least = min_keep if isinstance(min_keep, int) else math.ceil(Fraction(min_keep) * len(self.units))
        return min(least, len(self.alive()))


def how_many(parts, amount=None, target_sparsity=None, **_):
    """Return how many units of all ``parts`` go; units that are gone already count for ``target_sparsity``."""
    left = sum(len(part.alive()) for part in parts)
    total = sum(len(part.units) for part in parts)
    return oracles.how_many(amount, left) if amount is not None else round(target_sparsity * total) - (total - left)


def spend(parts, min_keep=1, **asked):
    """Return the masks of all ``parts`` after pruning, or None if the floors leave too little to take."""
    free = []
    for p, part in enumerate(parts):
        best_first = sorted(part.alive(), key=lambda u, scores=part.scores: (-scores[u], u))
        free += [(part.scores[u], -p, -u) for u in best_first[part.floor(min_keep) :]]
    k = how_many(parts, **asked)
    if not 0 <= k <= len(free):
        return None
    masks = [list(part.mask) for part in parts]
    for _, p, u in sorted(free)[:k]:  # of equal scores, the later tensor and the higher index go first
        for i in parts[-p].units[-u]:
            masks[-p][i] = 0
    return masks


def norm(values, n):
    """Return the Ln norm."""
    return {1: sum, 2: lambda v: math.sqrt(sum(x * x for x in v)), math.inf: max, 0: lambda v: sum(x != 0 for x in v)}[
        n
    ]([abs(x) for x in values])


def normalized(norms, n, size, how):
    """Return the norms of units of ``size`` entries as they are compared between tensors."""
    if how == "mean":
        roots = {1: size, 2: math.sqrt(size), math.inf: 1, 0: size}
        return [x / roots[n] for x in norms]
    scale = {None: 1, "max": max(norms, default=0), "sum": sum(norms)}[how]
    return [x / scale if scale else x for x in norms]


# ------------------------------------------------------------------------------------------------------- the rows


@dataclass(frozen=True)
class Row:
    """One global function. ``bn`` rows are called with (layer, bn) pairs, all others with (module, name) pairs."""

    function: Callable[..., None]
    shapes: st.SearchStrategy
    draw: Callable  # (draw, groups) -> keyword arguments that the scores come from
    units: Callable  # (layer, shape, args) -> units
    scores: Callable  # (layer, values, units, args) -> one number per unit; values are 0 where masked
    history: str  # of the call that ``ready`` prepares
    good: Callable = lambda layers: {}  # layers -> keyword arguments of that call
    layers: Callable = lambda: [nn.Conv2d(4, 6, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 2, 2), nn.Conv2d(8, 3, 1)]
    bad: tuple = ()  # (arguments, error, words) that the function refuses
    bn: bool = False

    @property
    def id(self):
        """The function's name is the row's name."""
        return self.function.__name__


ENTRIES = st.one_of(
    st.sampled_from([(0,), (1,), (1, 1), (0, 3), (2, 0), (7, 5)]),
    st.tuples(st.integers(0, 9)),
    st.tuples(st.integers(0, 4), st.integers(0, 7)),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3)),
)
KERNELS = st.one_of(
    st.sampled_from([(1, 1, 1), (2, 3, 0), (2, 2, 1, 1), (3, 2, 3, 3)]),
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3)),
    st.tuples(st.integers(1, 2), st.integers(1, 2), *[st.integers(1, 2)] * 3),
)
SLICES = st.one_of(st.sampled_from([(1, 1), (0, 3), (3, 0), (5, 7)]), st.tuples(st.integers(0, 5), st.integers(0, 6)),
                   KERNELS)  # fmt: skip
CHANNELS = st.one_of(st.tuples(st.integers(1, 6), st.integers(1, 3)), KERNELS.filter(lambda shape: 0 not in shape))


def owner(module):
    """Return the parameter that holds the dense weight."""
    return module._parameters.get("weight_orig", module._parameters.get("weight"))


def dense_mask(module):
    """Return the mask as a list."""
    mask = module._buffers.get("weight_mask")
    return [1] * owner(module).numel() if mask is None else [int(m != 0) for m in flat(mask)]


def tensors_for(draw, groups, levels, dtypes=DTYPES):
    """Draw one tensor for each parameter and list it for all modules that share it."""
    drawn = {}
    for modules in groups:
        shape = owner(modules[0]).shape
        tensor = draw_tensor(draw, shape, levels, draw(st.sampled_from(dtypes)), draw(st.sampled_from(LAYOUTS)))
        drawn |= {(module, "weight"): tensor for module in modules}
    return drawn


def draw_scores(draw, groups):
    return {"importance_scores": tensors_for(draw, groups, POSITIVE)} if draw(st.booleans()) else {}


def draw_gradients(draw, groups):
    if draw(st.booleans()):
        return {"grad": tensors_for(draw, groups, (-2.0, -1.0, 0.0, 0.5, 1.0))}
    for modules in groups:
        parameter = owner(modules[0])
        parameter.grad = draw_tensor(draw, parameter.shape, dtype=parameter.dtype)
    return {}


def draw_norm(**units):
    """Return a function that draws order, normalization and one of the ``units``, the values of an argument."""

    def arguments(draw, groups):
        # sums of roots would round differently here and there, and blur ties between tensors
        how, orders = draw(st.sampled_from([("mean", (0, 1, 2, math.inf)), ("max", (0, 1, 2, math.inf)),
                                            ("sum", (0, 1, math.inf)), (None, (0, 1, 2, math.inf))]))  # fmt: skip
        args = {"n": draw(st.sampled_from(orders)), "normalize": how, **draw_scores(draw, groups)}
        if how == "mean" and draw(st.booleans()):
            del args["normalize"]  # is the default
        return {**args, **{key: draw(st.sampled_from(values)) for key, values in units.items()}}

    return arguments


def entry_scores(layer, values, units, args):
    return [abs(value) for value in values]


def gradient_scores(layer, values, units, args):
    return [abs(g) for g in flat(args["grad"][layer, "weight"] if args else owner(layer).grad)]


def obd_scores(layer, values, units, args):
    return [max(h, 0) * w * w / 2 for h, w in zip(flat(args["hessian_diag"][layer, "weight"]), values, strict=True)]


def norm_scores(layer, values, units, args):
    norms = [norm([values[i] for i in unit], args["n"]) for unit in units]
    return normalized(norms, args["n"], len(units[0]) if units else 0, args.get("normalize", "mean"))


def slices(layer, shape, args):
    dim = args["dim"] % len(shape)
    return list(oracles.collect(shape, lambda at: at[dim])) if math.prod(shape) else []


ROWS = (
    Row(
        tpe.global_unstructured,
        ENTRIES,
        draw_scores,
        lambda layer, shape, args: oracles.entries(shape),
        entry_scores,
        history="global_unstructured(amount=0.3, min_keep=1)",
    ),
    Row(
        tpe.global_gradient_magnitude,
        ENTRIES,
        draw_gradients,
        lambda layer, shape, args: oracles.entries(shape),
        gradient_scores,
        history="global_gradient_magnitude(amount=0.3, min_keep=1)",
    ),
    Row(
        tpe.global_obd_saliency,
        ENTRIES,
        lambda draw, groups: {"hessian_diag": tensors_for(draw, groups, (-1.0, 0.0, 0.5, 1.0, 2.0))},
        lambda layer, shape, args: oracles.entries(shape),
        obd_scores,
        history="global_obd_saliency(amount=0.3, min_keep=1)",
        good=lambda layers: {
            "hessian_diag": {(layer, "weight"): owner(layer).detach().square() + 0.1 for layer in layers}
        },
    ),
    Row(
        tpe.global_kernel_ln,
        KERNELS,
        draw_norm(),
        lambda layer, shape, args: oracles.kernels(shape),
        norm_scores,
        history="global_kernel_ln(amount=0.3, min_keep=1, n=2, normalize='mean')",
    ),
    Row(
        tpe.global_vector_ln,
        SLICES,
        draw_norm(dim=(-1, 0, 1, -2)),
        lambda layer, shape, args: oracles.vectors(shape, args["dim"]),
        norm_scores,
        history="global_vector_ln(amount=0.3, min_keep=1, n=2, dim=-1, normalize='mean')",
    ),
    Row(
        tpe.global_block_ln,
        st.tuples(st.sampled_from([0, 2, 4, 6]), st.sampled_from([0, 2, 4])),
        draw_norm(block=(1, 2, (1, 2), (2, 1))),
        lambda layer, shape, args: oracles.collect(
            shape, lambda at: (at[0] // pair(args["block"])[0], at[1] // pair(args["block"])[1])
        ),
        norm_scores,
        history="global_block_ln(amount=0.3, min_keep=1, n=2, block=2, normalize='mean')",
        good=lambda layers: {"block": 2},
        layers=lambda: [nn.Linear(6, 4), nn.Linear(2, 8), nn.Linear(4, 6), nn.Linear(8, 2)],
        bad=(
            ({"block": 0}, ValueError, r"block=0"),
            ({"block": "x"}, TypeError, r"block='x'"),
            ({"block": (2, 4)}, ValueError, r"params\[0\].*block=\(2, 4\)"),
        ),
    ),
    Row(
        tpe.global_ln_structured,
        SLICES,
        draw_norm(dim=(0, 1, -1)),
        slices,
        norm_scores,
        history="global_ln_structured(amount=0.3, min_keep=1, n=2, dim=0, normalize='mean')",
    ),
    Row(
        tpe.global_bn_scaling,
        CHANNELS,
        lambda draw, groups: {"paired": draw(st.booleans())},
        lambda layer, shape, args: oracles.channels(shape, *output_axis(layer)),
        lambda layer, values, units, args: [abs(g) for g in flat(owner(args["bns"][layer]))],
        history="global_bn_scaling(amount=0.3, min_keep=1, paired=True)",
        bn=True,
    ),
)
NM_ROW = Row(
    tpe.global_nm_structured,
    *[None] * 4,  # it does not drop units one by one: its oracle is in test_global_nm.py
    history="global_nm_structured(amount=0.3, min_keep=1, n=?, m=4, dim=1)",
    good=lambda layers: {"m": 4},
)
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)


# ------------------------------------------------------------------------------------------------ drawn models


def prune_before(draw, module):
    """Leave the module as it is, or prune it natively or by us; the weight is trained afterwards."""
    chosen = draw(st.sampled_from(["not", "not", "mask", "ours", "both"]))
    parameter = owner(module)
    if chosen in ("mask", "both"):
        prune.custom_from_mask(module, "weight", draw_tensor(draw, parameter.shape, (0, 1, 1)))
    if chosen in ("ours", "both"):
        tpe.every_other(module, "weight", step=draw(st.integers(1, 4)), offset=draw(st.integers(0, 3)))
    if chosen != "not":  # the attribute is stale from now on
        parameter.data = draw_tensor(draw, parameter.shape, dtype=parameter.dtype, kind=draw(st.sampled_from(LAYOUTS)))


@dataclass
class Model:
    """Modules in groups that share one weight, in an order, some of them listed twice."""

    groups: list
    listing: list = field(default_factory=list)  # modules, in the order of the list
    bns: dict = field(default_factory=dict)

    def params(self, row):
        """Return the list that the function takes."""
        return [(module, self.bns[module] if row.bn else "weight") for module in self.listing]

    def ordered(self):
        """Return the groups in the order in which their first module is listed, that module first."""
        first = {}
        for module in self.listing:
            [group] = [g for g in self.groups if any(module is m for m in g)]
            first.setdefault(id(group), [module, *[m for m in group if m is not module]])
        return list(first.values())

    def parts(self, row, args):
        """Return the list as the oracle wants it."""
        parts = []
        for modules in self.ordered():
            shape = tuple(owner(modules[0]).shape)
            mask = [min(flags) for flags in zip(*map(dense_mask, modules), strict=True)] if math.prod(shape) else []
            units = [unit for unit in row.units(modules[0], shape, args) if unit]
            given = args.get("importance_scores", {}).get((modules[0], "weight"), owner(modules[0]))
            values = [v * m for v, m in zip(flat(given), mask, strict=True)]
            parts.append(Part(units, row.scores(modules[0], values, units, args), mask))
        if args.get("n") == 2:
            _refuse_ties_by_rounding(parts)
        return parts


def _refuse_ties_by_rounding(parts):
    """Leave out scores of units of different sizes that are equal but for rounding, so that nothing says which goes.

    Such as the mean squares of (2, 0, 0) and of (1, 1, 1, 3, 0, 0, 0, 0, 0), whose roots differ in the last digit.
    """
    sized = sorted((score, len(part.units[0])) for part in parts for score in part.scores if score)
    for (one, size), (other, another) in itertools.pairwise(sized):
        exact = size == another or all(math.isqrt(entries) ** 2 == entries for entries in (size, another))
        assume(exact or not math.isclose(one, other, rel_tol=1e-9))


def draw_model(draw, row):
    """Draw a model of one to four weights of any dtype and layout; tied, pruned before, listed twice."""
    groups, bns = [], {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        for _ in range(draw(st.integers(1, 4))):
            shape = draw(row.shapes)
            transposed = row.bn and len(shape) > 2 and draw(st.booleans())
            split = draw(st.sampled_from([g for g in (1, 2, 3) if shape[0] % g == 0])) if transposed else 1
            sharers = 1 if row.bn else draw(st.sampled_from([1, 1, 1, 2]))
            modules = [build(shape, transposed=transposed, groups=split) for _ in range(sharers)]
            dtype, form = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(LAYOUTS))
            shared = nn.Parameter(draw_tensor(draw, shape, dtype=dtype, kind=form))
            for module in modules:
                module.weight = shared
            if row.bn:
                dim, g = output_axis(modules[0])
                bns[modules[0]] = batch_norm_for(modules[0], draw_tensor(draw, (shape[dim] * g,)))
            for module in modules:
                prune_before(draw, module)
            groups.append(modules)
    modules = [module for group in groups for module in group]
    again = draw(st.lists(st.sampled_from(modules), max_size=2))
    return Model(groups, draw(st.permutations([*modules, *again])), bns)


def draw_budget(draw, parts):
    """Draw an amount and a floor, most of the time such that both hold."""
    min_keep = draw(st.sampled_from([0, 0, 1, 1, 2, 3, 0.0, 0.25, 0.5, 1.0, None]))
    floor = 1 if min_keep is None else min_keep
    left, total = (sum(len(f(part)) for part in parts) for f in (Part.alive, lambda part: part.units))
    k = draw(st.integers(0, left - sum(part.floor(floor) for part in parts)))
    asked = draw(
        st.sampled_from(
            [
                {"amount": k},
                {"amount": k / max(left, 1)},
                {"target_sparsity": (k + total - left) / max(total, 1)},
                {"amount": draw(st.floats(0, 1))},
                {"amount": draw(st.integers(0, left))},
            ]
        )
    )
    return asked if min_keep is None else {**asked, "min_keep": min_keep}


def check_mask(module, name, expected):
    """Check mask, product and history of a pruned tensor."""
    dense, mask = module._parameters[f"{name}_orig"], module._buffers[f"{name}_mask"]
    assert torch.equal(mask, torch.tensor(expected, dtype=dense.dtype).reshape(dense.shape))
    assert mask.dtype == dense.dtype
    strides = zip(mask.shape, mask.stride(), torch.empty_like(dense).stride(), strict=True)
    assert mask.numel() == 0 or all(size == 1 or ours == theirs for size, ours, theirs in strides)
    assert not mask.requires_grad
    assert torch.equal(getattr(module, name), dense * mask)
    [hook] = [hook for hook in module._forward_pre_hooks.values() if hook._tensor_name == name]
    last = hook[-1] if isinstance(hook, prune.PruningContainer) else hook
    nothing_new = isinstance(
        last, (prune.CustomFromMask, tpe.EveryOther)
    )  # of prune_before: the call has left no entry
    assert repr(last).startswith("global_") or nothing_new


def linear(values, **options):
    """Return a Linear layer of one row with these weights."""
    layer = nn.Linear(len(values), 1, bias=False, **options)
    layer.weight.data.copy_(torch.tensor([values], dtype=torch.float64))
    return layer


def weights(*layers):
    return [(layer, "weight") for layer in layers]


def two_convolutions(small=1.0, large=1.0):
    layers = [nn.Conv2d(2, 2, 1, bias=False), nn.Conv2d(2, 2, 3, bias=False)]
    for layer, size in zip(layers, (small, large), strict=True):
        spread = torch.tensor([[0.9, 1.0], [1.1, 1.2]])[:, :, None, None]
        layer.weight.data = (size * spread * torch.ones_like(layer.weight)).detach()
    return layers


class Tied(nn.Module):
    """Embedding, one layer, and a decoder that shares the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embedding, self.layer, self.decoder = nn.Embedding(10, 6), nn.Linear(6, 6), nn.Linear(6, 10)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens):
        return self.decoder(torch.relu(self.layer(self.embedding(tokens))))


def ready(function, state="fresh"):
    """Return modules and good arguments of a call of ``function`` on four layers."""
    [row] = [row for row in (*ROWS, NM_ROW) if row.function is function]
    layers = row.layers()
    norms = [batch_norm_for(layer) for layer in layers]
    for layer in layers:
        layer.weight.grad = layer.weight.detach().clone()
        if state == "native":
            prune.l1_unstructured(layer, "weight", 0.1)
            prune.random_unstructured(layer, "bias", 1)
        elif state == "ours":
            tpe.vector_ln(layer, "weight", 1, dim=1)
            tpe.every_other(layer, "weight", step=5)
    listed = {"pairs": list(zip(layers, norms, strict=True))} if row.bn else {"params": weights(*layers)}
    return nn.ModuleList([*layers, *norms]), {**listed, "amount": 0.3, **row.good(layers)}


FUNCTIONS = [row.function for row in (*ROWS, NM_ROW)]
every_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)


class PlantedError(Exception):
    """An error that nobody expects."""
