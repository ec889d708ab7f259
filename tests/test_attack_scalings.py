"""What only looks as if it scaled a layer's output, and modules that cannot be asked with a sample of it."""

import copy

import pytest
import torch
from compensating import MARKS, data, pairs, prune_and_compensate
from test_scaled_sums import IMAGES, ROWS, TOKENS, Block, LayerScale, Tokens, built, same_as_definition
from torch import nn

from torchprune_ext.compensation import residuals

pytestmark = [*MARKS, pytest.mark.usefixtures("to_the_end")]


class Largest(LayerScale):
    """Divides by the largest size: a constant goes to 1."""

    def forward(self, x):
        return x / x.abs().max() * self.gamma


class Gain(LayerScale):
    """Scales by what its parent says too."""

    gain = 1.0

    def forward(self, x):
        return super().forward(x) * self.gain


class Keeps(LayerScale):
    """Keeps what it gives, for others to read."""

    def forward(self, x):
        self.last = super().forward(x)
        return self.last


class InEights(LayerScale):
    """Takes whole batches only."""

    def forward(self, x):
        return super().forward(x.view(4, -1, 4)).view(x.shape)


class Item(Tokens):
    def join(self, x, y):
        return x + y * x.std().item()


class SetsGain(Tokens):
    def join(self, x, y):
        self.after.gain = x.std()
        return x + self.after(y)


class ReadsKept(Tokens):
    def join(self, x, y):
        return x + self.after(y) + self.after.last.mean(0)


OTHERS = {
    "a number that the data says": (Item, nn.Identity, TOKENS),
    "the largest": (Tokens, lambda: Largest(4), TOKENS),
    "a gain that the data says": (SetsGain, lambda: Gain(4), TOKENS),
    "kept": (ReadsKept, lambda: Keeps(4), TOKENS),
    "of the batch, in rows": (Tokens, lambda: nn.BatchNorm1d(4, track_running_stats=False), ROWS),
    "all off": (Block, lambda: nn.BatchNorm2d(4).apply(lambda layer: nn.init.zeros_(layer.weight)), IMAGES),
    "next to nothing": (Tokens, lambda: nn.BatchNorm1d(4).apply(lambda m: nn.init.constant_(m.weight, 1e-6)), ROWS),
}


@pytest.mark.parametrize("sizes", [(20, 13), (20, 20)])  # with others or without, for another look
@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_scaling_leaves_a_layer_as_it_is(name, sizes):
    same_as_definition(OTHERS[name], False, sizes=sizes)


def test_a_module_that_takes_whole_batches_only_is_no_scaling():
    model = built((Tokens, lambda: InEights(4), ROWS))
    prune_and_compensate(model, data(ROWS, (20, 12)), pairs(model), target_sparsity=0.5)


def doubling(module):
    module.register_forward_hook(lambda _, inputs, output: output * 2.0)
    return module


class Doubled(Tokens):
    def join(self, x, y):
        return x + self.after(y) * 2.0


def test_what_a_hook_does_counts_once_and_hooks_see_the_models_own_calls_only():
    hooked, plain = (
        built((Tokens, lambda: doubling(LayerScale(4)), TOKENS)),
        built((Doubled, lambda: LayerScale(4), TOKENS)),
    )
    sizes = set()
    hooked[0].after.register_forward_hook(lambda _, inputs, output: sizes.add(len(inputs[0])))
    for model in (hooked, plain):
        prune_and_compensate(model, data(TOKENS, (20, 13)), pairs(model), target_sparsity=0.5)
    for (one, _), (other, _) in zip(pairs(hooked), pairs(plain), strict=True):
        torch.testing.assert_close(one.weight, other.weight)
    assert sizes <= {20, 13, 40, 26}


class Inference(Tokens):
    def forward(self, x):
        with torch.inference_mode():
            return super().forward(x)


@pytest.mark.parametrize("after", [nn.Identity, lambda: LayerScale(4)])
def test_a_block_in_inference_mode(after):
    model = built((Inference, after, TOKENS))
    fits = prune_and_compensate(model, data(TOKENS, (20, 13)), pairs(model), target_sparsity=0.5)
    assert all(0 < fit.after < 1 for fit in fits.values())


