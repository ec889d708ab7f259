"""Files that are damaged, foreign or made to do harm: refused by name, and the model is what it was."""

import copy
import json
import os
import pathlib
import struct
import sys
import zipfile

import pytest
import torch
from fuzz_sparse_files import asked_for_too_much, bits, fuzz, limited_memory
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe
from torchprune_ext.deploy import container
from torchprune_ext.deploy.inspection import describe


class Net(nn.Module):
    """One tensor of each encoding, one with negative zeros, a bool."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(10, 9, bias=False)  # mask: 90 entries in 12 bytes, 6 spare bits
        self.b = nn.Linear(16, 16, bias=False)  # gaps
        self.c = nn.Linear(40, 40, bias=False)  # with negative zeros
        self.register_buffer("d", torch.tensor([True, False]))


@pytest.fixture
def written(tmp_path):
    """Return the file's path, its header and metadata to edit, and its parts by name."""
    torch.manual_seed(0)
    model = Net()
    prune.random_unstructured(model.a, "weight", 0.5)
    prune.random_unstructured(model.b, "weight", 0.9)
    prune.random_unstructured(model.c, "weight", 0.75)
    prune.remove(model.c, "weight")
    tpe.save_sparse(model, tmp_path / "m")
    return File(tmp_path / "m")


class File:
    def __init__(self, path):
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        self.path, self.header = path, json.loads(raw[8 : 8 + length])
        self.about = json.loads(self.header["__metadata__"]["torchprune_ext"])
        self.said = self.about["tensors"]
        entries = {name: entry for name, entry in self.header.items() if name != "__metadata__"}
        self.order = sorted(entries, key=lambda name: entries[name]["data_offsets"])
        begin = {name: entry["data_offsets"] for name, entry in entries.items()}
        self.parts = {name: bytearray(raw[8 + length :][slice(*begin[name])]) for name in self.order}

    def resize(self, name, count, fill=b"\0"):
        entry = self.header[name]
        width = len(self.parts[name]) // entry["shape"][0]
        self.parts[name] = bytearray((bytes(self.parts[name]) + fill * (count * width))[: count * width])
        entry["shape"][0] = count

    def write(self, *, places=True, text=None, behind=b""):
        """Write the file with what was edited; offsets are made to fit unless told not to."""
        at = 0
        for name in self.order if places else ():
            self.header[name]["data_offsets"] = [at, at := at + len(self.parts[name])]
        self.header["__metadata__"]["torchprune_ext"] = json.dumps(self.about)
        header = json.dumps(self.header) if text is None else text
        header = header if isinstance(header, bytes) else header.encode("utf-8", "surrogatepass")
        self.path.write_bytes(
            len(header).to_bytes(8, "little") + header + b"".join(self.parts[name] for name in self.order) + behind
        )


def refused(written, reason, model=None):
    """Check that load_sparse and describe refuse the file, and that the model stays."""
    model = Net() if model is None else model
    before = bits(model)
    with pytest.raises(ValueError, match=reason) as caught:
        tpe.load_sparse(model, written.path)
    assert repr(str(written.path)) in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert bits(model) == before
    with pytest.raises(ValueError, match=reason):
        describe(written.path)


def test_the_file_is_fine_when_written_again_unchanged(written):
    before = written.path.read_bytes()
    written.write()
    tpe.load_sparse(Net(), written.path)
    assert len(written.path.read_bytes()) >= len(before)
    assert {said["encoding"] for said in written.said.values()} == {"mask", "gaps"}
    assert "c.weight.negative_zeros" in written.parts


def change(path, value):
    """Return an edit that sets what stands at a path below the header or the metadata."""

    def edit(file):
        place = {"header": file.header, "about": file.about}
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return edit


