"""Compacted models in files: what was cut comes back from the dense model's constructor, to the bit."""

import json
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe


class Block(nn.Module):
    """Convolutions of three kinds around a BatchNorm, and a buffer that no state dict has."""

    def __init__(self, inputs, width, groups, bias):
        super().__init__()
        self.inner = nn.Conv2d(inputs, width * groups, 3, padding=1, bias=bias)
        self.bn = nn.BatchNorm2d(width * groups)
        self.depthwise = nn.Conv2d(width * groups, width * groups, 3, padding=1, groups=width * groups)
        self.grouped = nn.Conv2d(width * groups, inputs, 1, groups=groups)
        self.register_buffer("gains", torch.rand(width * groups, 1, 1), persistent=False)

    def forward(self, x):
        return x + self.grouped(self.depthwise(self.bn(self.inner(x)).relu()) * self.gains)


class Attention(nn.Module):
    """Heads as the transformers library cuts them: numbers of the module, three projections and one behind them."""

    def __init__(self, width, heads, size):
        super().__init__()
        self.num_attention_heads, self.attention_head_size, self.all_head_size = heads, size, heads * size
        self.split = (heads * size, heads * size, heads * size)
        self.qkv, self.out = nn.Linear(width, 3 * heads * size), nn.Linear(heads * size, width)

    def forward(self, x):
        shape = (*x.shape[:-1], self.num_attention_heads, self.attention_head_size)
        q, k, v = (t.view(shape).transpose(1, 2) for t in self.qkv(x).split(self.split, -1))
        found = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(found.transpose(1, 2).reshape(*x.shape[:-1], self.all_head_size))


class Net(nn.Module):
    """A model of any widths, with all that can be cut, ties and a shared module."""

    def __init__(self, channels=2, widths=(3, 2), groups=2, heads=3, width=8, units=5, bias=True):
        super().__init__()
        channels *= groups
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList(Block(channels, each, groups, bias) for each in widths)
        self.again = self.blocks[0]
        self.flat = nn.Linear(channels * 4, width)
        self.embedding = nn.Embedding(11, width)
        self.attention = Attention(width, heads, 2)
        self.norm = nn.LayerNorm(width)
        self.lstm = nn.LSTM(width, units, batch_first=True)
        self.up = nn.Linear(units, width)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.rand(width))

    def forward(self, image, tokens):
        x = self.stem(image)
        for block in (*self.blocks, self.again):
            x = block(x)
        x = self.flat(x.flatten(1))[:, None] + self.embedding(tokens)
        x = self.up(self.lstm(self.norm(x + self.attention(x)))[0]) * self.scale
        return self.head(x)


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 2, 2, generator=generator), torch.randint(11, (2, 4), generator=generator)


def round_trip(small, constructor, folder):
    tpe.save_compact(small, folder / "small.safetensors")
    return tpe.load_compact(constructor, folder / "small.safetensors")


def numbers(model):
    return {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if all(isinstance(each, int) for each in (value if isinstance(value, (tuple, list)) else [value]))
    }


def assert_same(loaded, small):
    """Check that two models hold the same bits under the same names, and look and are tied alike."""
    assert str(loaded) == str(small)
    assert numbers(loaded) == numbers(small)
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = (dict(getattr(m, kind)(remove_duplicate=False)) for m in (loaded, small))
        assert list(ours) == list(theirs)
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype
            assert ours[name].shape == tensor.shape
            assert type(ours[name]) is type(tensor)
            assert torch.equal(bits(ours[name]), bits(tensor)), name
        assert [ours[a] is ours[b] for a in ours for b in ours] == [theirs[a] is theirs[b] for a in ours for b in ours]


def bits(tensor):
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


DENSE = {"channels": 3, "widths": (4, 5), "groups": 2, "heads": 3, "width": 8, "units": 5}


@settings(max_examples=25)
@given(
    channels=st.integers(1, 3),
    widths=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    groups=st.integers(1, 2),
    heads=st.integers(1, 3),
    width=st.integers(1, 8),
    units=st.integers(1, 5),
    bias=st.tuples(st.booleans(), st.booleans()),
    sparse=st.booleans(),
)
def test_any_cut_comes_back(tmp_path_factory, bias, sparse, **sizes):
    small = Net(**sizes, bias=bias[0]).eval()
    small(*inputs())
    if sparse:
        with torch.no_grad():
            small.flat.weight[0] = 0
            small.embedding.weight[1:] = 0
    loaded = round_trip(small, lambda: Net(**DENSE, bias=bias[1]).eval(), tmp_path_factory.mktemp("file"))
    assert_same(loaded, small)
    assert torch.equal(loaded(*inputs()), small(*inputs()))