@pytest.mark.parametrize("sizes", [((3, 4), (4,)), ((4,), (3, 4))])
def test_batches_with_other_axes(sizes):
    model = built((Tokens, lambda: LayerScale(4), TOKENS))
    batches = [(torch.randn(20, *size, dtype=torch.float64), None) for size in sizes]
    flat = [(x.flatten(0, -2), None) for x, _ in batches]
    other = copy.deepcopy(model)
    for each, loader in ((model, batches), (other, flat)):
        prune_and_compensate(each, loader, pairs(each), target_sparsity=0.5)
    torch.testing.assert_close(model.state_dict(), other.state_dict())


class Number(Tokens):
    """Is scaled by a number that is a parameter."""

    def __init__(self, after):
        super().__init__(after)
        self.alpha = nn.Parameter(torch.tensor(0.5))

    def join(self, x, y):
        return x + y * self.alpha.item()

    def scaled(self, y):
        return y * self.alpha


def other_number(model):
    for block in model[:2]:
        block.alpha.data.fill_(0.75)


def test_a_number_that_is_another_in_the_dense_model_is_no_scaling():
    same_as_definition((Number, nn.Identity, TOKENS), False, other_number)


class Odd:
    """Two, the first of which has tensors that are a little larger."""

    group = object()

    def of_all(self, *numbers):
        return torch.tensor([numbers, numbers])

    def first(self, tensor):
        return tensor if tensor.dtype == torch.bool else tensor + 1e-9


def test_all_ranks_scale_as_the_first():
    model = built((Tokens, lambda: LayerScale(4), TOKENS))
    found = []
    agree = residuals.Residuals.agree

    def also(self, ranks):
        before = dict(self.scalings)
        agree(self, Odd())
        found.extend((before[layer].scale, each.scale) for layer, each in self.scalings.items())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(residuals.Residuals, "agree", also)
        prune_and_compensate(model, data(TOKENS, (20, 13)), pairs(model), target_sparsity=0.5)
    assert len(found) == 2
    assert all(torch.equal(mine + 1e-9, taken) for mine, taken in found)


def test_half_precision_stays_finite_where_next_to_nothing_is_added():
    torch.manual_seed(0)
    little = nn.BatchNorm1d(4)
    nn.init.constant_(little.weight, 1e-5)
    model = nn.Sequential(Tokens(), Tokens(lambda: little), nn.Linear(4, 3)).eval().half()
    batches = [(x * 60, None) for x, _ in data(ROWS, (40, 30), dtype=torch.float16)]
    prune_and_compensate(model, batches, pairs(model), target_sparsity=0.7)
    assert all(module.weight.isfinite().all() and module.weight.abs().max() < 100 for module, _ in pairs(model))


def test_what_modules_keep_is_as_before():
    model = built((Tokens, lambda: Keeps(4), TOKENS))
    prune_and_compensate(model, data(TOKENS, (20, 13)), pairs(model), target_sparsity=0.5)
    assert not {"last", "forward"} & vars(model[0].after).keys()


class Derived(LayerScale):
    """Keeps what it has made of its parameter."""

    kept = None

    def forward(self, x):
        if self.kept is None:
            self.kept = 2 * self.gamma
        return x * self.kept


class Doubling(LayerScale):
    def forward(self, x):
        return x * (2 * self.gamma)


def test_what_a_module_derives_from_its_tensors_is_derived_anew_in_the_dense_model():
    models = [built((Tokens, lambda scale=scale: scale(4), TOKENS)) for scale in (Derived, Doubling)]
    for model in models:
        dense = copy.deepcopy(model)
        for block in dense[:2]:
            block.after.gamma.data *= 1.5
        prune_and_compensate(model, data(TOKENS, (20, 13)), pairs(model), target_sparsity=0.5, dense=dense)
    for (one, _), (other, _) in zip(*map(pairs, models), strict=True):
        torch.testing.assert_close(one.weight, other.weight)
