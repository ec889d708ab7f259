"""The times of calls: one row for each, alternating, with the threads that were asked for."""

import itertools
import time

import pytest
import torch

from torchprune_ext.deploy.timing import medians


def test_a_slow_call_takes_longer_and_says_how_long():
    times = medians({"slow": lambda: time.sleep(0.02), "fast": lambda: None}, rounds=3)
    assert list(times) == ["slow", "fast"]
    assert 0.02 <= times["slow"].median < 0.2
    assert times["fast"].median < 1e-4
    assert all(time.spread >= 0 for time in times.values())


def test_calls_alternate():
    order = []
    medians({"a": lambda: order.append("a") or time.sleep(2e-3), "b": lambda: order.append("b")}, rounds=4)
    changes = sum(one != other for one, other in itertools.pairwise(order))
    assert changes == 2 * (1 + 4) - 1  # a, b to find how many calls fill a block, then four times


@pytest.mark.parametrize("threads", [None, 2])
def test_threads_are_those_asked_for_and_put_back(threads):
    before, seen = torch.get_num_threads(), set()
    times = medians({"call": lambda: seen.add(torch.get_num_threads())}, rounds=2, threads=threads)
    assert seen == {threads or before}
    assert times["call"].threads == (threads or before)
    assert torch.get_num_threads() == before


def test_an_error_of_a_call_is_raised_and_threads_are_put_back():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        medians({"call": lambda: 1 / 0}, threads=before + 1)
    assert torch.get_num_threads() == before
