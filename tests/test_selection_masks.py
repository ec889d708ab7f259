"""The exact k smallest against sorting, and the pure mask functions against loops."""

import math

import oracles
import pytest
import torch
from cases import DTYPES, LAYOUTS, POSITIVE, draw_tensor, flat
from hypothesis import given, settings
from hypothesis import strategies as st

from torchprune_ext import masks, selection
from torchprune_ext.criteria import magnitude
from torchprune_ext.patterns import NM, Channel, Kernel, Vector
from torchprune_ext.selection import Scores, kept, select_smallest, select_with_floors

LARGE = 4 * selection.SAMPLE + 12_345  # odd, and too many to be collected without a sample
SUBNORMAL = [5e-324, 1e-310, 2.2250738585072014e-308]


def by_sorting(scores, alive, k):
    """Drop the first ``k`` living entries by score, the later one of equals first."""
    order = (-scores.double()).argsort(stable=True)  # best first, lower index first
    order = order[alive[order] != 0]
    keep = torch.zeros(len(scores), dtype=torch.bool)
    keep[order[: len(order) - k]] = True
    return keep


def selected(parts, k):
    """Return the flags of all ``parts``, joined."""
    cuts = select_smallest(parts, k)
    return torch.cat([kept(part, cut) for part, cut in zip(parts, cuts, strict=True)])


@given(st.data())
def test_the_smallest_of_several_tensors(data):
    sizes = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    dtype = data.draw(st.sampled_from(DTYPES))
    tensors = [draw_tensor(data.draw, (size,), POSITIVE, dtype) for size in sizes]
    dead = [data.draw(st.booleans()) for _ in sizes]
    alive = [draw_tensor(data.draw, (size,), (0, 1)) if d else None for size, d in zip(sizes, dead, strict=True)]
    parts = [Scores.of(magnitude, t, alive=a) for t, a in zip(tensors, alive, strict=True)]
    masks_ = [torch.ones(size) if a is None else a for size, a in zip(sizes, alive, strict=True)]
    everything, living = torch.cat(tensors), torch.cat(masks_)
    k = data.draw(st.integers(0, int(living.sum())))
    assert torch.equal(selected(parts, k), by_sorting(everything, living, k))


@given(st.data())
def test_floors_save_what_others_then_give(data):
    sizes = data.draw(st.lists(st.integers(0, 8), min_size=1, max_size=4))
    scores = [draw_tensor(data.draw, (size,), POSITIVE) for size in sizes]
    alive = [draw_tensor(data.draw, (size,), (0, 1)) for size in sizes]
    left = [int(mask.sum()) for mask in alive]
    floors = [data.draw(st.integers(0, size)) for size in left]
    k = data.draw(st.integers(0, sum(left) - sum(floors)))
    parts = [Scores.of(magnitude, s, alive=a) for s, a in zip(scores, alive, strict=True)]
    everyone = [(float(s), -p, -i) for p, part in enumerate(scores) for i, s in enumerate(part) if alive[p][i]]
    masks_, gone = [mask.bool() for mask in alive], 0
    for _, p, i in sorted(everyone):  # one by one, the least first, and nothing from a tensor at its floor
        if gone < k and left[-p] > floors[-p]:
            masks_[-p][-i], gone, left[-p] = False, gone + 1, left[-p] - 1
    cuts = select_with_floors(parts, k, floors)
    assert [kept(*pair).tolist() for pair in zip(parts, cuts, strict=True)] == [mask.tolist() for mask in masks_]


