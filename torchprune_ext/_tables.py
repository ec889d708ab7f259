"""Tables in plain text and in HTML, and the numbers in them."""

from collections.abc import Collection, Iterable, Sequence
from html import escape


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


def html(heads: Sequence[str], rows: Iterable[Sequence[str]], notes: Iterable[str], words: Collection[int]) -> str:
    """Return a table in HTML with lines below it, in the colours of the page that it is shown on.

    Args:
        heads: of the columns.
        rows: cells, as text.
        notes: lines below the table.
        words: the columns that are set to the left, as words are; numbers are set to the right.

    Example:
        >>> html(["layer", "<0"], [["a&b", "1"]], ["note"], words=[0])[:80]
        '<div style="overflow-x:auto"><table style="font-variant-numeric:tabular-nums"><t'
    """

    def line(tag: str, cells: Sequence[str]) -> str:
        sides = ["left" if place in words else "right" for place in range(len(cells))]
        style = "white-space:nowrap;text-align:"
        shown = [f'<{tag} style="{style}{side}">{escape(c)}</{tag}>' for c, side in zip(cells, sides, strict=True)]
        return f"<tr>{''.join(shown)}</tr>"

    body = "".join(line("td", row) for row in rows)
    below = "<br>".join(map(escape, notes))
    return (
        f'<div style="overflow-x:auto"><table style="font-variant-numeric:tabular-nums"><thead>{line("th", heads)}'
        f"</thead><tbody>{body}</tbody></table></div><p>{below}</p>"
    )


def significant(value: float) -> str:
    """Return ``value`` with three digits or more.

    Example:
        >>> significant(0.5), significant(1234.5)
        ('0.500', '1234')
    """
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3}f}"


def quantity(value: float, unit: str = "") -> str:
    """Return a large number with a prefix.

    Example:
        >>> quantity(12_345), quantity(12_345, "B"), quantity(12, "B")
        ('12.3 k', '12.3 kB', '12 B')
    """
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{significant(value / size)} {prefix}{unit}"
    return f"{value:.0f} {unit}".rstrip()
