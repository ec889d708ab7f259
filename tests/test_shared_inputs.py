"""Layers that get the same inputs share their Gram matrix, and nothing but time tells."""

import gc

import pytest
import torch
from compensating import MARKS, build, data, equal, pairs, prune_and_compensate, weights
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from torchprune_ext.compensation import solvers, splitting, streams
from torchprune_ext.compensation.sources import Source

pytestmark = MARKS


class Readers(nn.Module):
    """Layers that read what ``give(x, which)`` makes of the same tensor, and one behind them."""

    def __init__(self, give=lambda x, which: x, layers=None):
        super().__init__()
        self.first = nn.Identity() if layers else nn.Linear(6, 6)
        made = layers or [nn.Linear(6, 5), nn.Linear(6, 4, bias=False), nn.Linear(6, 5)]
        self.layers, self.give = nn.ModuleList(made), give
        self.last = nn.Linear(3, 2)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        found = [layer(self.give(x, which)) for which, layer in enumerate(self.layers)]
        return self.last(sum(each.flatten(1)[:, :3] for each in found))


def changed(x, which):
    return x.mul_(1 + which)


def changed_behind_autograd(x, which):
    x.data.mul_(1 + which)
    return x


def now_and_then(x, which):
    return x if len(x) > 8 or which != 1 else x + 0.1  # not in a smaller batch


def some_other(x, which):
    return x + 0.1 * which if len(x) == 9 else x  # the same in the first batches only


def flipped(x, which):
    return x.as_strided(x.shape, (1, x.shape[0])) if which == 1 and x.shape[0] == 6 else x


def reused(x, which):
    gc.collect(0)
    return x.clone() + which  # freed behind the layer: the next may lie in the same memory


def inference(x, which):
    with torch.inference_mode():
        x = x.clone()
    return x


def convolutions(**other):
    def make():
        first, second = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, **{"kernel_size": 3, "padding": 1, **other})
        return Readers(layers=[first, second, nn.Conv2d(4, 6, 3, padding=1, bias=False)])

    return make


IMAGES = ((4, 5, 5), (9, 9, 7))
CASES = {  # the model, the data, and how many of its Gram matrices are summed
    "the same": (Readers, ((6,), (9, 9, 7)), 3),
    "changed in place": (lambda: Readers(changed), ((6,), (9, 9, 7)), 5),
    "changed behind autograd's back": (lambda: Readers(changed_behind_autograd), ((6,), (9, 9, 7)), 5),
    "copies": (lambda: Readers(lambda x, which: x.clone()), ((6,), (9, 9, 7)), 5),
    "memory used again": (lambda: Readers(reused), ((6,), (9, 9, 7)), 5),
    "another way through the same memory": (lambda: Readers(flipped), ((6,), (6, 6)), 5),
    "not in the last batch": (lambda: Readers(now_and_then), ((6,), (12, 12, 7)), None),
    "only in the first": (lambda: Readers(some_other), ((6,), (12, 12, 9, 9)), None),
    "not in the first": (lambda: Readers(now_and_then), ((6,), (7, 12, 12)), 5),
    "convolutions": (convolutions(), IMAGES, 2),
    "other padding": (convolutions(padding=0), IMAGES, 4),
    "other stride": (convolutions(stride=2), IMAGES, 4),
    "other kernel": (convolutions(kernel_size=1, padding=0), IMAGES, 4),
    "other groups": (convolutions(groups=2), IMAGES, 4),
}


@pytest.fixture
def summed(monkeypatch):
    """Count the rows that go into Gram matrices."""
    rows = []
    real = solvers._add_square

    def counting(gram, x, *weighted):
        rows.append(x.shape[1])
        real(gram, x, *weighted)

    monkeypatch.setattr(solvers, "_add_square", counting)
    return rows


def fitted(make, batches, *, share=True, **options):
    with pytest.MonkeyPatch.context() as patch:
        if not share:
            patch.setattr(streams.Source, "of", lambda *_: None)
        model = build(make)
        goal = {"target_sparsity": 0.5} | options
        fits = prune_and_compensate(model, batches, pairs(model), **goal)
    masks = [module.weight_mask for module, _ in pairs(model)]
    return [weights(model), masks, [(fit.before, fit.after) for fit in fits.values()]]


