"""Reads what ``save_sparse`` wrote, and believes nothing that the file says of itself."""

from collections.abc import Iterator
from typing import BinaryIO

import torch
from torch import Tensor

from torchprune_ext._checks import errors_about
from torchprune_ext.deploy.container import BLOCK, CODES, DAMAGED, Source, read_header, short, strict_json
from torchprune_ext.deploy.encodings import ENTRIES, Layout, nonzero, unpack, unpack_gaps, words

VERSION = 1  # of the format


class SparseFile:
    """What a file of :func:`save_sparse` holds, all of it checked but the values, which may be any.

    Args:
        file: the open file.

    Raises:
        ValueError: it is not such a file, or it is damaged.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        metadata, self._parts = read_header(file)
        self.metadata = metadata
        if "torchprune_ext" not in metadata:
            raise ValueError(
                "the file was not written by save_sparse. Load a dense safetensors file with the safetensors package."
            )
        about = strict_json(metadata["torchprune_ext"], "the metadata torchprune_ext")
        version = about.get("version") if isinstance(about, dict) else None
        if type(version) is int and version > VERSION:
            raise ValueError(f"the file has version {version} of the format, this library reads {VERSION}. Update it.")
        if version != VERSION or type(version) is not int or set(about) != {"version", "tensors", "aliases"}:
            raise ValueError(f"the metadata torchprune_ext do not hold just version, tensors and aliases. {DAMAGED}")
        said, aliases = about["tensors"], about["aliases"]
        if not isinstance(said, dict) or not isinstance(aliases, dict):
            raise ValueError(f"tensors or aliases of the metadata are not a table. {DAMAGED}")
        self.layouts = {name: Layout.of_json(name, entry, self._parts) for name, entry in said.items()}
        claimed: dict[str, str] = {}
        for name, layout in self.layouts.items():
            for key in layout.parts(name):
                if claimed.setdefault(key, name) != name:
                    raise ValueError(f"part {short(key)} belongs to two tensors. {DAMAGED}")
        for name, part in self._parts.items():
            if name not in claimed:
                if name in self.layouts:
                    raise ValueError(f"tensor {short(name)} is there twice, sparse and dense. {DAMAGED}")
                self.layouts[name] = Layout(CODES[part.code], part.shape)
        self.aliases: dict[str, str] = aliases
        for name, other in self.aliases.items():
            if name in self.layouts or not isinstance(other, str) or other not in self.layouts:
                raise ValueError(f"alias {short(name)} of {short(other)} does not stand for a tensor. {DAMAGED}")
        for name, layout in self.layouts.items():
            with errors_about(f"tensor {short(name)}"):
                self._check(name, layout)

    def of(self, name: str) -> str:
        """Return the name under which the values of ``name`` are written."""
        return self.aliases.get(name, name)

    def names(self) -> list[str]:
        """Return the names of all tensors, aliases included."""
        return [*self.layouts, *self.aliases]

    def _source(self, name: str, part: str) -> Source:
        return Source(self._file, self._parts[f"{name}{part}"])

    def _check(self, name: str, layout: Layout) -> None:
        """Raise ``ValueError`` if what says where survivors stand is damaged; takes time by bytes, not by claims."""
        if layout.dtype == torch.bool:
            source = self._source(name, "" if layout.encoding == "dense" else ".values")
            while len(block := source.take(BLOCK)):
                if int(block.max()) > 1:
                    raise ValueError(f"a byte of a bool tensor is {int(block.max())}, not 0 or 1. {DAMAGED}")
        if layout.encoding == "gaps":
            for _ in unpack_gaps(self._source(name, ".gaps").take, layout):
                pass
        for part in [".mask"] * (layout.encoding == "mask") + [".negative_zeros"] * layout.negative_zeros:
            spare = layout.index_bytes if part == ".mask" else -(-layout.numel // 8)
            source, found = self._source(name, part), 0
            for start in range(0, spare, ENTRIES // 8):
                bits = unpack(source.take(ENTRIES // 8), 1)
                if start + ENTRIES // 8 >= spare and bool(bits[layout.numel - 8 * start :].any()):
                    raise ValueError(f"spare bits behind its {part[1:]} are set. {DAMAGED}")
                found += int(bits.sum())
            if part == ".mask" and found != layout.survivors:
                raise ValueError(f"its mask has {found} bits set, but {layout.survivors} values. {DAMAGED}")
        if layout.negative_zeros:
            for alive, negative in zip(
                self._alive(name, layout), self._bits(name, ".negative_zeros", layout.numel), strict=True
            ):
                if bool((alive & negative).any()):
                    raise ValueError(f"an entry is both a survivor and a negative zero. {DAMAGED}")

    def _bits(self, name: str, part: str, numel: int) -> Iterator[Tensor]:
        """Yield a mask of the file in blocks of :data:`ENTRIES` entries, bool."""
        source = self._source(name, part)
        for start in range(0, numel, ENTRIES):
            yield unpack(source.take(ENTRIES // 8), 1)[: numel - start].view(torch.bool)

    def _alive(self, name: str, layout: Layout) -> Iterator[Tensor]:
        """Yield which entries survive in blocks of :data:`ENTRIES` entries, bool."""
        if layout.encoding == "mask":
            yield from self._bits(name, ".mask", layout.numel)
            return
        blocks = unpack_gaps(self._source(name, ".gaps").take, layout)
        waiting = torch.empty(0, dtype=torch.int64, device="cpu")
        for start in range(0, layout.numel, ENTRIES):
            stop = min(start + ENTRIES, layout.numel)
            while not len(waiting) or int(waiting[-1]) < stop:
                if (more := next(blocks, None)) is None:
                    break
                waiting = torch.cat([waiting, more])
            here = int(torch.searchsorted(waiting, stop))
            alive = torch.zeros(stop - start, dtype=torch.bool, device="cpu")
            alive[waiting[:here] - start] = True
            waiting = waiting[here:]
            yield alive

    def blocks(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the words of a tensor's entries, and which of them survive, as :meth:`Slot.blocks` does."""
        layout = self.layouts[name]
        if layout.encoding == "dense":
            source = self._source(name, "")
            for start in range(0, layout.numel, ENTRIES):
                count = min(ENTRIES, layout.numel - start)
                entries = words(source.take(count * layout.dtype.itemsize).view(layout.dtype))
                yield entries, nonzero(entries, layout.dtype)
            return
        source = self._source(name, ".values")
        negatives = self._bits(name, ".negative_zeros", layout.numel) if layout.negative_zeros else None
        for alive in self._alive(name, layout):
            entries = words(torch.zeros(len(alive), dtype=layout.dtype, device="cpu"))
            entries[alive] = words(source.take(int(alive.sum()) * layout.dtype.itemsize).view(layout.dtype))
            if negatives is not None:
                entries[next(negatives)] = torch.iinfo(entries.dtype).min
            yield entries, alive