def test_it_trains_on(tmp_path):
    models = [Net(widths=(2, 1)), None]
    models[1] = round_trip(models[0], lambda: Net(widths=(4, 4)), tmp_path)
    for model in models:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for seed in range(3):
            optimizer.zero_grad()
            model(*inputs(seed)).square().mean().backward()
            optimizer.step()
    assert_same(models[1], models[0])


def test_the_file_is_read_by_others(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    small = Net()
    tpe.save_compact(small, tmp_path / "f")
    with safetensors.safe_open(tmp_path / "f", "pt") as file:
        assert json.loads(file.metadata()["torchprune_ext_modules"])["version"] == 1
        assert {"stem.weight", "blocks.0.gains", "scale"} <= set(file.keys())
        assert torch.equal(file.get_tensor("stem.weight"), small.stem.weight)
    from torchprune_ext.deploy.inspection import describe

    assert "stem.weight" in describe(tmp_path / "f")


def test_without_buffers_outside_of_the_state_dict_it_is_a_sparse_file(tmp_path):
    tpe.save_compact(nn.Linear(3, 2), tmp_path / "f")
    fresh = tpe.load_sparse(nn.Linear(3, 2), tmp_path / "f")
    assert_same(tpe.load_compact(lambda: nn.Linear(5, 4), tmp_path / "f"), fresh)


def test_a_bias_that_came_and_one_that_went(tmp_path):
    def constructor():
        return nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), nn.BatchNorm2d(3), nn.Linear(3, 3))

    small = constructor()
    small[0].bias = nn.Parameter(torch.ones(3))
    small[2].bias = None
    small[1].running_mean = None
    assert_same(round_trip(small, constructor, tmp_path), small)

    def frozen():
        return constructor().requires_grad_(False)

    loaded = round_trip(small, frozen, tmp_path)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_a_bias_beside_buffers_only_is_trained(tmp_path):
    small = nn.BatchNorm1d(3, affine=False)
    small.bias = nn.Parameter(torch.ones(3))
    assert round_trip(small, lambda: nn.BatchNorm1d(4, affine=False), tmp_path).bias.requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_tensors_go_where_the_constructor_puts_them(tmp_path):
    small = nn.Conv2d(2, 3, 1)
    loaded = round_trip(small, lambda: nn.Conv2d(3, 4, 1, bias=False).cuda(), tmp_path)
    assert {p.device.type for p in loaded.parameters()} == {"cuda"}
    assert_same(loaded.cpu(), small)


def test_what_the_file_decides_and_what_the_constructor_does(tmp_path):
    def constructor():
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2)).eval()
        model[0].weight.requires_grad_(False)
        return model

    small = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.1), nn.Linear(3, 2)).to(torch.bfloat16)
    loaded = round_trip(small, constructor, tmp_path)
    assert loaded[0].weight.dtype == torch.bfloat16
    assert not loaded.training
    assert [p.requires_grad for p in loaded.parameters()] == [False, True, True, True]
    assert loaded[1].p == 0.5


def test_channels_that_come_last_do_so_again(tmp_path):
    def make(width):
        flat = nn.Conv2d(3, width, 3).to(memory_format=torch.channels_last)
        return nn.Sequential(flat, nn.Conv3d(3, width, 3).to(memory_format=torch.channels_last_3d))

    loaded = round_trip(make(4), lambda: make(5), tmp_path)
    assert [p.stride() for p in loaded.parameters()] == [p.stride() for p in make(4).parameters()]
    assert loaded[0].weight.stride() == (27, 1, 9, 3)


