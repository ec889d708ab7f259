"""What a file of weights holds, as a table to read: sparse files, safetensors, checkpoints of ``torch.save``."""

import os
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from torchprune_ext.deploy.container import BLOCK, CODES, DAMAGED, Source, opened, read_header, size_of
from torchprune_ext.deploy.encodings import ENTRIES, Layout, nonzero, words
from torchprune_ext.deploy.reading import SparseFile
from torchprune_ext.deploy.slots import listed

HARMLESS = re.compile(
    r"torch (\w+Storage|b?float\w*|u?int\d+|bool|complex\w+|Size|device)|torch\.storage UntypedStorage|"
    r"torch\._utils _rebuild_(tensor_v[23]|parameter|parameter_with_state|sparse_tensor)|"
    r"torch\.serialization _get_layout|collections (OrderedDict|Counter)|(builtins|__builtin__) (set|complex)|"
    r"_codecs encode"
)  # what the pickle of a checkpoint may name


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table.

    Args:
        name: name of the tensor.
        shape: its shape.
        dtype: its dtype.
        encoding: how it is written.
        alive: number of entries that are not zero, or survive their mask; None if that cannot be counted.
        numel: number of entries.
        nbytes: bytes that it takes in the file.
        dense: bytes that it takes dense.
        history: what pruned it, step by step.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    encoding: str
    alive: int | None
    numel: int
    nbytes: int
    dense: int
    history: tuple[str, ...] = ()


def describe(path: "str | os.PathLike[str]") -> str:
    r"""Return what a file holds: name, shape, dtype, encoding, density and bytes of each tensor, totals, history.

    Nothing in the file is run: a checkpoint is read with ``weights_only=True``.

    Args:
        path: a file of :func:`save_sparse`, of safetensors or of ``torch.save``.

    Returns:
        The table. What would not print is escaped.

    Raises:
        TypeError: ``path`` is not a path.
        ValueError: the file is of another kind, or is damaged.
        OSError: the file cannot be read.

    Example:
        >>> import tempfile
        >>> from torchprune_ext import every_other, save_sparse
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_sparse(every_other(torch.nn.Linear(4, 2, bias=False), "weight"), f"{folder}/model.safetensors")
        ...     title, *table = describe(f"{folder}/model.safetensors").splitlines()
        >>> print(*table, sep="\n")
        tensor  shape  dtype    encoding  density  bytes
        weight  2x4    float32  mask       50.0 %     17
                by EveryOther(step=2, offset=0)
        1 tensor, 8 entries, density 50.0 %, 17 bytes: 53.1 % of 32 dense
    """
    with opened(path) as file:
        start = file.read(9)
        if start[8:] == b"{":
            kind, rows = _safetensors(file)
        elif start.startswith(b"PK"):
            kind, rows = "checkpoint of torch.save", list(_checkpoint(file, os.fspath(path)))
        elif start.startswith(b"\x80"):
            raise ValueError("the file is a bare pickle, as torch before 1.6 wrote them. Load it and save it again.")
        else:
            raise ValueError(
                "the file is neither a safetensors file nor a checkpoint of torch.save. "
                "Pass a .safetensors, .pt or .pth file."
            )
        title = f"{printable(os.fspath(path))}: {kind}, {size_of(file):,} bytes"
    return "\n".join([title, *_table(rows), _total(rows)])


