"""How much of each layer: amounts for :func:`.prune_to`, :func:`.plan` and every call that takes one for each tensor.

Every function returns ``{(module, name): sparsity}``. Where a sparsity of all is asked for, the amounts are multiples
of one entry that add up to exactly ``round(sparsity * entries)`` of the listed entries, and each tensor that has
entries keeps one at least. A sparsity is that in the end, earlier pruning included. Tied tensors count once and get
one amount under all their names. Nothing is pruned.
"""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from torchprune_ext._checks import check_finite, check_fraction, check_module, check_sparsity, errors_about
from torchprune_ext._loading import Options
from torchprune_ext._statistics import Key
from torchprune_ext.calibration import activations
from torchprune_ext.discovery import prunable_parameters
from torchprune_ext.global_pruning.budget import Listed, Params, groups_of, refuse_empty
from torchprune_ext.masks import identity
from torchprune_ext.selection import Scores, kept, select_with_floors
from torchprune_ext.workflow.apportion import level, nearest
from torchprune_ext.workflow.least_drop import from_sensitivity
from torchprune_ext.workflow.sensitivity import Sensitivity, SensitivityRow, sensitivity

__all__ = [
    "Sensitivity",
    "SensitivityRow",
    "by_name",
    "erk",
    "from_sensitivity",
    "lamp",
    "owl",
    "sensitivity",
    "uniform",
]


def uniform(params: Params, sparsity: float) -> dict[Key, float]:
    """Return the same amount for each tensor, up to the rounding to whole entries.

    Args:
        params: ``(module, name)`` pairs, any iterable; see :func:`.prunable_parameters`.
        sparsity: fraction of all listed entries that shall be pruned, in [0, 1).

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: ``sparsity`` is not in [0, 1), or leaves less than one entry of each tensor; or a tensor that
            cannot be pruned.

    Example:
        >>> conv, head = nn.Conv2d(1, 4, 3), nn.Linear(4, 2)
        >>> list(uniform([(conv, "weight"), (head, "weight")], 0.5).values())
        [0.5, 0.5]
    """
    groups, most, k = _asked(params, sparsity)
    return _amounts(groups, nearest([sparsity * _size(listed) for listed in groups], k, most))


def erk(params: Params, sparsity: float) -> dict[Key, float]:
    r"""Return amounts after Erdős-Rényi-Kernel: small layers stay denser, large ones get sparser.

    The density of a tensor is proportional to the sum of its dimensions over their product, for a convolution
    :math:`(n_{out} + n_{in} + k_h + k_w) / (n_{out} n_{in} k_h k_w)`. Where that would be more than 1, the tensor stays
    dense, and the others take what it leaves.

    Args:
        params: ``(module, name)`` pairs.
        sparsity: fraction of all listed entries that shall be pruned, in [0, 1).

    Raises:
        TypeError: as :func:`uniform`.
        ValueError: as :func:`uniform`.

    Source: Mocanu et al. 2018, arXiv:1707.04780, for layers without kernels; Evci et al. 2020, *Rigging the Lottery*,
    arXiv:1911.11134, section 3 (1), with kernels.

    Example:
        >>> small, large = nn.Linear(4, 4), nn.Linear(32, 32)
        >>> list(erk([(small, "weight"), (large, "weight")], 0.75).values())  # 780 of 16 + 1,024
        [0.0, 0.76171875]
    """
    groups, most, k = _asked(params, sparsity)
    sizes = [_size(listed) for listed in groups]
    dims = [sum(listed.target.parameter.shape) or 1 for listed in groups]
    top = max(size / dim for size, dim in zip(sizes, dims, strict=True))
    keep = level(
        lambda scale: [min(size, scale * dim) for size, dim in zip(sizes, dims, strict=True)], sum(sizes) - k, 0.0, top
    )
    return _amounts(groups, nearest([size - left for size, left in zip(sizes, keep, strict=True)], k, most))


