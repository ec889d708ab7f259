"""The best N of M for each tensor against trying them all."""

import itertools
import warnings
from fractions import Fraction

import oracles
import pytest
import torch
from cases import (
    DTYPES,
    build,
    draw_tensor,
    flat,
)
from globally import (
    Tied,
    check_mask,
    dense_mask,
    draw_scores,
    owner,
    weights,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from snapshots import Snapshot
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe


def vertices(points):
    """Return the indices of ``points`` (cost, total), by rising cost, that lie on their upper concave envelope."""

    def below(a, point, b):
        share = Fraction(point[0] - a[0], b[0] - a[0])
        return point[1] < a[1] + share * (b[1] - a[1])

    distinct = [i for i, point in enumerate(points) if point[0] not in [cost for cost, _ in points[:i]]]
    return [
        i
        for i in distinct
        if not any(
            points[a][0] < points[i][0] < points[b][0] and below(points[a], points[i], points[b])
            for a in distinct
            for b in distinct
        )
    ]


def draw_nm(draw, *, even):
    """Draw layers, arguments, and for each layer what each ``n`` would keep; ``even``: nothing disturbs the steps."""
    m = draw(st.integers(1, 4))
    pad = not even and draw(st.booleans())
    dim = draw(st.sampled_from([0, 1, -1]))
    layers, options = [], []
    groups = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    for _ in range(draw(st.integers(1, 3))):
        rows = groups[0] if even else draw(st.integers(1, 4))
        size = m * (groups[1] if even else draw(st.integers(1, 2))) - (draw(st.integers(0, m - 1)) if pad else 0)
        layer = build((rows, size) if dim else (size, rows))
        # whole numbers: sums are exact
        values = draw_tensor(draw, (rows, size) if dim else (size, rows), range(-9, 10), draw(st.sampled_from(DTYPES)))
        layer.weight = nn.Parameter(values)
        if not even and draw(st.booleans()):
            prune.custom_from_mask(layer, "weight", draw_tensor(draw, values.shape, (0, 1)))
        layers.append(layer)
    args = {"m": m, "dim": dim, **({"pad": True} if pad else {})}
    given_scores = draw_scores(draw, [[layer] for layer in layers])
    for layer in layers:
        shape, mask = tuple(owner(layer).shape), dense_mask(layer)
        scores = flat(given_scores["importance_scores"][layer, "weight"] if given_scores else owner(layer))
        masks = [oracles.keep_n_of_m(oracles.runs(shape, m, dim), scores, mask, n) for n in range(m + 1)]
        totals = [sum(Fraction(abs(s)) * k for s, k in zip(scores, keep, strict=True)) for keep in masks]
        options.append([(sum(keep), total, keep) for keep, total in zip(masks, totals, strict=True)])
    return layers, {**args, **given_scores}, options


@pytest.mark.parametrize("even", [True, False])
@settings(max_examples=80)
@given(data=st.data())
def test_the_best_n_of_each_tensor(even, data):
    layers, args, options = draw_nm(data.draw, even=even)
    m = args["m"]
    min_keep = data.draw(st.sampled_from([0, 1]))
    if min_keep == 0:
        args["min_keep"] = 0
    ns = list(range(min_keep, m + 1))
    if not even and data.draw(st.booleans()):
        args["choices"] = data.draw(st.lists(st.integers(0, m), min_size=1, unique=True))
        ns = sorted(n for n in args["choices"] if n >= min_keep)
    alive = sum(option[m][0] for option in options)
    size = sum(owner(layer).numel() for layer in layers)
    asked = data.draw(
        st.sampled_from([{"amount": data.draw(st.floats(0, 1))}, {"amount": data.draw(st.integers(0, alive))},
                         {"target_sparsity": data.draw(st.floats(1 - alive / size, 1))}])
    )  # fmt: skip
    keep = alive - (
        oracles.how_many(asked["amount"], alive)
        if "amount" in asked
        else round(asked["target_sparsity"] * size) - (size - alive)
    )
    before, state = Snapshot(*layers), torch.get_rng_state()
    if not ns or sum(option[ns[0]][0] for option in options) > keep:
        with pytest.raises(ValueError, match=r"choices="):
            tpe.global_nm_structured(weights(*layers), **args, **asked)
        assert before.differences() == []
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tpe.global_nm_structured(weights(*layers), **args, **asked)
    assert torch.equal(torch.get_rng_state(), state)
    chosen = []
    for layer, option in zip(layers, options, strict=True):
        fits = [n for n in ns if option[n][2] == flat(layer.weight_mask)]
        assert fits, "the mask is that of no allowed n"
        check_mask(layer, "weight", option[fits[0]][2])
        chosen.append(fits[0])
    entries, total = (sum(option[n][i] for option, n in zip(options, chosen, strict=True)) for i in (0, 1))
    assert entries <= keep, "less sparse than asked"
    every = [
        tuple(sum(option[n][i] for option, n in zip(options, combination, strict=True)) for i in (0, 1))
        for combination in itertools.product(ns, repeat=len(layers))
    ]
    best = max(value for cost, value in every if cost <= keep)
    gains, costs = [0], []
    for option, n in zip(options, chosen, strict=True):
        corners = [ns[i] for i in vertices([option[n][:2] for n in ns])]
        gains += [option[b][1] - option[a][1] for a, b in itertools.pairwise(corners)]
        costs += [option[b][0] - option[n][0] for b in corners if option[b][0] > option[n][0]][:1]
    assert total >= best - max(gains), "lost more than the gain of one step"
    assert all(cost > keep - entries for cost in costs), "another step would have fitted"
    if even:  # all steps cost the same
        assert total == max(value for cost, value in every if cost <= entries)
    emptied = [not any(flat(layer.weight_mask)) for layer in layers]
    assert len(caught) <= (min_keep == 0 and any(emptied))


def test_counting_norms_compare_across_precisions():
    single, double = nn.Conv1d(1, 2, 3), nn.Conv1d(1, 2, 3).double()
    for layer in (single, double):
        layer.weight.data.fill_(5.0)
    double.weight.data[1, 0, 0] = 0  # two of three entries
    tpe.global_kernel_ln(weights(single, double), amount=1, n=0, min_keep=0)
    assert [float(layer.weight_mask.sum()) for layer in (single, double)] == [6, 3]


def test_what_counts_is_the_gain_per_entry():
    large, *small = layers = [nn.Linear(2, 4), *[nn.Linear(2, 1) for _ in range(4)]]
    large.weight.data.fill_(2.0)  # the second of two gains 8 for 4 entries
    for layer in small:
        layer.weight.data.fill_(5.0)  # and here 5 for 1
    tpe.global_nm_structured(weights(*layers), m=2, amount=4)
    assert [int(layer.weight_mask.sum()) for layer in layers] == [4, 2, 2, 2, 2]


def test_tied_tensors_get_the_same_n():
    model = Tied()
    tpe.global_nm_structured(weights(model.embedding, model.layer, model.decoder), m=2, amount=0.5)
    assert torch.equal(model.embedding.weight_mask, model.decoder.weight_mask)
    assert int(model.embedding.weight_mask.sum() + model.layer.weight_mask.sum()) == (60 + 36) // 2
