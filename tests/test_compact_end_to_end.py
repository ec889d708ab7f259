"""Pruned, compacted, saved, and loaded in a fresh process by the dense model's constructor: the same bits."""

import functools
import pathlib
import subprocess
import sys

import pytest
import torch
from compacted import KINDS, output

import torchprune_ext as tpe


@functools.cache
def case(kind):
    """Return a pruned model of a kind, the compacted one, inputs."""
    constructor, deaden, inputs, package = KINDS[kind]
    pytest.importorskip(package)
    torch.manual_seed(0)
    model, batch = constructor(), inputs()
    deaden(model)
    return model, tpe.compact(model, batch), batch


def parameters(model):
    return sum(tensor.numel() for tensor in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_it_comes_back_and_trains(kind, tmp_path):
    (model, small, batch), constructor = case(kind), KINDS[kind][0]
    assert parameters(small) < 0.97 * parameters(constructor())
    tpe.save_compact(small, tmp_path / "small.safetensors")
    loaded = tpe.load_compact(constructor, tmp_path / "small.safetensors")
    assert str(loaded) == str(small)
    assert parameters(loaded) == parameters(small)
    with torch.no_grad():
        expected = output(small, batch)
        assert torch.equal(output(loaded, batch), expected)
        torch.testing.assert_close(expected, output(model, batch))
    for each in (loaded, small):
        each.zero_grad()
        output(each, batch).square().mean().backward()
    for (name, a), b in zip(loaded.named_parameters(), small.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.equal(a.grad, b.grad), name


def test_in_a_fresh_process(tmp_path):
    for kind in KINDS:
        _, small, batch = case(kind)
        tpe.save_compact(small.eval(), tmp_path / f"{kind}.safetensors")
        with torch.no_grad():
            torch.save((batch, output(small, batch)), tmp_path / f"{kind}.pt")
    script = pathlib.Path(__file__).with_name("compacted.py")
    environment = {"PYTHONPATH": str(pathlib.Path(tpe.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, "-W", "error", script, tmp_path], text=True, capture_output=True, env=environment
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines() == [f"{kind} True True []" for kind in sorted(KINDS)]
