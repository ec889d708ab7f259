"""What scales and shifts the channels of a layer's output on its way to a sum: as if it were part of the layer."""

import pytest
import torch
from compensating import (
    MARKS,
    best_row,
    close,
    columns,
    compensate,
    data,
    in_both,
    matrix,
    names,
    pairs,
    prune_and_compensate,
    rows,
    sparsegpt,
    watch,
)
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe
from torchprune_ext.compensation import coroutines, solvers

pytestmark = [*MARKS, pytest.mark.usefixtures("to_the_end")]


# ------------------------------------------------------------------------------------------------------------- models


class LayerScale(nn.Module):
    """As vision transformers have it."""

    def __init__(self, channels):
        super().__init__()
        self.gamma = nn.Parameter(torch.linspace(0.1, -0.5, channels))

    def forward(self, x):
        return x * self.gamma


class FrozenBatchNorm(nn.Module):
    """As detectors have it: buffers, and arithmetic of its own."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("weight", torch.linspace(0.5, 2, channels))
        self.register_buffer("bias", torch.linspace(-1, 1, channels))

    def forward(self, x):
        return x * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


class Block(nn.Module):
    """A layer before, and a layer whose output is scaled and added to what the block gets."""

    def __init__(self, after=nn.Identity):
        super().__init__()
        self.up, self.down, self.after = self.layer(4, 8), self.layer(8, 4), after()

    def layer(self, inputs, outputs):
        return nn.Conv2d(inputs, outputs, 3, padding=1)

    def forward(self, x):
        return self.join(x, self.down(torch.tanh(self.up(x))))

    def join(self, x, y):
        return x + self.after(y)

    def scaled(self, y):
        """Return what becomes of the output."""
        return self.after(y)


class NoBias(Block):
    def layer(self, inputs, outputs):
        return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)


class InPlace(Block):
    def join(self, x, y):
        y = self.after(y)
        y += x
        return y * 2


class Tokens(Block):
    def layer(self, inputs, outputs):
        return nn.Linear(inputs, outputs)


class Halved(Block):
    def join(self, x, y):
        return x + 0.5 * self.after(y)

    def scaled(self, y):
        return self.after(y) / 2


class Divided(Halved):
    def join(self, x, y):
        return self.after(y) / 2 + x


class Half(Tokens):
    def join(self, x, y):
        return x + y.mul(-0.5)

    def scaled(self, y):
        return -y / 2


class Dropped(Block):
    def join(self, x, y):
        return x + nn.functional.dropout(self.after(y), 0.5, self.training)


def batch_norm(dims=2):
    """Return a BatchNorm whose channels differ; one is dead, and one negative."""
    layer = (nn.BatchNorm1d if dims == 1 else nn.BatchNorm2d)(4)
    layer.running_mean.copy_(torch.tensor([0.5, -1.0, 0.0, 2.0]))
    layer.running_var.copy_(torch.tensor([0.3, 1.0, 4.0, 2.0]))
    layer.weight.data = torch.tensor([1.5, -0.7, 0.0, 0.02])
    layer.bias.data = torch.tensor([0.2, 0.0, -1.0, 0.5])
    return layer


def pruned_norm():
    layer = batch_norm()
    prune.custom_from_mask(layer, "weight", torch.tensor([1.0, 0.0, 1.0, 1.0]))
    return layer


IMAGES, ROWS, TOKENS = (4, 5, 5), (4,), (3, 4)
SUMS = {
    "BatchNorm": (Block, batch_norm, IMAGES),
    "no bias": (NoBias, batch_norm, IMAGES),
    "BatchNorm of rows": (Tokens, lambda: batch_norm(1), ROWS),
    "in place": (InPlace, batch_norm, IMAGES),
    "in a Sequential": (Block, lambda: nn.Sequential(batch_norm(), nn.Dropout(0.5)), IMAGES),
    "two": (Block, lambda: nn.Sequential(batch_norm(), FrozenBatchNorm(4)), IMAGES),
    "frozen": (NoBias, lambda: FrozenBatchNorm(4), IMAGES),
    "without parameters": (Block, lambda: nn.BatchNorm2d(4, affine=False), IMAGES),
    "pruned": (Block, pruned_norm, IMAGES),
    "LayerScale": (Tokens, lambda: LayerScale(4), TOKENS),
    "a number": (Half, nn.Identity, TOKENS),
    "a number too": (Halved, batch_norm, IMAGES),
    "a quotient too": (Divided, batch_norm, IMAGES),
    "dropout": (Dropped, batch_norm, IMAGES),
}


class WithReLU(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class Clipped(LayerScale):
    """Scales all but what is far."""

    def forward(self, x):
        return super().forward(x).clamp(-0.05, 0.05)


class Counting(LayerScale):
    """Is another with every call."""

    def forward(self, x):
        self.gamma.data *= 1.5
        return super().forward(x)


class InItself(LayerScale):
    def forward(self, x):
        return x.mul_(self.gamma)


class Looked(Block):
    def join(self, x, y):
        return x + self.after(y) + 0.1 * torch.tanh(y)


class Twice(Block):
    def join(self, x, y):
        return x + self.after(y) + self.after(y)


class Both(Block):
    def join(self, x, y):
        return x + self.after(y) + 0.5 * y


class First(Block):
    def join(self, x, y):
        return (x + y) + self.after(y)


class Halves(Tokens):
    def join(self, x, y):
        return x + y * 0.5 + y * 0.25


class Itself(Tokens):
    def join(self, x, y):
        y *= 0.5
        return x + y


class Floored(Tokens):
    def join(self, x, y):
        return x + torch.div(y, 0.1, rounding_mode="floor")


class Given(Tokens):
    """Is scaled by what the data says."""

    def join(self, x, y):
        return x + y * x.std()


class Held(Block):
    def join(self, x, y):
        self.last = self.after(y)
        return x + self.last


OTHERS = {
    "activation in it": (Block, lambda: WithReLU(4), IMAGES),
    "activation behind": (Block, lambda: nn.Sequential(batch_norm(), nn.Tanh()), IMAGES),
    "of the batch": (Block, lambda: nn.BatchNorm2d(4, track_running_stats=False), IMAGES),
    "LayerNorm": (Tokens, lambda: nn.LayerNorm(4), TOKENS),
    "PReLU": (Block, lambda: nn.PReLU(4), IMAGES),
    "clipped": (Tokens, lambda: Clipped(4), TOKENS),
    "in itself": (Tokens, lambda: InItself(4), TOKENS),
    "looked at": (Looked, batch_norm, IMAGES),
    "twice": (Twice, batch_norm, IMAGES),
    "beside": (Both, batch_norm, IMAGES),
    "before": (First, batch_norm, IMAGES),
    "halves": (Halves, nn.Identity, TOKENS),
    "itself": (Itself, nn.Identity, TOKENS),
    "floored": (Floored, nn.Identity, TOKENS),
    "by the data": (Given, nn.Identity, TOKENS),
    "held": (Held, batch_norm, IMAGES),
}


def two_of(block, after, shape):
    """Return two blocks and a head."""
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)] if shape == IMAGES else [nn.Linear(4, 3)]
    return lambda: nn.Sequential(block(after), block(after), *head)


def built(case):
    """Return the model as it is made; ``build`` would give its BatchNorms other values."""
    torch.manual_seed(0)
    return two_of(*case)().double().eval()


# --------------------------------------------------------------------------------------------------------- the oracle


def affine(block, y):
    """Return by what the block multiplies each channel of an output like ``y``, and what it adds."""
    shift, one = (block.scaled(each).detach() for each in (torch.zeros_like(y[:1]), torch.ones_like(y[:1])))
    axis = 1 if isinstance(block.down, nn.Conv2d) else -1
    return [each.movedim(axis, -1).reshape(-1, 4)[0] for each in (one - shift, shift)]


def by_definition(model, dense, masks, batches, sums):
    """Fit a plain model layer by layer, row by row, and return the errors after."""
    errors = []
    for name, mask in zip(names(model), masks, strict=True):
        model.get_submodule(name).weight.data *= mask
    for name, mask in zip(names(model), masks, strict=True):
        layer = model.get_submodule(name)
        x, _, y = in_both(model, dense, name, batches)
        x, y, scale = columns(layer, x)[0], rows(layer, y)[0], torch.ones(len(layer.weight)).double()
        if sums and name.endswith("down"):
            blocks = [net.get_submodule(name.removesuffix(".down")) for net in (model, dense)]
            raw = watch(dense, dense.get_submodule(name), batches)[1]
            (scale, shift), (other, others) = (affine(block, raw) for block in blocks)
            theirs, ours = (
                rows(layer, watch(net, block, batches)[0])[0] for net, block in zip((model, dense), blocks, strict=True)
            )
            counts = scale.abs() > 1e-3 * scale.abs().max()
            wanted = y * other + others - shift
            wanted[: len(ours)] += ours - theirs
            y = torch.where(counts, wanted / torch.where(counts, scale, 1), y)
        weight = matrix(layer, layer.weight.data)[0].clone()
        bias = torch.zeros(len(weight)).double() if layer.bias is None else layer.bias.data
        for row in range(len(weight)):
            keep, fixed = matrix(layer, mask)[0, row] != 0, bias[row] if layer.bias is None else None
            weight[row], bias[row] = best_row(x, y[:, row], weight[row].clone(), keep, fixed, solvers.RIDGE)
        layer.weight.data = weight.reshape(layer.weight.shape)
        off = ((x @ weight.t() + bias - y) * scale).square().sum()
        errors.append(float(off / ((y - y.mean(0)) * scale).square().sum()))
    return errors


def same_as_definition(case, sums, change=None, sizes=(20, 13)):
    model, plain, dense = (built(case) for _ in range(3))
    batches = data(case[2], sizes)
    for each in (model, plain) if change else ():
        change(each)
    for module, name in pairs(model):
        prune.random_unstructured(module, name, amount=0.5)
    errors = by_definition(plain, dense, [m.weight_mask for m, _ in pairs(model)], batches, sums)
    fits = compensate(model, batches, pairs(model), dense=dense if change else None)
    for name in names(model):
        found, wanted = model.get_submodule(name), plain.get_submodule(name)
        close(found.weight.detach(), wanted.weight.detach())
        if found.bias is not None:
            close(found.bias.detach(), wanted.bias.detach())
    torch.testing.assert_close([fit.after for fit in fits.values()], errors, rtol=1e-6, atol=1e-9)


# -------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("window", [coroutines.WINDOW, 0])
@pytest.mark.parametrize("name", SUMS)
def test_against_the_definition(name, window, monkeypatch):
    monkeypatch.setattr(coroutines, "WINDOW", window)
    same_as_definition(SUMS[name], True)


@pytest.mark.parametrize("name", OTHERS)
def test_whatever_else_is_done_with_an_output_leaves_it_as_it_is(name):
    same_as_definition(OTHERS[name], False)


def other_statistics(model):
    """Change what the BatchNorms do, as an estimate of their statistics under the masks does."""
    for block in model[:2]:
        block.after.running_mean.add_(0.3)
        block.after.running_var.mul_(1.7)


@pytest.mark.parametrize("name", ["BatchNorm", "no bias", "in place", "a number too"])
def test_another_batch_norm_than_that_of_the_dense_model_is_made_up_for(name):
    same_as_definition(SUMS[name], True, other_statistics)


def folded(model):
    """Return the same function with what scales in the layers themselves."""
    with torch.no_grad():
        for block in model[:2]:
            scale, shift = affine(block, torch.zeros(1, 4, 5, 5, dtype=torch.float64))
            block.down.weight *= scale.view(-1, 1, 1, 1)
            block.down.bias.mul_(scale).add_(shift)
            block.after = nn.Identity()
    return model


def alive():
    """Return a BatchNorm without dead channels, whose layers would give nothing."""
    layer = batch_norm()
    layer.weight.data = torch.tensor([1.5, -0.7, 0.3, 0.02])
    return layer


def masks_and_errors(call, folding):
    model = built((Block, alive, IMAGES))
    model = folded(model) if folding else model
    fits = call(model, data(IMAGES, (20, 13)), pairs(model))
    masks = [getattr(module, "weight_mask", None) for module, _ in pairs(model)]
    return masks, [(fit.before, fit.after) for fit in fits.values()], model


CALLS = {
    **{
        f"{criterion}, {goal}": (criterion, goal)
        for criterion in ("admm", "obs", "wanda", "magnitude")
        for goal in ("half", "2:4")
    },
    "obs, units": ("obs", "units"),
    "admm, units": ("admm", "units"),
    "shares": ("admm", "shares"),
    "macs": (None, "macs"),
}


@pytest.mark.parametrize("name", CALLS)
def test_it_is_as_if_it_were_part_of_the_layer(name):
    criterion, goal = CALLS[name]

    def call(model, batches, params):
        more = {
            "half": {"target_sparsity": 0.5},
            "2:4": {"pattern": tpe.NM(2, 4)},
            "units": {"target_sparsity": 0.4, "unit": tpe.Channel(dim=1)},
            "shares": {"target_sparsity": 0.4, "allocation": "auto"},
            "macs": {"target_macs": 0.6},
        }[goal]
        return prune_and_compensate(model, batches, params, **({"criterion": criterion} if criterion else {}), **more)

    (ours, errors, model), (theirs, others, _) = (masks_and_errors(call, folding) for folding in (False, True))
    for one, other in zip(ours, theirs, strict=True):
        assert one is other is None or torch.equal(one, other)
    assert any(mask is not None and not mask.all() for mask in ours)
    torch.testing.assert_close(errors, others, rtol=1e-5, atol=1e-9)
    batches = data(IMAGES, (20, 13))
    _, _, other = masks_and_errors(call, True)
    for x, _ in batches:
        torch.testing.assert_close(model(x), other(x), rtol=1e-4, atol=1e-6)


def test_sparsegpt_does_not_look_at_sums():
    found = []
    for after in (alive, nn.Identity):
        model = built((Block, after, IMAGES))
        sparsegpt(model, data(IMAGES, (20, 13)), pairs(model)[:2], target_sparsity=0.5)
        found.append(model[0].down.weight.detach().clone())
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes(dtype):
    model, batches = built((Block, alive, IMAGES)).to(dtype), data(IMAGES, (20, 13), dtype=dtype)
    expected, exact = built((Block, alive, IMAGES)), data(IMAGES, (20, 13))
    for each in (model, expected):
        each.load_state_dict({name: value.to(torch.float16) for name, value in expected.state_dict().items()})
    for one, other in zip(pairs(model), pairs(expected), strict=True):
        mask = torch.rand(one[0].weight.shape) < 0.5
        for module, name in (one, other):
            prune.custom_from_mask(module, name, mask)
    fits, others = (compensate(net, loader, pairs(net)) for net, loader in ((model, batches), (expected, exact)))
    off = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    for one, other in zip(fits.values(), others.values(), strict=True):
        torch.testing.assert_close(one.after, other.after, rtol=5 * off, atol=off / 10)


class Uneven(Tokens):
    """Scales by what depends on the size of the batch."""

    def join(self, x, y):
        return x + y * (0.5 if len(x) > 15 else 0.25)


def test_a_scaling_that_is_another_in_some_batches_is_no_sum():
    same_as_definition((Uneven, nn.Identity, TOKENS), False)
