"""Batches of any kind give what one gives, and reported errors are those of the model that comes out."""

import contextvars
import copy

import pytest
import torch
import torch.nn.functional as F
from compensating import (
    ALL,
    DEEP,
    MARKS,
    Branching,
    Positions,
    Remembering,
    Table,
    Tokens,
    build,
    close,
    compensate,
    data,
    equal,
    in_both,
    mlp,
    names,
    never_worse,
    pairs,
    pruned,
    two,
    weights,
    with_memory,
    with_positions,
)
from snapshots import Snapshot
from torch import nn
from torch.nn.utils import parametrize, prune

import torchprune_ext as tpe

pytestmark = MARKS

# ---------------------------------------------------------------------------------------------------------- the data


@pytest.mark.usefixtures("to_the_end")
@pytest.mark.parametrize("name", ["linear", "linear, tokens", "strided", *(f"deep {name}" for name in DEEP)])
def test_batches_of_any_size_give_what_one_gives(name):
    found = []
    for sizes in [(40,), (20, 20), (1, 17, 3, 19)]:
        model, params = pruned(name)
        compensate(model, data(ALL[name][1], sizes), params)
        found.append(weights(model))
    for other in found[1:]:
        close(other, found[0])


def test_generators_dictionaries_prepare_and_max_batches_give_the_same():
    batches = data((6,), (20, 9, 11))

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x, scale=1.0):
            return self.net(x) * scale

    def run(loader, **options):
        model = build(Named)
        for module, name in pairs(model):
            prune.l1_unstructured(module, name, amount=0.5)
        compensate(model, loader, pairs(model), **options)
        return weights(model)

    first = run(batches)
    equal(run(batch for batch in batches), first)
    equal(run([{"x": x} for x, _ in batches]), first)
    equal(run([{"x": x, "scale": torch.full((len(x), 1), 2.0)} for x, _ in batches]), first)
    equal(run([((x,), None) for x, _ in batches]), first)
    equal(run([x for x, _ in batches], prepare=lambda x: (x, None)), first)
    drawn = []

    def endless():
        for batch in [*batches, *batches]:
            drawn.append(batch)
            yield batch

    equal(run(endless(), max_batches=3), first)
    assert len(drawn) == 3


def test_samples_that_the_mask_leaves_out_do_not_count():
    torch.manual_seed(2)
    lengths = [torch.randint(1, 6, (size,)) for size in (12, 7)]
    made = [torch.arange(5) < length[:, None] for length in lengths]
    batches = [(x, mask) for (x, _), mask in zip(data((5, 4), (12, 7)), made, strict=True)]
    batches = [(torch.where(mask[..., None], x, 100.0), mask) for x, mask in batches]
    by_hand = [(x[mask], None) for x, mask in batches]
    found = []
    for loader, options in [(batches, {"sample_mask": lambda batch: batch[1]}), (by_hand, {}), (batches, {})]:
        model, params = pruned("deep tokens")
        fits = compensate(model, loader, params, **options)
        found.append((weights(model), [fit.after for fit in fits.values()]))
    close(found[0], found[1])
    assert not torch.allclose(found[0][0][0][0], found[2][0][0][0])


def test_a_batch_that_the_mask_leaves_out_whole_does_not_count():
    batches = [(x, mask) for (x, _), mask in zip(data((3, 4), (9, 8, 7)), (False, True, True), strict=True)]
    found = []
    for loader in (batches, batches[1:]):
        model, params = pruned("deep tokens")
        compensate(model, loader, params, sample_mask=lambda batch: torch.full(batch[0].shape[:2], batch[1]))
        found.append(weights(model))
    close(found[0], found[1])


@pytest.mark.parametrize("name", ["linear", "linear, tokens", "(in, out)", "strided", "conv1d"])
def test_whole_samples_can_be_left_out(name):
    x, keep, found = data(ALL[name][1], (40,))[0][0], torch.arange(40) % 3 > 0, []
    far = torch.where(keep.view(-1, *[1] * (x.dim() - 1)), x, 100 * x)
    for loader, options in [([(far, keep)], {"sample_mask": lambda batch: batch[1]}), ([(x[keep], None)], {})]:
        model, params = pruned(name)
        compensate(model, loader, params, **options)
        found.append(weights(model))
    close(found[0], found[1])


