"""What counts as a layer: convolutions with a forward of their own, experts with and without data."""

import copy

import pytest
import torch
import torch.nn.functional as F
from compensating import MARKS, best_row, build, close, compensate, data, in_both, prune_and_compensate, sparsegpt
from snapshots import Snapshot
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe
from torchprune_ext.compensation.solvers import RIDGE

pytestmark = MARKS


class SamePadding(nn.Conv2d):
    """Pads before it convolves, more behind than before, as a TensorFlow convolution does."""

    def forward(self, x):
        pads = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Activating(nn.Conv1d):
    def forward(self, x):
        return F.relu(super().forward(2 * x)) + 1


class Keywords(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(input=x, weight=self.weight, bias=self.bias, padding=1, groups=self.groups)


class Through(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x.flip(-1), weight, bias)


CONVOLUTIONS = {
    "pads by itself": (lambda: SamePadding(2, 3, 3, stride=2), (2, 6, 5)),
    "pads by itself, depthwise": (lambda: SamePadding(4, 4, (3, 2), groups=4), (4, 5, 5)),
    "activates": (lambda: Activating(2, 4, 3, stride=2, padding=1), (2, 9)),
    "by keywords": (lambda: Keywords(4, 6, 3, groups=2, bias=False), (4, 5, 5)),
    "by _conv_forward": (lambda: Through(2, 3, 3, padding="same", padding_mode="circular"), (2, 5, 4)),
}


def seen_by(module, x):
    """Return what reaches the convolution of ``module`` as rows (groups, places, inputs), and what comes out of it."""
    found = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func in (torch.conv1d, torch.conv2d):
                found.append(
                    (func, dict(zip(("input", "weight", "bias", *OPTIONS), args, strict=False), **kwargs or {}), out)
                )
            return out

    with Watch(), torch.no_grad():
        module(x)
    [(func, given, out)] = found
    options = {key: given[key] for key in OPTIONS if key in given}
    weight, groups = module.weight.detach(), module.groups
    columns = []
    for k in range(weight[0].numel()):  # one entry at a time
        one = torch.zeros_like(weight[0]).flatten()
        one[k] = 1
        each = func(given["input"], one.view_as(weight[0]).expand_as(weight).contiguous(), None, **options)
        columns.append(
            each.detach().flatten(2).movedim(1, 0).reshape(groups, -1, each.shape[0] * each[0, 0].numel())[:, 0]
        )
    y = out.detach().flatten(2).movedim(1, 0)
    return torch.stack(columns, -1), y.reshape(groups, y.shape[0] // groups, -1).mT


OPTIONS = ("stride", "padding", "dilation", "groups")


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.usefixtures("to_the_end")
def test_a_convolution_with_a_forward_of_its_own_gets_what_least_squares_gives(name):
    make, shape = CONVOLUTIONS[name]
    model, dense, batches = build(make), build(make), data(shape, (12, 12))
    prune.random_unstructured(model, "weight", amount=0.5)
    mask = model.weight_mask.flatten(1).view(model.groups, -1, model.weight[0].numel()) != 0
    start = model.weight.detach().reshape(mask.shape)
    x, y = (torch.cat(parts, 1) for parts in zip(*(seen_by(dense, x) for x, _ in batches), strict=True))
    fits = compensate(model, batches, [(model, "weight")])
    for group in range(model.groups):
        for out in range(mask.shape[1]):
            fixed = None if model.bias is not None else torch.zeros(()).double()
            row, bias = best_row(x[group], y[group, :, out], start[group, out], mask[group, out], fixed, RIDGE)
            close(model.weight.detach().reshape(mask.shape)[group, out], row)
            if model.bias is not None:
                close(model.bias.detach().view(model.groups, -1)[group, out], bias)
    assert fits[model, "weight"].after < fits[model, "weight"].before


@pytest.mark.parametrize("call", [prune_and_compensate, sparsegpt])
def test_such_convolutions_are_pruned_by_all_calls(call):
    for make, shape in CONVOLUTIONS.values():
        model = build(lambda make=make: nn.Sequential(make(), nn.ReLU()))
        fits = call(model, data(shape, (20,)), [(model[0], "weight")], target_sparsity=0.5)
        assert 0 < fits[model[0], "weight"].after < 1


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class BiasElsewhere(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight) + self.bias.view(1, -1, 1, 1)


class Twice(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias) + F.conv2d(2 * x, self.weight, self.bias)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (Standardised, TypeError, "Standardised, which does not multiply with its weight"),
        (BiasElsewhere, TypeError, "BiasElsewhere, which does not multiply"),
        (Twice, ValueError, "more than once"),
    ],
)
def test_what_is_not_the_product_with_the_weight_is_refused_by_name(make, error, words):
    model = build(lambda: make(2, 3, 3))
    before = Snapshot(model)
    for call in (prune_and_compensate, sparsegpt):
        with pytest.raises(error, match=words):
            call(model, data((2, 5, 5)), [(model, "weight")], target_sparsity=0.5)
    assert not before.differences()