def lamp(params: Params, sparsity: float) -> dict[Key, float]:
    r"""Return how much of each tensor one threshold on layer-adaptive magnitudes takes.

    The score of a weight is its square over the sum of squares of all weights of the tensor that are not smaller,
    :math:`w_u^2 / \sum_{v \ge u} w_v^2`, with the weights in rising order; the smallest of all tensors go. Within a
    tensor these are the weights of smallest magnitude, so ``prune_to(params, lamp(params, sparsity))`` prunes as the
    scores say. What is pruned already goes first.

    Args:
        params: ``(module, name)`` pairs.
        sparsity: fraction of all listed entries that shall be pruned, in [0, 1).

    Raises:
        TypeError: as :func:`uniform`.
        ValueError: as :func:`uniform`, weights that are not finite, or more is pruned already, or all of a tensor.

    Source: Lee, Park, Mo, Ahn & Shin 2021, *Layer-adaptive sparsity for the Magnitude-based Pruning*, arXiv:2010.07611.

    Example:
        >>> a, b = nn.Linear(3, 1, bias=False), nn.Linear(3, 1, bias=False)
        >>> _ = a.weight.data.copy_(torch.tensor([[1.0, 2.0, 3.0]])), b.weight.data.fill_(9.0)
        >>> [round(3 * amount) for amount in lamp([(a, "weight"), (b, "weight")], 0.5).values()]  # 1/14, 4/13 and 1/3
        [2, 1]
    """
    groups, _, k = _asked(params, sparsity)
    parts = []
    for listed in groups:
        with errors_about(listed.where):
            check_finite(listed.target.name, listed.target.parameter)
            parts.append(Scores.of(identity, _lamp_scores(listed)))
            if _size(listed) and not len(parts[-1]):
                raise ValueError("nothing is left of it. Leave it out of params, or undo() its pruning first.")
    dead = [_size(listed) - len(part) for listed, part in zip(groups, parts, strict=True)]
    if k < sum(dead):
        raise ValueError(
            f"sparsity={sparsity!r} is {k} of the listed entries, but {sum(dead)} are pruned already. Pass a larger "
            "one, or undo_all() first."
        )
    floors = [min(len(part), 1) for part in parts]
    cuts = select_with_floors(parts, min(k - sum(dead), sum(map(len, parts)) - sum(floors)), floors)
    stay = [int(kept(part, cut).count_nonzero()) for part, cut in zip(parts, cuts, strict=True)]
    return _amounts(groups, [_size(listed) - left for listed, left in zip(groups, stay, strict=True)])


