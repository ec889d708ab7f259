"""save_sparse and load_sparse: what comes back, how large the file is, and what other readers see."""

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe
from torchprune_ext.deploy import encodings
from torchprune_ext.deploy.encodings import DTYPES


def net(**options):
    return nn.Sequential(nn.Linear(64, 48, **options), nn.BatchNorm1d(48, **options), nn.Linear(48, 10, **options))


def bits(tensor):
    """Return the bytes of a tensor, to compare NaN and -0.0 too."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).tolist()


def same(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(bits(ours[key]) == bits(theirs[key]) for key in ours)


def header_of(path):
    raw = path.read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])


def layouts_of(path):
    return json.loads(header_of(path)["__metadata__"]["torchprune_ext"])["tensors"]


# --- what comes back ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*min_keep=0:UserWarning")
@pytest.mark.parametrize("amount", [0.0, 0.3, 0.5, 0.9, 0.99, 1.0])
def test_pruned_comes_back_dense_with_zeros_and_pruned_with_masks(tmp_path, amount):
    model = net()
    tpe.global_unstructured(tpe.prunable_parameters(model), target_sparsity=amount, min_keep=0)
    tpe.save_sparse(model, tmp_path / "m")

    dense = tpe.load_sparse(net(), tmp_path / "m")
    other = net()
    for module in (other[0], other[2]):
        prune.random_unstructured(module, "weight", 0.5)
    tpe.load_sparse(other, tmp_path / "m")
    for i in (0, 2):
        assert torch.equal(dense[i].weight, model[i].weight)
        assert torch.equal(other[i].weight_mask, model[i].weight_mask)
        assert torch.equal(other[i].weight_orig, model[i].weight)
        assert torch.equal(other[i].weight, model[i].weight)
        assert torch.equal(other[i].bias, model[i].bias)
    x = torch.randn(5, 64)
    assert torch.equal(dense(x), model(x))
    assert torch.equal(other(x), model(x))
    assert not prune.is_pruned(dense)


def test_native_removed_and_dense_models_keep_every_bit(tmp_path):
    dense, removed = net(), net()
    prune.l1_unstructured(removed[0], "weight", 0.8)  # remove leaves 0.0 and -0.0
    prune.remove(removed[0], "weight")
    assert bits(torch.tensor(-0.0)) != bits(torch.tensor(0.0))
    for model in (dense, removed):
        tpe.save_sparse(model, tmp_path / "m")
        assert same(tpe.load_sparse(net(), tmp_path / "m"), model)


@pytest.mark.filterwarnings("ignore:.*support is experimental:UserWarning")
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_every_dtype_keeps_every_bit(tmp_path, name, share):
    dtype, torch_bytes = DTYPES[name], torch.randint(0, 256, (37, 40, 16), dtype=torch.uint8)
    torch_bytes[torch.rand(37, 40) > share] = 0
    torch_bytes[1] = torch.randint(0, 256, (40, 16), dtype=torch.uint8)
    if dtype == torch.bool:
        torch_bytes &= 1
    values = torch_bytes[..., : dtype.itemsize].contiguous().view(-1).view(dtype).view(37, 40)
    model, other = nn.Module(), nn.Module()
    for each in (model, other):
        each.register_buffer("x", values.clone() if each is model else ones_like(values))
    tpe.save_sparse(model, tmp_path / "m")
    tpe.load_sparse(other, tmp_path / "m")
    assert bits(other.x) == bits(model.x)
    assert other.x.dtype == dtype
    if share == 0.1 and dtype.itemsize > 1:
        assert layouts_of(tmp_path / "m")["x"]["encoding"] in ("mask", "gaps")


def ones_like(values):
    return torch.full_like(values.view(-1).view(torch.uint8), 1).view(values.dtype).view(values.shape)


def test_nan_infinity_and_negative_zero_survive_a_mask(tmp_path):
    layer = nn.Linear(8, 1, bias=False)
    odd = torch.tensor([[0x7FC12345, -1, -(2**31), 0, 0x7F800000, 1, 0x3F800000, -5]], dtype=torch.int32)
    layer.weight.data = odd.view(torch.float32).clone()
    prune.custom_from_mask(layer, "weight", torch.tensor([[1.0, 1, 1, 1, 1, 1, 0, 0]]))
    tpe.save_sparse(layer, tmp_path / "m")
    fresh = tpe.load_sparse(nn.Linear(8, 1, bias=False), tmp_path / "m")
    assert fresh.weight.view(torch.int32).tolist() == [[*odd[0, :6].tolist(), 0, 0]]
    prune.identity(fresh, "weight")  # the survivor that is 0 is known as one
    tpe.load_sparse(fresh, tmp_path / "m")
    assert fresh.weight_mask.tolist() == layer.weight_mask.tolist()


@given(
    numel=st.integers(0, 3000),
    density=st.sampled_from([0.0, 0.001, 0.01, 0.1, 0.25, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 99),
    block=st.sampled_from([8, 64, 1024, 2**18]),
)
@settings(deadline=None, max_examples=150)
def test_any_mask_comes_back(tmp_path_factory, numel, density, seed, block):
    path = tmp_path_factory.getbasetemp() / "any"
    generator = torch.Generator().manual_seed(seed)
    model, other = nn.Module(), nn.Module()
    for each in (model, other):
        each.weight = nn.Parameter(torch.randn(numel, generator=generator))
        prune.custom_from_mask(each, "weight", (torch.rand(numel, generator=generator) < density).float())
    with pytest.MonkeyPatch.context() as patch:
        for module in ("reading", "slots"):
            patch.setattr(f"torchprune_ext.deploy.{module}.ENTRIES", block)
        tpe.save_sparse(model, path)
        tpe.load_sparse(other, path)
    assert torch.equal(model.weight_mask, other.weight_mask)
    assert bits(model.weight_orig * model.weight_mask + 0.0) == bits(other.weight_orig + 0.0)


@given(st.lists(st.integers(0, 700), max_size=60), st.sampled_from(encodings.GAP_BITS), st.integers(0, 900))
def test_gaps_are_read_as_a_plain_loop_reads_them(gaps, width, behind):
    places = [sum(gaps[: i + 1]) + i for i in range(len(gaps))]
    numel = (places[-1] + 1 if places else 0) + behind
    alive = torch.zeros(numel, dtype=torch.bool)
    alive[places] = True
    packed = torch.cat([*encodings.pack_gaps([alive[: numel // 2], alive[numel // 2 :]], width)])
    assert len(packed) == encodings.gap_bytes([alive])[width]

    stream = "".join(f"{byte:08b}"[::-1] for byte in packed.tolist())
    found, place = [], -1
    while len(found) < len(gaps):
        code, stream = int(stream[:width][::-1], 2), stream[width:]
        if code == 2**width - 1:
            place += code
        else:
            place += code + 1
            found.append(place)
    assert found == places
    assert len(stream) < 8
    assert "1" not in stream

    reader = iter(packed.split(width) if len(packed) else [])
    layout = encodings.Layout(torch.float32, (numel,), "gaps", width, len(gaps), len(packed))
    read = encodings.unpack_gaps(lambda count: next(reader, torch.empty(0, dtype=torch.uint8)), layout)
    assert torch.cat([torch.empty(0, dtype=torch.int64), *read]).tolist() == places


def test_layouts_of_memory_do_not_matter(tmp_path):
    model, other = (nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last) for _ in range(2))
    model.register_buffer("t", torch.randn(5, 6).t())
    other.register_buffer("t", torch.randn(6, 5))
    tpe.gradient_magnitude(model, "weight", 0.7, grad=torch.randn(8, 8, 3, 3))
    prune.identity(other, "weight")
    tpe.save_sparse(model, tmp_path / "m")
    tpe.load_sparse(other, tmp_path / "m")
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(other.weight_mask, model.weight_mask)
    assert torch.equal(other.t, model.t)
    assert other.weight_orig.is_contiguous(memory_format=torch.channels_last)


def test_scalars_empty_tensors_and_odd_names(tmp_path):
    model, other = (nn.ParameterDict({"ä ö/\n": torch.tensor(v), "e": torch.empty(0, 3)}) for v in (2.5, 1.0))
    tpe.save_sparse(model, tmp_path / "m")
    assert same(tpe.load_sparse(other, tmp_path / "m"), model)
    tpe.save_sparse(nn.ReLU(), tmp_path / "m")
    tpe.load_sparse(nn.ReLU(), tmp_path / "m")


def test_buffers_that_are_not_saved_are_left_alone(tmp_path):
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    for value, each in enumerate((model, other)):
        each.register_buffer("kept", torch.full((2,), float(value)))
        each.register_buffer("scratch", torch.full((2,), float(value)), persistent=False)
    tpe.save_sparse(model, tmp_path / "m")
    tpe.load_sparse(other, tmp_path / "m")
    assert (other.kept.tolist(), other.scratch.tolist()) == ([0, 0], [1, 1])


def test_objects_stay_and_optimizers_and_recurrent_layers_see_the_new_weights(tmp_path):
    model, other = nn.LSTM(4, 3, batch_first=True), nn.LSTM(4, 3, batch_first=True)
    prune.l1_unstructured(model, "weight_hh_l0", 0.5)
    prune.random_unstructured(other, "weight_hh_l0", 0.5)
    parameters, version = list(other.parameters()), other.weight_ih_l0._version
    tpe.save_sparse(model, tmp_path / "m")
    assert tpe.load_sparse(other, tmp_path / "m") is other
    assert all(a is b for a, b in zip(parameters, other.parameters(), strict=True))
    assert other.weight_ih_l0._version > version  # the write is not hidden from autograd
    x = torch.randn(2, 5, 4)
    assert torch.equal(other(x)[0], model(x)[0])
    other(x)[0].sum().backward()
    assert other.weight_hh_l0_orig.grad is not None


# --- tied tensors ---------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self, tie=True):
        super().__init__()
        self.encoder, self.decoder = nn.Embedding(30, 20), nn.Linear(20, 30, bias=False)
        if tie:
            self.decoder.weight = self.encoder.weight


def test_tied_tensors_are_written_once(tmp_path):
    model = Tied()
    tpe.global_unstructured([(model.encoder, "weight"), (model.decoder, "weight")], target_sparsity=0.5)
    tpe.save_sparse(model, tmp_path / "m")
    assert sum(key.endswith(".values") for key in header_of(tmp_path / "m")) == 1
    for other in (Tied(), Tied(tie=False)):
        tpe.load_sparse(other, tmp_path / "m")
        assert torch.equal(other.encoder.weight, model.encoder.weight)
        assert torch.equal(other.decoder.weight, model.decoder.weight)


def test_one_tied_name_pruned_and_the_other_dense(tmp_path):
    model, other = Tied(), Tied()
    prune.l1_unstructured(model.decoder, "weight", 0.5)
    tpe.save_sparse(model, tmp_path / "m")
    with pytest.raises(ValueError, match="are one tensor in the model"):
        tpe.load_sparse(other, tmp_path / "m")
    prune.random_unstructured(other.decoder, "weight", 0.5)
    tpe.load_sparse(other, tmp_path / "m")
    assert torch.equal(other.encoder.weight, model.encoder.weight)
    assert torch.equal(other.decoder.weight, model.decoder.weight)
    assert torch.equal(other.decoder.weight_mask, model.decoder.weight_mask)
    untied = tpe.load_sparse(Tied(tie=False), tmp_path / "m")
    assert torch.equal(untied.decoder.weight, model.decoder.weight)
    assert torch.equal(untied.encoder.weight, model.encoder.weight)


def test_tied_in_the_model_but_different_in_the_file_is_refused(tmp_path):
    model, other = Tied(tie=False), Tied()
    tpe.save_sparse(model, tmp_path / "m")
    before = other.encoder.weight.clone()
    with pytest.raises(ValueError, match=r"Untie them in the model first"):
        tpe.load_sparse(other, tmp_path / "m")
    assert torch.equal(other.encoder.weight, before)
    model.decoder.weight.data.copy_(model.encoder.weight)
    tpe.save_sparse(model, tmp_path / "m")
    assert torch.equal(tpe.load_sparse(other, tmp_path / "m").encoder.weight, model.encoder.weight)


# --- size, memory, other readers ------------------------------------------------------------------


@pytest.mark.parametrize(("sparsity", "share"), [(0.5, 0.54), (0.75, 0.29), (0.9, 0.14), (0.95, 0.07)])
def test_size_of_float32(tmp_path, sparsity, share):
    layer = prune.l1_unstructured(nn.Linear(512, 512, bias=False), "weight", sparsity)
    tpe.save_sparse(layer, tmp_path / "m")
    assert (tmp_path / "m").stat().st_size <= share * 512 * 512 * 4


def test_size_of_2_of_4_in_bfloat16(tmp_path):
    layer = tpe.nm_structured(nn.Linear(512, 512, bias=False, dtype=torch.bfloat16), "weight", n=2, m=4)
    tpe.save_sparse(layer, tmp_path / "m")
    assert (tmp_path / "m").stat().st_size <= 0.57 * 512 * 512 * 2


def test_the_smallest_encoding_is_taken(tmp_path):
    for amount, encoding in [(0.3, "mask"), (0.9, "gaps"), (0.999, "gaps")]:
        layer = prune.random_unstructured(nn.Linear(128, 128), "weight", amount)
        tpe.save_sparse(layer, tmp_path / "m")
        assert layouts_of(tmp_path / "m")["weight"]["encoding"] == encoding
    tpe.save_sparse(nn.Linear(128, 128), tmp_path / "m")
    assert layouts_of(tmp_path / "m") == {}


MEMORY = """
import pathlib, sys, torch
import torchprune_ext as tpe
from torch import nn
from torch.nn.utils import prune
def peak():
    return int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
