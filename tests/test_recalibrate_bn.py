"""BatchNorm's statistics are those of what reaches it in eval mode, over all samples, however batches are cut."""

import copy
import datetime
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from calibrating import PlantedError, Residual, broken_loader
from hypothesis import given
from hypothesis import strategies as st
from snapshots import Snapshot
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import torchprune_ext as tpe

BUFFERS = ("running_mean", "running_var")


def recalibrate(model, loader, **options):
    loader = list(loader) if isinstance(loader, tuple) else loader  # as split returns
    return tpe.recalibrate_bn(model, loader, progress=False, **options)


def layers(model):
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def dense():
    return nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 2), nn.BatchNorm1d(2)
    )


def series():
    return nn.Sequential(nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4), nn.Tanh(), nn.Conv1d(4, 2, 2), nn.BatchNorm1d(2))


NETS = {"dense": (dense, (3,)), "series": (series, (3, 5)), "residual": (Residual, (1, 6, 6))}


def build(name, seed=0):
    torch.manual_seed(seed)
    model = NETS[name][0]().double()
    for layer in layers(model):
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
        nn.init.uniform_(layer.weight, 0.5, 1.5)
    return model


def by_definition(model, samples, keep=None):
    """Set one layer after the other, each by a pass of its own over single samples."""
    model = copy.deepcopy(model).eval()
    order, rows = [], {}

    def note(layer, args):
        order.append(layer)
        rows.setdefault(layer, []).append(args[0].detach())

    for layer in layers(model):
        layer.register_forward_pre_hook(note)
    model(samples[:1])
    for layer in list(order):
        rows.clear()
        for sample in samples:
            model(sample[None])
        values = torch.cat(rows[layer]).movedim(1, -1).reshape(-1, layer.num_features)
        if keep is not None:
            values = values[keep.reshape(-1)]
        for channel in range(layer.num_features):
            column = values[:, channel].tolist()
            mean = sum(column) / len(column)
            layer.running_mean[channel] = mean
            layer.running_var[channel] = sum((value - mean) ** 2 for value in column) / (len(column) - 1)
    return model


def assert_same(model, expected, **tolerance):
    for one, other in zip(layers(model), layers(expected), strict=True):
        for name in BUFFERS:
            torch.testing.assert_close(getattr(one, name), getattr(other, name), **tolerance)


# ------------------------------------------------------------------------------------------------------ the definition


@given(
    st.sampled_from([*NETS]),
    st.lists(st.integers(1, 4), min_size=1, max_size=4).filter(lambda sizes: sum(sizes) > 1),
    st.integers(0, 9),
)
def test_it_is_the_definition_however_the_batches_are_cut(name, sizes, seed):
    model = build(name, seed)
    samples = torch.randn(sum(sizes), *NETS[name][1], dtype=torch.float64)
    expected = by_definition(model, samples)
    recalibrate(model, list(samples.split(sizes)))
    assert_same(model, expected, rtol=1e-9, atol=1e-11)
    assert {int(layer.num_batches_tracked) for layer in layers(model)} == {len(sizes)}


def test_one_layer_and_one_batch_are_what_the_host_finds():
    samples = torch.randn(7, 3, 5)
    ours, host = nn.BatchNorm1d(3), nn.BatchNorm1d(3, momentum=None)
    host(samples)
    recalibrate(ours, [samples])
    assert_same(ours, host)


def test_the_host_does_not_do_so():
    """The reason for this function: in ``update_bn``, uneven batches count alike, and so does where they lie."""
    batches = [torch.tensor([[0.0], [2.0], [1.0], [1.0]]), torch.tensor([[10.0], [12.0]])]
    ours, host = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    torch.optim.swa_utils.update_bn(batches, host)
    recalibrate(ours, batches)
    whole = torch.cat(batches)
    assert ours.running_mean == whole.mean()
    torch.testing.assert_close(ours.running_var, whole.var(0))
    assert host.running_mean == 6
    assert host.running_var < 2


def test_after_it_every_layer_gives_mean_0_and_variance_1_before_scale_and_shift():
    model = build("residual")
    samples = torch.randn(40, 1, 6, 6, dtype=torch.float64)
    recalibrate(model, samples.split(16))
    model.eval()
    for layer in layers(model):
        layer.register_forward_hook(lambda layer, _, y: seen.append((layer, y)))
    seen = []
    model(samples)
    assert len(seen) == len(layers(model))
    for layer, y in seen:
        rows = y.movedim(1, -1).flatten(0, -2)
        torch.testing.assert_close(rows.mean(0), layer.bias.detach().clone(), rtol=0, atol=1e-9)
        torch.testing.assert_close(rows.var(0), layer.weight.detach().square(), rtol=1e-3, atol=0)