@pytest.mark.parametrize("create_bias", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_sharing_changes_nothing(name, create_bias, summed):
    make, (shape, sizes), products = CASES[name]
    batches = data(shape, sizes)
    apart = fitted(make, batches, share=False, create_bias=create_bias)
    alone = sum(summed)
    summed.clear()
    equal(fitted(make, batches, create_bias=create_bias), apart)
    layers = len(apart[1])
    assert sum(summed) <= alone
    if products is not None and (shape == (6,) or products == layers):
        assert sum(summed) * layers == alone * products


@pytest.mark.parametrize("criterion", ["admm", "obs"])
def test_samples_that_are_left_out_are_so_for_all_layers(criterion, summed):
    batches = data((6,), (9, 9, 7))
    options = {"sample_mask": lambda batch: batch[0][:, 0] > -0.3, "criterion": criterion}
    apart = fitted(Readers, batches, share=False, **options)
    alone = sum(summed)
    summed.clear()
    equal(fitted(Readers, batches, **options), apart)
    assert sum(summed) * 5 == alone * 3


# ------------------------------------------------------------------------------------------------------ what is same


def test_a_tensor_is_the_same_until_it_changes():
    x = torch.randn(4, 3)
    first = Source.of(x, "use")
    assert first.same(Source.of(x, "use"))
    assert first.same(Source.of(x.detach(), "use"))
    for other in (x.clone(), x.t(), x[:2], x[:, :2], x.view(3, 4), x.expand(2, 4, 3), x.double()):
        assert not first.same(Source.of(other, "use"))
    assert not first.same(Source.of(x, "other use"))
    assert not first.same(None)
    y = x.detach()
    x[0, 0] += 1
    x[0, 0] -= 1  # the values are what they were, but who knows
    assert not first.same(Source.of(y, "use"))


def test_memory_that_is_used_again_is_another_tensor():
    for _ in range(20):
        source = Source.of(torch.zeros(64))
        assert not source.same(Source.of(torch.zeros(64)))


def test_what_has_no_version_or_no_storage_of_its_own_is_never_the_same():
    with torch.inference_mode():
        x = torch.randn(3)
    assert Source.of(x) is None
    assert Source.of(torch.eye(3).to_sparse()) is None
    assert Source.of(torch.tensor(1.0)) is None
    assert Source.of(nn.Parameter(torch.ones(3))) is None


@given(
    same=st.lists(st.booleans(), min_size=1, max_size=5),
    longer=st.booleans(),
    rows=st.lists(st.integers(0, 4), min_size=6, max_size=6),
    fixed=st.tuples(st.booleans(), st.booleans()),
    weights=st.lists(st.sampled_from([1.0, 0.25, 3.0]), min_size=7, max_size=7),
)
def test_moments_are_those_of_all_samples_wherever_the_inputs_come_from(same, longer, rows, fixed, weights):
    torch.manual_seed(0)
    rows[0] += 1
    xs = [torch.randn(1, n, 5).double() + 3 for n in rows[: len(same)]]
    others = [x if is_same else x + 1 for x, is_same in zip(xs, same, strict=True)]
    others += [torch.randn(1, 2, 5).double()] * longer
    before, shared, apart = solvers.Moments(), solvers.Moments(), solvers.Moments()
    before.followed = True
    for moments, inputs in ((before, xs), (shared, others), (apart, others)):
        if moments is shared:
            shared = moments = solvers.Moments(before)
        for x, weight in zip(inputs, weights, strict=False):
            known = moments is not apart and moments.reads(Source.of(x), lambda x=x: [x], weight)
            moments.add(x, x[..., :2] + x[..., 2:4], weight, known=known)
        if moments is before:
            before.problem(torch.zeros(1, 1).double() if fixed[0] else None)
    assert shared.shares == (all(same) and not longer)
    problems = [m.problem(torch.ones(1, 1).double() if fixed[1] else None) for m in (shared, apart)]
    for pick in (
        lambda p: p.gram,
        lambda p: p.damped(torch.float64),
        lambda p: p.error(torch.ones(1, 2, 5).double()),
        lambda p: p.best_bias(torch.ones(1, 2, 5).double()),
        lambda p: [p.count, p.energy(), p.size(), p.input_norms()],
    ):
        equal(*map(pick, problems))


def test_layers_that_share_their_inputs_share_the_inverses(monkeypatch):
    made = []
    real = splitting.inverse_of
    monkeypatch.setattr(splitting, "inverse_of", lambda *args: made.append(args[1]) or real(*args))
    fitted(Readers, data((6,), (30,)))
    stages = -(-splitting.STEPS // splitting.EVERY)
    assert len(made) == 4 * stages  # of the first layer, of those that share, with a bias and without, of the last
