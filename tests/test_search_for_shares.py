"""How the search for shares goes from round to round, on errors that are known in closed form."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchprune_ext.compensation import by_output
from torchprune_ext.compensation.by_output import Columns, Round, Search, share


class Known(Search):
    """Looks for shares of layers whose prices rise with a power of the odds, without a model."""

    def __init__(self, weights, power, sparsity=0.5, base=0.0):
        self.columns = {(place, "weight"): Columns.of(torch.ones(1, 8, 64)) for place in range(len(weights))}
        self.weights, self.power, self.target_sparsity, self.base, self.keeps = weights, power, sparsity, base, []

    def price(self, place, gone):
        return self.weights[place] * by_output._odds(gone) ** self.power

    def error(self, keep):
        steps = [(place, gone) for place, left in enumerate(keep) for gone in range(64 - left.most)]
        return self.base + sum(8 * self.price(place, (gone + 0.5) / 64) for place, gone in steps) / 1e3

    def round(self, keep):
        keep = keep or self.even()
        self.keeps.append(keep)
        prices = [self.price(place, each.gone(left.most)) / 1e3 for place, (each, left) in self.pairs(keep)]
        return Round(keep, self.error(keep), prices)

    def pairs(self, keep):
        return enumerate(zip(self.columns.values(), keep, strict=True))

    def best_there_is(self):
        columns = list(self.columns.values())
        return self.error(share(columns, self.goal(), lambda place, gone: self.price(place, gone)))


@given(
    st.lists(st.sampled_from([0.25, 0.5, 1.0, 1.0, 2.0, 3.0]), min_size=3, max_size=8),
    st.sampled_from([1.0, 1.5, 2.0, 4.0]),
    st.sampled_from([0.3, 0.5, 0.7]),
)
def test_it_comes_near_the_best_there_is_in_few_rounds(weights, power, sparsity):
    search = Known(weights, power, sparsity)
    _, errors = search.best()
    assert min(errors) <= 1.03 * search.best_there_is()
    assert len(errors) <= 4


def test_it_does_not_try_what_promises_nothing():
    equal = Known([1.0, 1.0, 1.0], 2.0)
    assert len(equal.best()[1]) == 1
    mostly_elsewhere = Known([1.0, 2.0, 1.5], 2.0, base=1e4)
    assert len(mostly_elsewhere.best()[1]) == 1


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0, 5.0])
def test_the_power_is_what_two_rounds_show(power):
    search = Known([0.5, 1.0, 2.0, 3.0], power)
    first = search.round(None)
    second = search.round(search.moved(first, 1.5, 2.0))
    assert search.shown(first, second, 9.0) == pytest.approx(power, rel=1e-6)
    assert search.shown(first, first, 9.0) == 9.0


def test_what_a_move_promises_is_what_it_gives():
    search = Known([0.5, 1.0, 2.0, 3.0], 1.5)
    first = search.round(None)
    keep = search.moved(first, 1.5, 1.2)
    gained = first.error - search.error(keep)
    assert gained > 0
    assert search.promised(first, keep, 1.5) == pytest.approx(gained, rel=0.05)


def test_layers_that_are_dead_or_cost_nothing_do_not_stand_in_the_way():
    search = Known([0.0, 1.0, 2.0, 4.0], 1.5)
    dead = torch.zeros(1, 8, 64)
    search.columns[4, "weight"], search.weights = Columns.of(dead), [0.0, 1.0, 2.0, 4.0, 0.0]
    search.target_sparsity = 0.6
    goals, errors = search.best()
    assert goals.sparsity[4, "weight"] == 1
    assert min(errors) < 0.7 * errors[0]
    assert len(Known([0.0, 0.0, 0.0], 1.5).best()[1]) == 1


class Wary(Known):
    """Gets much worse where a share is far from equal."""

    def error(self, keep):
        odds = self.odds(keep)
        far = max(max(each, 1 / each) for each in odds)
        return super().error(keep) * (1 + 2 * (far > 2.2))


def test_after_a_round_that_made_it_worse_the_next_is_nearer():
    search = Wary([0.2, 1.0, 1.0, 5.0], 1.5)
    _, errors = search.best()
    assert errors[1] > errors[0]
    assert min(errors) < errors[0]
    reached = [max(max(o, 1 / o) for o in search.odds(keep)) for keep in search.keeps]
    assert reached[1] > 2.2 >= reached[2] > 1


class Hopeless(Known):
    def error(self, keep):
        return super().error(keep) + (1e6 if keep != self.even() else 0.0)


def test_two_rounds_that_made_it_worse_end_it_with_equal_shares():
    search = Hopeless([0.2, 1.0, 5.0], 1.5)
    goals, errors = search.best()
    assert len(errors) == 3
    assert set(goals.sparsity.values()) == {0.5}
