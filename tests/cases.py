"""One row per method: what the contract and property tests need to know about it. A new method costs one row."""

import copy
import inspect
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import oracles
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import torchprune_ext as tpe

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced", "expanded")
LEVELS = (-3.0, -2.0, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 2.0, 3.0)  # few levels: ties and zeros are the rule
POSITIVE = (0.0, 0.5, 1.0, 2.0)
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
Error = type[Exception] | tuple[type[Exception], ...]


def _torch_seeded(make):
    """Build a module with fixed random weights and leave the global generator as it was."""

    def build():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return make()

    return build


HOSTS = {
    "linear": _torch_seeded(lambda: nn.Linear(8, 6)),
    "conv1d": _torch_seeded(lambda: nn.Conv1d(8, 6, 3)),
    "conv2d": _torch_seeded(lambda: nn.Conv2d(8, 6, 3)),
    "conv3d": _torch_seeded(lambda: nn.Conv3d(4, 6, 2)),
    "grouped2d": _torch_seeded(lambda: nn.Conv2d(8, 6, 3, groups=2)),
    "transposed1d": _torch_seeded(lambda: nn.ConvTranspose1d(8, 6, 3)),
    "transposed2d": _torch_seeded(lambda: nn.ConvTranspose2d(8, 6, 3)),
    "transposed2d-grouped": _torch_seeded(lambda: nn.ConvTranspose2d(8, 8, 3, groups=2)),
    "transposed3d": _torch_seeded(lambda: nn.ConvTranspose3d(4, 4, 2)),
}
CONVOLUTIONS = tuple(host for host in HOSTS if host != "linear")


# ---------------------------------------------------------------------------------------------- tensors and modules


def layout(tensor, kind):
    """Return a tensor of (nearly always) equal values whose memory is laid out as ``kind`` says."""
    if kind == "channels_last" and tensor.dim() in (4, 5):
        form = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
        return tensor.contiguous(memory_format=form)
    if kind == "sliced" and tensor.dim():
        return torch.stack([tensor, tensor], dim=-1)[..., 0]  # every stride is twice as long
    if kind == "expanded" and tensor.dim() and tensor.numel():
        return tensor[:1].expand_as(tensor)  # stride 0: the rows are one and the same
    if kind in ("transposed", "channels_last") and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    return tensor.contiguous()


def flat(tensor):
    """Return the values in row-major order, as the oracles want them."""
    return tensor.detach().double().reshape(-1).tolist()


def draw_tensor(draw, shape, levels=LEVELS, dtype=torch.float32, kind="contiguous"):
    """Draw a tensor whose entries are ``levels``."""
    values = draw(npst.arrays(np.float64, tuple(shape), elements=st.sampled_from(levels)))
    return layout(torch.from_numpy(values).to(dtype), kind)


def draw_amount(draw, units):
    """Draw an amount that ``units`` living units can give up."""
    fractions = st.one_of(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0]), st.floats(0, 1))
    return draw(st.one_of(fractions, st.integers(0, units)))


def alive(units, mask):
    """Count the units that have an entry left."""
    return sum(any(mask[i] for i in unit) for unit in units)


def build(shape, *, transposed=False, groups=1, bias=False):
    """Return a layer whose weight has ``shape``; 1-D shapes give a layer norm."""
    kind = {3: ("Conv1d", "ConvTranspose1d"), 4: ("Conv2d", "ConvTranspose2d"), 5: ("Conv3d", "ConvTranspose3d")}
    if len(shape) == 1:
        return nn.LayerNorm(shape, elementwise_affine=True, bias=bias, device="meta")
    if len(shape) == 2:
        return nn.Linear(1, 1, bias=bias, device="meta")
    make = getattr(nn, kind[len(shape)][transposed])
    ins, outs = (shape[0], shape[1] * groups) if transposed else (shape[1] * groups, shape[0])
    return make(ins, outs, shape[2:], groups=groups, bias=bias, device="meta")


def output_axis(module):
    """Return ``(dim, groups)`` of the output channels in ``module.weight``."""
    transposed = getattr(module, "transposed", False)
    return (1, module.groups) if transposed else (0, 1)


