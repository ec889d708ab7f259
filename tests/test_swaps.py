"""The order of columns in which N:M keeps most."""

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchprune_ext._swaps import Stripes, best_order


def kept(scores: Tensor, places: Tensor, order: list[int], n: int) -> float:
    """Return what n:m keeps, as a plain loop."""
    standing = [*order, *range(len(order), scores.shape[1])]
    total = 0.0
    for row in scores.tolist():
        for stripe in places.tolist():
            total += sum(sorted((row[standing[place]] for place in stripe), reverse=True)[:n])
    return total


def in_a_row(columns: int, m: int) -> Tensor:
    return torch.arange(columns).view(-1, m)


@st.composite
def problems(draw):
    """Draw readers of the same channels, some with places that no channel can take, and scores that often tie."""
    m = draw(st.integers(2, 5))
    n = draw(st.integers(1, m - 1))
    channels = draw(st.integers(1, 13))
    stripes = []
    for _ in range(draw(st.integers(1, 2))):
        count = -(-channels // m) + draw(st.integers(0, 1))
        places = torch.randperm(count * m, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
        rows = draw(st.integers(1, 4))
        scores = st.lists(st.integers(0, 4), min_size=rows * count * m, max_size=rows * count * m)
        stripes.append(Stripes(torch.tensor(draw(scores)).float().view(rows, -1), places.view(-1, m)))
    return stripes, channels, n


@given(problems())
def test_it_never_keeps_less_and_no_exchange_would_keep_more(problem):
    stripes, channels, n = problem
    order = best_order(stripes, channels, n).tolist()
    own = list(range(channels))

    def total(order):
        return sum(kept(each.scores, each.places, order, n) for each in stripes)

    assert sorted(order) == own
    assert total(order) >= total(own)
    for a, b in combinations(own, 2):
        other = list(order)
        other[a], other[b] = other[b], other[a]
        assert total(other) <= total(order)


@pytest.mark.parametrize("whole", [False, True], ids=["normal", "ties"])
def test_of_eight_columns_it_mostly_finds_the_best_of_all_35_ways_to_share_them(whole):
    best = 0
    for seed in range(40):
        scores = torch.randn(6, 8, generator=torch.Generator().manual_seed(seed)).abs()
        scores = (scores * 2).round() if whole else scores
        ways = [[0, *more] for more in combinations(range(1, 8), 3)]
        ways = [[*way, *(i for i in range(8) if i not in way)] for way in ways]
        assert len(ways) == 35
        optimum = max(kept(scores, in_a_row(8, 4), way, 2) for way in ways)
        order = best_order([Stripes(scores, in_a_row(8, 4))], 8, 2)
        found = kept(scores, in_a_row(8, 4), order.tolist(), 2)
        assert optimum * 0.97 <= found <= optimum * 1.000001
        best += found >= optimum * 0.999999
    assert best >= 34


def test_large_columns_are_dealt_out():
    scores = torch.ones(3, 16)
    scores[:, :8] = 5.0
    order = best_order([Stripes(scores, in_a_row(16, 4))], 16, 2)
    assert kept(scores, in_a_row(16, 4), order.tolist(), 2) == 3 * 8 * 5


def test_many_rows_are_looked_at_in_parts(monkeypatch):
    scores = torch.rand(50, 24, generator=torch.Generator().manual_seed(0))
    stripes = [Stripes(scores, in_a_row(24, 4))]
    whole = kept(scores, in_a_row(24, 4), best_order(stripes, 24, 2).tolist(), 2)
    monkeypatch.setattr("torchprune_ext._swaps.ENTRIES", 100)
    parts = kept(scores, in_a_row(24, 4), best_order(stripes, 24, 2).tolist(), 2)
    assert parts > kept(scores, in_a_row(24, 4), list(range(24)), 2)
    assert parts == pytest.approx(whole, rel=1e-2)  # equal gains may be told apart by rounding


def test_an_order_that_rounding_made_worse_is_not_taken(monkeypatch):
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    monkeypatch.setattr("torchprune_ext._swaps._exchanges", lambda *_: torch.tensor([[1, 2]]))
    order = best_order([Stripes(scores, torch.tensor([[0, 2], [1, 3]]))], 4, 1)
    assert order.tolist() == [0, 1, 2, 3]
