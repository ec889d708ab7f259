"""Damages valid files in every way it can think of, and sees what load_sparse, load_compact and inspect make of them.

Allowed are the file's own content, a ``ValueError`` that names the file, and nothing else: no other exception, no
request for memory that the length of the file cannot back, no long wait, and not one changed bit in a model whose file
was refused. What is accepted must say the same twice.

    python tests/fuzz_sparse_files.py [--files 50000] [--seed 0]
"""

import argparse
import copy
import io
import json
import pathlib
import random
import resource
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

import torchprune_ext as tpe
from torchprune_ext.deploy.inspection import describe

BOUND = 4 * 2**20  # bytes that one request may ask for: a block of entries is at most 2 MB
SPARE = 64 * 2**20  # bytes that a call may add to the memory of the process
SLOW = 2.0  # seconds of computing, so that other work on the machine does not count
HOSTILE = [
    *(0, -1, 1, 2, 7, 8, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**25, 10**5000),
    *(0.5, 1e300, float("nan"), float("inf"), True, False, None, "", "a", "\ud800", "F32", "F64", "BOOL", "U8", "C64"),
    *("mask", "gaps", "dense", "float32", "bool", "complex128", "weight", [], [0], [-1], [2**40, 2**40], [1] * 65, {}),
    *([0.0], [True], ["1"], [[1]], [10**30], [4, 4, 0], {"a": 1}),
]


class Tiny(nn.Module):
    """A model with each encoding, several dtypes and a tie; small, so that each byte is hit often."""

    def __init__(self) -> None:
        super().__init__()
        self.gaps, self.mask = nn.Linear(24, 16), nn.Linear(9, 7)
        self.removed, self.tied = nn.Linear(40, 40, bias=False), nn.Linear(9, 7, bias=False)
        self.tied.weight = self.mask.weight
        self.register_buffer("flags", torch.rand(11) < 0.5)
        self.register_buffer("wide", torch.randn(3, dtype=torch.complex128))
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("count", torch.tensor(7))


class Cut(nn.Module):
    """A model of any widths, with what a cut changes: numbers, biases, ties, buffers outside of the state dict."""

    def __init__(self, width: int = 6, groups: int = 3, *, bias: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2 * groups, 3, groups=1, bias=bias)
        self.grouped = nn.Conv2d(2 * groups, 2 * groups, 1, groups=groups)
        self.bn = nn.BatchNorm2d(2 * groups)
        self.lstm, self.norm = nn.LSTM(width, 2), nn.LayerNorm(width)
        self.linear, self.embedding = nn.Linear(width, 30), nn.Embedding(30, width)
        self.linear.weight = self.embedding.weight
        self.again, self.split = self.linear, (width, width, 2 * width)
        self.register_buffer("gains", torch.rand(width), persistent=False)


def small() -> Cut:
    model = Cut(4, 2, bias=True)
    prune.random_unstructured(model.linear, "bias", 0.8)
    return model


def pruned() -> Tiny:
    model = Tiny()
    prune.random_unstructured(model.gaps, "weight", 0.9)
    tpe.global_unstructured([(model.mask, "weight"), (model.tied, "weight")], target_sparsity=0.4)
    prune.random_unstructured(model.removed, "weight", 0.8)
    prune.remove(model.removed, "weight")
    return model


def bits(model: nn.Module) -> bytes:
    """Return all that a model holds."""
    tensors = [
        tensor.detach().reshape(-1).view(torch.uint8) for tensor in model.state_dict().values() if tensor.numel()
    ]
    return torch.cat(tensors).numpy().tobytes()


# --- damage ---------------------------------------------------------------------------------------


def nested(value: object) -> list[tuple[object, object]]:
    """Return the places in nested JSON: container and key."""
    if not isinstance(value, (dict, list)):
        return []
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    return [(value, key) for key in keys] + [place for key in keys for place in nested(value[key])]