def test_parameters_stay_the_same_objects(tmp_path):
    class Registers(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
            self.weights = [layer.weight for layer in self.layers]

        def forward(self, x):
            return x @ self.weights[0] @ self.weights[1]

    small = Registers(2)
    loaded = round_trip(small, lambda: Registers(4), tmp_path)
    assert torch.equal(loaded(torch.eye(2)), small(torch.eye(2)))


@pytest.mark.parametrize("dense_is_tied", [False, True])
@pytest.mark.parametrize("small_is_tied", [False, True])
def test_ties_are_those_of_the_file(tmp_path, dense_is_tied, small_is_tied):
    def make(width, tied):
        model = nn.ModuleDict({"a": nn.Embedding(5, width), "b": nn.Linear(width, 5, bias=False)})
        if tied:
            model.b.weight = model.a.weight
        return model

    small = make(2, small_is_tied)
    assert_same(round_trip(small, lambda: make(3, dense_is_tied), tmp_path), small)


def test_a_constructor_on_the_meta_device_takes_no_memory(tmp_path):
    small = Net(widths=(2, 1))

    def constructor():
        with torch.device("meta"):
            return Net(widths=(4, 4))

    loaded = round_trip(small, constructor, tmp_path)
    assert_same(loaded, small)
    assert torch.equal(loaded.eval()(*inputs()), small.eval()(*inputs()))


def test_in_inference_mode_it_is_trainable_all_the_same(tmp_path):
    with torch.inference_mode():
        loaded = round_trip(nn.Linear(3, 2), lambda: nn.Linear(4, 3), tmp_path)
    loaded(torch.ones(1, 3)).sum().backward()
    assert loaded.weight.grad.shape == (2, 3)


def test_a_model_that_has_gradients(tmp_path):
    def constructor():
        dense = nn.Linear(4, 3)
        dense(torch.ones(1, 4)).sum().backward()
        return dense

    loaded = round_trip(nn.Linear(3, 2), constructor, tmp_path)
    loaded(torch.ones(1, 3)).sum().backward()
    assert loaded.weight.grad.shape == (2, 3)


def test_a_pruned_model_is_written_as_if_removed(tmp_path):
    small = nn.Sequential(nn.Linear(40, 30))
    prune.l1_unstructured(small[0], "weight", 0.9)
    loaded = round_trip(small, lambda: nn.Sequential(nn.Linear(50, 40)), tmp_path)
    tpe.remove_all(small)
    assert (loaded[0].weight == small[0].weight).all()
    assert os.path.getsize(tmp_path / "small.safetensors") < 0.3 * 4 * 1200


def test_attention_whose_projection_is_pruned(tmp_path):
    """While pruned, the projection has a class of its own."""
    small = nn.MultiheadAttention(4, 2, batch_first=True)
    tpe.threshold(small.out_proj, "weight", 0.1)
    loaded = round_trip(small, lambda: nn.MultiheadAttention(6, 3, batch_first=True), tmp_path)
    tpe.remove_all(small)
    assert str(loaded) == str(small)
    assert all((a == b).all() for a, b in zip(loaded.parameters(), small.parameters(), strict=True))


@pytest.mark.parametrize("removed", [False, True])
def test_parameters_keep_their_order(tmp_path, removed):
    """Native pruning puts a weight behind its bias; optimizers go by the order."""
    small = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    prune.l1_unstructured(small[0], "weight", 0.5)
    if removed:
        prune.remove(small[0], "weight")
    loaded = round_trip(small, lambda: nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2)), tmp_path)
    assert [name for name, _ in loaded.named_parameters()] == ["0.bias", "0.weight", "1.weight", "1.bias"]


def test_what_keeps_zeros_is_not_part_of_the_model(tmp_path):
    small = nn.Sequential(nn.Linear(4, 3))
    prune.l1_unstructured(small[0], "weight", 0.5)
    tpe.remove_all(small, keep_zeros=True)
    assert "0.weight_zeros" in dict(small.named_buffers())
    loaded = round_trip(small, lambda: nn.Sequential(nn.Linear(5, 4)), tmp_path)
    assert torch.equal(loaded[0].weight, small[0].weight)