A, B = ("about", "tensors", "a.weight"), ("about", "tensors", "b.weight")
LONE = {"dtype": "int8", "shape": [1], "encoding": "mask"}
EDITS = {
    "shape that is not a list": (change((*A, "shape"), "10"), "is not the shape of a tensor"),
    "shape with a negative": (change((*A, "shape"), [-10, -9]), "is not the shape of a tensor"),
    "shape with a bool": (change((*A, "shape"), [90, True]), "is not the shape of a tensor"),
    "shape with a float": (change((*A, "shape"), [9.0, 10]), "is not a whole number"),
    "shape that overflows": (change((*A, "shape"), [2**32, 2**32]), "is not the shape of a tensor"),
    "shape of 65 dimensions": (change((*A, "shape"), [1] * 65), "is not the shape of a tensor"),
    "shape of another size": (change((*A, "shape"), [9, 11]), "do not fit its 99 entries"),
    "huge shape behind few gaps": (change((*B, "shape"), [2**29, 2**29]), "in the file and"),
    "dtype that is not one": (change((*A, "dtype"), "float31"), "is unknown to this torch"),
    "dtype that is something of torch": (change((*A, "dtype"), "load"), "is unknown to this torch"),
    "dtype of another size": (change((*A, "dtype"), "float64"), "but F64"),
    "dtype of the same size": (change((*A, "dtype"), "int32"), "but I32"),
    "dtype that is a list": (change((*A, "dtype"), []), "is unknown to this torch"),
    "encoding": (change((*A, "encoding"), "pickle"), "is not dense, mask or gaps"),
    "encoding that is a table": (change((*A, "encoding"), {}), "is not dense, mask or gaps"),
    "encoding of another part": (change((*A, "encoding"), "dense"), "has a history"),
    "bits of a mask": (change((*A, "bits"), 4), "bits=4 does not fit"),
    "bits 0": (change((*B, "bits"), 0), "bits=0"),
    "bits 9": (change((*B, "bits"), 9), "bits=9"),
    "bits that are a bool": (change((*B, "bits"), True), "bits=True"),
    "bits that are huge": (change((*B, "bits"), 2**62), "bits="),
    "history": (change((*A, "history"), "x"), "history is not a list of strings"),
    "history of numbers": (change((*A, "history"), [1]), "history is not a list of strings"),
    "a key too many": (change((*A, "survivors"), 45), "hold other keys"),
    "a tensor that is a list": (change(A, [1]), "hold other keys"),
    "a tensor without parts": (
        change(("about", "tensors", "x"), {"dtype": "int8", "shape": [1], "encoding": "mask"}),
        "is missing",
    ),
    "an alias of nothing": (change(("about", "aliases"), {"x": "y"}), "does not stand for a tensor"),
    "an alias of an alias": (change(("about", "aliases"), {"x": "d", "y": "x"}), "does not stand for a tensor"),
    "an alias that is a tensor": (change(("about", "aliases"), {"d": "a.weight"}), "does not stand for a tensor"),
    "an alias that is a list": (change(("about", "aliases"), {"x": []}), "does not stand for a tensor"),
    "aliases that are a list": (change(("about", "aliases"), []), "not a table"),
    "a later version": (change(("about", "version"), 2), "Update it"),
    "version True": (change(("about", "version"), True), "just version, tensors and aliases"),
    "no version": (lambda file: file.about.pop("version"), "just version, tensors and aliases"),
    "code": (change(("header", "d", "dtype"), "F4"), "is unknown"),
    "code that is a list": (change(("header", "d", "dtype"), ["F4"]), "is unknown"),
    "an entry too many": (change(("header", "d", "x"), 1), "just dtype, shape and data_offsets"),
    "metadata of numbers": (change(("header", "__metadata__", "x"), 1), "not a table of strings"),
}


@pytest.mark.parametrize("name", EDITS)
def test_metadata_that_lie(written, name):
    edit, reason = EDITS[name]
    edit(written)
    written.write()
    if name == "huge shape behind few gaps":  # a shape that costs nothing is only refused by the model
        with pytest.raises(ValueError, match=reason):
            tpe.load_sparse(Net(), written.path)
        assert "0.0 %" in describe(written.path)
    else:
        refused(written, reason)


PLACES = {
    "overlap": ([0, 1], "overlap, or leave a hole"),
    "negative": ([-2, 0], "not two whole numbers"),
    "swapped": ([2, 0], "leave it -2"),
    "three": ([0, 1, 2], "not two whole numbers"),
    "bool": ([False, True], "not two whole numbers"),
    "large": ([2**62, 2**62 + 2], "overlap, or leave a hole"),
    "a string": ("02", "not two whole numbers"),
}


@pytest.mark.parametrize("name", PLACES)
def test_offsets_that_lie(written, name):
    places, reason = PLACES[name]
    written.write()
    written.header["d"]["data_offsets"] = places
    if name == "overlap":
        written.header["d"]["shape"] = [1]
    written.write(places=False)
    refused(written, reason)