def batch_norm_for(module, gamma=None, size=None, **options):
    """Return a BatchNorm that fits behind ``module``, with the given ``gamma`` and no zero in its bias."""
    dim, groups = output_axis(module)
    size = module.weight.shape[dim] * groups if size is None else size
    bn = BATCH_NORMS[module.weight.dim()](size, dtype=module.weight.dtype, **options)
    if bn.affine:
        with torch.no_grad():
            bn.weight.copy_(torch.arange(size) * 5 % 7 - 3.0 if gamma is None else gamma)
            bn.bias.copy_(torch.arange(size) + 1.0)
    return bn


def rescaled(args, factor):
    """Multiply everything in ``args`` that scores are made of."""

    def scale(key, value):
        if isinstance(value, _BatchNorm):
            value = copy.deepcopy(value)
            value.weight.data *= factor
            return value
        return value * factor if torch.is_tensor(value) or key == "threshold" else value

    return {key: scale(key, value) for key, value in args.items()}


# ------------------------------------------------------------------------------------------------------- the rows


@dataclass(frozen=True)
class Bad:
    """Arguments that a method refuses; those not given are the good ones."""

    args: Mapping[str, object]
    error: Error
    words: str  # regular expression that the message matches


@dataclass(frozen=True)
class Case:
    """One method. A value that is a function in ``good``, ``bad`` or ``bias`` is called with (module, name)."""

    function: Callable[..., nn.Module]
    cls: type
    pruning_type: str
    good: Mapping[str, object]
    repr: str
    bad: tuple[Bad, ...]
    oracle: Callable  # (module, shape, weight, mask, args) -> mask
    units: Callable  # (module, shape, args) -> units that live or die together
    draw: Callable  # (draw, module, shape, mask) -> args
    hosts: tuple[str, ...] = ("linear", "conv1d", "conv2d", "transposed2d-grouped")
    dims: tuple[int, ...] = (1, 2, 3, 4)  # numbers of axes that the unit exists for
    bias: Mapping[str, object] | None = field(default_factory=dict)  # what differs on a bias; None: refused there
    ranks_weight: bool = True  # the weight's own values decide, unless importance_scores= does
    whole: bool = False  # units have more than one entry and go as a whole
    amount: bool = True  # has an amount of units
    empty: bool = True  # takes tensors without entries
    pairs: tuple | None = None  # of rows that rank by norms: a shape and arguments whose units are [0, 1] and [2, 3]
    masks: tuple[str, ...] = ("weight",)  # what a call for the weight masks
    host_weight: Callable | None = lambda scores: scores  # weights for the oracle where the host passes scores only

    @property
    def id(self):
        """The function's name is the row's name."""
        return self.function.__name__

    def arguments(self, module, name="weight", **changes):
        """Return ready arguments: the good ones with ``changes``, and on a bias with what differs there."""
        given = {**self.good, **(self.bias or {} if name == "bias" else {}), **changes}
        ready = {k: v(module, name) if isinstance(v, types.FunctionType) else v for k, v in given.items()}
        return {k: v for k, v in ready.items() if v is not ABSENT}


ABSENT = object()  # as an argument: leave it out


def _one_bad(value):
    def scores(module, name):
        tensor = torch.ones_like(getattr(module, name)).detach()
        tensor.view(-1)[-1] = value
        return tensor

    return scores


def _wrong_shape(module, name):
    return torch.ones(*getattr(module, name).shape, 2)


def _pseudo_random(module, name):
    tensor = getattr(module, name)
    return ((torch.arange(tensor.numel()) * 37 % 101 - 30.0) / 8).reshape(tensor.shape).to(tensor.dtype)


def _bad_tensor(param, *, negative):
    rows = [
        Bad({param: _one_bad(math.nan)}, ValueError, param),
        Bad({param: _one_bad(math.inf)}, ValueError, param),
        Bad({param: _one_bad(-math.inf)}, ValueError, param),
        Bad({param: _wrong_shape}, ValueError, rf"{param}.*, 2\)"),
        Bad({param: [1.0, 2.0]}, TypeError, param),
        Bad({param: 3.0}, TypeError, param),
        Bad({param: lambda module, name: getattr(module, name).detach() + 1j}, TypeError, param),
    ]
    return (*rows, Bad({param: _one_bad(-1.0)}, ValueError, param)) if negative else tuple(rows)


