"""Schedules are pure functions of the step: their equations as plain loops, and what they refuse."""

import copy
import pickle
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import torchprune_ext as tpe
from torchprune_ext.schedules import Schedule, cubic, geometric, geometric_mean, linear, one_shot

KINDS = [linear, cubic, geometric]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
SPARSITIES = st.one_of(st.sampled_from([0.0, 0.5, 0.9, 1 - 2**-53]), st.floats(0, 1, exclude_max=True))


@st.composite
def arguments(draw):
    start = draw(st.integers(0, 20))
    initial, final = sorted((draw(SPARSITIES), draw(SPARSITIES)))
    return {
        "start": start,
        "end": start + draw(st.integers(1, 40)),
        "every": draw(st.integers(1, 45)),
        "initial": initial,
        "final": final,
    }


def plain(kind, step, start, end, every, initial, final):
    """Return the sparsity by going through the steps one by one, with the equations in exact numbers."""
    value = initial
    for t in range(step + 1):
        if t >= end:
            value = final
        elif t >= start and (t - start) % every == 0:
            p, a, b = Fraction(t - start, end - start), Fraction(initial), Fraction(final)
            value = {
                linear: lambda p, a, b: float(a + (b - a) * p),
                cubic: lambda p, a, b: float(b + (a - b) * (1 - p) ** 3),
                geometric: lambda p, a, b: 1 - float(1 - a) ** float(1 - p) * float(1 - b) ** float(p),
            }[kind](p, a, b)
    return value


@every_kind
@given(arguments(), st.integers(0, 70))
def test_the_equation_as_a_plain_loop(kind, args, step):
    assert kind(**args)(step) == pytest.approx(plain(kind, step, **args), rel=1e-12, abs=1e-12)


@every_kind
@given(arguments())
@example({"start": 0, "end": 3, "every": 1, "initial": 0.1, "final": 0.1 + 2**-55})
def test_it_rises_changes_at_updates_only_and_has_exact_ends(kind, args):
    schedule = kind(**args)
    values = [schedule(step) for step in range(args["end"] + 5)]
    assert values == sorted(values)
    assert set(values[: args["start"] + 1]) == {args["initial"]}
    assert set(values[args["end"] :]) == {args["final"]}
    updates = list(schedule.updates())
    assert updates == [step for step in range(args["end"] + 5) if schedule.is_update(step)]
    assert {step for step in range(1, len(values)) if values[step] != values[step - 1]} <= set(updates)


@given(st.integers(0, 30), SPARSITIES)
def test_one_shot(step, sparsity):
    schedule = one_shot(step=step, sparsity=sparsity)
    assert [schedule(t) for t in range(step + 3)] == [0.0] * step + [sparsity] * 3
    assert list(schedule.updates()) == [step] == [t for t in range(step + 3) if schedule.is_update(t)]
    assert schedule == one_shot(step, sparsity)


@every_kind
def test_values_are_frozen_and_can_be_printed_copied_and_pickled(kind):
    schedule = kind(3, 10, 2, 0.25, final=0.75)
    assert repr(schedule) == f"{kind.__name__}(start=3, end=10, every=2, initial=0.25, final=0.75)"
    assert repr(one_shot(step=3, sparsity=0.5)) == "one_shot(step=3, sparsity=0.5)"
    for again in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule), eval(repr(schedule))):
        assert again == schedule
        assert hash(again) == hash(schedule)
        assert [again(t) for t in range(12)] == [schedule(t) for t in range(12)]
    with pytest.raises(AttributeError):
        schedule.final = 0.9
    assert schedule != kind(3, 10, 2, 0.25, final=0.5)
    assert len({k(3, 10, 2, 0.25, final=0.75) for k in KINDS}) == len(KINDS)


@every_kind
@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        ({"final": 1.0}, ValueError, r"final=1.0 is not in \[0, 1\)"),
        ({"final": -0.1}, ValueError, "final=-0.1"),
        ({"final": 90}, ValueError, "0.9 for 90 %"),
        ({"final": float("nan")}, ValueError, "final=nan"),
        ({"final": True}, TypeError, "bool"),
        ({"final": "0.9"}, TypeError, "final='0.9' is a str"),
        ({"initial": 1.5}, ValueError, "initial=1.5"),
        ({"initial": 0.95}, ValueError, "final=0.9 is less than initial=0.95"),
        ({"end": 1}, ValueError, "end=1 comes before start=2"),
        ({"end": 2}, ValueError, r"one_shot\(step=2, sparsity=0.9\)"),
        ({"start": -1}, ValueError, "start=-1"),
        ({"start": 0.5}, TypeError, "start=0.5"),
        ({"every": 0}, ValueError, "every=0"),
        ({"every": 1.5}, TypeError, "every=1.5"),
    ],
    ids=str,
)
def test_refusals(kind, bad, error, words):
    with pytest.raises(error, match=words):
        kind(**{"start": 2, "end": 8, "every": 2, "initial": 0.0, "final": 0.9, **bad})


def test_one_shot_and_steps_are_checked_too():
    for bad, error in (({"step": -1}, ValueError), ({"sparsity": 1}, ValueError), ({"step": 0.5}, TypeError)):
        with pytest.raises(error, match=f"{next(iter(bad))}="):
            one_shot(**{"step": 0, "sparsity": 0.5, **bad})
    with pytest.raises(TypeError, match=r"step=0\.5"):
        linear(0, 2, final=0.5)(0.5)
    with pytest.raises(ValueError, match="step=-1"):
        linear(0, 2, final=0.5)(-1)


def test_the_kept_fraction_falls_by_the_same_factor():
    assert geometric_mean(0.0, 0.0, 0.5) == 0.0
    assert geometric_mean(1.0, 0.0, 0.5) == 0.0
    assert geometric_mean(1.0, 0.0, 0.0) == 1.0
    kept = [1 - geometric(0, 5, final=1 - 0.8**5)(step) for step in range(6)]
    assert kept == pytest.approx([0.8**step for step in range(6)])
    assert isinstance(tpe.schedules.cubic(0, 1, final=0.5), Schedule)
