"""python -m torchprune_ext inspect FILE: what it prints, exit codes, no tracebacks."""

import io
import os
import runpy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe
from torchprune_ext.__main__ import main
from torchprune_ext.deploy.inspection import describe


def sparse_file(path):
    model = nn.Sequential(nn.Linear(100, 64), nn.Linear(64, 64, bias=False))
    prune.l1_unstructured(model[0], "weight", 0.9)
    tpe.nm_structured(model[0], "weight", n=1, m=4)
    model[1].weight.data[:, 16:] = 0
    tpe.save_sparse(model, path)
    return model


def test_sparse_file(tmp_path, capsys):
    model = sparse_file(tmp_path / "m.safetensors")
    assert main(["inspect", str(tmp_path / "m.safetensors")]) == 0
    title, head, *lines = capsys.readouterr().out.splitlines()
    assert title == (
        f"{tmp_path}/m.safetensors: sparse file of torchprune_ext, "
        f"{(tmp_path / 'm.safetensors').stat().st_size:,} bytes"
    )
    assert head.split() == ["tensor", "shape", "dtype", "encoding", "density", "bytes"]
    kept = int(model[0].weight_mask.sum())
    rows = {line.split()[0]: line.split() for line in lines}
    assert rows["0.weight"][1:4] == ["64x100", "float32", "gaps,"]
    assert rows["0.weight"][6:8] == [f"{kept / 6400:.1%}".rstrip("%"), "%"]
    assert rows["0.bias"][1:4] == ["64", "float32", "dense"]
    assert rows["1.weight"][3] in ("mask", "gaps,")
    assert [line.strip() for line in lines if line.strip().startswith("by ")] == [
        "by L1Unstructured(amount=0.9)",
        f"by {[*next(iter(model[0]._forward_pre_hooks.values()))][1]!r}",
    ]
    assert lines[-1].startswith("3 tensors, 10,560 entries, density ")
    assert lines[-1].endswith(" of 42,240 dense")


def test_bytes_add_up_to_the_file(tmp_path):
    sparse_file(tmp_path / "m")
    raw = (tmp_path / "m").read_bytes()
    header = int.from_bytes(raw[:8], "little")
    assert f" {len(raw) - 8 - header:,} bytes: " in describe(tmp_path / "m")


def test_dense_safetensors(tmp_path):
    save = pytest.importorskip("safetensors.torch").save_file
    save({"a": torch.tensor([[1.0, 0.0], [-0.0, 2.0]]), "f": torch.ones(3).to(torch.float8_e5m2)}, tmp_path / "d")
    title, _, first, second, total = describe(tmp_path / "d").splitlines()
    assert "dense safetensors" in title
    assert first.split() == ["a", "2x2", "float32", "dense", "50.0", "%", "16"]
    assert second.split() == ["f", "3", "float8_e5m2", "dense", "100.0", "%", "3"]
    assert total == "2 tensors, 7 entries, density 71.4 %, 19 bytes"


def test_checkpoint(tmp_path):
    layer = prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.75)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    shared = torch.ones(3)
    content = {
        "model": layer.state_dict(),
        "optimizer": optimizer.state_dict(),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "wide": torch.zeros(2, dtype=torch.int16),
        "expanded": torch.ones(1).expand(10**9),
        "sparse": torch.eye(3).to_sparse(),
        "shared": [shared, shared],
        "epoch": 3,
    }
    torch.save(content, tmp_path / "c.pt")
    lines = describe(tmp_path / "c.pt").splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:]}
    assert "checkpoint of torch.save" in lines[0]
    assert rows["model.weight_mask"] == ["8x8", "float32", "dense", "25.0", "%", "256"]
    assert rows["optimizer.state.0.exp_avg"][:2] == ["8", "float32"]
    assert rows["expanded"] == ["1000000000", "float32", "dense", "-", "4,000,000,000"]
    assert rows["sparse"][2:4] == ["sparse_coo", "-"]
    assert {"half", "wide", "shared.0", "shared.1"} <= rows.keys()


def test_containers_that_hold_each_other_many_times_are_walked_once(tmp_path):
    content = {"a": torch.ones(1)}
    for _ in range(60):
        content = {"b": content, "c": content}
    torch.save(content, tmp_path / "c.pt")
    assert "1 tensor, 1 entries" in describe(tmp_path / "c.pt")


def test_names_cannot_command_the_terminal(tmp_path):
    model = nn.Module()
    model.register_buffer("\x1b[2J\nfake  1x1", torch.ones(1))
    tpe.save_sparse(model, tmp_path / "m")
    text = describe(tmp_path / "m")
    assert "\x1b" not in text
    assert len(text.splitlines()) == 4
    assert r"\x1b[2J\nfake" in text


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 broken", b"\x80\x02}q\x00.", b"\0" * 100])
def test_other_files_are_an_error_of_one_line(tmp_path, capsys, content):
    (tmp_path / "f").write_bytes(content)
    assert main(["inspect", str(tmp_path / "f")]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: '{tmp_path}/f': ")
    assert printed.err.count("\n") == 1


def test_missing_files_and_wrong_arguments(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "nothing")]) == 1
    assert "No such file" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path)]) == 1
    assert "is not a regular file" in capsys.readouterr().err
    for arguments in ([], ["inspect"], ["prune", "x"], ["inspect", "a", "b"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        capsys.readouterr()
    with pytest.raises(TypeError, match="path=3"):
        describe(3)


def test_the_command(tmp_path):
    sparse_file(tmp_path / "m")
    command = [sys.executable, "-m", "torchprune_ext", "inspect", str(tmp_path / "m")]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ascii_only)
    assert (done.returncode, done.stderr) == (0, "")
    assert "0.weight" in done.stdout


@pytest.mark.filterwarnings("ignore:.*found in sys.modules after import of package")
def test_the_command_ends_with_1_on_an_error(tmp_path, monkeypatch, capsys):
    (tmp_path / "m").write_bytes(b"hello")
    monkeypatch.setattr(sys, "argv", ["torchprune_ext", "inspect", str(tmp_path / "m")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("torchprune_ext", run_name="__main__")
    assert ended.value.code == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")


def test_a_reader_that_stops_listening_is_no_error(tmp_path, monkeypatch):
    sparse_file(tmp_path / "m")

    class Closed(io.StringIO):
        def fileno(self):
            return os.open(tmp_path / "out", os.O_CREAT | os.O_WRONLY)

        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    assert main(["inspect", str(tmp_path / "m")]) == 0