BAD_AMOUNT = (
    Bad({"amount": -1}, ValueError, r"amount=-1\b"),
    Bad({"amount": -0.1}, ValueError, r"amount=-0\.1"),
    Bad({"amount": 2.0}, ValueError, r"amount=2\.0"),
    Bad({"amount": 1.0000001}, ValueError, r"amount=1\.0000001"),
    Bad({"amount": math.nan}, ValueError, r"amount=nan"),
    Bad({"amount": math.inf}, ValueError, r"amount=inf"),
    Bad({"amount": 10**6}, ValueError, r"amount=1000000\b"),
    Bad({"amount": "x"}, TypeError, r"amount='x'"),
    Bad({"amount": None}, TypeError, r"amount=None"),
    Bad({"amount": True}, TypeError, r"amount=True"),
)
BAD_ORDER = (
    Bad({"n": "fro"}, TypeError, r"n='fro'"),
    Bad({"n": None}, TypeError, r"n=None"),
    Bad({"n": math.nan}, ValueError, r"n=nan"),
)
BAD_SCORES = _bad_tensor("importance_scores", negative=True)


def _draw_scores(draw, shape):
    if not draw(st.booleans()):
        return {}
    options = st.sampled_from(DTYPES), st.sampled_from(LAYOUTS)
    return {"importance_scores": draw_tensor(draw, shape, POSITIVE, *map(draw, options))}


def _draw_nm(draw, module, shape, mask):
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    pad = draw(st.booleans())
    fits = [m for m in range(1, shape[dim] + 1) if shape[dim] % m == 0] or [1, 2]
    m = draw(st.integers(1, 6) if pad else st.sampled_from(fits))
    n = draw(st.integers(1, m))
    return {"n": n, "m": m, "dim": dim, "pad": pad, **_draw_scores(draw, shape)}


def by_norm(units_of, draw_unit=lambda draw, shape: {}):
    """Return the fields of a row that prunes units by their norm.

    Args:
        units_of: ``(shape, **unit) -> units``, where ``unit`` are the arguments that say what a unit is.
        draw_unit: ``(draw, shape) -> unit``.
    """

    def units(module, shape, args):
        return units_of(shape, **{key: args[key] for key in set(args) & set(inspect.signature(units_of).parameters)})

    def arguments(draw, module, shape, mask):
        args = {"n": draw(st.sampled_from([2, 1, 2.0, 0, math.inf, -math.inf])), **draw_unit(draw, shape)}
        amount = draw_amount(draw, alive(units(module, shape, args), mask))
        return {**args, "amount": amount, **_draw_scores(draw, shape)}

    def oracle(module, shape, weight, mask, args):
        scores = _scores(weight, args)
        return oracles.prune_by_norm(units(module, shape, args), scores, mask, args["amount"], args["n"])

    return {"units": units, "draw": arguments, "oracle": oracle, "whole": True}


def pair(block):
    """Return rows and columns of a block."""
    return block if isinstance(block, tuple) else (block, block)


def _draw_with_tensor(param):
    def arguments(draw, module, shape, mask):
        tensor = draw_tensor(draw, shape, LEVELS, module.weight.dtype, draw(st.sampled_from(LAYOUTS)))
        return {param: tensor, "amount": draw_amount(draw, sum(mask))}

    return arguments


def _draw_bn(draw, module, shape, mask):
    units = oracles.channels(shape, *output_axis(module))
    bn = batch_norm_for(module, draw_tensor(draw, (len(units),)))
    return {"bn": bn, "paired": draw(st.booleans()), "amount": draw_amount(draw, alive(units, mask))}


def _scores(weight, args):
    return flat(args["importance_scores"]) if args.get("importance_scores") is not None else weight


def _nm_oracle(module, shape, weight, mask, args):
    return oracles.keep_n_of_m(oracles.runs(shape, args["m"], args["dim"]), _scores(weight, args), mask, args["n"])


def _gradient_oracle(module, shape, weight, mask, args):
    scores = [abs(g) for g in flat(args["grad"])]
    return oracles.prune_units(oracles.entries(shape), scores, mask, args["amount"])


def _obd_oracle(module, shape, weight, mask, args):
    scores = [max(h, 0) * w * w / 2 for h, w in zip(flat(args["hessian_diag"]), weight, strict=True)]
    return oracles.prune_units(oracles.entries(shape), scores, mask, args["amount"])


def _bn_oracle(module, shape, weight, mask, args):
    units = oracles.channels(shape, *output_axis(module))
    return oracles.prune_units(units, [abs(g) for g in flat(args["bn"].weight)], mask, args["amount"])