KINDS = {
    "distinct": lambda g: torch.randperm(LARGE, generator=g).double(),
    "few levels": lambda g: torch.randint(4, (LARGE,), generator=g).double(),
    "all equal": lambda g: torch.full((LARGE,), 2.5, dtype=torch.double),
    "all zero": lambda g: torch.zeros(LARGE, dtype=torch.double),
    "one apart": lambda g: torch.zeros(LARGE, dtype=torch.double).index_fill_(0, torch.tensor([77_777]), 1.0),
    "sorted": lambda g: torch.arange(LARGE).double(),
    "huge and tiny": lambda g: 10.0 ** torch.randint(-300, 300, (LARGE,), generator=g).double(),
    "subnormal": lambda g: torch.tensor([0.0, *SUBNORMAL], dtype=torch.double)[torch.randint(4, (LARGE,), generator=g)],
    "outliers": lambda g: torch.rand(LARGE, generator=g, dtype=torch.double).pow(50),
    "two clumps": lambda g: (torch.arange(LARGE) >= LARGE // 3).double() * 1e-9 + 1,
}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6)
@given(
    share=st.one_of(st.sampled_from([0.0, 1e-6, 0.5, 0.9, 1 - 1e-6, 1.0]), st.floats(0, 1)),
    died=st.sampled_from([0.0, 0.5, 0.999]),
    single=st.booleans(),
    parts=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_large_tensors_are_selected_exactly(kind, share, died, single, parts, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = KINDS[kind](generator)
    scores = scores.float() if single and kind != "huge and tiny" else scores
    alive = (torch.rand(LARGE, generator=generator) >= died).float()
    k = round(share * int(alive.sum()))
    pieces = zip(scores.tensor_split(parts), alive.tensor_split(parts), strict=True)
    before = torch.get_rng_state()
    result = selected([Scores.of(magnitude, s, alive=a if died else None) for s, a in pieces], k)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(result, by_sorting(scores, alive, k))


@settings(max_examples=15)
@given(st.integers(0, LARGE), st.integers(0, 3), st.sampled_from(["few levels", "distinct", "outliers"]))
def test_the_result_does_not_depend_on_the_sample(k, seed, kind):
    scores = KINDS[kind](torch.Generator().manual_seed(9))
    parts = [Scores.of(magnitude, scores)]
    expected = selected(parts, k)
    generator = torch.Generator().manual_seed(seed)
    unlucky = {
        0: lambda *_: scores[:100].sort().values,
        1: lambda *_: scores.sort().values[:64],  # only the smallest
        2: lambda *_: scores.sort().values[-64:],  # only the largest
        3: lambda *_: scores[torch.randint(LARGE, (1,), generator=generator)],
    }[seed]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(selection, "_sample", unlucky)
        assert torch.equal(selected(parts, k), expected)


@settings(max_examples=10)
@given(st.integers(1, 40), st.integers(0, 40), st.integers(0, 9))
def test_chunks_do_not_matter(chunk, k, seed):
    scores = torch.randint(3, (40,), generator=torch.Generator().manual_seed(seed)).float()
    parts = [Scores.of(magnitude, scores[:15]), Scores.of(magnitude, scores[15:])]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(selection, "CHUNK", chunk)
        assert torch.equal(selected(parts, k), by_sorting(scores, torch.ones(40), k))


def test_infinitely_large_but_finite_single_scores():
    scores = torch.tensor([torch.finfo(torch.float32).max, 1.0, torch.finfo(torch.float32).max, 0.0])
    assert selected([Scores.of(magnitude, scores)], 3).tolist() == [True, False, False, False]


# ------------------------------------------------------------------------------------------------------- N:M


def nm_expected(scores, pattern, default):
    units = oracles.runs(tuple(scores.shape), pattern.m, pattern.along(1).dim)
    mask = oracles.keep_n_of_m(units, flat(scores), flat(default), pattern.n)
    return torch.tensor(mask).reshape(scores.shape)


@given(st.data())
def test_nm_masks_of_every_size(data):
    m = data.draw(st.one_of(st.sampled_from([1, 2, 3, 4, 5, 8, 16, 31, 32, 33, 40]), st.integers(1, 70)))
    n = data.draw(st.one_of(st.sampled_from([1, m, max(m - 1, 1), max(m // 2, 1)]), st.integers(1, m)))
    pad = data.draw(st.booleans())
    size = data.draw(st.integers(0, 2 * m + 1)) if pad else m * data.draw(st.integers(0, 3))
    shape = [size, data.draw(st.integers(0, 3))]
    dim = data.draw(st.sampled_from([0, 1, -1, -2]))
    shape = shape if dim % 2 == 0 else shape[::-1]
    pattern = NM(n, m, dim, pad)
    dtype, form = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(LAYOUTS))
    levels = data.draw(st.sampled_from([(0.0, 1.0), (-1.0, 1.0), (-2.0, -0.5, 0.0, 0.5, 1.0, 3.0)]))
    scores = draw_tensor(data.draw, shape, levels, dtype, form)
    default = draw_tensor(data.draw, shape, (0, 1), dtype, data.draw(st.sampled_from(LAYOUTS)))
    given_mask = default if data.draw(st.booleans()) else None
    mask = masks.nm_mask(scores, pattern, given_mask)
    assert (mask.shape, mask.dtype) == (scores.shape, dtype)
    expected = nm_expected(scores, pattern, torch.ones(shape) if given_mask is None else default)
    assert torch.equal(mask, expected.to(dtype))
    assert torch.equal(masks.nm_mask(scores, pattern, mask), mask)


@pytest.mark.parametrize(
    ("n", "m"), [(1, 4), (2, 4), (3, 4), (4, 8), (8, 16), (5, 31), (16, 32), (16, 33), (300, 1000)]
)
@pytest.mark.parametrize("tied", [True, False])
def test_nm_masks_across_chunks(n, m, tied, monkeypatch):
    monkeypatch.setattr(masks, "CHUNK", 2 * m + 1)
    generator = torch.Generator().manual_seed(n)
    scores = torch.randn(7, 3 * m, generator=generator)
    scores = scores.mul(2).round() if tied else scores
    default = (torch.rand(scores.shape, generator=generator) > 0.3).float()
    assert torch.equal(masks.nm_mask(scores, NM(n, m), default), nm_expected(scores, NM(n, m), default).float())
    assert torch.equal(
        masks.nm_mask(scores.t(), NM(n, m, 0), default.t()), nm_expected(scores, NM(n, m), default).float().t()
    )


@pytest.mark.parametrize("n", [1, 2, 3])
def test_nm_orders_the_smallest_and_largest_of_numbers(n):
    top = torch.finfo(torch.float32).max
    scores = torch.tensor([[1e-45, 0.0, -top, top], [-0.0, 0.0, 1e-45, -1e-44], [1.0, -1.0000001, 1.0, 0.0]])
    assert torch.equal(masks.nm_mask(scores, NM(n, 4)), nm_expected(scores, NM(n, 4), torch.ones(3, 4)).float())


@pytest.mark.parametrize("m", [1, 2, 4, 7, 32, 33, 50])
@pytest.mark.parametrize("pruned", [False, True])
def test_profiles_tell_what_masks_keep(m, pruned):
    generator = torch.Generator().manual_seed(m)
    scores = torch.randn(3, 2 * m + 1, generator=generator, dtype=torch.float64)
    scores[0] = 0  # counts all the same
    default = (torch.rand(scores.shape, generator=generator) > 0.3).double() if pruned else None
    profile = masks.nm_profile(scores, NM(1, m, pad=True), default)
    kept = [masks.nm_mask(scores, NM(n, m, pad=True), default) for n in range(1, m + 1)]
    assert profile.entries == [0, *(int(mask.sum()) for mask in kept)]
    assert profile.total == pytest.approx([0, *(float((scores.abs() * mask).sum()) for mask in kept)])


def test_padding_counts_as_zeros_and_never_wins():
    mask = masks.nm_mask(torch.tensor([[5.0, 4.0, 3.0, 2.0, 0.0, 0.0]]), NM(2, 4, pad=True))
    assert mask.tolist() == [[1, 1, 0, 0, 1, 1]]
    mask = masks.nm_mask(torch.tensor([[1.0, 2.0, 3.0]]), NM(2, 8, pad=True))
    assert mask.tolist() == [[0, 1, 1]]


@pytest.mark.parametrize(("n", "m", "error"), [(0, 1, ValueError), (2, 1, ValueError), (1.0, 2, TypeError),
                                               (1, True, TypeError), (-1, 2, ValueError)])  # fmt: skip
def test_what_is_no_pattern_is_refused(n, m, error):
    with pytest.raises(error, match=r"[nm]="):
        NM(n, m)


def test_patterns_are_values():
    assert NM(2, 4) == NM(2, 4, dim=None, pad=False)
    assert NM(2, 4).along(1) == NM(2, 4, dim=1)
    assert len({Vector(), Vector(-1), Kernel(), Kernel(), Channel(), Channel(0, 1), NM(2, 4), NM(2, 4)}) == 4
    with pytest.raises(AttributeError):
        NM(2, 4).n = 3


# --------------------------------------------------------------------------------------------------- other masks


@given(st.data())
def test_units_norms_and_what_is_left_of_them(data):
    shape = data.draw(st.sampled_from([(2, 3, 2), (3, 2, 2, 1), (1, 4, 1, 2), (4, 1, 3)]))
    pattern, units = data.draw(
        st.sampled_from(
            [(Kernel(), oracles.kernels(shape))]
            + [(Vector(dim), oracles.vectors(shape, dim)) for dim in range(-len(shape), len(shape))]
        )
    )
    n = data.draw(st.sampled_from([0, 1, 2, math.inf, -math.inf]))
    scores = draw_tensor(data.draw, shape, kind=data.draw(st.sampled_from(LAYOUTS)))
    default = draw_tensor(data.draw, shape, (0, 1))
    values = [s * m for s, m in zip(flat(scores), flat(default), strict=True)]
    got = masks.unit_scores(scores, pattern, n, default)
    ranks = [oracles.rank_of_norm([values[i] for i in unit], n) for unit in units]
    norms = [math.sqrt(rank) if n == 2 else rank for rank in ranks]
    alive = [any(flat(default)[i] for i in unit) for unit in units]
    expected = [norm if living else selection.DEAD for norm, living in zip(norms, alive, strict=True)]
    assert flat(got.at(slice(None))) == pytest.approx(expected, rel=1e-6)
    assert masks.units_alive(pattern, default).tolist() == alive
    flags = draw_tensor(data.draw, (len(units),), (0, 1))
    mask = masks.unit_mask(flags, pattern, scores, default)
    for flag, unit in zip(flat(flags), units, strict=True):
        assert [flat(mask)[i] for i in unit] == [flag * flat(default)[i] for i in unit]


@given(st.data())
def test_grouped_channels(data):
    groups, per_group, rows = (data.draw(st.integers(1, 3)) for _ in range(3))
    shape = (groups * rows, per_group, 2)
    flags = draw_tensor(data.draw, (groups * per_group,), (0, 1))
    like = draw_tensor(data.draw, shape, kind=data.draw(st.sampled_from(LAYOUTS)))
    mask = masks.unit_mask(flags, Channel(1, groups), like, None)
    for flag, unit in zip(flat(flags), oracles.channels(shape, 1, groups), strict=True):
        assert {flat(mask)[i] for i in unit} == {flag}
