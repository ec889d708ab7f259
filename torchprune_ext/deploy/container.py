"""The safetensors container, written and read strictly: a header that says where each part's bytes are, and the bytes.

A file is 8 bytes that give the length of the header (little-endian), the header (JSON), and the data. What reads here
believes nothing: it checks the header against the length of the file, before anything is allocated by its numbers.
"""

import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from torchprune_ext._checks import errors_about

HEADER_LIMIT = 16 * 2**20  # bytes; a header of 50,000 tensors is shorter, and Python's objects of it take 20 times that
BLOCK = 2**20  # bytes read at a time
CODES: dict[str, torch.dtype] = {
    code: getattr(torch, name)
    for code, name in {
        "BOOL": "bool",
        "U8": "uint8",
        "I8": "int8",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E5M2": "float8_e5m2",
        "F8_E5M2FNUZ": "float8_e5m2fnuz",
        "F8_E8M0": "float8_e8m0fnu",
        "I16": "int16",
        "U16": "uint16",
        "F16": "float16",
        "BF16": "bfloat16",
        "I32": "int32",
        "U32": "uint32",
        "F32": "float32",
        "I64": "int64",
        "U64": "uint64",
        "F64": "float64",
        "C64": "complex64",
    }.items()
    if hasattr(torch, name)  # the oldest torch does not have all
}


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of the container.

    Args:
        code: its dtype, e.g. ``"F32"``.
        shape: its shape.
        begin: where its bytes begin, counted from the first byte of the file.
        end: where they end.
    """

    code: str
    shape: tuple[int, ...]
    begin: int = 0
    end: int = 0

    @property
    def nbytes(self) -> int:
        """How many bytes its dtype and shape need."""
        return math.prod(self.shape) * CODES[self.code].itemsize


def short(text: object) -> str:
    """Return the ``repr`` of what a file says, which may be long, short enough for a message."""
    shown = repr(text[:200] if isinstance(text, str) else text)
    return shown if len(shown) <= 120 else f"{shown[:100]}... ({len(shown)} characters)"


@contextmanager
def opened(path: "str | os.PathLike[str]") -> Iterator[BinaryIO]:
    """Open a file for reading, and name it in every ``ValueError`` raised inside.

    Raises:
        TypeError: ``path`` is not a path.
        ValueError: what is there is not a regular file; a pipe would be waited for, a device has no end.
        OSError: the file cannot be opened.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path={path!r} is a {type(path).__name__}. Pass the path of a file.")
    name = os.fspath(path)
    if not stat.S_ISREG(os.stat(name).st_mode):
        raise ValueError(f"{name!r} is not a regular file. Pass the path of a file.")
    with open(name, "rb") as file, errors_about(repr(name)):
        yield file


def size_of(file: BinaryIO) -> int:
    """Return the length of an open file in bytes."""
    return os.fstat(file.fileno()).st_size


