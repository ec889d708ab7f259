"""Whole numbers that add up: the definitions as plain loops."""

import math
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from torchprune_ext.workflow.apportion import level, nearest, proportional

SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=6)


def one_by_one(weights, total, most):
    """Return what each part has after ``total`` units were given out one by one."""
    counts = [0] * len(weights)
    for _ in range(total):
        free = [i for i, weight in enumerate(weights) if weight and counts[i] < most[i]]
        counts[min(free, key=lambda i: ((counts[i] + 0.5) / weights[i], i))] += 1
    return counts


@given(st.data())
def test_proportional_gives_out_one_by_one(data):
    most = data.draw(SIZES)
    weights = [data.draw(st.sampled_from([0.0, 0.1, 0.25, 1.0, 3.0]) | st.floats(0.01, 50)) for _ in most]
    able = sum(top for top, weight in zip(most, weights, strict=True) if weight)
    total = data.draw(st.integers(0, able))
    counts = proportional(weights, total, most)
    assert counts == one_by_one(weights, total, most)
    if total < able:  # the Alabama paradox does not happen
        assert all(a <= b for a, b in zip(counts, proportional(weights, total + 1, most), strict=True))


@pytest.mark.parametrize("total", [1, 12_345_678, 10**9])
def test_proportional_takes_no_longer_for_many(total):
    weights = [1e9 / 3, 1e9 / 7, 64.0]
    counts = proportional(weights, total, [10**9] * 3)
    assert sum(counts) == total
    assert all(abs(c - w * total / sum(weights)) <= 1.5 for c, w in zip(counts, weights, strict=True))


@given(st.data())
@example(None)
def test_nearest_rounds_up_or_down_and_adds_up(data):
    if data is None:
        sizes, share = [4, 4, 100], 0.9
    else:
        sizes, share = data.draw(SIZES), data.draw(st.floats(0, 1, exclude_max=True))
    ideal, budget = [share * size for size in sizes], round(share * sum(sizes))
    counts = nearest(ideal, budget, sizes)
    assert sum(counts) == budget
    assert all(abs(count - part) < 1 for count, part in zip(counts, ideal, strict=True))
    lost = [Fraction(part) - math.floor(part) for part in ideal]
    up = [i for i, (count, part) in enumerate(zip(counts, ideal, strict=True)) if count > math.floor(part)]
    expected = sorted(range(len(sizes)), key=lambda i: (-lost[i], i))[: len(up)]
    assert sorted(up) == sorted(expected)


@given(st.data())
def test_nearest_with_limits_and_costs(data):
    most = data.draw(SIZES)
    costs = [data.draw(st.integers(1, 9)) for _ in most]
    ideal = [data.draw(st.floats(0, top)) for top in most]
    worth = sum(part * cost for part, cost in zip(ideal, costs, strict=True))
    budget = min(math.ceil(worth), sum(top * cost for top, cost in zip(most, costs, strict=True)))
    counts = nearest(ideal, budget, most, costs)
    spent = sum(count * cost for count, cost in zip(counts, costs, strict=True))
    assert budget <= spent < budget + max(costs)
    assert all(0 <= count <= top for count, top in zip(counts, most, strict=True))


def test_nearest_takes_back_what_rounding_the_sum_has_given():
    assert nearest([1.0, 1.0], 1, [5, 5]) == [1, 0]
    assert nearest([0.0, 1.0], 0, [5, 5]) == [0, 0]
    assert nearest([3.6, 3.6, 90.0], 97, [3, 3, 99]) == [3, 3, 91]


@given(st.lists(st.tuples(st.floats(0, 9), st.floats(0.1, 9)), min_size=1, max_size=5), st.floats(0, 1))
def test_level_meets_the_budget(parts, share):
    def ideals(depth):  # the first parts jump, all are flat above
        return [min(depth * rate, top) + (top if depth >= 3 else 0) for top, rate in parts]

    low, high = ideals(0.0), ideals(1000.0)
    budget = sum(low) + share * (sum(high) - sum(low))
    found = level(ideals, budget, 0.0, 1000.0)
    assert sum(found) == pytest.approx(budget, abs=1e-9)
    assert all(a - 1e-9 <= f <= b + 1e-9 for a, f, b in zip(low, found, high, strict=True))
