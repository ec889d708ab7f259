"""How far pruning has got: pure functions of the step."""


def geometric(start: float, end: float, progress: float) -> float:
    r"""Return the fraction that is kept on the way from ``start`` to ``end``, :math:`s^{1-p} e^p`.

    Equal steps of ``progress`` keep equal shares of what is left, as in iterative pruning by a constant rate.

    Args:
        start: fraction kept at first, in (0, 1].
        end: fraction kept in the end, in [0, 1].
        progress: how much of the way is done, in [0, 1].

    Source: Tanaka, Kunin, Yamins & Ganguli 2020, arXiv:2006.05467, algorithm 1.

    Example:
        >>> [geometric(1.0, 0.25, step / 2) for step in (0, 1, 2)]
        [1.0, 0.5, 0.25]
    """
    return float(start ** (1 - progress) * end**progress)