def owl(
    model: nn.Module,
    loader: Iterable[Any],
    params: Params,
    sparsity: float,
    *,
    m: float = 5.0,
    lam: float = 0.08,
    blocks: Iterable[nn.Module] | None = None,
    **options: Unpack[Options],
) -> dict[Key, float]:
    r"""Return amounts by outliers (OWL): a layer with more of them keeps more. Made for large language models.

    An outlier is an entry whose score :math:`|w_{ij}| \cdot \|x_j\|_2` (Wanda's) is more than ``m`` times the mean of
    its layer. The densities are ``1 - sparsity`` plus a part that grows with the layer's fraction of outliers, from
    the least to the largest by ``2 * lam``, such that their mean, weighted by size, stays.

    It does not help every model: the perplexity of OPT-6.7B was seen to rise by it, from 20.3 to 22.5. Compare with
    :func:`uniform` on held-out data.

    Args:
        model: as for :func:`.calibration.activations`, and so are ``loader`` and ``options``.
        loader: batches; targets are not used.
        params: ``(module, name)`` pairs of the weights of ``Linear`` layers and convolutions.
        sparsity: fraction of all listed entries that shall be pruned, in [0, 1).
        m: how many times the mean makes an outlier.
        lam: half of the difference between the largest and the least density, in [0, 0.5].
        blocks: modules, as the blocks of a transformer, within which all listed tensors are taken as one layer, as the
            authors do; by default each tensor is a layer.
        **options: see :class:`.Options`.

    Raises:
        TypeError: as :func:`uniform` and :func:`.calibration.activations`.
        ValueError: as these, ``m`` or ``lam`` out of range, or a tensor that is in two blocks.

    Source: Yin et al. 2023, *Outlier Weighed Layerwise Sparsity*, arXiv:2310.05175; the densities as in the code of its
    authors, where each transformer block is a layer, and blocks are of one size.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        >>> _ = model[0].weight.data.fill_(0.1), model[2].weight.data.fill_(0.1)
        >>> model[2].weight.data[0, 0] = 9.0  # an outlier
        >>> params = [(model[0], "weight"), (model[2], "weight")]
        >>> list(owl(model, [torch.ones(16, 8)], params, 0.5, lam=0.125, progress=False).values())
        [0.625, 0.375]
    """
    params = _listed_twice(params)
    groups, most, k = _asked(params, sparsity)
    check_fraction("lam", lam)
    if lam > 0.5:
        raise ValueError(f"lam={lam!r} is more than 0.5, half of the way from empty to dense. Pass e.g. 0.08.")
    if isinstance(m, bool) or not isinstance(m, (int, float)) or not m > 0:
        raise ValueError(f"m={m!r} is not a multiple of the mean. Pass a number > 0, e.g. 5.0.")
    layer = _layers_of(groups, blocks)
    scores = activations(model, loader, [(listed.target.module, listed.target.name) for listed in groups], **options)
    found: dict[Any, list[Tensor]] = {}
    for key, score in zip(layer, scores.values(), strict=True):
        found.setdefault(key, []).append(score)
    ratios = {key: _outliers(layer_scores, m) for key, layer_scores in found.items()}
    low, high = min(ratios.values()), max(ratios.values())
    more = [2 * lam * (ratios[key] - low) / (high - low) if high > low else 0.0 for key in layer]
    sizes = [_size(listed) for listed in groups]
    keep = level(
        lambda density: [size * min(max(density + extra, 0.0), 1.0) for size, extra in zip(sizes, more, strict=True)],
        sum(sizes) - k,
        -2 * lam,
        1.0,
    )
    return _amounts(groups, nearest([size - left for size, left in zip(sizes, keep, strict=True)], k, most))


def by_name(model: nn.Module, amounts: Mapping[str, float | None], params: Params | None = None) -> dict[Key, float]:
    """Return amounts that are given by the names of layers, as ``model.named_modules()`` has them.

    Args:
        model: any module.
        amounts: ``{name: sparsity}``. A name is the path of a module, which stands for all below it, the path of a
            tensor, as ``"fc1.bias"``, or a pattern of either, as ``"fc*"`` or ``"*.attention.*"``. Where several
            match, the last one counts, so exceptions come behind the rule. None leaves out what it matches, as is
            what nothing matches.
        params: ``(module, name)`` pairs to choose from; by default :func:`.prunable_parameters` of the model.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a name that matches nothing, with the names that are near; one that later names override wherever
            it matches; or a sparsity that is not in [0, 1).

    Example:
        >>> from collections import OrderedDict
        >>> model = nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 4, 3), fc1=nn.Linear(4, 4), head=nn.Linear(4, 2)))
        >>> amounts = by_name(model, {"*": 0.75, "conv": 0.5, "head": None})
        >>> [(type(module).__name__, amount) for (module, _), amount in amounts.items()]
        [('Conv2d', 0.5), ('Linear', 0.75)]
    """
    check_module("model", model)
    if not isinstance(amounts, Mapping):
        raise TypeError(
            f"amounts is a {type(amounts).__name__}. Pass a dictionary, e.g. {{'conv1': 0.85, 'fc*': 0.75}}."
        )
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    groups = groups_of(prunable_parameters(model) if params is None else params)
    names = [
        {name for target in g.everywhere() for name in _names(paths.get(target.module, []), target.name)}
        for g in groups
    ]
    decided: list[str | None] = [None] * len(groups)
    for pattern, amount in amounts.items():
        if not isinstance(pattern, str):
            raise TypeError(f"amounts has the key {pattern!r}, a {type(pattern).__name__}. Pass names of modules.")
        if amount is not None:
            check_sparsity(f"amounts[{pattern!r}]", amount)
        matches = [i for i, own in enumerate(names) if any(fnmatchcase(name, pattern) for name in own)]
        if not matches:
            known = list(dict.fromkeys(name for own in names for name in sorted(own)))
            near = get_close_matches(pattern, known, n=5, cutoff=0.5) or known[:5]
            raise ValueError(
                f"amounts[{pattern!r}] matches no tensor of {type(model).__name__} that is listed. Did you mean "
                f"{near}? Pass a path or a pattern of paths, such as model.named_modules() gives them."
            )
        for i in matches:
            decided[i] = pattern
    if idle := [pattern for pattern in amounts if pattern not in decided]:
        raise ValueError(
            f"amounts[{idle[0]!r}] decides nothing, since the last match counts and later names match all that it "
            "does. Put it behind them, or leave it out."
        )
    chosen = [
        (listed, amounts[pattern]) for listed, pattern in zip(groups, decided, strict=True) if pattern is not None
    ]
    return {key: float(amount) for listed, amount in chosen if amount is not None for key in listed.pairs()}