DTYPES = [torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.complex128, torch.int8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_buffers_and_parameters_of_any_dtype_and_of_no_size(tmp_path, dtype):
    def make(size):
        model = nn.Module()
        model.register_buffer("a", torch.arange(size).to(dtype))
        model.register_buffer("b", torch.ones(0, size).to(dtype), persistent=False)
        model.register_buffer("c", torch.tensor(1).to(dtype))
        model.d = nn.Parameter(torch.arange(size).to(dtype), requires_grad=False)
        return model

    assert_same(round_trip(make(3), lambda: make(5), tmp_path), make(3))


# --- what is refused ------------------------------------------------------------------------------


def refused(constructor, path, reason, kind=ValueError):
    """Check that the call fails, naming the file if that was read, and leaves what the constructor returned."""
    made = []

    def keeps():
        made.append(constructor())
        if isinstance(made[0], nn.Module):
            made.append({key: (t, t.clone()) for key, t in made[0].state_dict(keep_vars=True).items()})
            made.append(numbers(made[0]))
        return made[0]

    with pytest.raises(kind, match=reason) as caught:
        tpe.load_compact(keeps, path)
    assert len(str(caught.value)) < 2000
    if len(made) == 3:
        model, before, attributes = made
        after = model.state_dict(keep_vars=True)
        assert list(after) == list(before)
        assert all(after[key] is old and torch.equal(old, values) for key, (old, values) in before.items())
        assert numbers(model) == attributes
    return str(caught.value)


@pytest.fixture
def written(tmp_path):
    tpe.save_compact(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), tmp_path / "f")
    return tmp_path / "f"


def counting(model, count):
    model.calls = count
    return model


FOREIGN = {
    "module too few": (lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU()), "1 modules of the file are not .*: '2'; 0"),
    "module too many": (
        lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2), nn.ReLU()),
        "0 modules of .*; 1 of the model are not in the file: '3'",
    ),
    "other class": (
        lambda: nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)),
        "module '1' is a 'ReLU' in the file and a GELU",
    ),
    "smaller": (
        lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(2, 2)),
        "module '2' of type Linear: its attribute 'in_features' is 3 in the file and 2 from",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_the_constructor_of_another_model(written, name):
    constructor, reason = FOREIGN[name]
    message = refused(constructor, written, reason)
    assert repr(str(written)) in message
    assert "Pass the function that built the model before it was compacted" in message


