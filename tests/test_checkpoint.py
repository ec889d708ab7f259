"""State dicts of pruned models, in and out."""

import io
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from snapshots import Snapshot
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe


def network(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Sequential(nn.Flatten(), nn.Linear(16, 8))
    )
    model(torch.randn(5, 2, 4, 4))  # BatchNorm has seen something
    return model


def native(model):
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    prune.ln_structured(model[3][1], "weight", amount=0.3, n=2, dim=0)
    prune.random_unstructured(model[3][1], "bias", amount=3)


def ours(model):
    tpe.nm_structured(model[3][1], "weight", 2, 4)
    tpe.kernel_ln(model[0], "weight", 0.25)


def both(model):
    ours(model)
    native(model)


def nothing(model):
    pass


def identity(model):
    prune.identity(model[0], "weight")
    prune.identity(model[3][1], "weight")


WAYS = {by.__name__: by for by in (nothing, native, ours, both, identity)}
every_pair = pytest.mark.parametrize(
    ("old", "new"), [(WAYS[a], WAYS[b]) for a in WAYS for b in WAYS], ids=[f"{a}-{b}" for a in WAYS for b in WAYS]
)
IMAGES = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(1))


def masks(model):
    return {f"{path}.{name}": getattr(m, f"{name}_mask").clone() for path, m, name in tpe.pruned_parameters(model)}


@every_pair
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_way_round(old, new, dtype):
    source, target = network(1), network(2).to(dtype)
    old(source)
    new(target)
    order, objects = [n.removesuffix("_orig") for n, _ in target.named_parameters()], list(target.parameters())
    optimizer = torch.optim.SGD(target.parameters(), 0.1, momentum=0.9)
    had, comes = masks(target), masks(source)

    assert tpe.load_pruned_state_dict(target, source.state_dict()) is target
    assert [n.removesuffix("_orig") for n, _ in target.named_parameters()] == order
    assert all(a is b for a, b in zip(objects, target.parameters(), strict=True))
    now = masks(target)
    assert {k: v.tolist() for k, v in now.items()} == {k: v.tolist() for k, v in {**had, **comes}.items()}
    dense = tpe.dense_state_dict(source)
    for key, mask in now.items():
        module, _, name = key.rpartition(".")
        module = target.get_submodule(module)
        assert torch.equal(getattr(module, name), dense[key].to(dtype) * mask)  # before any forward pass
        assert mask.dtype == dtype
    for a, b in zip(source.buffers(), target.buffers(), strict=False):
        assert set(comes) != set(now) or torch.equal(a.to(b.dtype), b)
    assert torch.equal(source[1].running_mean.to(dtype), target[1].running_mean)
    target(IMAGES.to(dtype)).square().mean().backward()
    before = [target[i]._parameters.get("weight", target[i].weight).detach().clone() for i in (0, 1)]
    optimizer.step()
    tpe.refresh(target)
    assert not any(map(torch.equal, before, (target[0].weight, target[1].weight)))
    # pruning goes on, natively too, and what was loaded stays dead
    prune.l1_unstructured(target[3][1], "weight", amount=0.1)
    if "3.1.weight" in now:
        assert bool((target[3][1].weight_mask <= now["3.1.weight"]).all())
    tpe.undo_all(target)


def test_the_history_tells_where_a_mask_came_from():
    source, fresh, twin = network(1), network(2), network(1)
    both(source)
    both(twin)
    for each in (fresh, twin):
        tpe.load_pruned_state_dict(each, source.state_dict())
    [loaded] = fresh[0]._forward_pre_hooks.values()
    assert repr(loaded) == "load_pruned_state_dict()"
    [container] = twin[0]._forward_pre_hooks.values()
    assert "load_pruned_state_dict" not in str([repr(each) for each in container])  # nothing has changed
    other = network(3)
    native(other)
    tpe.load_pruned_state_dict(other, source.state_dict())
    [container] = other[0]._forward_pre_hooks.values()
    assert [type(each).__name__ for each in container] == ["L1Unstructured", "Loaded"]
    assert not [v for each in container for v in vars(each).values() if torch.is_tensor(v)]
    torch.save(fresh, file := io.BytesIO())
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(IMAGES), fresh(IMAGES))


def change(key, value=None):
    def edit(values):
        if value is None:
            del values[key]
        else:
            values[key] = value(values)

    return edit