def extra(call):
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    call()
    return peak() - before
def net(size):
    return nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(6)))
path, size = sys.argv[1], 2048
for small in (True, False):
    model, fresh = net(16 if small else size), net(16 if small else size)
    for layer in model:
        prune.custom_from_mask(layer, "weight", torch.rand_like(layer.weight) < 0.1)
    save, load = extra(lambda: tpe.save_sparse(model, path)), extra(lambda: tpe.load_sparse(fresh, path))
print(save, load, 4 * size * size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_beyond_the_model_is_less_than_one_tensor(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "m")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    save, load, tensor = map(int, done.stdout.split())
    assert save < tensor
    assert load < tensor


def test_the_safetensors_package_reads_the_files(tmp_path):
    reader = pytest.importorskip("safetensors")
    model = net()
    model.register_buffer("odd", torch.randn(3, dtype=torch.complex128))
    prune.l1_unstructured(model[0], "weight", 0.9)
    tpe.save_sparse(model, tmp_path / "m.safetensors")
    with reader.safe_open(tmp_path / "m.safetensors", "pt") as file:
        names, about = set(file.keys()), file.metadata()
        assert {"0.weight.values", "0.weight.gaps", "0.bias", "1.running_mean", "2.weight", "odd"} <= names
        assert about["format"] == "pt"
        assert torch.equal(file.get_tensor("2.weight"), model[2].weight)
        alive = model[0].weight_mask.bool()
        assert torch.equal(file.get_tensor("0.weight.values"), model[0].weight[alive])


def test_history_is_told_in_words(tmp_path):
    layer = nn.Linear(16, 16)
    prune.l1_unstructured(layer, "weight", 0.25)
    prune.custom_from_mask(layer, "weight", torch.ones(16, 16))
    tpe.nm_structured(layer, "weight", n=1, m=4)
    tpe.save_sparse(layer, tmp_path / "m")
    first, second, third = layouts_of(tmp_path / "m")["weight"]["history"]
    assert first == "L1Unstructured(amount=0.25)"
    assert second == "CustomFromMask(mask=...)"
    assert third.startswith("NMStructured(n=1, m=4")


# --- refusals -------------------------------------------------------------------------------------


class WithState(nn.Linear):
    def get_extra_state(self):
        return {"any": "thing"}

    def set_extra_state(self, state):
        pass


def refused_by_save():
    lazy = nn.LazyLinear(3)
    grey = nn.Linear(2, 2)
    prune.identity(grey, "weight")
    grey.weight_mask[0, 0] = 0.5
    surrogate = nn.Module()
    surrogate.register_buffer("\ud800", torch.ones(1))
    hook = nn.Linear(2, 2)
    hook._register_state_dict_hook(lambda module, state, *_: state.update({"weight.values": torch.ones(1)}))
    sparse = nn.Module()
    sparse.register_buffer("s", torch.eye(3).to_sparse())
    return {
        "has no shape yet": lazy,
        "meta device": nn.Linear(2, 2, device="meta"),
        "extra state": WithState(2, 2),
        "other than 0 and 1": grey,
        "cannot be written as UTF-8": surrogate,
        "state dict hook": hook,
        "plain dense tensor": sparse,
    }


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
@pytest.mark.parametrize("reason", refused_by_save())
def test_what_no_file_can_hold_is_refused_and_leaves_no_file(tmp_path, reason):
    with pytest.raises(ValueError, match=reason):
        tpe.save_sparse(refused_by_save()[reason], tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "m"
    tpe.save_sparse(nn.Linear(2, 2), path)
    before = path.read_bytes()
    link = tmp_path / "link"
    link.symlink_to(path)

    def fail(*_):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("torchprune_ext.deploy.sparse_files.to_bytes", fail)
        with pytest.raises(OSError, match="disk is full"):
            tpe.save_sparse(nn.Linear(2, 2), path)
    assert path.read_bytes() == before
    assert {each.name for each in tmp_path.iterdir()} == {"m", "link"}
    tpe.save_sparse(nn.Linear(2, 2), link)
    assert link.is_symlink()
    assert path.read_bytes() != before


def test_wrong_arguments(tmp_path):
    with pytest.raises(TypeError, match="model='m'"):
        tpe.save_sparse("m", tmp_path / "m")
    for call in (tpe.save_sparse, tpe.load_sparse):
        with pytest.raises(TypeError, match="path=3"):
            call(nn.Linear(2, 2), 3)
        with pytest.raises((OSError, ValueError)):
            call(nn.Linear(2, 2), tmp_path)
    with pytest.raises(FileNotFoundError):
        tpe.load_sparse(nn.Linear(2, 2), tmp_path / "nothing")


def refused_by_load():
    expanded = nn.Linear(64, 48)
    expanded.weight.data = torch.zeros(48, 1).expand(48, 64)
    with torch.inference_mode():
        inference = nn.Linear(64, 48)
    return {
        r"shape \(48, 64\) in the file and \(48, 32\) in the model": nn.Linear(32, 48),
        r"Convert the model to torch.float32 first": nn.Linear(64, 48).half(),
        r"'weight' is close to 'weights'|0 of the model": nn.ParameterDict({"weights": torch.ones(48, 64)}),
        r"1 of the model are not in the file: 'more'": nn.ParameterDict(
            {"weight": torch.ones(48, 64), "bias": torch.ones(48), "more": torch.ones(1)}
        ),
        r"1 tensors of the file are not in the model: 'bias'": nn.Linear(64, 48, bias=False),
        "expanded": expanded,
        "inference_mode": inference,
        "meta device": nn.Linear(64, 48, device="meta"),
    }


@pytest.mark.parametrize("reason", refused_by_load())
def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path, reason):
    source = prune.l1_unstructured(nn.Linear(64, 48), "weight", 0.5)
    tpe.save_sparse(source, tmp_path / "m")
    model = refused_by_load()[reason]
    before = {key: (value, None if value.is_meta else bits(value)) for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=reason):
        tpe.load_sparse(model, tmp_path / "m")
    for key, value in model.state_dict().items():
        assert value.is_meta or bits(value) == before[key][1]