def _listed_twice(params: Params) -> Params:
    """Return ``params`` such that it can be read twice."""
    return params if isinstance(params, nn.Module) or not isinstance(params, Iterable) else list(params)


def _asked(params: Params, sparsity: float) -> tuple[list[Listed], list[int], int]:
    """Return the tensors, how many entries of each may go at most, and how many of all shall."""
    check_sparsity("sparsity", sparsity)
    groups = groups_of(params)
    refuse_empty(groups)
    most = [max(_size(listed) - 1, 0) for listed in groups]
    total = sum(map(_size, groups))
    k = round(sparsity * total)
    if k > sum(most):
        raise ValueError(
            f"sparsity={sparsity!r} takes {k} of {total} entries, and leaves less than one for each of {len(groups)} "
            "tensors. Ask for less, or leave small tensors out of params."
        )
    return groups, most, k


def _amounts(groups: Sequence[Listed], counts: Sequence[int]) -> dict[Key, float]:
    """Return what fraction of each tensor ``counts`` are, under all of its names."""
    pairs = zip(groups, counts, strict=True)
    return {key: count / max(_size(listed), 1) for listed, count in pairs for key in listed.pairs()}


def _size(listed: Listed) -> int:
    return listed.target.parameter.numel()


def _lamp_scores(listed: Listed) -> Tensor:
    """Return the scores of the entries that are not pruned, in falling order."""
    dense, mask = listed.target.parameter.detach().reshape(-1), listed.target.mask
    alive = dense if mask is None else dense[mask.reshape(-1) != 0]
    falling = alive.abs().to(torch.float64).sort(descending=True).values
    squares = (falling / falling[:1]).square()  # the scores do not change, and no square leaves the range
    return (squares / squares.cumsum(0)).nan_to_num(0.0)  # where all are zero


def _layers_of(groups: Sequence[Listed], blocks: Iterable[nn.Module] | None) -> list[Any]:
    """Return what each tensor is a part of: the place of a block, or itself."""
    layer: list[Any] = [listed.place for listed in groups]
    for place, block in enumerate(() if blocks is None else blocks):
        check_module(f"blocks[{place}]", block)
        inside = set(block.modules())
        for i, listed in enumerate(groups):
            if any(target.module in inside for target in listed.everywhere()):
                if isinstance(layer[i], int):
                    raise ValueError(
                        f"{listed.where} is in blocks[{layer[i]}] and in blocks[{place}]. Pass blocks that share "
                        "nothing."
                    )
                layer[i] = place
    return layer


def _outliers(scores: Sequence[Tensor], m: float) -> float:
    """Return the fraction of all ``scores`` above ``m`` times their mean; 0 without any."""
    count = sum(score.numel() for score in scores)
    mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / max(count, 1)
    return sum(int((score.double() > m * mean).count_nonzero()) for score in scores) / max(count, 1)


def _names(paths: Iterable[str], name: str) -> set[str]:
    """Return what a tensor called ``name`` of the module at ``paths`` may be called by: itself and all above it."""
    found = set()
    for path in paths:
        parts = path.split(".") if path else []
        found |= {".".join(parts[:end]) for end in range(1, len(parts) + 1)} | {".".join([*parts, name])}
    return found
