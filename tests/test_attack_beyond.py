"""What models keep on themselves, and the caller's autocast, must not change what whole-model calls find."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import torchprune_ext as tpe


class Skipping(nn.Module):
    """A model whose first activation is taken up again at the end, kept in the meantime in the way of ``kept``."""

    def __init__(self, kept: str) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.bn = nn.BatchNorm1d(8)
        self.kept, self.skips, self.skip, self.cache = kept, [], None, {}
        self.register_buffer("written", torch.zeros(16, 8))
        self.register_buffer("rebound", None)

    def put(self, x: Tensor) -> None:
        if self.kept == "new list":
            self.skips = [x]
        elif self.kept == "appended":
            self.skips.append(x)
        elif self.kept == "until the end":
            self.skip = x
        elif self.kept == "in a dict":
            self.cache["x"] = x
        elif self.kept == "buffer written into":
            self.written.copy_(x.detach())
        elif self.kept == "buffer replaced":
            self.rebound = x

    def take(self) -> Tensor:
        if self.kept == "new list":
            return self.skips[0]
        if self.kept == "appended":
            return self.skips.pop()
        if self.kept == "until the end":
            x, self.skip = self.skip, None
            return x
        if self.kept == "in a dict":
            return self.cache["x"]
        return self.written if self.kept == "buffer written into" else self.rebound

    def forward(self, x: Tensor) -> Tensor:
        x = skip = torch.relu(self.a(x))
        self.put(x)
        x = torch.relu(self.bn(self.c(torch.relu(self.b(x)))))
        if self.kept != "local":
            skip = self.take()
        return self.d(x + 3 * skip)


def skipping(kept: str, batches: int) -> tuple[Skipping, list[Tensor]]:
    """Return a pruned model and data whose batches differ."""
    torch.manual_seed(0)
    model = Skipping(kept)
    data = [torch.randn(16, 8) + number % 3 for number in range(batches)]
    tpe.global_unstructured(tpe.prunable_parameters(model), target_sparsity=0.5)
    return model, data


KEPT = ["new list", "appended", "until the end", "in a dict", "buffer written into", "buffer replaced"]


def weights(model: Skipping) -> list[Tensor]:
    return [each for layer in (model.a, model.b, model.c, model.d) for each in (layer.weight.detach(), layer.bias)]


@pytest.mark.parametrize(
    ("call", "kept", "batches"),
    [
        *(("compensate", kept, 3) for kept in KEPT),
        *(("refine", kept, 3) for kept in KEPT),
        *(("recalibrate_bn", kept, 3) for kept in KEPT),
        ("compensate", "appended", 34),
        ("compensate", "buffer written into", 34),
        ("recalibrate_bn", "in a dict", 34),
    ],
)
def test_what_a_module_keeps_is_swapped_between_batches_that_take_turns(call: str, kept: str, batches: int) -> None:
    found = []
    for each in ("local", kept):
        model, data = skipping(each, batches)
        if call == "compensate":
            tpe.compensate(model, data, tpe.prunable_parameters(model), progress=False)
        elif call == "recalibrate_bn":
            tpe.recalibrate_bn(model, data, progress=False)
        else:
            tpe.refine(
                model, data, blocks=list("abcd"), epochs=2, optimizer=lambda p: torch.optim.SGD(p, 0.1), progress=False
            )
        found.append([*weights(model), model.bn.running_mean, model.bn.running_var])
        assert (model.skips, model.cache, model.skip, model.rebound) == ([], {}, None, None)
        assert not model.written.any()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


class Scaled(nn.Module):
    """A block that multiplies by what its parent has put on it, or by what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(8, 8), None

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return x + torch.relu(self.linear(x)) * (self.scale if scale is None else scale)


class Parent(nn.Module):
    def __init__(self, *, attribute: bool) -> None:
        super().__init__()
        self.blocks, self.attribute = nn.ModuleList([Scaled(), Scaled()]), attribute

    def forward(self, x: Tensor) -> Tensor:
        scale = 10 * x.mean()
        for block in self.blocks:
            block.scale = scale if self.attribute else None
        for block in self.blocks:
            x = block(x) if self.attribute else block(x, scale)
        for block in self.blocks:
            block.scale = None
        return x


