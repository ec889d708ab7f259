"""What a report says: frozen values that print as a table, in a terminal and in a notebook."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from torchprune_ext._tables import html, quantity, significant, table
from torchprune_ext.patterns import NM
from torchprune_ext.reporting.structure import tightest

if TYPE_CHECKING:
    from pandas import DataFrame

HEADS = ("tensor", "layer", "shape", "kept", "entries", "density", "whole zeros", "N:M", "by")


class Count(NamedTuple):
    """How many units are zero as a whole.

    Args:
        zero: units in which nothing is kept.
        total: units that there are.
    """

    zero: int
    total: int


@dataclass(frozen=True, slots=True)
class Row:
    """What is left of one tensor.

    Args:
        name: path of the tensor, as ``"layer1.0.conv1.weight"``, without the suffix that pruning gives it.
        layer: type of the module that owns it.
        shape: its shape.
        dtype: its dtype.
        source: where it is read what is pruned. ``"mask"``: the tensor is pruned, and its mask says so. ``"zeros"``: it
            has no mask, but zeros, as after :func:`.remove`. ``"dense"``: neither. ``"unread"``: it is of a format
            that does not show its entries (quantized, semi-structured), and all count as kept.
        kept: entries that are not pruned.
        total: all entries.
        nonzero: kept entries that are not zero. Fewer than ``kept`` under a mask if the tensor has other zeros too, as
            where masks were made over permanent ones; see :func:`.mask_zeros`.
        units: for each kind of unit that the shape has, the :class:`Count` of those that are zero as a whole:
            ``entries``; of a convolution ``kernels``, ``filters`` (what one output channel reads) and ``channels``
            (what reads one input channel); of a matrix ``rows`` and ``columns``; of a stack of matrices ``slices``.
        nm: the N:M patterns that hold, with the axis that they run along; see :func:`report`.
        history: the calls that pruned it, oldest first; see :func:`.lifecycle.history`.
        tied: other names of the same tensor.
        macs: multiplications with it in one forward pass of the example; None if not known.
    """

    name: str
    layer: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: str
    kept: int
    total: int
    nonzero: int
    units: Mapping[str, Count]
    nm: tuple[NM, ...]
    history: tuple[str, ...]
    tied: tuple[str, ...]
    macs: int | None = None

    @property
    def density(self) -> float:
        """Fraction of the entries that is kept; 1 if there are none."""
        return self.kept / self.total if self.total else 1.0

    @property
    def sparsity(self) -> float:
        """Fraction of the entries that is pruned."""
        return 1 - self.density

    @property
    def empty(self) -> bool:
        """Whether there are entries and none is kept, so that the layer gives no more than its bias."""
        return self.kept == 0 < self.total

    @property
    def full(self) -> bool:
        """Whether nothing is pruned."""
        return self.kept == self.total

    @property
    def is_weight(self) -> bool:
        """Whether it has two axes or more, as what is multiplied with; biases and scales have one."""
        return len(self.shape) > 1

    def to_dict(self) -> dict[str, Any]:
        """Return all of it in plain dictionaries, lists, strings and numbers."""
        return {
            **{name: getattr(self, name) for name in ("name", "layer", "source", "kept", "total", "nonzero", "macs")},
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "sparsity": self.sparsity,
            "units": {name: count._asdict() for name, count in self.units.items()},
            "nm": [asdict(pattern) for pattern in self.nm],
            "history": list(self.history),
            "tied": list(self.tied),
        }

    def cells(self) -> list[str]:
        """Return the line of the table."""
        zeros = [f"{c.zero:,} of {c.total:,} {kind}" for kind, c in self.units.items() if kind != "entries" and c.zero]
        shape, source = "x".join(map(str, self.shape)) or "scalar", self.source
        if source == "mask" and self.nonzero < self.kept:
            source = f"mask, and {self.kept - self.nonzero:,} zeros"
        patterns = [f"{each.n}:{each.m} dim {each.dim}" for each in tightest(self.nm)]
        numbers = [f"{self.kept:,}", f"{self.total:,}", _percent(self.kept, self.total)]
        return [self.name, self.layer, shape, *numbers, "; ".join(zeros), ", ".join(patterns), source]


@dataclass(frozen=True, slots=True)
class Report:
    """What is left of a model, as :func:`report` returns it; ``print`` it for the table.

    ``report["layer1.0.conv1.weight"]`` is the row of a tensor, by any of its names; ``for row in report`` goes through
    all of them.

    Args:
        model: type of the model.
        rows: one for each parameter, in the order of the model; one that several modules share (tied) has one row.
        macs: multiplications of one forward pass of the example, in matrix products, convolutions and attention, zeros
            included; None without ``example_inputs``, and where that is not known.
        effective_macs: those of them that are not with a pruned entry. Theoretical: dense kernels multiply by all. None
            where ``macs`` is, and where it is not known with which weights they are. Weights that are cast or computed
            before they are multiplied with count in full, and the table names those that are pruned.
        latency: median seconds of a forward pass; None without ``example_inputs``.
        spread: interquartile range of these, in seconds.
        threads: how many torch had on the CPU.
        rounds: how often the latency was measured.
    """

    model: str
    rows: tuple[Row, ...]
    macs: int | None = None
    effective_macs: int | None = None
    latency: float | None = None
    spread: float | None = None
    threads: int | None = None
    rounds: int | None = None
    _places: Mapping[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Note where each name stands."""
        places = {name: place for place, row in enumerate(self.rows) for name in (row.name, *row.tied)}
        object.__setattr__(self, "_places", places)

    @property
    def kept(self) -> int:
        """Entries of all parameters that are not pruned."""
        return sum(row.kept for row in self.rows)

    @property
    def total(self) -> int:
        """Entries of all parameters, biases and scales included."""
        return sum(row.total for row in self.rows)

    @property
    def sparsity(self) -> float:
        """Fraction of the entries of all parameters that is pruned."""
        return 1 - self.kept / self.total if self.total else 0.0

    @property
    def bytes(self) -> int:
        """Bytes of all entries of all parameters, masks aside."""
        return sum(row.total * row.dtype.itemsize for row in self.rows)

    @property
    def nonzero_bytes(self) -> int:
        """Bytes of those that are kept, without what it takes to say where they are. Theoretical too."""
        return sum(row.kept * row.dtype.itemsize for row in self.rows)

    @property
    def weights(self) -> tuple[Row, ...]:
        """The rows of tensors with two axes or more."""
        return tuple(row for row in self.rows if row.is_weight)

    @property
    def empty(self) -> tuple[str, ...]:
        """Names of the tensors of which nothing is kept."""
        return tuple(row.name for row in self.rows if row.empty)

    @property
    def full(self) -> tuple[str, ...]:
        """Names of the tensors of which nothing is pruned."""
        return tuple(row.name for row in self.rows if row.full)

    def __getitem__(self, name: str) -> Row:
        """Return the row of the tensor ``name``, e.g. ``"layer1.0.conv1.weight"``.

        Raises:
            KeyError: the model has no such tensor; the message names what is near.
        """
        if isinstance(name, str) and name in self._places:
            return self.rows[self._places[name]]
        raise KeyError(f"{name!r} is not the name of a tensor of {self.model}. {self._near(name)}")

    def __iter__(self) -> Iterator[Row]:
        """Go through the rows."""
        return iter(self.rows)

    def __contains__(self, item: object) -> bool:
        """Return whether ``item`` is a name of a tensor, or a row."""
        return item in self._places if isinstance(item, str) else item in self.rows

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def _near(self, name: object) -> str:
        """Return which names may have been meant."""
        known = list(self._places)
        if not isinstance(name, str):
            return f"Pass a name, as {known[0]!r}." if known else "It has none."
        path, _, last = f".{name}".rpartition(".")
        inside = f"{path}.parametrizations.{last}.".lstrip(".")
        below = [each for each in known if name and each.startswith((f"{name}.", inside))]
        near = below[:4] or get_close_matches(name, known, n=4, cutoff=0.4)
        return f"Did you mean {' or '.join(map(repr, near))}?" if near else f"Choose one of {known[:6]}."

    def to_dict(self) -> dict[str, Any]:
        """Return all of it in plain dictionaries, lists, strings and numbers, as for a JSON file."""
        names = ("model", "kept", "total", "sparsity", "bytes", "nonzero_bytes", "macs", "effective_macs")
        timing = ("latency", "spread", "threads", "rounds")
        return {
            **{name: getattr(self, name) for name in (*names, *timing)},
            "empty": list(self.empty),
            "full": list(self.full),
            "rows": [row.to_dict() for row in self.rows],
        }

    def to_pandas(self) -> "DataFrame":
        """Return the rows as a table of pandas, by name; ``zero_filters`` and the like are whole units that are zero.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            from pandas import DataFrame, Index
        except ImportError as error:
            raise ImportError("pandas is not installed: pip install torchprune-ext[pandas]") from error
        rows = []
        for row in self.rows:
            plain = {**row.to_dict(), "shape": row.shape, "nm": row.nm, "history": row.history, "tied": row.tied}
            del plain["units"], plain["name"]
            rows.append({**plain, **{f"zero_{kind}": count.zero for kind, count in row.units.items()}})
        return DataFrame(rows, index=Index([row.name for row in self.rows], name="name"))

    def __str__(self) -> str:
        """Return the table."""
        heads, rows, words = self._lines()
        widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
        lines = [[c.ljust(widths[i]) if i in words else c for i, c in enumerate(line)] for line in [heads, *rows]]
        return "\n".join([*([table(lines[0], lines[1:])] if rows else []), *self._notes()])

    def _repr_html_(self) -> str:
        """Return the table for notebooks."""
        heads, rows, words = self._lines()
        return html(heads, rows, self._notes(), words)

    def _lines(self) -> tuple[list[str], list[list[str]], list[int]]:
        """Return the heads and rows of the table, without columns that say nothing, and which columns are words."""
        rows = [row.cells() for row in self._shown()]
        used = [place for place in range(len(HEADS)) if place < 3 or any(row[place] for row in rows)]
        words = [number for number, place in enumerate(used) if HEADS[place] not in ("kept", "entries", "density")]
        return [HEADS[place] for place in used], [[row[place] for place in used] for row in rows], words

    def _shown(self) -> list[Row]:
        """Return the rows of the table: weights, and what else is pruned."""
        return [row for row in self.rows if row.is_weight or row.source != "dense"]

    def _notes(self) -> list[str]:
        """Return the lines below the table."""
        weights, rest = self.weights, len(self.rows) - len(self._shown())
        parts = (sum(row.kept for row in weights), sum(row.total for row in weights))
        notes = [
            f"weights: {parts[0]:,} of {parts[1]:,} entries kept, {_percent(*parts, digits=2)}",
            f"all parameters: {self.kept:,} of {self.total:,}, {_percent(self.kept, self.total, digits=2)}"
            + (f"; not shown: {rest} dense vector{'s' * (rest != 1)}" if rest else ""),
            f"bytes: {quantity(self.nonzero_bytes, 'B')} kept of {quantity(self.bytes, 'B')}, masks and indices aside",
        ]
        for word, names in (("nothing left", self.empty), ("not read", [r.name for r in self if r.source == "unread"])):
            if names:
                notes.append(f"{word}: {', '.join(names[:8])}{', ...' * (len(names) > 8)}")
        if self.latency is None or self.spread is None:
            return notes
        if self.macs is None:
            notes.append(
                "MACs: not known, as no product was seen, or one that torch.utils.flop_counter has no formula for"
            )
        elif self.effective_macs is None:
            notes.append(f"MACs: {quantity(self.macs)}; of which weights is not known")
        else:
            notes.append(
                f"MACs: {quantity(self.macs)}; with entries that are kept: {quantity(self.effective_macs)}, "
                f"{_percent(self.effective_macs, self.macs)}, which is theoretical: dense kernels multiply by zeros too"
            )
            unseen = [row.name for row in self.weights if not row.full and not row.macs]
            if unseen:
                notes.append(f"counted in full, as no product is with them as they are stored: {', '.join(unseen[:8])}")
        return [
            *notes,
            f"latency: {significant(1e3 * self.latency)} ms ± {significant(1e3 * self.spread)}, median ± interquartile "
            f"range of {self.rounds} rounds, {self.threads} thread{'s' * (self.threads != 1)}",
        ]


def _percent(part: int, whole: int, digits: int = 1) -> str:
    """Return a share in percent, as 0 or 100 only if it is that exactly."""
    if not whole:
        return "-"
    share, least = 100 * part / whole, 10.0**-digits
    if 0 < share < least:
        return f"<{least:.{digits}f} %"
    return f">{100 - least:.{digits}f} %" if 100 - least < share < 100 else f"{share:.{digits}f} %"