def test_runs_under_autocast_as_the_model_does():
    model, params = pruned("deep mlp", dtype=torch.float32)
    batches = data((6,), (20, 9), dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        model(batches[0][0])
        never_worse(compensate(model, batches, params))
    assert {module.weight_orig.dtype for module, _ in params} == {torch.float32}


class TokensFirst(nn.Module):
    """As nn.Transformer by default: (tokens, batch, features) inside."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.down(F.gelu(self.up(x.transpose(0, 1)))).transpose(0, 1)


@pytest.mark.parametrize(("size", "tokens"), [(3, 5), (1, 4), (2, 4), (3, 6)])
def test_samples_may_be_on_the_second_axis(size, tokens):
    found, batches = [], data((tokens, 4), (size,) * 8)
    for make in (Tokens, TokensFirst):
        model = build(make)
        for module, name in pairs(model):
            prune.random_unstructured(module, name, amount=0.5)
        compensate(model, batches, pairs(model))
        found.append(weights(model))
    close(found[1], found[0])


# ------------------------------------------------------------------------------ errors are those of the model, whatever


def true_errors(model, dense, batches):
    """Return how far what each listed layer gives for its inputs in both models is off the dense model's outputs."""
    found = []
    for each in names(model):
        _, *outputs = in_both(model.eval(), dense.eval(), each, batches)
        other, y = (output.reshape(-1, output.shape[-1]) for output in outputs)
        found.append(float((other - y).square().sum() / (y - y.mean(0)).square().sum()))
    return found


class SequenceFirst(Branching):
    """Changes to (tokens, samples, features) on the way."""

    def forward(self, x):
        return self.b(F.relu(self.a(x)).transpose(0, 1))


class Keeping(nn.Module):
    """Keeps what it needs later on itself."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        self.skip = F.relu(self.a(x))
        return self.c(F.relu(self.b(self.skip)) + self.skip)


class TimeMajor(Branching):
    """Puts the rows of one sample far apart."""

    def forward(self, x):
        return self.b(self.a(x).transpose(0, 1).reshape(-1, 4))


class TimeFirst(nn.Module):
    def __init__(self, mix, head):
        super().__init__()
        self.mix, self.head = mix, head

    def forward(self, x):
        return self.head(self.mix(x)[0])


ODD = {
    "sequence first, twice as many tokens as samples": (SequenceFirst, data((8, 4), (4,) * 6)),
    "sequence first, as many": (SequenceFirst, data((4, 4), (4,) * 6)),
    "sequence first, one sample": (SequenceFirst, data((2, 4), (1,) * 20)),
    "tensors kept on the module": (Keeping, data((4,), (16,) * 4)),
    "memory": (Remembering, with_memory(30)),
    "positions": (Positions, with_positions(20)),
    "memory as long as the batch": (Remembering, with_memory(5)),
    "positions as long as the batch": (Positions, with_positions(3)),
    "a table that is not from the samples": (lambda: Table().requires_grad_(False), data((4,), (30,))),
    "time before samples": (TimeMajor, data((3, 4), (4, 4))),
    "an LSTM along the samples": (lambda: TimeFirst(nn.LSTM(4, 4), nn.Linear(4, 3)), data((3, 4), (5, 3))),
    "statistics of the batch": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)),
        data((4,), (5, 7)),
    ),
}


@pytest.mark.parametrize("why", ODD)
def test_reported_errors_are_true(why):
    make, batches = ODD[why]
    model, dense = build(make), build(make)
    for module, name in pairs(model):
        prune.random_unstructured(module, name, amount=0.5)
    before, fits = set(vars(model)), compensate(model, batches, pairs(model))
    assert set(vars(model)) == before
    expected = true_errors(model, dense, batches)
    torch.testing.assert_close([fit.after for fit in fits.values()], expected, rtol=1e-6, atol=1e-12)


class Flattening(Branching):
    def forward(self, x):
        return self.b(self.a(x).flatten(0, 1))


class Pooling(Branching):
    def forward(self, x):
        return self.b(self.a(x).mean(1))


@pytest.mark.parametrize("make", [SequenceFirst, Flattening])
def test_padding_does_not_count_wherever_the_tokens_stand(make):
    keep = torch.arange(5) < torch.arange(1, 6).repeat(4)[:, None]
    x = data((5, 4), (20,))[0][0]
    found = []
    for padding in (0.0, 50.0):
        model = build(make)
        for module, name in pairs(model):
            prune.random_unstructured(module, name, amount=0.5)
        batches = [(torch.where(keep[..., None], x, padding), None)]
        compensate(model, batches, pairs(model), sample_mask=lambda batch: keep)
        found.append(weights(model))
    close(found[1], found[0])


def test_a_pooled_sample_counts_if_any_of_its_tokens_does():
    keep, found = torch.arange(5) < torch.tensor([0, 1, 3, 5]).repeat(6)[:, None], []
    x = data((5, 4), (24,))[0][0]
    for mask in (keep, keep.any(1)):
        model = build(Pooling)
        prune.random_unstructured(model.b, "weight", amount=0.5)
        compensate(model, [(x, None)], [(model.b, "weight")], sample_mask=lambda batch, mask=mask: mask)
        found.append(weights(model))
    equal(found[1], found[0])


def test_nan_in_samples_that_do_not_count_does_no_harm():
    keep, x = torch.arange(20) != 3, data((4,), (20,))[0][0]
    found = []
    for value in (0.0, float("nan")):
        model = build(two)
        for module, name in pairs(model):
            prune.random_unstructured(module, name, amount=0.5)
        batches = [(torch.where(keep[:, None], x, value), None)]
        compensate(model, batches, pairs(model), sample_mask=lambda batch: keep)
        found.append(weights(model))
    equal(found[1], found[0])


def test_a_weight_beyond_the_range_of_its_dtype_is_not_taken():
    model = nn.Linear(2, 1).half()
    model.weight.data.fill_(3e4)
    t = torch.linspace(-1, 1, 20).half()
    prune.custom_from_mask(model, "weight", torch.tensor([[1.0, 0.0]]))
    never_worse(compensate(model, [(torch.stack([0.1 * t, t], 1), None)], [(model, "weight")]))
    assert torch.isfinite(model.weight).all()


def test_random_state_is_kept_if_asked():
    model, params = pruned("deep mlp")
    loader = torch.utils.data.DataLoader(data((6,), (1,) * 20), batch_size=None, shuffle=True)
    state = torch.get_rng_state()
    compensate(model, loader, params, keep_rng=True)
    equal(torch.get_rng_state(), state)


def test_batches_see_the_context_of_the_caller():
    here, seen = contextvars.ContextVar("here", default=0), set()
    here.set(5)

    class Looking(Branching):
        def forward(self, x):
            seen.add((here.get(), torch.ones(1).device.type))
            return self.b(self.a(x))

    model, batches = build(Looking), data((4,), (9, 9))
    prune.l1_unstructured(model.a, "weight", amount=0.5)
    with torch.device("meta"):
        compensate(model, batches, pairs(model))
    assert seen == {(5, "meta")}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_created_bias_of_a_frozen_layer_is_frozen():
    model = build(lambda: nn.Linear(6, 4, bias=False)).requires_grad_(False)
    prune.l1_unstructured(model, "weight", amount=0.5)
    compensate(model, data((6,)), [(model, "weight")], create_bias=True)
    assert model.bias is not None
    assert not model.bias.requires_grad


# ----------------------------------------------------------------------------------------------- what a layer may be


class Probed(nn.Module):
    """Adds 1: what it computes its bias from is a parameter elsewhere."""

    def forward(self, x):
        return x + 1


def test_a_computed_bias_stays_and_counts():
    model = build(lambda: nn.Linear(5, 3))
    parametrize.register_parametrization(model, "bias", Probed())
    bias, dense = model.bias.detach().clone(), build(lambda: nn.Linear(5, 3))
    dense.bias.data = bias.clone()
    batches = data((5,))
    x, y = batches[0][0], dense(batches[0][0]).detach()
    prune.l1_unstructured(model, "weight", amount=0.4)
    before = float((model(x) - y).detach().square().sum())
    compensate(model, batches, [(model, "weight")])
    equal(model.bias.detach(), bias)
    assert float((model(x) - y).detach().square().sum()) <= before


def test_a_bias_that_two_layers_share_makes_neither_worse():
    model = build(two)
    model[2].bias = model[0].bias
    dense, batches = copy.deepcopy(model), data((4,), (40,))
    for module, name in pairs(model):
        prune.l1_unstructured(module, name, amount=0.5)
    try:
        fits = compensate(model, batches, pairs(model))
    except ValueError:
        return
    for each, fit in zip(names(model), fits.values(), strict=True):
        _, found, y = in_both(model, dense, each, batches)
        error = (found - y).square().sum() / (y - y.mean(0)).square().sum()
        assert fit.after == pytest.approx(float(error), rel=1e-9)


class Unbiased(nn.Module):
    """Multiplies as Linear does and has no bias at all."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5))

    def forward(self, x):
        return F.linear(x, self.weight)


def test_errors_are_true_where_a_bias_cannot_be_created():
    model, batches = build(Unbiased), data((5,))
    y = model(batches[0][0]).detach()
    prune.l1_unstructured(model, "weight", amount=0.5)
    before = (model(batches[0][0]) - y).detach().square().sum()
    try:
        compensate(model, batches, [(model, "weight")], create_bias=True)
    except (TypeError, ValueError):
        return
    assert (model(batches[0][0]) - y).square().sum() <= before


def test_a_keyword_input_is_found():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 4)

        def forward(self, x):
            return self.a(input=x)

    found = []
    for make in (Keyword, lambda: nn.Linear(6, 4)):
        model = build(make)
        prune.l1_unstructured(*pairs(model)[0], amount=0.5)
        compensate(model, data((6,)), pairs(model))
        found.append(weights(model))
    equal(found[0], found[1])