def rename(old, new):
    def edit(values):
        values[new] = values.pop(old)

    return edit


def prefixed(values):
    for key in list(values):
        values[f"module.{key}"] = values.pop(key)


BAD = {
    "mask without orig": (change("0.weight_orig"), r"mask '0.weight_mask' without its '0.weight_orig'"),
    "orig without mask": (change("0.weight_mask"), r"'0.weight_orig' without its '0.weight_mask'"),
    "mask only": (lambda v: [v.pop("0.weight_orig"), v.update({"0.weight": torch.ones(4, 2, 3, 3)})], "without its"),
    "dense too": (change("0.weight", lambda v: torch.ones(4, 2, 3, 3)), r"both '0.weight' and '0.weight_orig'"),
    "missing": (change("1.running_mean"), r"is missing: '1.running_mean'"),
    "misspelt": (
        rename("1.running_mean", "1.runing_mean"),
        r"fits nothing: '1.runing_mean' \(near: '1.running_mean'",
    ),
    "misspelt pruned": (rename("0.weight_orig", "0.weigth_orig"), "without its"),
    "unexpected": (change("5.weight", lambda v: torch.ones(2)), r"fits nothing: '5.weight'"),
    "prefix": (prefixed, r"fits nothing: 'module.0.bias' \(near: '0.bias'"),
    "shape": (change("3.1.bias", lambda v: torch.ones(7)), r"'3.1.bias'\] has the shape \(7,\), .* \(8,\)"),
    "shape of orig": (change("0.weight_orig", lambda v: torch.ones(4, 2, 3)), r"'0.weight_orig'\] has the shape"),
    "shape of mask": (change("0.weight_mask", lambda v: torch.ones(4)), r"'0.weight_mask'\]:? has the shape \(4,\)"),
    "shape of buffer": (change("1.running_var", lambda v: torch.ones(3)), r"'1.running_var'\] has the shape"),
    "values of mask": (change("0.weight_mask", lambda v: v["0.weight_mask"] * 0.5), "values other than 0 and 1"),
    "nan in mask": (change("0.weight_mask", lambda v: v["0.weight_mask"] * float("nan")), "values other than 0 and 1"),
    "a wrapped one": (lambda v: [v.clear(), v.update(state_dict={"a": torch.ones(1)})], r"pass state_dict\['state_d"),
    "no tensor": (change("1.running_var", lambda v: "text"), "1.running_var"),
    "no mask": (change("0.weight_mask", lambda v: "text"), "is a str. A mask is a tensor"),
    "sparse": (change("3.1.bias", lambda v: torch.ones(8).to_sparse()), "3.1.bias|layout"),
}