def strict_json(text: str, what: str) -> Any:
    """Parse JSON that holds each key once and whole numbers of at most 19 digits, and no other numbers.

    Raises:
        ValueError: it is anything else; ``what`` names the text.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(items)
        if len(table) < len(items):
            seen: set[str] = set()
            twice = next(key for key, _ in items if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ValueError(f"the key {short(twice)} occurs twice")
        return table

    def whole(digits: str) -> int:
        if len(digits) > 19:
            raise ValueError(f"the number {short(digits)} is too large")
        return int(digits)

    def refuse(number: str) -> None:
        raise ValueError(f"{short(number)} is not a whole number")

    try:
        found = json.loads(text, object_pairs_hook=pairs, parse_int=whole, parse_float=refuse, parse_constant=refuse)
        json.dumps(found, ensure_ascii=False).encode()  # half of a surrogate pair is not text
        return found
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply. {DAMAGED}") from None
    except UnicodeEncodeError:
        raise ValueError(f"{what} holds half of a surrogate pair, which is not text. {DAMAGED}") from None
    except ValueError as error:
        raise ValueError(f"{what} is not valid: {error}. {DAMAGED}") from None


DAMAGED = "The file is damaged or was not written by this library; get it again from where it came from."


def read_header(file: BinaryIO) -> tuple[dict[str, str], dict[str, Part]]:
    """Return the metadata and the parts of a file, all checked against the file's length.

    Raises:
        ValueError: the file is not a valid safetensors file.
    """
    size = size_of(file)
    file.seek(0)
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > size - 8:
        needed = f"{8 + length} for its header alone" if len(start) == 8 else "more than 8"
        raise ValueError(
            f"the file has {size} bytes and needs {needed}: it is cut short, or is not a safetensors file. {DAMAGED}"
        )
    if length > HEADER_LIMIT:
        raise ValueError(f"the header has {length} bytes, more than the {HEADER_LIMIT} that are read. {DAMAGED}")
    raw = file.read(length)
    if not raw.startswith(b"{") or len(raw) < length:
        raise ValueError(f"the header does not begin with '{{', so this is not a safetensors file. {DAMAGED}")
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise ValueError(f"the header is not UTF-8 text. {DAMAGED}") from None
    table = strict_json(text, "the header")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"__metadata__ of the header is not a table of strings. {DAMAGED}")
    parts = {name: _part(name, entry, 8 + length) for name, entry in table.items()}
    _check_places(parts, 8 + length, size)
    return metadata, parts


def _part(name: str, entry: Any, data: int) -> Part:
    """Return the part that an entry of the header describes; ``data`` is where the data begin."""
    where = f"tensor {short(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where}: its entry does not hold just dtype, shape and data_offsets. {DAMAGED}")
    code, shape, places = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in CODES:
        raise ValueError(f"{where}: dtype={short(code)} is unknown. Known are {', '.join(CODES)}.")
    check_shape(where, shape)
    if not is_whole_list(places) or len(places) != 2:
        raise ValueError(f"{where}: data_offsets={short(places)} are not two whole numbers. {DAMAGED}")
    part = Part(code, tuple(shape), data + places[0], data + places[1])
    if part.nbytes != part.end - part.begin:
        raise ValueError(
            f"{where}: dtype {code} and shape {short(shape)} need {part.nbytes} bytes, its data_offsets "
            f"{places} leave it {part.end - part.begin}. {DAMAGED}"
        )
    return part


def is_whole_list(value: Any) -> bool:
    """Return whether ``value``, read from JSON, is a list of whole numbers >= 0."""
    return isinstance(value, list) and all(type(each) is int and each >= 0 for each in value)


def check_shape(where: str, shape: Any) -> None:
    """Raise ``ValueError`` unless ``shape``, read from JSON, is one that a tensor can have."""
    if not is_whole_list(shape) or len(shape) > 64 or math.prod(shape) >= 2**59:  # 2**63 bytes of the widest dtype
        raise ValueError(f"{where}: shape={short(shape)} is not the shape of a tensor. {DAMAGED}")


def _check_places(parts: Mapping[str, Part], begin: int, size: int) -> None:
    """Raise ``ValueError`` unless the parts fill the file from ``begin`` on, without overlaps or holes."""
    for name, part in sorted(parts.items(), key=lambda item: (item[1].begin, item[1].end)):
        if part.begin != begin:
            raise ValueError(
                f"tensor {short(name)} begins at byte {part.begin}, but the one before it ends at {begin}: "
                f"tensors overlap, or leave a hole. {DAMAGED}"
            )
        begin = part.end
    if begin != size:
        raise ValueError(
            f"the tensors end at byte {begin}, but the file has {size}: it is cut short or goes on. {DAMAGED}"
        )


def make_header(parts: Mapping[str, Part], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """Return the bytes before the data, and the names of the parts in the order in which their data follow.

    Wide dtypes come first, so that each part begins at a multiple of the size of its entries.

    Raises:
        ValueError: a name cannot be written, or the header gets too long to be read again.
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    order, place = sorted(parts, key=lambda name: (-CODES[parts[name].code].itemsize, name)), 0
    for name in order:
        part = parts[name]
        table[name] = {"dtype": part.code, "shape": part.shape, "data_offsets": [place, place + part.nbytes]}
        place += part.nbytes
    raw = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > HEADER_LIMIT:
        raise ValueError(
            f"the names and shapes of {len(parts)} tensors take {len(raw)} bytes, more than the {HEADER_LIMIT} "
            "that are read. Save parts of the model to files of their own."
        )
    return len(raw).to_bytes(8, "little") + raw, order


def to_bytes(tensor: Tensor) -> bytearray:
    """Return the bytes of a contiguous tensor, which may be on any device."""
    buffer = bytearray(tensor.numel() * tensor.element_size())
    if buffer:
        torch.frombuffer(buffer, dtype=torch.uint8).copy_(tensor.view(-1).view(torch.uint8))
    return buffer


class Source:
    """Reads the bytes of one part from front to back; several may read one file in turns.

    Args:
        file: an open file.
        part: one of its parts, as :func:`read_header` returned it.
    """

    def __init__(self, file: BinaryIO, part: Part) -> None:
        self._file, self._place, self._end = file, part.begin, part.end

    def take(self, count: int) -> Tensor:
        """Return the next ``count`` bytes, or as many as are left, as uint8.

        Raises:
            ValueError: the file has become shorter.
        """
        count = min(count, self._end - self._place)
        if not count:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        self._file.seek(self._place)
        raw = self._file.read(count)
        if len(raw) < count:
            raise ValueError("the file became shorter while it was read. Load it again when nothing writes to it.")
        self._place += count
        return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


@contextmanager
def replaced(path: "str | os.PathLike[str]") -> Iterator[BinaryIO]:
    """Write a file beside ``path`` and put it in its place at the end; on any error ``path`` stays what it was.

    Raises:
        TypeError: ``path`` is not a path.
        OSError: the file cannot be written.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path={path!r} is a {type(path).__name__}. Pass the path of a file.")
    final = Path(os.path.realpath(os.fspath(path)))  # a link stays one
    if final.is_dir():
        raise IsADirectoryError(f"path={os.fspath(path)!r} is a folder. Pass the path of a file in it.")
    beside = final.with_name(f".{final.name[:100]}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    try:
        with open(beside, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else the new name may survive a power cut, and the bytes not
        os.replace(beside, final)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