def printable(text: str) -> str:
    """Return text with all escaped that would not print, a terminal's commands too."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _safetensors(file: BinaryIO) -> tuple[str, list[Row]]:
    """Return the kind of a safetensors file and its rows."""
    metadata, parts = read_header(file)
    if "torchprune_ext" not in metadata:
        rows = []
        for name, part in parts.items():
            dtype, source, alive = CODES[part.code], Source(file, part), 0
            while len(block := source.take(BLOCK)):
                alive += _alive(words(block.view(dtype)), dtype)
            layout = Layout(dtype, part.shape)
            rows.append(Row(name, part.shape, dtype, "dense", alive, layout.numel, part.nbytes, part.nbytes))
        return "dense safetensors", rows
    found, rows = SparseFile(file), []
    for name, layout in found.layouts.items():
        alive = layout.survivors
        if layout.encoding == "dense":
            alive = sum(int(block.sum()) for _, block in found.blocks(name))
        encoding = f"gaps, {layout.bits} bits" if layout.encoding == "gaps" else layout.encoding
        dense = layout.numel * layout.dtype.itemsize
        history = layout.history or ()
        row = Row(name, layout.shape, layout.dtype, encoding, alive, layout.numel, layout.nbytes(), dense, history)
        rows.append(row)
    rows += [
        Row(name, found.layouts[other].shape, found.layouts[other].dtype, f"tied to {other}", None, 0, 0, 0)
        for name, other in found.aliases.items()
    ]
    return "sparse file of torchprune_ext", rows


def _checkpoint(file: BinaryIO, path: str) -> Iterator[Row]:
    """Yield the rows of a checkpoint of ``torch.save``."""
    _refuse_bombs(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        kind = type(error).__name__
        raise ValueError(f"torch.load(weights_only=True) fails on it with {kind}. {DAMAGED}") from None
    left = 4 * size_of(file)  # bytes to count zeros in: tensors may share memory, and expanded ones claim any number
    for name, tensor in _tensors(found, "", set()):
        nbytes, alive = tensor.numel() * tensor.element_size(), None
        plain = type(tensor) is Tensor or isinstance(tensor, torch.nn.Parameter)
        held = tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized
        if plain and held and nbytes <= size_of(file) and nbytes <= left:
            left -= nbytes
            flat = tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1)
            alive = sum(_alive(words(block), tensor.dtype) for block in flat.split(ENTRIES))
        layout = "dense" if tensor.layout == torch.strided else str(tensor.layout).removeprefix("torch.")
        yield Row(name, tuple(tensor.shape), tensor.dtype, layout, alive, tensor.numel(), nbytes, nbytes)


def _refuse_bombs(file: BinaryIO) -> None:
    """Raise ``ValueError`` if an archive may unfold to more than its file has bytes; ``torch.save`` makes none such.

    Of what torch's unpickler allows, some takes a size and makes an object of that size, e.g. ``bytearray``.
    """
    try:
        archive = zipfile.ZipFile(file)
        entries = archive.infolist()
        stored = all(e.compress_type == zipfile.ZIP_STORED and e.compress_size == e.file_size for e in entries)
        if not stored or sum(e.file_size for e in entries) > size_of(file):
            raise ValueError("it is compressed, or claims more bytes than the file has")
        pickles = [archive.read(entry) for entry in entries if entry.filename.endswith("/data.pkl")]
        named = {str(name) for raw in pickles for code, name, _ in pickletools.genops(raw) if code.name == "GLOBAL"}
    except Exception as error:  # whatever damage leads zipfile and pickletools to
        reason = printable(str(error)[:200]) or type(error).__name__
        raise ValueError(f"the archive is not valid: {reason}. {DAMAGED}") from None
    odd = sorted(name for name in named if not HARMLESS.fullmatch(name))
    if odd:
        raise ValueError(
            f"it names {listed(odd)}, so it holds more than plain tensors, and reading it could run code or take any "
            "amount of memory. Save the state dict of the model instead."
        )


def _tensors(value: Any, name: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested dicts, lists and tuples, each container once, and where they are."""
    if isinstance(value, Tensor):
        yield name or "(the whole)", value
    elif isinstance(value, (dict, list, tuple)) and id(value) not in seen and name.count(".") < 100:
        seen.add(id(value))
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, each in items:
            yield from _tensors(each, f"{name}.{key}" if name else str(key), seen)


def _alive(entries: Tensor, dtype: torch.dtype) -> int:
    return int(nonzero(entries, dtype).sum())


def _share(alive: int | None, numel: int) -> str:
    return "-" if alive is None or not numel else f"{alive / numel:.1%}".replace("%", " %")


def _table(rows: list[Row]) -> list[str]:
    """Return the rows as lines of aligned columns."""
    cells = [["tensor", "shape", "dtype", "encoding", "density", "bytes"]] + [
        [
            printable(row.name),
            "x".join(map(str, row.shape)) or "scalar",
            str(row.dtype).removeprefix("torch."),
            printable(row.encoding),
            _share(row.alive, row.numel),
            f"{row.nbytes:,}",
        ]
        for row in rows
    ]
    widths = [min(80, max(len(line[i]) for line in cells)) for i in range(6)]
    lines = []
    for line, steps in zip(cells, [(), *(row.history for row in rows)], strict=True):
        padded = [c.rjust(w) if i > 3 else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        lines.append("  ".join(padded).rstrip())
        lines += [f"{' ' * min(widths[0], 8)}  by {printable(step)}" for step in steps]
    return lines


def _total(rows: list[Row]) -> str:
    numel, nbytes, dense = (sum(getattr(row, key) for row in rows) for key in ("numel", "nbytes", "dense"))
    counted = [row for row in rows if row.alive is not None]
    share = _share(sum(row.alive or 0 for row in counted), sum(row.numel for row in counted))
    total = f"{len(rows)} tensor{'s' * (len(rows) != 1)}, {numel:,} entries, density {share}, {nbytes:,} bytes"
    return f"{total}: {_share(nbytes, dense)} of {dense:,} dense" if nbytes != dense else total