@pytest.mark.parametrize("into", [nothing, native, ours], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_changes_nothing(case, into):
    edit, message = BAD[case]
    source, target = network(1), network(2)
    tpe.kernel_ln(source[0], "weight", 0.5)
    into(target)
    values = source.state_dict()
    edit(values)
    before, given = Snapshot(target), dict(values)
    with pytest.raises((ValueError, TypeError), match=message):
        tpe.load_pruned_state_dict(target, values)
    assert before.differences() == []
    assert dict(values) == given or list(values) == list(given)


def test_all_misfits_are_listed():
    values = network().state_dict()
    values["a"], values["b"] = values.pop("0.bias"), values.pop("1.bias")
    with pytest.raises(ValueError, match=r"(?s)'a'.*'b'.*missing: '0.bias'.*missing: '1.bias'"):
        tpe.load_pruned_state_dict(network(), values)


def test_ctrl_c_in_the_middle_changes_nothing():
    class Late(nn.Linear):
        def _load_from_state_dict(self, *args):
            super()._load_from_state_dict(*args)
            raise KeyboardInterrupt

    source = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    native_one = prune.l1_unstructured(source[0], "weight", 0.5)
    assert prune.is_pruned(native_one)
    target = nn.Sequential(nn.Linear(4, 4), Late(4, 4))
    before = Snapshot(target)
    with pytest.raises(KeyboardInterrupt):
        tpe.load_pruned_state_dict(target, source.state_dict())
    assert before.differences() == []


@pytest.mark.parametrize("kind", ["meta", "lazy"])
def test_models_without_values(kind):
    model = nn.Linear(4, 4, device="meta") if kind == "meta" else nn.LazyLinear(4)
    with pytest.raises(ValueError, match="to_empty" if kind == "meta" else "Run one forward"):
        tpe.load_pruned_state_dict(model, nn.Linear(4, 4).state_dict())


def test_a_buffer_of_the_models_own_that_is_called_mask():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.Parameter(torch.randn(3))
            self.register_buffer("attn_mask", torch.full((3,), -1.0))
            self.bias_orig = nn.Parameter(torch.randn(3))

    old, new = Own(), Own()
    tpe.load_pruned_state_dict(new, old.state_dict())
    assert torch.equal(new.attn, old.attn)
    assert not list(tpe.pruned_parameters(new))
    assert list(tpe.dense_state_dict(new)) == list(new.state_dict())


@every_pair
def test_the_dense_state_dict_is_that_of_the_removed_model(old, new):
    model = network(1)
    old(model)
    new(model)
    for module, dtype in ((model, None), (model[0], torch.float64)):
        module.to(dtype)
    before = Snapshot(model)
    dense = tpe.dense_state_dict(model)
    assert before.differences() == []
    pointers = {p.data_ptr() for p in model.parameters()}
    assert not {dense[k].data_ptr() for k in masks(model)} & pointers
    fresh = network(3)
    fresh[0].double()
    fresh.load_state_dict(dense, strict=True)
    if list(tpe.pruned_parameters(model)):
        tpe.remove_all(model)
    assert set(dense) == set(model.state_dict())
    assert all(torch.equal(dense[k], v) for k, v in model.state_dict().items())
    assert dense._metadata == model.state_dict()._metadata


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.decode = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.decode.weight = self.embed.weight


def test_tied_tensors_stay_tied():
    model = Tied()
    tpe.global_unstructured(tpe.prunable_parameters(model), 0.5)
    dense = tpe.dense_state_dict(model)
    assert dense["embed.weight"].data_ptr() == dense["decode.weight"].data_ptr()
    fresh = tpe.load_pruned_state_dict(Tied(), model.state_dict())
    assert fresh.embed.weight_orig is fresh.decode.weight_orig
    assert torch.equal(fresh.embed.weight, model.embed.weight)


@pytest.mark.parametrize("kept", ["embed", "decode"])
def test_files_that_write_shared_memory_once(kept):
    dropped = "decode" if kept == "embed" else "embed"
    model = Tied()
    tpe.global_unstructured(tpe.prunable_parameters(model), 0.5)
    values = model.state_dict()
    del values[f"{dropped}.weight_orig"]
    fresh = tpe.load_pruned_state_dict(Tied(), values)
    assert torch.equal(fresh.embed.weight, model.embed.weight)
    assert torch.equal(fresh.decode.weight, model.decode.weight)
    dense = tpe.dense_state_dict(model)
    del dense[f"{dropped}.weight"]
    for each in (Tied(), fresh):
        assert torch.equal(tpe.load_pruned_state_dict(each, dense).embed.weight, model.embed.weight)

    # the mask is shared too, so that nothing is left of the second module: was it pruned?
    del values[f"{dropped}.weight_mask"]
    untouched = Tied()
    before = Snapshot(untouched)
    with pytest.raises(ValueError, match=rf"nothing for '{dropped}.weight', which is tied .* whether"):
        tpe.load_pruned_state_dict(untouched, values)
    assert before.differences() == []
    alike = {**values, f"{dropped}.weight_mask": values[f"{kept}.weight_mask"]}
    assert torch.equal(tpe.load_pruned_state_dict(Tied(), alike).get_submodule(dropped).weight, model.embed.weight)
    apart = tpe.load_pruned_state_dict(Tied(), {**values, f"{dropped}.weight": values[f"{kept}.weight_orig"]})
    assert [path for path, _, _ in tpe.pruned_parameters(apart)] == [kept]


def half_tied():
    model = Tied()
    prune.l1_unstructured(model.decode, "weight", amount=0.5)
    return model


def otherwise_tied():
    model = half_tied()
    prune.random_unstructured(model.embed, "weight", amount=0.5)
    return model


@pytest.mark.parametrize("make", [half_tied, otherwise_tied], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "call",
    [
        tpe.remove_all,
        tpe.dense_state_dict,
        lambda model: tpe.remove_all(model, [(model.decode, "weight")]),
    ],
    ids=["remove_all", "dense_state_dict", "one of them"],
)
def test_a_tied_tensor_is_never_zeroed_with_the_other(make, call):
    model = make()
    before = Snapshot(model)
    with pytest.raises(ValueError, match=r"(?s)Linear.weight of shape \(7, 4\) and embed.weight.*\(tied\).*pruned"):
        call(model)
    assert before.differences() == []
    kept = model.embed.weight.detach().clone()
    model.decode.weight_orig = nn.Parameter(model.decode.weight_orig.detach().clone())  # as the message says
    call(model)
    assert torch.equal(model.embed.weight, kept)


def test_equal_masks_of_tied_tensors_are_removed_even_one_by_one():
    model = Tied()
    tpe.global_unstructured(tpe.prunable_parameters(model), 0.5)
    want = tpe.dense_state_dict(model)["embed.weight"].clone()
    tpe.remove_all(model, [(model.decode, "weight")])
    tpe.remove_all(model)
    assert model.embed.weight is model.decode.weight
    assert torch.equal(model.embed.weight, want)


def test_through_safetensors_and_torch_save(tmp_path):
    files = pytest.importorskip("safetensors.torch")
    model = network(1)
    both(model)
    files.save_file(model.state_dict(), tmp_path / "model.safetensors")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    for values in (
        files.load_file(tmp_path / "model.safetensors"),
        torch.load(tmp_path / "model.pt", weights_only=True),
    ):
        fresh = tpe.load_pruned_state_dict(network(2), values)
        assert torch.equal(fresh.eval()(IMAGES), model.eval()(IMAGES))


def test_the_models_own_state_dict():
    model = network(1)
    both(model)
    before = model.eval()(IMAGES)
    tpe.load_pruned_state_dict(model, model.state_dict())
    assert torch.equal(model(IMAGES), before)


def test_a_compiled_model():
    model, fresh = network(1), network(2)
    both(model)
    compiled = torch.compile(fresh, backend="eager")
    compiled(IMAGES)
    tpe.load_pruned_state_dict(fresh, model.state_dict())
    assert torch.equal(compiled.eval()(IMAGES), model.eval()(IMAGES))
    with pytest.raises(ValueError, match=r"near: '_orig_mod\.0\.bias'"):
        tpe.load_pruned_state_dict(compiled, model.state_dict())


RUN = """
import os, torch, torchprune_ext as tpe
from torch import nn

def run(path, start, stop, die):
    torch.manual_seed(0)
    data = torch.randn(20, 16, 8)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 4))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)  # before pruning, in both runs
    if start:
        saved = torch.load(path, weights_only=True)
        tpe.load_pruned_state_dict(model, saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])
    for i in range(start, stop):
        if i in (2, 6):
            tpe.global_unstructured(tpe.prunable_parameters(model), 0.3)
        optimizer.zero_grad()
        model(data[i]).square().mean().backward()
        optimizer.step()
        if i == die:
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
            torch.save(saved, path)
            os._exit(9)
    return model.state_dict()
"""


def test_a_run_that_was_killed_and_resumed_gives_the_same_bits(tmp_path):
    path = str(tmp_path / "saved.pt")
    killed = subprocess.run([sys.executable, "-c", f"{RUN}\nrun({path!r}, 0, 12, 4)"], check=False)
    assert killed.returncode == 9
    exec(RUN, here := {})  # the same code, to save the time that a process needs to start
    resumed, whole = here["run"](path, 5, 12, -1), here["run"](path, 0, 12, -1)
    assert list(resumed) == list(whole)
    assert "4.weight_mask" in whole
    assert all(map(torch.equal, resumed.values(), whole.values()))


@pytest.mark.parametrize("wrong", [None, [1], "text", nn.Linear(1, 1)], ids=repr)
def test_only_state_dicts(wrong):
    with pytest.raises(TypeError, match=r"state_dict is a .* Pass what model.state_dict\(\) returns"):
        tpe.load_pruned_state_dict(nn.Linear(1, 1), wrong)
    with pytest.raises(TypeError, match="state_dict has the key 3"):
        tpe.load_pruned_state_dict(nn.Linear(1, 1), OrderedDict({3: torch.ones(1)}))
