"""The splitting: its thresholds, where it ends, and the re-fit from there."""

import pytest
import torch
from compensating import MARKS
from hypothesis import given
from hypothesis import strategies as st

from torchprune_ext.compensation import solvers, splitting
from torchprune_ext.masks import nm_mask
from torchprune_ext.patterns import NM

pytestmark = MARKS


@st.composite
def rows(draw):
    """Return values of distinct sizes, a mask of what is alive, and how many to keep."""
    inputs, outputs = draw(st.integers(1, 40)), draw(st.integers(1, 4))
    seed, power = draw(st.integers(0, 99)), draw(st.sampled_from([0.2, 1.0, 3.0]))
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(1, outputs, inputs, generator=generator).double()
    values = values.sign() * values.abs() ** power
    alive = (torch.rand(1, outputs, inputs, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))).double()
    return values, alive, draw(st.integers(1, inputs))


@given(drawn=rows())
def test_the_first_thresholds_keep_the_largest(drawn):
    values, alive, keep = drawn
    found = splitting.Thresholds(keep, alive)(values)
    wanted = nm_mask(values, NM(keep, values.shape[-1], dim=2), alive)
    assert torch.equal(found, wanted)


@given(drawn=rows(), drift=st.sampled_from([0.0, 0.05, 10.0]))
def test_thresholds_follow_the_values_and_never_keep_what_is_dead(drawn, drift):
    values, alive, keep = drawn
    thresholds = splitting.Thresholds(keep, alive)
    for step in range(12):
        values = values * (1 + drift * torch.cos(torch.arange(values.shape[-1]) + step))
        found = thresholds(values)
        assert not found[alive == 0].any()
    wanted = alive.sum(-1).clamp_max(keep)
    off = [float((thresholds(values).sum(-1) - wanted).abs().max()) for _ in range(20)]
    assert min(off) <= splitting.FAR * values.shape[-1]


@pytest.mark.parametrize("values", [torch.ones(1, 3, 50), torch.zeros(1, 3, 50), torch.ones(1, 3, 50) * 1e-30])
def test_equal_values_harm_nothing(values):
    thresholds = splitting.Thresholds(20, torch.ones_like(values))
    for _ in range(5):
        found = thresholds(values)
        assert bool(found.isfinite().all())
        assert thresholds.cuts is not None
        assert bool(thresholds.cuts.isfinite().all())


def correlated(seed, inputs=48, outputs=12, samples=400, alike=0.3):
    """Return a problem whose inputs are much alike, and its weights."""
    torch.manual_seed(seed)
    x = torch.randn(1, samples, 6) @ torch.randn(1, 6, inputs) + alike * torch.randn(1, samples, inputs)
    weight, moments = torch.randn(1, outputs, inputs).double(), solvers.Moments()
    moments.add(x.double(), x.double() @ weight.mT)
    return moments.problem(torch.zeros(1, 1).double()), weight


@pytest.mark.parametrize("share", [0.5, 0.3])
@pytest.mark.parametrize("alike", [1.0, 0.1, 0.01])
def test_thresholds_cost_next_to_nothing(alike, share):
    errors = torch.zeros(2)
    for seed in range(4):
        problem, weight = correlated(seed, alike=alike)
        one, keep = torch.ones_like(weight), round(share * weight.shape[-1])

        def choose(values, one=one, keep=keep):
            return nm_mask(values, NM(keep, values.shape[-1], dim=2), one)

        for way, near in enumerate([splitting.Thresholds(keep, one), None]):
            mask, start = splitting.split(problem, weight, choose, near)
            assert set(mask.sum(-1).flatten().tolist()) == {keep}
            assert not start[mask == 0].any()
            errors[way] += float(problem.error(solvers.refit(problem, weight, mask, start)).sum())
    assert float(errors[0]) < 1.1 * float(errors[1])


def test_the_penalty_is_that_of_the_spectrum():
    gram = torch.diag(torch.tensor([1.0, 4.0, 16.0]) - splitting.LEAST)[None].repeat(2, 1, 1)
    assert splitting._mean_eigenvalue(gram) == pytest.approx(4)


@pytest.mark.parametrize("alike", [1e-3, 1e-5, 0.0])
def test_inputs_that_are_all_the_same_are_within_the_range_of_float32(alike):
    torch.manual_seed(0)
    x = torch.randn(1, 300, 1) + alike * torch.randn(1, 300, 400)
    weight, moments = torch.rand(1, 4, 400) + 0.5, solvers.Moments()
    moments.add(x, x @ weight.mT)
    problem, one = moments.problem(torch.zeros(1, 1).double()), torch.ones_like(weight)
    mask, start = splitting.split(
        problem, weight, lambda v: nm_mask(v, NM(200, 400, dim=2), one), splitting.Thresholds(200, one)
    )
    error = float(problem.error(solvers.refit(problem, weight, mask, start)).sum() / problem.energy().sum())
    assert error < 1e-4


@given(seed=st.integers(0, 30), spoilt=st.booleans())
def test_a_re_fit_ends_at_the_same_from_wherever_it_starts(seed, spoilt):
    problem, weight = correlated(seed, inputs=12, outputs=3, samples=60)
    keep = (torch.rand_like(weight) < 0.5).double()
    start = torch.randn_like(weight) * (100 if spoilt else 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solvers, "TOLERANCE", 0.0)
        patch.setattr(solvers, "ROUNDS", 300)
        found = solvers.refit(problem, weight, keep, start)
    gram, cross = problem.damped(torch.float64)
    gradient = (found @ gram - cross - solvers.RIDGE * weight) * keep
    assert not found[keep == 0].any()
    assert float(gradient.abs().max()) <= 1e-6 * float(cross.abs().max())


def test_a_start_saves_steps_and_costs_no_error(monkeypatch):
    steps, errors = [], []

    def counting(self, *args, real=torch.Tensor.addcmul_, **options):
        steps[-1] += 1
        return real(self, *args, **options)

    monkeypatch.setattr(torch.Tensor, "addcmul_", counting)
    for seed in range(4):
        steps.append(0)
        problem, weight = correlated(seed, outputs=30)
        one = torch.ones_like(weight)
        mask, start = splitting.split(problem, weight, lambda v, one=one: nm_mask(v, NM(24, 48, dim=2), one))
        for way in (start, None):
            steps.append(0)
            errors.append(float(problem.error(solvers.refit(problem, weight, mask, way)).sum()))
    assert sum(steps[1::3]) < 0.7 * sum(steps[2::3])
    assert sum(errors[::2]) < 1.01 * sum(errors[1::2])