def test_transformer_layers_are_called_one_by_one():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    params = [(layer.linear1, "weight"), (layer.linear2, "weight")]
    fast = torch.backends.mha.get_fastpath_enabled()
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(6, 5, 8, generator=generator), None)]
    fits = tpe.prune_and_compensate(layer, batches, params, target_sparsity=0.5, progress=False)
    assert all(0 < fit.after < fit.before for fit in fits.values())
    assert torch.backends.mha.get_fastpath_enabled() == fast


@pytest.mark.parametrize("how", ["bare", "dictionary", "prepare"])
def test_unlabelled_data_of_any_form_gives_the_same(how):
    class Named(nn.Linear):
        def forward(self, input):
            return super().forward(input)

    found = []
    for batches, options in (
        (data((6,), (20, 10)), {}),
        {
            "bare": ([x for x, _ in data((6,), (20, 10))], {}),
            "dictionary": ([{"input": x} for x, _ in data((6,), (20, 10))], {}),
            "prepare": ([[x] for x, _ in data((6,), (20, 10))], {"prepare": lambda batch: (batch[0], None)}),
        }[how],
    ):
        model = build(lambda: Named(6, 4))
        prune.random_unstructured(model, "weight", amount=0.5)
        compensate(model, batches, [(model, "weight")], **options)
        found.append(model.weight.detach())
    equal(found[1], found[0])


class Choosing(nn.Module):
    """Goes on with the rows that its first layer gives more than -1, and with all if its weight is 0."""

    def __init__(self, axis):
        super().__init__()
        self.a, self.b, self.axis = nn.Linear(4, 4), nn.Linear(4, 4), axis
        self.a.bias.data.zero_()

    def forward(self, x):
        h = self.a(x)
        return self.b(h[h[:, 0, 0] > -1] if self.axis == 0 else h[:, h[0, :, 0] > -1])


@pytest.mark.parametrize("axis", [0, 1])
def test_rows_that_only_one_of_the_models_drops_are_refused(axis):
    model = build(lambda: Choosing(axis))
    for module in (model.a, model.b):
        prune.random_unstructured(module, "weight", amount=0.5)
    before, [(x, _)] = Snapshot(model), data((8, 4), (13,))
    with pytest.raises(ValueError, match=r"b\.weight gets .* do not belong together"):
        compensate(model, [(1e-3 * x, None), (10 * x, None)], [(model.a, "weight"), (model.b, "weight")])
    assert not before.differences()
