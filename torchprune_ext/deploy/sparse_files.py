"""Files of sparse models: only what survived, where it stands, and no pickle."""

import json
import os
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from torchprune_ext.deploy.container import (
    Part,
    make_header,
    opened,
    replaced,
    short,
    to_bytes,
)
from torchprune_ext.deploy.encodings import (
    OVERHEAD,
    SIGNED_ZERO,
    Layout,
    gap_bytes,
    pack,
    pack_gaps,
)
from torchprune_ext.deploy.reading import VERSION, SparseFile
from torchprune_ext.deploy.slots import Slot, check_names, row, same_mask, slots_of

# --- save -----------------------------------------------------------------------------------------


def save_sparse(model: nn.Module, path: "str | os.PathLike[str]") -> None:
    """Write the weights of a pruned model to a file that holds only what survived.

    The file is a valid safetensors file. For each tensor it holds the survivors and where they stand, as a bit mask or
    as gaps, or all entries, whichever is smallest. While pruned, masks say what survives; what lies under them is not
    written. After ``remove``, zeros are left out. Names are those of the dense model. Tied tensors are written once.

    Besides the model, memory is needed for a few megabytes, or for one tensor if that is not contiguous.

    Args:
        model: any module, pruned by whatever method, or not at all; on any device, of any dtype. It is not changed.
        path: where to write. A file that is there is replaced when the new one is complete, not before.

    Raises:
        TypeError: ``model`` is not a module, ``path`` not a path.
        ValueError: the model holds what a file without pickle cannot hold: extra state, a tensor on the meta device, a
            sharded or quantized one, a mask with other entries than 0 and 1.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile, pathlib
        >>> from torch.nn.utils import prune
        >>> layer = prune.l1_unstructured(nn.Linear(256, 256), "weight", amount=0.9)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "model.safetensors"
        ...     save_sparse(layer, path)
        ...     fresh = load_sparse(nn.Linear(256, 256), path)
        ...     share = path.stat().st_size / (4 * 256 * 257)
        >>> bool((fresh.weight == layer.weight).all()), share < 0.14
        (True, True)
    """
    write_file(slots_of(model), path, {})


def write_file(slots: dict[str, Slot], path: "str | os.PathLike[str]", more: Mapping[str, str]) -> None:
    """Write tensors to a sparse file, with ``more`` in its metadata."""
    aliases = _aliases(slots)
    slots = {name: slot for name, slot in slots.items() if name not in aliases}
    layouts = {name: _choose(slot) for name, slot in slots.items()}
    owners: dict[str, str] = {}
    parts: dict[str, Part] = {}
    for name, layout in layouts.items():
        for key, part in layout.parts(name).items():
            if key in parts or key == "__metadata__":
                raise ValueError(
                    f"the name {short(key)} is needed for tensor {short(name)} and is used already. Rename one of them."
                )
            owners[key], parts[key] = name, part
    said = {name: entry for name, layout in layouts.items() if (entry := layout.as_json()) is not None}
    about = {"version": VERSION, "tensors": said, "aliases": aliases}
    metadata = {"format": "pt", "torchprune_ext": as_json(about), **more}
    try:
        header, order = make_header(parts, metadata)
    except UnicodeEncodeError as error:
        raise ValueError(f"a name of the model cannot be written as UTF-8: {error}. Rename it.") from None
    with replaced(path) as file:
        file.write(header)
        for key in order:
            name = owners[key]
            for block in _data(slots[name], layouts[name], key.removeprefix(name)):
                file.write(to_bytes(block))