def test_counts_that_lie(written):
    for name in ("a.weight.values", "b.weight.values", "c.weight.values"):
        for step in (-1, 1):
            file = copy.deepcopy(written)
            file.resize(name, file.header[name]["shape"][0] + step)
            file.write()
            refused(file, "bits set, but|gaps do not end with")
    for name in ("a.weight.mask", "b.weight.gaps", "c.weight.negative_zeros"):
        for step in (-1, 1):
            for fill in (b"\0", b"\xff"):
                file = copy.deepcopy(written)
                file.resize(name, file.header[name]["shape"][0] + step, fill)
                file.write()
                refused(file, "do not fit its|gaps do not end with|are needed|bits set, but")


def test_bits_that_lie(written):
    file = copy.deepcopy(written)
    file.parts["a.weight.mask"][-1] |= 0x80  # 90 entries: the last byte has 6 spare bits
    file.write()
    refused(file, "spare bits")
    file = copy.deepcopy(written)
    file.parts["a.weight.mask"][0] ^= 1
    file.write()
    refused(file, "bits set, but 45 values")
    file = copy.deepcopy(written)
    file.parts["b.weight.gaps"][:] = b"\xff" * len(file.parts["b.weight.gaps"])
    file.write()
    refused(file, "gaps do not end with")
    file = copy.deepcopy(written)
    file.parts["c.weight.negative_zeros"][:] = b"\xff" * len(file.parts["c.weight.negative_zeros"])
    file.write()
    refused(file, "both a survivor and a negative zero")
    file = copy.deepcopy(written)
    file.parts["d"][0] = 2
    file.write()
    refused(file, "a byte of a bool tensor is 2")