def test_what_a_pruned_model_sees_is_what_counts():
    model = build("residual")
    tpe.global_unstructured([(model.stem, "weight"), (model.conv, "weight")], target_sparsity=0.6)
    plain = tpe.copy_pruned(model)
    tpe.remove_all(plain)
    samples = torch.randn(9, 1, 6, 6, dtype=torch.float64)
    recalibrate(model, [samples])
    assert_same(model, by_definition(plain, samples), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_are_wide(dtype):
    """Half precision would sum 100,000 ones to 2,048 or less."""
    layer = nn.BatchNorm1d(1).to(dtype)
    samples = torch.cat([torch.ones(50_000, 1), 3 * torch.ones(50_000, 1)]).to(dtype)
    recalibrate(layer, samples.split(33_333))
    assert layer.running_mean == 2
    torch.testing.assert_close(layer.running_var, torch.ones(1, dtype=dtype), rtol=2e-5, atol=0)
    assert layer.running_mean.dtype == dtype


def test_a_large_mean_does_not_eat_the_variance():
    samples = 1e4 + torch.randn(999, 2)
    layer = nn.BatchNorm1d(2)
    recalibrate(layer, samples.split(10))
    torch.testing.assert_close(layer.running_var.double(), samples.double().var(0), rtol=1e-3, atol=0)


def test_padding_does_not_count():
    model = nn.Sequential(
        nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.Tanh(), nn.Conv1d(4, 2, 1), nn.BatchNorm1d(2)
    ).double()
    samples, keep = torch.randn(5, 3, 4, dtype=torch.float64), torch.rand(5, 4) < 0.6
    expected = by_definition(model, samples, keep)
    masks = iter(keep.split([3, 2]))
    recalibrate(model, samples.split([3, 2]), sample_mask=lambda batch: next(masks))
    assert_same(model, expected, rtol=1e-9, atol=1e-11)


# -------------------------------------------------------------------------------------------------- what stays as it is


class Keeping(nn.Module):
    """Keeps its stem on itself from one layer to a later one, and a list; every batch has its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
        self.stem = None

    def forward(self, x):
        self.stem, self.all = 2 * x, [x]
        y = self.first(x) + self.stem
        return self.second(y + self.all[0])


def test_batches_that_take_turns_do_not_mix():
    torch.manual_seed(0)
    model, samples = Keeping().double(), torch.randn(9, 2, dtype=torch.float64)
    expected = by_definition(model, samples)
    recalibrate(model, samples.split([4, 3, 2]))
    assert_same(model, expected, rtol=1e-9, atol=1e-11)
    assert model.stem is None
    assert not hasattr(model, "all")


def test_only_statistics_change():
    model = build("dense")
    model[1].momentum, model[5].momentum = 0.3, None
    model[1].eval()
    samples = torch.randn(5, 3, dtype=torch.float64)
    before, state = Snapshot(model), torch.get_rng_state()
    recalibrate(model, [samples])
    assert torch.equal(torch.get_rng_state(), state)
    changed = before.differences()
    assert len(changed) >= 6
    assert all(any(name in line for name in (*BUFFERS, "num_batches_tracked")) for line in changed), changed
    assert not any("another object" in line for line in changed)


def test_layers_without_statistics_are_left_alone():
    model = nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False), nn.BatchNorm1d(2, affine=False))
    recalibrate(model, [3 + torch.randn(50, 2)])
    assert model[0].running_mean is None
    assert model[1].running_mean.abs().max() < 1e-5


def test_layers_that_only_training_calls_stay_and_are_named():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.side = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

        def forward(self, x):
            return self.main(x) + self.side(x) if self.training else self.main(x)

    model = Auxiliary()
    with pytest.warns(UserWarning, match=r"\['side'\] are not called in eval mode"):
        recalibrate(model, [3 + torch.randn(50, 2)])
    assert model.main.running_mean.min() > 2
    assert model.side.running_mean.max() == 0


def test_half_of_each_loader_does_with_max_batches_and_pairs_do():
    samples = torch.randn(8, 3)
    model, expected = dense(), None
    expected = by_definition(model, samples[:4])
    recalibrate(model, [(part, torch.zeros(2)) for part in samples.split(2)], max_batches=2)
    assert_same(model, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("made_inside", [False, True])
def test_inference_mode_makes_no_difference(made_inside):
    samples = torch.randn(9, 3)
    with torch.inference_mode(made_inside):
        model = dense()
    with torch.inference_mode():
        recalibrate(model, samples.split(4))
        assert_same(model, by_definition(model, samples), rtol=1e-4, atol=1e-6)
    assert model[1].running_mean.is_inference() == made_inside


def test_synchronized_layers_and_any_number_of_axes_do():
    model = nn.Sequential(nn.BatchNorm3d(2), nn.SyncBatchNorm(2))
    samples = 3 + torch.randn(4, 2, 2, 3, 2)
    recalibrate(model, [samples])
    torch.testing.assert_close(model[0].running_mean, samples.mean((0, 2, 3, 4)))
    torch.testing.assert_close(model[0].running_var, samples.var((0, 2, 3, 4), correction=1))
    torch.testing.assert_close(model[1].running_mean, torch.zeros(2), rtol=0, atol=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="torch.compile needs a C++ compiler")
def test_compiled_models_are_recalibrated_too():
    model = build("dense").float()
    samples = torch.randn(6, 3)
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    compiled.eval()(samples)
    recalibrate(compiled, samples.split(2))
    assert_same(compiled, by_definition(model, samples), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(compiled(samples), by_definition(model, samples)(samples))


# ------------------------------------------------------------------------------------------------------ all or nothing


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.bn = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

    def forward(self, x):
        return self.bn(self.bn(self.first(x)))


class Forked(nn.Module):
    def __init__(self):
        super().__init__()
        self.zero, self.one, self.two = nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.BatchNorm1d(2)

    def forward(self, x):
        return self.one(self.zero(x)) if len(x) > 2 else self.two(self.zero(x))


class Late(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.bn, self.error = nn.BatchNorm1d(2), error

    def forward(self, x):
        y = self.bn(x)
        if self.error is not None and len(x) == 2:
            raise self.error
        return y


THREE, TWO = torch.randn(3, 2), torch.randn(2, 2)
BAD = {
    "none": (nn.Linear(2, 2), [THREE], ValueError, "no BatchNorm with running statistics"),
    "without": (nn.BatchNorm1d(2, track_running_stats=False), [THREE], ValueError, "track_running_stats=False"),
    "not a module": (3, [THREE], TypeError, "model=3"),
    "no data": (Late(None), [], ValueError, "gave no batch"),
    "a batch": (Late(None), THREE, TypeError, "not an iterable of batches"),
    "twice": (Twice(), [THREE, TWO], ValueError, "bn is called twice"),
    "ways": (Forked(), [THREE, TWO], ValueError, "different ways"),
    "one value": (Late(None), [THREE[:1]], ValueError, "bn gets 1 values"),
    "nan": (nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)), [THREE / 0], ValueError, "0 gets NaN"),
    "overflow": (nn.BatchNorm1d(2).half(), [1e3 * THREE.half()], ValueError, "beyond the range of torch.float16"),
    "the model": (Late(ZeroDivisionError()), [THREE, TWO], ZeroDivisionError, ""),
    "the loader": (Late(None), broken_loader([THREE]), PlantedError, ""),
    "ctrl-c": (Late(KeyboardInterrupt()), [THREE, TWO], KeyboardInterrupt, ""),
    "option": (Late(None), [THREE], TypeError, "unknown arguments"),
}


@pytest.mark.parametrize(("model", "loader", "error", "words"), BAD.values(), ids=BAD)
@pytest.mark.usefixtures("no_thread_left")
def test_on_an_error_nothing_is_changed(model, loader, error, words):
    before = Snapshot(model) if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=words or None):
        recalibrate(model, loader, **({"unknown": 1} if words == "unknown arguments" else {}))
    assert before is None or before.differences() == []


def test_an_interrupt_while_statistics_are_written_puts_the_old_ones_back(monkeypatch):
    model = dense()
    before, copied = Snapshot(model), []

    class Interrupting(torch.Tensor):
        def copy_(self, *args):
            copied.append(args)
            if len(copied) == 1:
                raise KeyboardInterrupt
            return torch.Tensor.copy_(self.as_subclass(torch.Tensor), *args)

    from torchprune_ext.compensation import batch_norm

    written = batch_norm._write

    def write(*args):
        kept = model[5]._buffers["running_mean"]
        model[5]._buffers["running_mean"] = kept.as_subclass(Interrupting)
        try:
            written(*args)
        finally:
            model[5]._buffers["running_mean"] = kept

    monkeypatch.setattr(batch_norm, "_write", write)
    with pytest.raises(KeyboardInterrupt):
        recalibrate(model, [torch.randn(5, 3)])
    assert copied
    assert before.differences() == []


# --------------------------------------------------------------------------------------------------- several processes


def in_a_group(rank, file):
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2, timeout=timeout)
    samples = torch.randn(9, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = build("residual")
    alone = copy.deepcopy(model)
    recalibrate(alone, samples.split(4))
    share = list(samples[:5].split(3)) if rank else [samples[5:]]
    recalibrate(model, share, process_group=dist.group.WORLD)
    assert_same(model, alone, rtol=1e-9, atol=1e-11)
    assert int(model.first.num_batches_tracked) == 3
    before = Snapshot(model)
    with pytest.raises(PlantedError if rank else RuntimeError):
        recalibrate(model, broken_loader(share) if rank else share, process_group=dist.group.WORLD)
    model.head.register_forward_pre_hook(lambda *_: F.relu(torch.tensor("x" if rank else 0)))
    with pytest.raises((TypeError, RuntimeError)):
        recalibrate(model, share, process_group=dist.group.WORLD)
    model.head._forward_pre_hooks.clear()
    assert before.differences() == []
    dist.destroy_process_group()


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()) or sys.platform == "win32", reason="needs gloo"
)
def test_two_processes_find_what_one_finds_and_fail_together(tmp_path, processes):
    processes.spawn(in_a_group, (tmp_path / "rendezvous",), 2)