def as_json(value: object) -> str:
    """Return ``value`` as the JSON that the metadata of a file hold."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _aliases(slots: dict[str, Slot]) -> dict[str, str]:
    """Return which names stand for the same values under the same mask as an earlier name."""
    first: dict[tuple[object, ...], list[str]] = {}
    aliases = {}
    for name, slot in slots.items():
        known = first.setdefault(slot.place, [])
        twin = next((other for other in known if same_mask(slots[other].mask, slot.mask)), None)
        if twin is None:
            known.append(name)
        else:
            aliases[name] = twin
    return aliases


def _choose(slot: Slot) -> Layout:
    """Return the smallest layout of a tensor; one that keeps the mask, if it is pruned."""
    shape, dtype, history = tuple(slot.tensor.shape), slot.tensor.dtype, slot.history()
    survivors, negative = 0, False
    for entries, alive in slot.blocks():
        survivors += int(alive.sum())
        negative |= history is None and bool((_negative_zeros(entries, dtype)).any())
    dense = Layout(dtype, shape)
    mask = Layout(dtype, shape, "mask", 0, survivors, -(-dense.numel // 8), negative, history)
    found = [mask]
    if 2 * survivors < dense.numel:  # else gaps, of at least 2 bits each, are longer than the mask
        sizes = gap_bytes(alive for _, alive in slot.blocks())
        bits = min(sizes, key=lambda bits: sizes[bits])
        found.append(Layout(dtype, shape, "gaps", bits, survivors, sizes[bits], negative, history))
    best = min(found, key=Layout.nbytes)
    return best if history is not None or best.nbytes() + OVERHEAD < dense.nbytes() else dense


def _negative_zeros(entries: Tensor, dtype: torch.dtype) -> Tensor:
    """Return which entries are -0.0."""
    return (entries == torch.iinfo(entries.dtype).min) & (dtype in SIGNED_ZERO)


def _data(slot: Slot, layout: Layout, part: str) -> Iterator[Tensor]:
    """Yield what a part of a tensor holds, block by block; ``part`` is what follows the tensor's name in the part's."""
    if part == ".gaps":
        yield from pack_gaps((alive for _, alive in slot.blocks()), layout.bits)
        return
    for entries, alive in slot.blocks():
        if part == ".values":
            yield entries[alive]
        elif part == ".mask":
            yield pack(alive.view(torch.uint8), 1)
        elif part == ".negative_zeros":
            yield pack(_negative_zeros(entries, slot.tensor.dtype).view(torch.uint8), 1)
        else:
            yield entries


# --- load -----------------------------------------------------------------------------------------


def load_sparse(model: nn.Module, path: "str | os.PathLike[str]") -> nn.Module:
    """Give a model the weights from a file of :func:`save_sparse`.

    Tensors that are not pruned in ``model`` get the weights with zeros where the file's were pruned, as after
    ``remove``: what a model needs to be served. For those that are pruned, ``weight_orig`` gets these values,
    ``weight_mask`` becomes the mask of the file (for a tensor that was saved without one, what is not zero), and
    ``weight`` their product. What was not written comes back as 0; all else has the bits that it had.

    The file is not trusted. All of it is checked before the first value is written, so a file that is damaged, does
    not fit or was made to do harm changes nothing. Loading runs no code from it. Besides the model, memory is needed
    for a few megabytes, or for one tensor if that is not contiguous.

    Args:
        model: the module to load into, pruned or not, on any device. It must have the tensors of the file, with the
            same shapes and dtypes.
        path: a file that :func:`save_sparse` wrote.

    Returns:
        The model. Parameters, buffers and hooks are the same objects as before.

    Raises:
        TypeError: ``model`` is not a module, ``path`` not a path.
        ValueError: the file is damaged or of another kind; names, shapes or dtypes do not fit the model; or tensors
            that are tied in the model differ in the file. The model is unchanged.
        OSError: the file cannot be read.

    Example:
        See :func:`save_sparse`.
    """
    slots = slots_of(model)
    with opened(path) as file:
        found = SparseFile(file)
        _check_fit(slots, found)
        _check_ties(slots, found)
        done: set[tuple[object, ...]] = set()
        # of tied tensors, those that are pruned come first: where they hold zeros, the dense one holds values
        with torch.no_grad():
            for name, slot in sorted(slots.items(), key=lambda item: item[1].mask is None):
                job = (*slot.place, found.of(name), id(slot.mask))
                if job not in done:
                    done.add(job)
                    _write(slot, found, found.of(name))
    for slot in slots.values():
        if slot.target is not None and slot.mask is not None:
            product = slot.mask.to(slot.tensor.dtype) * slot.target.parameter
            setattr(slot.target.module, slot.target.name, product)
    return model


def _write(slot: Slot, found: SparseFile, name: str) -> None:
    """Write a tensor of the file, and its mask, into the tensor of a model."""
    tensors = [slot.tensor.detach()] if slot.mask is None else [slot.tensor.detach(), slot.mask.detach()]
    rows = [row(tensor) for tensor in tensors]  # copies of those that are not contiguous
    start = 0
    for entries, alive in found.blocks(name):
        for to, block in zip(rows, (entries.view(-1).view(slot.tensor.dtype), alive), strict=False):
            to[start : start + len(alive)].copy_(block)
        start += len(alive)
    for tensor, written in zip(tensors, rows, strict=True):
        if written.data_ptr() != tensor.data_ptr():
            tensor.copy_(written.view(tensor.shape))


def _check_fit(slots: dict[str, Slot], found: SparseFile) -> None:
    """Raise ``ValueError`` unless the tensors of file and model have the same names, shapes and dtypes."""
    check_names("tensors", found.names(), slots, "Load into a model of the same architecture and names.")
    for name, slot in slots.items():
        layout, tensor = found.layouts[found.of(name)], slot.tensor
        if layout.shape != tuple(tensor.shape):
            raise ValueError(
                f"tensor {short(name)} has shape {layout.shape} in the file and {tuple(tensor.shape)} in the model. "
                "Load into a model of the same architecture."
            )
        if layout.dtype != tensor.dtype:
            raise ValueError(
                f"tensor {short(name)} has dtype {layout.dtype} in the file and {tensor.dtype} in the model. "
                f"Convert the model to {layout.dtype} first, load, and convert it back."
            )
        for each in (tensor, slot.mask):
            if each is None:
                continue
            if any(step == 0 and size > 1 for step, size in zip(each.stride(), each.shape, strict=True)):
                raise ValueError(
                    f"tensor {short(name)} of the model is expanded: entries share memory. Clone it first."
                )
            if each.is_inference() and not torch.is_inference_mode_enabled():
                raise ValueError(
                    f"tensor {short(name)} of the model was made in torch.inference_mode() and cannot be written "
                    "outside of it. Make the model outside of it, or load inside."
                )


def _check_ties(slots: dict[str, Slot], found: SparseFile) -> None:
    """Raise ``ValueError`` if tensors that are one in the model differ in the file where both survive."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, slot in slots.items():
        groups.setdefault(slot.place, []).append(name)
    for names in groups.values():
        names.sort(key=lambda name: slots[name].mask is not None)  # a dense one first, if there is one
        for other in names[1:]:
            if found.of(other) == found.of(names[0]):
                continue
            masked = [slots[name].mask is not None for name in (names[0], other)]
            pairs = zip(found.blocks(found.of(names[0])), found.blocks(found.of(other)), strict=True)
            for (a, alive_a), (b, alive_b) in pairs:
                differ = (a != b).any(1) if a.ndim > 1 else a != b
                if masked == [True, True]:
                    differ |= alive_a != alive_b
                elif masked == [False, True]:
                    differ &= alive_b  # what lies under the mask of one is a weight of the other
                if bool(differ.any()):
                    raise ValueError(
                        f"{short(names[0])} and {short(other)} are one tensor in the model (tied), but differ in the "
                        "file. Untie them in the model first, or save the file from a model that ties them."
                    )
