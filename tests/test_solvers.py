"""The solvers on one small problem."""

import pytest
import torch
from compensating import MARKS, best_row, close

from torchprune_ext.compensation import solvers, splitting

pytestmark = MARKS


def problem(seed=0, groups=2, inputs=20, outputs=3, samples=50, fixed=False):
    torch.manual_seed(seed)
    moments = solvers.Moments()
    x = torch.randn(groups, samples, 6) @ torch.randn(groups, 6, inputs) + 0.3 * torch.randn(groups, samples, inputs)
    x, weight = x.double(), torch.randn(groups, outputs, inputs).double()
    y = x @ weight.mT + 1
    for part in zip(x.split([7, 30, samples - 37], 1), y.split([7, 30, samples - 37], 1), strict=True):
        moments.add(*part)
    bias = torch.full((groups, outputs), 0.5).double() if fixed else None
    return moments.problem(bias), weight, x, y, bias


@pytest.mark.parametrize("fixed", [False, True])
def test_the_error_of_a_problem_is_that_of_the_samples(fixed):
    found, weight, x, y, bias = problem(fixed=fixed)
    other = weight + 0.1 * torch.randn_like(weight)
    best = (y - x @ other.mT).mean(1)
    close(found.best_bias(other), best)
    used = bias if fixed else best
    close(found.error(other), (x @ other.mT + used[:, None] - y).square().sum(1))
    if not fixed:
        close(found.error(other, best + 1), (x @ other.mT + best[:, None] + 1 - y).square().sum(1))
    close(found.input_norms(), x.norm(dim=1))


@pytest.mark.parametrize("fixed", [False, True])
def test_more_rounds_never_raise_the_objective(fixed, monkeypatch):
    for seed in range(4):
        found, weight, *_ = problem(seed, fixed=fixed)
        keep = (torch.rand_like(weight) < 0.5).double()
        size = found.gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None]
        values, errors = [], []
        for rounds in range(21):
            monkeypatch.setattr(solvers, "ROUNDS", rounds)
            fitted = solvers.refit(found, weight, keep)
            assert not fitted[keep == 0].any()
            pull = solvers.RIDGE * size * (fitted - weight * keep).square().sum(-1)
            errors.append(found.error(fitted))
            values.append(errors[-1] + pull)
        values, errors = torch.stack(values), torch.stack(errors)
        assert bool((errors <= errors[0] * (1 + 1e-12)).all())
        assert bool((values[1:] <= values[:-1] * (1 + 1e-9)).all())
        assert float(errors[-1].sum()) < 0.9 * float(errors[0].sum())


def test_splitting_returns_a_mask_that_choose_gave():
    for seed in range(3):
        found, weight, *_ = problem(seed)
        given_masks = []

        def choose(scores, given_masks=given_masks):
            given_masks.append(torch.zeros_like(scores).scatter(-1, scores.abs().topk(7, -1).indices, 1.0))
            return given_masks[-1]

        mask, _ = splitting.split(found, weight, choose)
        assert any(mask is each or torch.equal(mask, each) for each in given_masks)
        assert set(mask.sum(-1).flatten().tolist()) == {7.0}
        by_size = torch.zeros_like(weight).scatter(-1, weight.abs().topk(7, -1).indices, 1.0)
        ours, theirs = (found.error(solvers.refit(found, weight, m)).sum() for m in (mask, by_size))
        assert float(ours) <= float(theirs)


def test_obs_scores_are_what_deletion_costs(monkeypatch):
    monkeypatch.setattr(solvers, "RIDGE", 1e-9)
    found, weight, x, y, _ = problem(inputs=8, samples=60)
    scores = solvers.obs_scores(found, weight)
    size = found.gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    for group in range(2):
        for j in range(8):
            keep = torch.arange(8) != j
            weight_j, bias = best_row(x[group], y[group, :, 0], weight[group, 0], keep, None, 0.0)
            error = (x[group] @ weight_j + bias - y[group, :, 0]).square().sum()
            torch.testing.assert_close(scores[group, 0, j] * size[group], error, rtol=1e-4, atol=1e-8)


def redundant(latent=4, inputs=24, outputs=5, samples=200):
    """Return a problem whose re-fit takes away nearly all of the error, and a mask."""
    torch.manual_seed(0)
    x = torch.randn(1, samples, latent) @ torch.randn(1, latent, inputs) + 1e-2 * torch.randn(1, samples, inputs)
    weight, moments = torch.randn(1, outputs, inputs).double(), solvers.Moments()
    moments.add(x.double(), x.double() @ weight.mT)
    return moments.problem(None), weight, (torch.rand(weight.shape) < 0.5).double()


def test_steps_end_early_and_by_the_error_that_is_left(monkeypatch):
    monkeypatch.setattr(solvers, "RIDGE", 1e-9)
    found, weight, keep = redundant()
    fitted = solvers.refit(found, weight, keep)
    monkeypatch.setattr(solvers, "ROUNDS", 9)
    assert torch.equal(solvers.refit(found, weight, keep), fitted)  # it was not cut off
    monkeypatch.setattr(solvers, "TOLERANCE", 0.0)
    monkeypatch.setattr(solvers, "ROUNDS", 500)
    least, error, start = (
        float(found.error(each).sum()) for each in (solvers.refit(found, weight, keep), fitted, weight * keep)
    )
    assert error < 1e-3 * start
    assert error <= 1.01 * least