def test_a_block_is_fitted_with_the_attributes_of_each_batch() -> None:
    found = []
    for attribute in (False, True):
        torch.manual_seed(0)
        model = Parent(attribute=attribute)
        data = [torch.randn(16, 8) + number % 3 for number in range(6)]
        tpe.global_unstructured(tpe.prunable_parameters(model), target_sparsity=0.5)
        done = tpe.refine(
            model, data, list(model.blocks), epochs=3, optimizer=lambda p: torch.optim.Adam(p, 1e-2), progress=False
        )
        found.append([done.model.after, *(block.after for block in done.blocks)])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize("whole", [False, True])
def test_refining_under_autocast_sees_the_new_values(whole: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    data = list(torch.randn(256, 8).split(32))
    tpe.global_unstructured(tpe.prunable_parameters(model), target_sparsity=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        model(data[0])  # casts are cached from here on
        done = tpe.refine(
            model, data, epochs=8, whole=whole, optimizer=lambda p: torch.optim.Adam(p, 1e-2), progress=False
        )
        assert torch.is_autocast_cache_enabled()
    assert done.model.after < 0.7 * done.model.before


def test_a_model_pruned_outside_of_autocast_has_not_changed_inside() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    params = tpe.prunable_parameters(model)
    tpe.global_unstructured(params, target_sparsity=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        tpe.compensate(model, [torch.randn(64, 8)], params, progress=False)


def masked(fill: float) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """Return a model and data whose last samples, of value ``fill``, do not count."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    counts = torch.tensor([True] * 15 + [False])
    data = [torch.where(counts[:, None], torch.randn(16, 8), fill) for _ in range(8)]
    return model, [(x, counts.clone()) for x in data]


OPTIONS = {"prepare": lambda raw: (raw[0], None), "sample_mask": lambda raw: raw[1], "progress": False}


@pytest.mark.parametrize("whole", [False, True])
def test_nan_in_a_batch_that_is_fitted_to_is_refused(whole: bool) -> None:
    model, data = masked(0.0)
    tpe.global_unstructured(tpe.prunable_parameters(model), target_sparsity=0.5)
    before = model[0].weight_orig.clone()
    data[1][0][0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        tpe.refine(model, data, whole=whole, epochs=2, **OPTIONS)
    assert torch.equal(model[0].weight_orig, before)


def test_nan_in_samples_that_do_not_count_is_refused_where_it_gets_into_gradients() -> None:
    model, data = masked(float("nan"))
    params = tpe.prunable_parameters(model)
    with pytest.raises(ValueError, match="sample_mask leaves out"):
        tpe.prune_and_compensate(model, data, params, target_sparsity=0.5, allocation="auto", **OPTIONS)
    tpe.global_unstructured(params, target_sparsity=0.5)
    with pytest.raises(ValueError, match="sample_mask leaves out"):
        tpe.refine(model, data, epochs=2, **OPTIONS)


def test_a_fit_that_diverges_keeps_what_was_there() -> None:
    model, data = masked(0.0)
    tpe.global_unstructured(tpe.prunable_parameters(model), target_sparsity=0.5)
    before = model[0].weight_orig.clone()
    done = tpe.refine(model, data, optimizer=lambda p: torch.optim.SGD(p, 1e30), **OPTIONS)
    assert done.model.best == 0
    assert torch.equal(model[0].weight_orig, before)


def test_batches_kept_aside_that_do_not_count_are_passed_over() -> None:
    model, data = masked(0.0)
    data[0][1][:] = False
    params = tpe.prunable_parameters(model)
    fits = tpe.prune_and_compensate(model, data, params, target_sparsity=0.5, allocation="auto", **OPTIONS)
    assert all(error > 0 for error in fits.rounds)
    model, data = masked(0.0)
    data[0][1][:] = data[4][1][:] = False
    params = tpe.prunable_parameters(model)
    with pytest.raises(ValueError, match="keeps one of"):
        tpe.prune_and_compensate(model, data, params, target_sparsity=0.5, allocation="auto", **OPTIONS)


@dataclass
class Out:
    """What some models return."""

    logits: Tensor


class Returning(nn.Sequential):
    def forward(self, x: Tensor) -> Out:
        return Out(super().forward(x))


def test_shares_by_output_read_a_dataclass() -> None:
    rounds = []
    for kind in (nn.Sequential, Returning):
        torch.manual_seed(0)
        model = kind(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        data, params = list(torch.randn(64, 8).split(16)), tpe.prunable_parameters(model)
        fits = tpe.prune_and_compensate(model, data, params, target_sparsity=0.5, allocation="auto", progress=False)
        rounds.append(fits.rounds)
    assert rounds[0] == rounds[1]