NM_STRUCTURED = Case(
    tpe.nm_structured,
    tpe.NMStructured,
    "global",
    good={"n": 1, "m": 2},
    repr="NMStructured(n=1, m=2, dim=1, pad=False, groups=1)",
    bad=(
        Bad({"n": 0}, ValueError, r"n=0\b"),
        Bad({"n": -1}, ValueError, r"n=-1\b"),
        Bad({"n": 3, "m": 2}, ValueError, r"n=3\b"),
        Bad({"m": 0, "n": 0}, ValueError, r"\b[nm]=0\b"),
        Bad({"n": 1.5}, TypeError, r"n=1\.5"),
        Bad({"m": "x"}, TypeError, r"m='x'"),
        Bad({"n": True}, TypeError, r"n=True"),
        Bad({"m": 5, "dim": 1}, ValueError, r"m=5\b.*pad=True"),
        Bad({"dim": 7}, ValueError, r"dim=7\b"),
        Bad({"dim": -6}, ValueError, r"dim=-6\b"),
        Bad({"dim": 0.5}, TypeError, r"dim=0\.5"),
        *BAD_SCORES,
    ),
    oracle=_nm_oracle,
    units=lambda module, shape, args: oracles.runs(shape, args["m"], args["dim"]),
    draw=_draw_nm,
    bias={"dim": 0},
    amount=False,
)
CASES = (
    NM_STRUCTURED,
    Case(
        tpe.kernel_ln,
        tpe.KernelLn,
        "global",
        good={"amount": 0.3, "n": 2},
        repr="KernelLn(amount=0.3, n=2)",
        bad=(
            *BAD_AMOUNT,
            *BAD_ORDER,
            *BAD_SCORES,
        ),
        **by_norm(oracles.kernels),
        hosts=CONVOLUTIONS,
        dims=(3, 4, 5),
        bias=None,
        pairs=((1, 2, 2), {}),
    ),
    Case(
        tpe.vector_ln,
        tpe.VectorLn,
        "global",
        good={"amount": 0.3, "n": 1, "dim": 0},
        repr="VectorLn(amount=0.3, n=1, dim=0)",
        bad=(
            *BAD_AMOUNT,
            *BAD_ORDER,
            Bad({"dim": 7}, ValueError, r"dim=7\b"),
            Bad({"dim": -6}, ValueError, r"dim=-6\b"),
            Bad({"dim": "x"}, TypeError, r"dim='x'"),
            *BAD_SCORES,
        ),
        **by_norm(oracles.vectors, lambda draw, shape: {"dim": draw(st.integers(-len(shape), len(shape) - 1))}),
        bias={"amount": 1},
        pairs=((2, 2), {"dim": 1}),
    ),
    Case(
        tpe.block_ln,
        tpe.BlockLn,
        "global",
        good={"amount": 0.3, "n": 2, "block": (3, 2)},
        repr="BlockLn(amount=0.3, n=2, block=(3, 2))",
        bad=(
            *BAD_AMOUNT,
            *BAD_ORDER,
            Bad({"block": 0}, ValueError, r"block=0"),
            Bad({"block": 1.5}, TypeError, r"block=1\.5"),
            Bad({"block": None}, TypeError, r"block=None"),
            Bad({"block": True}, TypeError, r"block=True"),
            Bad({"block": (2,)}, TypeError, r"block=\(2,\)"),
            Bad({"block": (2, -1)}, ValueError, r"block=\(2, -1\)"),
            Bad({"block": (2, "x")}, TypeError, r"block=\(2, 'x'\)"),
            Bad({"block": 4}, ValueError, r"block=4 .*\[1, 2, 3, 6\] .*\[1, 2, 4, 8\]"),
            *BAD_SCORES,
        ),
        **by_norm(
            lambda shape, block: oracles.collect(shape, lambda at: (at[0] // pair(block)[0], at[1] // pair(block)[1])),
            lambda draw, shape: {
                "block": tuple(draw(st.sampled_from([d for d in range(1, 10) if size % d == 0])) for size in shape)
            },
        ),
        hosts=("linear",),
        dims=(2,),
        bias=None,
        pairs=((1, 4), {"block": (1, 2)}),
    ),
    Case(
        tpe.gradient_magnitude,
        tpe.GradientMagnitude,
        "unstructured",
        good={"amount": 0.5, "grad": _pseudo_random},
        repr="GradientMagnitude(amount=0.5)",
        bad=(
            *BAD_AMOUNT,
            *_bad_tensor("grad", negative=False),
            Bad({"grad": ABSENT}, ValueError, r"backward\(\).*grad="),
            Bad({"grad": None}, ValueError, r"backward\(\).*grad="),
        ),
        oracle=_gradient_oracle,
        units=lambda module, shape, args: oracles.entries(shape),
        draw=_draw_with_tensor("grad"),
        ranks_weight=False,
    ),
    Case(
        tpe.obd_saliency,
        tpe.OBDSaliency,
        "unstructured",
        good={"amount": 0.5, "hessian_diag": _pseudo_random},
        repr="OBDSaliency(amount=0.5)",
        bad=(
            *BAD_AMOUNT,
            *_bad_tensor("hessian_diag", negative=False),
            Bad({"hessian_diag": None}, TypeError, r"hessian_diag"),
        ),
        oracle=_obd_oracle,
        units=lambda module, shape, args: oracles.entries(shape),
        draw=_draw_with_tensor("hessian_diag"),
        host_weight=lambda scores: [2**0.5] * len(scores),  # the host passes h w^2 / 2 itself
    ),
    Case(
        tpe.bn_scaling,
        tpe.BNScaling,
        "global",
        good={"amount": 0.5, "bn": lambda module, name: batch_norm_for(module)},
        repr="BNScaling(amount=0.5, dim=0, groups=1)",
        bad=(
            *BAD_AMOUNT,
            Bad({"bn": lambda module, name: batch_norm_for(module, size=5)}, ValueError, r"bn.*5"),
            Bad({"bn": lambda module, name: batch_norm_for(module, affine=False)}, ValueError, r"bn.*affine"),
            Bad({"bn": lambda module, name: nn.Linear(6, 6)}, TypeError, r"bn"),
            Bad({"bn": None}, TypeError, r"bn=None"),
            Bad({"bn": lambda module, name: batch_norm_for(module, torch.tensor(math.nan))}, ValueError, r"bn"),
        ),
        oracle=_bn_oracle,
        units=lambda module, shape, args: oracles.channels(shape, *output_axis(module)),
        draw=_draw_bn,
        hosts=tuple(HOSTS),
        dims=(2, 3, 4, 5),
        ranks_weight=False,
        whole=True,
        empty=False,
        masks=("weight", "bias"),
        host_weight=None,  # the largest score of a channel counts there
    ),
    Case(
        tpe.threshold,
        tpe.Threshold,
        "unstructured",
        good={"threshold": 0.05},
        repr="Threshold(threshold=0.05)",
        bad=(
            Bad({"threshold": -1.0}, ValueError, r"threshold=-1\.0"),
            Bad({"threshold": math.nan}, ValueError, r"threshold=nan"),
            Bad({"threshold": math.inf}, ValueError, r"threshold=inf"),
            Bad({"threshold": "x"}, TypeError, r"threshold='x'"),
            Bad({"threshold": None}, TypeError, r"threshold=None"),
            Bad({"threshold": True}, TypeError, r"threshold=True"),
            *BAD_SCORES,
        ),
        oracle=lambda module, shape, weight, mask, args: oracles.below(_scores(weight, args), mask, args["threshold"]),
        units=lambda module, shape, args: oracles.entries(shape),
        draw=lambda draw, module, shape, mask: {
            "threshold": draw(st.sampled_from([0, 0.0, 0.25, 0.5, 1, 1.0, 1.5, 2.0, 100.0])),
            **_draw_scores(draw, shape),
        },
        amount=False,
    ),
    Case(
        tpe.every_other,
        tpe.EveryOther,
        "unstructured",
        good={"step": 2, "offset": 0},
        repr="EveryOther(step=2, offset=0)",
        bad=(
            Bad({"step": 0}, ValueError, r"step=0\b"),
            Bad({"step": -2}, ValueError, r"step=-2\b"),
            Bad({"step": 1.5}, TypeError, r"step=1\.5"),
            Bad({"step": "x"}, TypeError, r"step='x'"),
            Bad({"step": True}, TypeError, r"step=True"),
            Bad({"offset": -1}, ValueError, r"offset=-1\b"),
            Bad({"offset": 0.5}, TypeError, r"offset=0\.5"),
        ),
        oracle=lambda module, shape, weight, mask, args: oracles.every_other(mask, args["step"], args["offset"]),
        units=lambda module, shape, args: oracles.entries(shape),
        draw=lambda draw, module, shape, mask: {
            "step": (step := draw(st.integers(1, 5))),
            "offset": draw(st.integers(0, step - 1)),
        },
        ranks_weight=False,
        amount=False,
    ),
)