def test_gaps_that_lead_out_of_the_tensor(written):
    gaps = written.parts["b.weight.gaps"]
    width = written.said["b.weight"]["bits"]
    top = 2**width - 1
    codes = [top] * (256 // top + 1) + [0] * 26
    stream = "".join(f"{code:0{width}b}"[::-1] for code in codes)
    packed = bytes(int(stream[i : i + 8][::-1], 2) for i in range(0, len(stream), 8))
    written.resize("b.weight.gaps", len(packed))
    written.parts["b.weight.gaps"][:] = packed
    assert len(gaps) != len(packed) or bytes(gaps) != packed
    written.write()
    refused(written, "gaps lead to entry")


def test_parts_of_two_tensors(written):
    written.said["a"] = {"dtype": "bool", "shape": [2], "encoding": "dense"}
    written.header["a"] = written.header.pop("d")
    written.parts["a"] = written.parts.pop("d")
    written.order[written.order.index("d")] = "a"
    written.write()
    with pytest.raises(ValueError, match="are not in the model: 'a'"):
        tpe.load_sparse(Net(), written.path)
    written.said["b.weight.values"] = {
        "dtype": "float32",
        "shape": [written.header["b.weight.values"]["shape"][0]],
        "encoding": "dense",
    }
    written.write()
    refused(written, "belongs to two tensors")


HEADERS = {
    "a key twice": (lambda text: text.replace('{"', '{"d": 1, "', 1), "occurs twice"),
    "NaN": (lambda text: text.replace("[0, ", "[NaN, ", 1), "not a whole number"),
    "Infinity": (lambda text: text.replace("[0, ", "[-Infinity, ", 1), "not a whole number"),
    "exponent": (lambda text: text.replace("[0, ", "[0e0, ", 1), "not a whole number"),
    "digits": (lambda text: text.replace("[0, ", f"[{'9' * 5000}, ", 1), "too large"),
    "depth": (lambda text: '{"a":' * 100_000 + text, "nested too deeply|not valid"),
    "closed depth": (lambda text: '{"a":' + "[" * 100_000 + "]" * 100_000 + "," + text[1:], "nested too deeply"),
    "surrogate": (lambda text: text.replace('"d"', r'"\ud800"', 1), "surrogate"),
    "not UTF-8": (lambda text: text.encode().replace(b'"d"', b'"\xff"', 1), "not UTF-8"),
    "behind the end": (lambda text: text + " x", "not valid"),
    "a list": (lambda text: f"[{text}]", "does not begin with|neither"),
    "empty": (lambda text: "", "does not begin with|neither"),
    "nothing": (lambda text: "{}", "the tensors end at|was not written"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_are_not_json_of_the_format(written, name):
    edit, reason = HEADERS[name]
    written.write()
    written.write(text=edit(json.dumps(written.header)))
    refused(written, reason)


def test_every_truncation_and_what_is_too_long(written):
    written.write()
    raw = written.path.read_bytes()
    for end in [*range(0, 40), *range(40, len(raw), 97), len(raw) - 1]:
        written.path.write_bytes(raw[:end])
        refused(written, "cut short|neither|needs more than 8")
    written.path.write_bytes(raw + b"\0")
    refused(written, "goes on")


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**40, 100 * 10**6])
def test_a_header_that_claims_more_than_there_is(written, length):
    written.path.write_bytes(struct.pack("<Q", length) + b"{}")
    refused(written, "cut short")


def test_metadata_of_100_megabytes_are_not_read(written):
    with open(written.path, "wb") as file:
        file.write(struct.pack("<Q", 10**8) + b'{"__metadata__":{"a":"')
        file.truncate(8 + 10**8)  # a hole: takes no space
    refused(written, "more than the 16777216 that are read")


def test_foreign_files(tmp_path):
    dense = nn.Linear(2, 2, bias=False)
    header = json.dumps({"weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}).encode()
    (tmp_path / "dense").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    torch.save(dense.state_dict(), tmp_path / "checkpoint")
    (tmp_path / "text").write_text("hello, this is a text file\n" * 10)
    (tmp_path / "empty").write_bytes(b"")
    for name in ("dense", "checkpoint", "text", "empty"):
        before = bits(dense)
        with pytest.raises(ValueError, match=f"{name}': the (file|header)"):
            tpe.load_sparse(dense, tmp_path / name)
        assert bits(dense) == before


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes in the file system")
def test_what_is_not_a_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, pathlib.Path("/dev/zero")):
        with pytest.raises(ValueError, match="is not a regular file"):
            tpe.load_sparse(Net(), path)
        with pytest.raises(ValueError, match="is not a regular file"):
            describe(path)


def test_a_file_that_shrinks_while_it_is_read(written, monkeypatch):
    written.write()
    raw = written.path.read_bytes()
    checked = container._check_places

    def then_cut(*arguments):
        checked(*arguments)
        written.path.write_bytes(raw[:-100])

    monkeypatch.setattr(container, "_check_places", then_cut)
    model = Net()
    before = bits(model)
    with pytest.raises(ValueError, match="became shorter"):
        tpe.load_sparse(model, written.path)
    assert bits(model) == before


class Loaded:
    def __reduce__(self):
        return print, ("code of the file was run",)


@pytest.mark.parametrize("content", [Loaded(), bytearray(3), nn.Linear(2, 2)], ids=["code", "bytearray", "module"])
def test_checkpoints_that_hold_more_than_tensors_are_not_loaded(tmp_path, capsys, content):
    torch.save({"a": torch.ones(2), "b": content}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="holds more than plain tensors"):
        describe(tmp_path / "c.pt")
    assert "was run" not in capsys.readouterr().out


def test_a_compressed_checkpoint_is_not_unfolded(tmp_path):
    torch.save({"a": torch.zeros(10**6)}, tmp_path / "c.pt")
    with (
        zipfile.ZipFile(tmp_path / "c.pt") as old,
        zipfile.ZipFile(tmp_path / "z.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ValueError, match="compressed"):
        describe(tmp_path / "z.pt")


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory by /proc")
def test_an_archive_that_claims_a_huge_entry_takes_no_memory(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "c.pt")
    raw = bytearray((tmp_path / "c.pt").read_bytes())
    entry = raw.index(b"PK\x01\x02")  # of data.pkl in the directory
    raw[entry + 20 : entry + 24] = struct.pack("<I", 2**31 - 1)  # its compressed size
    (tmp_path / "c.pt").write_bytes(raw)
    with limited_memory(2**28), pytest.raises(ValueError, match="claims more bytes than the file has") as caught:
        describe(tmp_path / "c.pt")
    assert not asked_for_too_much(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory by /proc")
def test_damage_of_any_kind(tmp_path):
    counts = fuzz(1500, seed=0, folder=tmp_path)
    assert {name for name in counts if name.isupper()} == set()
    assert min(counts[f"{call} {end}"] for call in ("load", "build", "inspect") for end in ("accepted", "refused")) > 50