def test_a_module_that_is_shared_in_one_of_both(tmp_path):
    class Two(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.a = nn.Linear(2, 2)
            self.b = self.a if shared else nn.Linear(2, 2)

    tpe.save_compact(Two(True), tmp_path / "shared")
    refused(lambda: Two(False), tmp_path / "shared", "'b' is the module 'a' in the file and a module of its own from")
    tpe.save_compact(Two(False), tmp_path / "apart")
    refused(lambda: Two(True), tmp_path / "apart", "'b' is a module of its own in the file and the module 'a' from")


def test_tensors_that_do_not_fit(tmp_path):
    class Holder(nn.Module):
        def __init__(self, **tensors):
            super().__init__()
            for name, tensor in tensors.items():
                self.register_buffer(name, tensor)

    def against(file, here, reason):
        tpe.save_compact(Holder(**file), tmp_path / "f")
        refused(lambda: Holder(**here), tmp_path / "f", reason)

    a = torch.ones(3)
    against({"a": a}, {"a": torch.ones(2)}, r"'a' has shape \(3,\) .* a cut makes nothing larger")
    against({"a": a}, {"a": torch.ones(3, 1)}, r"shape \(3, 1\) and dtype torch.float32 from the constructor")
    against({"a": a}, {"a": torch.ones(3, dtype=torch.int64)}, "dtype torch.float32 in the file, but .*int64 from")
    against({"a": a, "bcd": a}, {"a": a, "bce": a}, "'bcd'; .*: 'bce'. 'bcd' is close to 'bce'")
    against({"a": a}, {"a": None}, "makes None there, and no tensor of the module with more than 0 entries")
    against({"a": a}, {}, "1 tensors of the file are not in the model")
    against({}, {"a": a}, "1 of the model are not in the file: 'a'")


def test_a_constructor_that_makes_sparse_tensors(tmp_path):
    def make(value):
        model = nn.Module()
        model.register_buffer("a", value)
        return model

    tpe.save_compact(make(torch.ones(3)), tmp_path / "f")
    with pytest.raises(ValueError, match=r"is a Tensor of layout torch\.sparse_coo from the constructor"):
        tpe.load_compact(lambda: make(torch.ones(3).to_sparse()), tmp_path / "f")


def test_numbers_that_do_not_fit(tmp_path):
    def against(file, here, reason):
        tpe.save_compact(counting(nn.ReLU(), file), tmp_path / "f")
        refused(lambda: counting(nn.ReLU(), here), tmp_path / "f", reason)

    against(3, 2, "'' of type ReLU: its attribute 'calls' is 3 in the file and 2 .*a counter, set it in")
    against(-1, 2, "is -1 in the file and 2")
    against(1, -1, "is 1 in the file and -1")
    against(1, True, "is 1 in the file and True")
    against(1, None, "is 1 in the file and None")
    against(1, (1,), r"is 1 in the file and \(1,\)")
    against([1], 1, r"is \[1\] in the file and 1")
    against((1, 2), (1, 3, 4), r"is \[1, 2\] in the file and \(1, 3, 4\)")
    against((1, 4), (1, 3), r"is \[1, 4\] in the file and \(1, 3\)")
    against(1, "one", "is 1 in the file and 'one'")


KEPT = [
    (3, 5),
    (3, np.int64(5)),
    (np.int32(3), np.int32(5)),
    ((np.int64(1), 2), (1, 3)),
    (0, 5),
    (-1, -1),
    ((1, 2), (1, 3)),
    ([0, 2], [4, 2]),
    (torch.Size([1, 2]), torch.Size([2, 2])),
]


@pytest.mark.parametrize(("small", "dense"), KEPT)
def test_numbers_keep_their_type(tmp_path, small, dense):
    loaded = round_trip(counting(nn.ReLU(), small), lambda: counting(nn.ReLU(), dense), tmp_path)
    assert loaded.calls == small
    assert type(loaded.calls) is type(dense)


@pytest.mark.parametrize("value", [True, 1.5, "1", None, (), [], (1, True), [(1,)], {"a": 1}, 2**60], ids=repr)
def test_attributes_that_are_not_numbers_are_the_constructors(tmp_path, value):
    loaded = round_trip(counting(nn.ReLU(), value), lambda: counting(nn.ReLU(), "here"), tmp_path)
    assert loaded.calls == "here"


def test_an_attribute_that_the_constructor_does_not_make_is_left_out(tmp_path):
    assert not hasattr(round_trip(counting(nn.ReLU(), 3), nn.ReLU, tmp_path), "calls")


def test_other_constructors(written):
    refused(lambda: None, written, r"constructor\(\)=None is a NoneType", TypeError)
    pruned = prune.identity(nn.Linear(4, 3), "weight")
    refused(lambda: pruned, written, r"whose Linear.weight .* is pruned. Return a dense model, e.g. by remove_all")
    with pytest.raises(TypeError, match=r"is a Linear\. Pass a function without arguments"):
        tpe.load_compact(nn.Linear(4, 3), written)
    with pytest.raises(TypeError, match=r"is a str\. Pass a function without arguments"):
        tpe.load_compact("resnet18", written)
    with pytest.raises(ValueError, match=r"whose '0.weight' has no shape yet\. Run one forward pass"):
        tpe.load_compact(lambda: nn.Sequential(nn.LazyLinear(3)), written)


def test_files_of_others(tmp_path):
    tpe.save_sparse(nn.Linear(4, 3), tmp_path / "sparse")
    refused(lambda: nn.Linear(4, 3), tmp_path / "sparse", "was not written by save_compact.*load_sparse")
    with pytest.raises(FileNotFoundError):
        tpe.load_compact(lambda: nn.Linear(4, 3), tmp_path / "none")


def test_what_cannot_be_saved_leaves_the_file_that_is_there(written):
    before = written.read_bytes()

    class Extra(nn.Linear):
        def get_extra_state(self):
            return 1

    with pytest.raises(ValueError, match="extra state"):
        tpe.save_compact(Extra(2, 2), written)
    with pytest.raises(ValueError, match="meta device"):
        tpe.save_compact(nn.Linear(2, 2, device="meta"), written)
    with pytest.raises(TypeError, match="model=3 is a"):
        tpe.save_compact(3, written)
    assert written.read_bytes() == before
    assert [path.name for path in written.parent.iterdir()] == ["f"]


def test_an_interrupt_while_it_is_filled_leaves_the_model(written, monkeypatch):
    def constructor():
        return model

    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    before = {key: (t, t.clone()) for key, t in model.state_dict(keep_vars=True).items()}
    calls = []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return True

    monkeypatch.setattr("torchprune_ext.deploy.compact_files._can_be_kept", stop)
    with pytest.raises(KeyboardInterrupt):
        tpe.load_compact(constructor, written)
    assert all(t is before[k][0] and torch.equal(t, before[k][1]) for k, t in model.state_dict(keep_vars=True).items())
    assert [model[0].out_features, model[2].in_features] == [8, 8]