def edit_json(text: str, rng: random.Random) -> str:
    """Return JSON with a value replaced, moved, removed, doubled or nested."""
    table = json.loads(text)

    def hostile() -> object:
        return copy.deepcopy(rng.choice(HOSTILE))

    for _ in range(rng.choice((1, 1, 2))):
        container, key = rng.choice(nested(table) or [({"": 0}, "")])
        kind = rng.randrange(6)
        if kind == 0:
            container[key] = hostile()
        elif kind == 1 and type(container[key]) is int:
            container[key] += rng.choice((-8, -4, -1, 1, 4, 8, 256, 2**32))
        elif kind == 2:
            del container[key]
        elif kind == 3:
            other, there = rng.choice(nested(table) or [(container, key)])
            container[key], other[there] = copy.deepcopy((other[there], container[key]))
        elif kind == 4 and isinstance(container, dict):
            container[rng.choice([*container, "weight", "__metadata__", "x.values"])] = container.pop(key)
        elif isinstance(container, dict):
            container[str(key) + rng.choice(("", "x", ".mask", ".gaps"))] = hostile()
        else:
            container.insert(0, hostile())
    try:
        text = json.dumps(table, ensure_ascii=rng.random() < 0.5)
    except (ValueError, RecursionError):  # too many digits for Python
        text = text.replace("0", "9" * 5000, 1)
    if rng.random() < 0.1:
        text = text.replace("{", '{"weight":' * 2, 1) if rng.random() < 0.5 else "[" * 100_000 + text
    if rng.random() < 0.1:
        text = text[:-1] + "," + text[1:]  # each key twice
    return text


