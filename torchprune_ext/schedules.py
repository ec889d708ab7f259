r"""How far pruning shall have got: frozen values, each a pure function of the step.

A schedule is called with the number of a training step and returns the sparsity that shall be reached in it, earlier
pruning included. It changes at its *updates*, namely at ``start``, at each ``every``-th step behind it, and at
``end``; between them it keeps the value of the last one. Before ``start`` it is ``initial``, from ``end`` on exactly
``final``. With :math:`p = (t - t_0) / (t_1 - t_0)` for the last update :math:`t`, start :math:`t_0` and end
:math:`t_1`, and initial and final sparsities :math:`s_i` and :math:`s_f`:

- :func:`linear`: :math:`s_i + (s_f - s_i)\,p`
- :func:`cubic`: :math:`s_f + (s_i - s_f)(1 - p)^3`, much at first, while there is much to choose from
- :func:`geometric`: :math:`1 - (1 - s_i)^{1-p} (1 - s_f)^p`, each time the same fraction of what is left
- :func:`one_shot`: all at one step
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torchprune_ext._checks import check_sparsity, check_whole

__all__ = ["Schedule", "cubic", "geometric", "geometric_mean", "linear", "one_shot"]


@dataclass(frozen=True, slots=True, repr=False)
class Schedule:
    """A sparsity for each step; see the module. Use :func:`linear` and the like to make one.

    Args:
        curve: from initial sparsity, final sparsity and progress, in [0, 1), to a sparsity.
        start: step of the first update.
        end: step of the last one.
        every: steps from one update to the next; the last distance may be shorter.
        initial: sparsity up to the first update.
        final: sparsity from ``end`` on.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a sparsity is not in [0, 1), or less in the end than at first; a step is negative; ``end`` comes
            before ``start``; ``every`` is less than 1.
    """

    curve: Callable[[float, float, float], float]
    start: int
    end: int
    every: int
    initial: float
    final: float

    def __post_init__(self) -> None:
        """Check the values."""
        check_whole("start", self.start, 0)
        check_whole("end", self.end, 0)
        check_whole("every", self.every, 1)
        check_sparsity("initial", self.initial)
        check_sparsity("final", self.final)
        if self.end < self.start:
            raise ValueError(f"end={self.end!r} comes before start={self.start!r}. Pass an end behind the start.")
        if self.final < self.initial:
            raise ValueError(
                f"final={self.final!r} is less than initial={self.initial!r}, but what is pruned does not come back. "
                f"Pass a final sparsity of at least {self.initial!r}."
            )

    def __call__(self, step: int) -> float:
        """Return the sparsity, in [0, 1), that shall be reached in ``step``, a number >= 0."""
        check_whole("step", step, 0)
        if step >= self.end:
            return self.final
        done = (step - self.start) // self.every * self.every
        if done <= 0:
            return self.initial
        sparsity = self.curve(self.initial, self.final, done / (self.end - self.start))
        return min(max(sparsity, self.initial), self.final)  # rounding may lead out of that

    def is_update(self, step: int) -> bool:
        """Return whether the schedule has an update at ``step``."""
        return step == self.end or (self.start <= step < self.end and (step - self.start) % self.every == 0)

    def updates(self) -> Iterator[int]:
        """Yield the steps of all updates, from ``start`` to ``end``."""
        yield from range(self.start, self.end, self.every)
        yield self.end

    def __repr__(self) -> str:
        """Return the call that made this."""
        if self.curve is _one_shot:
            return f"one_shot(step={self.end!r}, sparsity={self.final!r})"
        return (
            f"{self.curve.__name__[1:]}(start={self.start!r}, end={self.end!r}, every={self.every!r}, "
            f"initial={self.initial!r}, final={self.final!r})"
        )


def one_shot(step: int, sparsity: float) -> Schedule:
    """Return the schedule that prunes nothing before ``step``, and all at once in it.

    Args:
        step: when, a number of steps.
        sparsity: fraction that shall be pruned, in [0, 1).

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: ``step`` is negative, or ``sparsity`` not in [0, 1).

    Example:
        >>> schedule = one_shot(step=2, sparsity=0.9)
        >>> [schedule(step) for step in range(4)], list(schedule.updates())
        ([0.0, 0.0, 0.9, 0.9], [2])
    """
    check_whole("step", step, 0)
    check_sparsity("sparsity", sparsity)
    return Schedule(_one_shot, step, step, 1, 0.0, sparsity)


def linear(start: int, end: int, every: int = 1, initial: float = 0.0, *, final: float) -> Schedule:
    """Return the schedule that prunes the same number of entries at each update.

    Args:
        start: step of the first update, at which the sparsity still is ``initial``.
        end: step from which it is ``final``, after ``start``.
        every: steps from one update to the next.
        initial: sparsity up to ``start``, in [0, 1); what a model has that is pruned already.
        final: sparsity in the end, in [0, 1).

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: as :class:`Schedule`.

    Example:
        >>> schedule = linear(start=1, end=5, every=2, final=0.8)
        >>> [schedule(step) for step in range(7)]
        [0.0, 0.0, 0.0, 0.4, 0.4, 0.8, 0.8]
    """
    return _between(_linear, start, end, every, initial, final)


def cubic(start: int, end: int, every: int = 1, initial: float = 0.0, *, final: float) -> Schedule:
    r"""Return the schedule of automated gradual pruning (AGP), :math:`s_f + (s_i - s_f)(1 - p)^3`.

    Args:
        start: as in :func:`linear`, and so are the other arguments.
        end: step from which the sparsity is ``final``.
        every: steps from one update to the next.
        initial: sparsity up to ``start``.
        final: sparsity in the end.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: as :class:`Schedule`.

    Source: Zhu & Gupta 2017, *To prune, or not to prune*, arXiv:1710.01878, equation 1; :math:`p` is its
    :math:`(t - t_0) / (n \Delta t)`.

    Example:
        >>> schedule = cubic(start=0, end=4, every=2, final=0.8)
        >>> [round(schedule(step), 3) for step in range(6)]
        [0.0, 0.0, 0.7, 0.7, 0.8, 0.8]
    """
    return _between(_cubic, start, end, every, initial, final)


def geometric(start: int, end: int, every: int = 1, initial: float = 0.0, *, final: float) -> Schedule:
    """Return the schedule that prunes the same fraction of what is left at each update, as lottery tickets do.

    For a given fraction ``rate`` and number of rounds, pass ``final=1 - (1 - rate) ** rounds``.

    Args:
        start: as in :func:`linear`, and so are the other arguments.
        end: step from which the sparsity is ``final``.
        every: steps from one update to the next.
        initial: sparsity up to ``start``.
        final: sparsity in the end.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: as :class:`Schedule`.

    Source: Frankle & Carbin 2019, *The Lottery Ticket Hypothesis*, arXiv:1803.03635, section 1: each round prunes the
    same share of the weights that survive the round before.

    Example:
        >>> schedule = geometric(start=0, end=3, final=0.875)
        >>> [round(schedule(step), 3) for step in range(5)]
        [0.0, 0.5, 0.75, 0.875, 0.875]
    """
    return _between(_geometric, start, end, every, initial, final)


def geometric_mean(start: float, end: float, progress: float) -> float:
    r"""Return the fraction that is kept on the way from ``start`` to ``end``, :math:`s^{1-p} e^p`.

    Equal steps of ``progress`` keep equal shares of what is left, as in iterative pruning by a constant rate.

    Args:
        start: fraction kept at first, in [0, 1].
        end: fraction kept in the end, at most ``start``.
        progress: how much of the way is done, in [0, 1].

    Source: Tanaka, Kunin, Yamins & Ganguli 2020, arXiv:2006.05467, algorithm 1.

    Example:
        >>> [geometric_mean(1.0, 0.25, step / 2) for step in (0, 1, 2)]
        [1.0, 0.5, 0.25]
    """
    return float(start * (end / start) ** progress) if start else 0.0


def _between(
    curve: Callable[[float, float, float], float], start: int, end: int, every: int, initial: float, final: float
) -> Schedule:
    """Return the schedule of ``curve``, which needs two steps at least."""
    schedule = Schedule(curve, start, end, every, initial, final)
    if start == end:
        raise ValueError(
            f"start={start!r}, end={end!r} leave no way from one to the other. Pass an end behind the start, or "
            f"schedules.one_shot(step={end!r}, sparsity={final!r})."
        )
    return schedule


def _one_shot(initial: float, final: float, progress: float) -> float:
    return final


def _linear(initial: float, final: float, progress: float) -> float:
    return initial + (final - initial) * progress


def _cubic(initial: float, final: float, progress: float) -> float:
    left = 1 - progress
    return final - (final - initial) * (left * left * left)  # spelled out, each step rounds monotonically


def _geometric(initial: float, final: float, progress: float) -> float:
    return 1 - geometric_mean(1 - initial, 1 - final, progress)
