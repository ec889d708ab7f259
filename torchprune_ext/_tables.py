"""Tables in plain text."""

from collections.abc import Iterable, Sequence


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return ``rows`` under ``heads``, the first column to the left and the others to the right.

    Example:
        >>> print(table(["layer", "entries"], [["conv", "100"], ["head", "8"]]))
        layer  entries
        conv       100
        head         8
    """
    lines = [list(heads), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True))]).rstrip()
        for first, *rest in lines
    )


def percent(share: float) -> str:
    """Return ``share`` of a whole as in ``"81.2 %"``."""
    return f"{share:.1%}".replace("%", " %")