def resized(raw: bytes, rng: random.Random) -> bytearray:
    """Return a valid container with the lengths of some parts changed, so that they do not fit each other any more."""
    length = int.from_bytes(raw[:8], "little")
    table, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    parts = {name: entry for name, entry in table.items() if name != "__metadata__"}
    body, changed = bytearray(), rng.sample(sorted(parts), min(len(parts), rng.choice((1, 2))))
    for name, entry in sorted(parts.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        block = bytearray(data[begin:end])
        if name in changed and len(entry["shape"]) and entry["shape"][0]:
            row = len(block) // entry["shape"][0]
            count = rng.choice((0, 1, entry["shape"][0] - 1, entry["shape"][0] + 1, 2 * entry["shape"][0]))
            block = (block + bytes(rng.choice((0, 255)) for _ in range(count * row)))[: count * row]
            entry["shape"][0] = count
        entry["data_offsets"] = [len(body), len(body) + len(block)]
        body += block
    header = json.dumps(table, ensure_ascii=False)
    if rng.random() < 0.5:  # and let the metadata say the same of a tensor
        about = json.loads(table["__metadata__"].get("torchprune_ext", "{}"))
        for said in about.get("tensors", {}).values():
            said["shape"] = rng.choice((said["shape"], [1, *said["shape"]], [s + 1 for s in said["shape"]]))
        table["__metadata__"]["torchprune_ext"] = json.dumps(about)
        header = json.dumps(table, ensure_ascii=False)
    return bytearray(len(header.encode()).to_bytes(8, "little") + header.encode() + body)


def damaged(raw: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Return a file with one kind of damage."""
    kind = rng.randrange(11)
    data = bytearray(raw)
    first = 0 if raw[:2] == b"PK" or rng.random() < 0.3 else 8 + int.from_bytes(raw[:8], "little")
    if kind == 0:
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[rng.randrange(first, len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[rng.randrange(first, len(data))] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
    elif kind == 2:
        del data[rng.randrange(len(data)) :]
    elif kind == 3:
        data += bytes(rng.randrange(256) for _ in range(rng.choice((1, 8, 100))))
    elif kind == 4:
        at, length = rng.randrange(len(data)), rng.choice((1, 2, 8, 64))
        if rng.random() < 0.5:
            del data[at : at + length]
        else:
            data[at:at] = data[rng.randrange(len(data)) :][:length]
    elif kind == 5:
        other = rng.choice(others)
        data = data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]
    elif raw[:2] == b"PK":
        data[rng.randrange(len(data)) :][:4] = struct.pack("<I", rng.choice((0, 1, 2**31, 2**32 - 1)))
        at = rng.randrange(max(1, len(data) - 4))
        data[at : at + 4] = struct.pack("<I", rng.choice((0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1)))
    elif kind == 6:
        data[:8] = struct.pack("<Q", rng.choice((0, 1, 2**20, 10**8, 2**31, 2**63, 2**64 - 1, len(raw), len(raw) - 8)))
    elif kind in (9, 10):
        data = resized(raw, rng)
    else:
        length = int.from_bytes(raw[:8], "little")
        header = raw[8 : 8 + length].decode()
        if kind == 7:
            header = edit_json(header, rng)
        else:
            table = json.loads(header)
            said = [key for key in table["__metadata__"] if key.startswith("torchprune_ext")]
            if said:
                key = rng.choice(said)
                table["__metadata__"][key] = edit_json(table["__metadata__"][key], rng)
            header = json.dumps(table)
        encoded = header.encode("utf-8", "surrogatepass")
        data = bytearray(len(encoded).to_bytes(8, "little") + encoded + raw[8 + length :])
    return bytes(data)


# --- what is watched ------------------------------------------------------------------------------


class Requests(TorchDispatchMode):
    """Notes the largest tensor that any operation makes, in bytes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta and tensor.layout == torch.strided:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


@contextmanager
def limited_memory(spare: int) -> Iterator[None]:
    """Let this process get ``spare`` more bytes; a request for more fails, whether it would be used or not."""
    old = resource.getrlimit(resource.RLIMIT_AS)
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + spare, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


def asked_for_too_much(error: BaseException | None) -> bool:
    """Return whether an error, or one that led to it, says that memory was refused."""
    while error is not None:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def seeds(folder: pathlib.Path) -> list[bytes]:
    """Return valid files: sparse ones, a dense safetensors file, checkpoints."""
    files = []
    for model in (pruned(), Tiny(), pruned()):
        tpe.save_sparse(model, folder / "seed")
        files.append((folder / "seed").read_bytes())
    for model in (small(), Cut()):
        tpe.save_compact(model, folder / "seed")
        files.append((folder / "seed").read_bytes())
    header = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {"format": "pt"}}
    encoded = json.dumps(header).encode()
    files.append(len(encoded).to_bytes(8, "little") + encoded + bytes(range(24)))
    for content in ({"model": pruned().state_dict(), "step": 3}, {"a": torch.eye(3).to_sparse(), "b": [torch.ones(2)]}):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        files.append(buffer.getvalue())
    return files


def fuzz(files: int, seed: int, folder: pathlib.Path) -> Counter:
    """Damage so many files, and return how often what happened.

    Raises:
        AssertionError: something happened that must not; the message tells what, and the file stays in ``folder``.
    """
    rng = random.Random(seed)
    torch.manual_seed(seed)
    valid, model, counts = seeds(folder), Tiny(), Counter()
    before, path = bits(model), folder / "damaged"
    calls = {
        "load": lambda: tpe.load_sparse(model, path),
        "build": lambda: tpe.load_compact(Cut, path),
        "inspect": lambda: describe(path),
    }
    with Requests():  # what torch imports on first use takes seconds
        torch.ones(1).add_(1)
    for number in range(files):
        raw = damaged(rng.choice(valid), valid, rng)
        path.unlink(missing_ok=True)  # a file that is cut to nothing first is flushed to the disk when closed
        path.write_bytes(raw)
        for name, call in calls.items():
            requests = Requests()
            start, outcome, problems = time.process_time(), "accepted", []
            try:
                # the limit catches what is large in every file, watching what is above BOUND in each fifth
                with limited_memory(SPARE), requests if number % 5 == 0 else nullcontext():
                    call()
            except Exception as error:
                outcome = "refused"
                if type(error) is not ValueError or str(path) not in str(error):
                    problems.append(f"CRASH {error!r}")
                if asked_for_too_much(error):
                    problems.append(f"ALLOCATION {error!r}")
            if (taken := time.process_time() - start) > SLOW:
                problems.append(f"HANG {taken:.1f} s")
            if requests.largest > BOUND + len(raw):
                problems.append(f"ALLOCATION {requests.largest}")
            if name == "load" and outcome == "refused" and bits(model) != before:
                problems.append("MODEL CHANGED")
            if name == "load" and outcome == "accepted":
                before = bits(model)
                tpe.load_sparse(model, path)
                problems += ["TWICE DIFFERENT"] * (bits(model) != before)
            counts[f"{name} {outcome}"] += 1
            for problem in problems:
                counts[problem.split(" ")[0]] += 1
                kept = folder / f"problem-{len(list(folder.glob('problem-*')))}"
                kept.write_bytes(raw)
                print(f"{name}: {problem[:500]}: {kept}", file=sys.stderr)
    return counts


def main() -> int:
    """Fuzz and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.perf_counter()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="fuzz-"))
    counts = fuzz(options.files, options.seed, folder)
    print(f"{options.files} damaged files in {time.perf_counter() - start:.0f} s")
    for name in ("load", "build", "inspect"):
        print(f"  {name} accepted: {counts[f'{name} accepted']}, refused: {counts[f'{name} refused']}")
    bad = {name: counts[name] for name in ("CRASH", "HANG", "ALLOCATION", "MODEL", "TWICE")}
    print(
        "crashes {CRASH}, hangs {HANG}, allocations beyond the bound {ALLOCATION}, models changed {MODEL}, ".format(
            **bad
        )
    )
    print(f"accepted but different at the second time {bad['TWICE']}")
    return int(any(bad.values()))


if __name__ == "__main__":
    sys.exit(main())