def test_a_sample_without_a_batch_axis():
    model, dense = build(lambda: nn.Conv2d(2, 3, 3)), build(lambda: nn.Conv2d(2, 3, 3))
    batches = [(x[0], None) for x, _ in data((2, 6, 6), (1,) * 8)]
    fits = prune_and_compensate(model, batches, [(model, "weight")], target_sparsity=0.5)
    y, found = (torch.cat([net(x).detach().flatten(1) for x, _ in batches], 1) for net in (dense, model))
    true = (found - y).square().sum() / (y - y.mean(1, keepdim=True)).square().sum()
    assert fits[model, "weight"].after == pytest.approx(float(true), rel=1e-6)


# ------------------------------------------------------------------------------------------------------------ routing


class Experts(nn.Module):
    """Sends each row to the expert that a router chooses."""

    def __init__(self, experts=3, after=True):
        super().__init__()
        self.first, self.router = nn.Linear(4, 4), nn.Linear(4, experts)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(experts))
        self.last, self.after = nn.Linear(4, 2), after

    def forward(self, x):
        h = torch.tanh(self.first(x)) if self.after else x
        chosen = self.router(h).argmax(-1)
        out = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            if bool((chosen == number).any()):
                out[chosen == number] = expert(h[chosen == number])
        return self.last(h + out)


def test_experts_whose_tokens_the_two_models_disagree_about_are_refused():
    model = build(Experts)
    before = Snapshot(model)
    params = [(m, "weight") for m in model.modules() if isinstance(m, nn.Linear) and m is not model.router]
    with pytest.raises(ValueError, match=r"experts\.\d\.weight gets an input.*depends on the weights"):
        prune_and_compensate(model, data((4,), (40,)), params, target_sparsity=0.5)
    assert not before.differences()
    rest = [(model.first, "weight"), (model.last, "weight")]
    prune_and_compensate(model, data((4,), (40,)), rest, target_sparsity=0.5)


def test_experts_that_a_fixed_router_feeds_are_fitted():
    model = build(lambda: Experts(after=False))
    dense, batches = copy.deepcopy(model), data((4,), (60,))
    params = [(expert, "weight") for expert in model.experts] + [(model.last, "weight")]
    fits = prune_and_compensate(model, batches, params, target_sparsity=0.5)
    _, found, y = in_both(model, dense, "last", batches)
    assert fits[model.last, "weight"].after == pytest.approx(
        float((found - y).square().sum() / (y - y.mean(0)).square().sum()), rel=1e-6
    )
    assert sum(fits[expert, "weight"].rows for expert in model.experts) == 60


@pytest.mark.parametrize("empty", [False, True])
def test_an_expert_without_data_is_refused_by_name(empty):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x) + (self.unused(x[:0]).sum() if empty else 0)

    model = build(Fixed)
    params = tpe.prunable_parameters(model)
    before = Snapshot(model)
    for call in (prune_and_compensate, sparsegpt):
        with pytest.raises(ValueError, match=r"unused\.weight, (whose module is never called|which no row of data)"):
            call(model, data((4,), (20,)), params, target_sparsity=0.5)
    assert not before.differences()


@pytest.mark.filterwarnings("error:fewer rows")
def test_a_layer_that_too_little_data_reaches_is_named():
    model = build(lambda: nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 2)))
    params = tpe.prunable_parameters(model)
    with pytest.warns(UserWarning, match=r"0\.weight \(7 of 8\), so") as caught:
        fits = prune_and_compensate(model, data((8,), (7,)), params, target_sparsity=0.5)
    assert len(caught) == 1
    assert [fit.rows for fit in fits.values()] == [7, 7]
    prune_and_compensate(
        model,
        data((8,), (8,)),
        params,
        target_sparsity=0.6,
        dense=build(lambda: nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 2))),
    )
