r"""Least squares of one layer under a mask: which entries to keep, and what they should be. No modules, no hooks.

All functions minimise :math:`\|Y - X W^\top\|^2` over :math:`W` through the second moments :math:`G = X^\top X` and
:math:`C = Y^\top X`, for one or more groups at once: ``weight`` has shape ``(groups, outputs, inputs)``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchprune_ext._ranks import Ranks

Choose = Callable[[Tensor], Tensor]  # from values (groups, outputs, inputs) to a mask of the largest, 0 and 1
RIDGE = 3e-3  # of the mean diagonal of the Gram matrix
ROUNDS = 60  # most steps of the conjugate gradients
TOLERANCE = 3e-4  # of the error: they end where a step gains less
SPLITTING = 30  # steps of the operator splitting
PENALTY, GROWTH, EVERY = 0.1, 1.3, 3  # its penalty at first, and by what it grows every so many steps
ROWS = 256  # of a weight that are worked on at once, which bounds the memory for what lies in between
BLOCK = 128  # columns that SparseGPT treats at once, or as many as whole groups allow


class Moments:
    """Sums over the samples of a layer's inputs and outputs, in float64, taken about the means of the first ones."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in samples: inputs ``(groups, samples, inputs)`` and dense outputs ``(groups, samples, outputs)``."""
        if not x.shape[1]:
            return
        x, y = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x, y))
        if not self.count:
            self._start(x.mean(1, keepdim=True), y.mean(1, keepdim=True))
        x, y = x - self.origin[0], y - self.origin[1]
        sum_x, sum_y, gram, cross, energy = self.sums
        sum_x += x.sum(1)
        sum_y += y.sum(1)
        for total, left in ((gram, x), (cross, y)):
            for rows, columns in zip(total.split(ROWS, 1), left.split(ROWS, 2), strict=True):
                rows += columns.mT @ x
        energy += y.square().sum(1)
        self.count += x.shape[1]

    def _start(self, x: Tensor, y: Tensor) -> None:
        """Take all sums, of which there are none yet, about ``x`` and ``y``."""
        self.origin = x, y
        groups, inputs, outputs = len(x), x.shape[2], y.shape[2]
        shapes = [(groups, inputs), (groups, outputs), (groups, inputs, inputs), (groups, outputs, inputs)]
        self.sums = [x.new_zeros(shape, dtype=torch.float64) for shape in [*shapes, (groups, outputs)]]

    def over(self, ranks: Ranks, matrix: Tensor) -> None:
        """Make these the moments of the samples of all ranks, on each of them; ``matrix`` is the layer's weight as one.

        Each rank takes its own about the mean of all samples before they are added.
        """
        if ranks.group is None or not (count := ranks.total(self.count)):
            return
        if not self.count:
            self._start(
                matrix.new_zeros(len(matrix), 1, matrix.shape[2]), matrix.new_zeros(len(matrix), 1, matrix.shape[1])
            )
        old = [origin.squeeze(1).double() for origin in self.origin]
        new = [ranks.sum(self.count * one + total) / count for one, total in zip(old, self.sums, strict=False)]
        self.origin = new[0].unsqueeze(1), new[1].unsqueeze(1)
        (sum_x, sum_y, gram, cross, energy), (by_x, by_y) = self.sums, (old[0] - new[0], old[1] - new[1])
        energy += by_y * (2 * sum_y + self.count * by_y)
        for total, sums, by in ((gram, sum_x, by_x), (cross, sum_y, by_y)):
            total.baddbmm_(by.unsqueeze(-1), (sum_x + self.count * by_x).unsqueeze(-2))
            total.baddbmm_(sums.unsqueeze(-1), by_x.unsqueeze(-2))
        sum_x += self.count * by_x
        sum_y += self.count * by_y
        for place, total in enumerate(self.sums):  # one after the other, since the copy on its way may be large
            self.sums[place] = ranks.sum(total)
        self.count = count

    def problem(self, bias: Tensor | None) -> "Problem":
        """Return the least squares with the best bias for each weight, or with a fixed ``bias``, (groups, outputs).

        The sums are used up.
        """
        sum_x, sum_y, gram, cross, energy = self.sums
        mean_x, mean_y = sum_x / self.count, sum_y / self.count
        gram.baddbmm_(mean_x.unsqueeze(-1), mean_x.unsqueeze(-2), alpha=-self.count)
        cross.baddbmm_(mean_y.unsqueeze(-1), mean_x.unsqueeze(-2), alpha=-self.count)
        variation = energy = energy - self.count * mean_y.square()
        mean_x, mean_y = mean_x + self.origin[0].squeeze(1), mean_y + self.origin[1].squeeze(1)
        if bias is not None:
            rest = mean_y - bias
            gram.baddbmm_(mean_x.unsqueeze(-1), mean_x.unsqueeze(-2), alpha=self.count)
            cross.baddbmm_(rest.unsqueeze(-1), mean_x.unsqueeze(-2), alpha=self.count)
            energy = energy + self.count * rest.square()
        return Problem(gram, cross, energy, variation, mean_x, mean_y, self.count, bias is None)


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """The least squares of one layer: all that its samples say of it."""

    gram: Tensor
    cross: Tensor
    energy: Tensor
    variation: Tensor  # squares of the outputs about their means
    mean_x: Tensor
    mean_y: Tensor
    count: int
    centred: bool  # taken about the means, so that the bias is at its best

    def error(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the squared error of each row; without ``bias`` with the best one, or the one fixed in the problem."""
        found = self.energy.clone()
        for total, *rows in zip(*(t.split(ROWS, 1) for t in (found, weight, self.cross)), strict=True):
            some, cross = rows[0].double(), rows[1]
            total += (some @ self.gram).sub_(cross, alpha=2).mul_(some).sum(-1)
        found.clamp_min_(0)
        return found if bias is None else found + self.count * (self.best_bias(weight) - bias).square()

    def best_bias(self, weight: Tensor) -> Tensor:
        """Return the best bias of each row, ``(groups, outputs)``."""
        rows = [part.double() @ self.mean_x.unsqueeze(-1) for part in weight.split(ROWS, 1)]
        return self.mean_y - torch.cat(rows, 1).squeeze(-1)

    def input_norms(self) -> Tensor:
        """Return the norm of each input over the samples, ``(groups, inputs)``."""
        about = self.count * self.mean_x.square() if self.centred else 0.0
        return (self.gram.diagonal(dim1=-2, dim2=-1) + about).sqrt()

    def size(self) -> Tensor:
        """Return the mean diagonal of the Gram matrix of each group, ``(groups, 1, 1)``; 1 where it is 0."""
        size = self.gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        return torch.where(size > 0, size, 1.0)

    def damped(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the Gram matrix and the cross moments, in units of :meth:`size`, the former with ``RIDGE``."""
        gram, cross = (self._scaled(moments, dtype) for moments in (self.gram, self.cross))
        gram.diagonal(dim1=-2, dim2=-1).add_(RIDGE)
        return gram, cross

    def _scaled(self, moments: Tensor, dtype: torch.dtype) -> Tensor:
        size, scaled = self.size(), torch.empty_like(moments, dtype=dtype)
        for rows, values in zip(scaled.split(ROWS, 1), moments.split(ROWS, 1), strict=True):
            rows.copy_(values / size)
        return scaled


def refit(problem: Problem, weight: Tensor, keep: Tensor) -> Tensor:
    """Return the best weights on the support ``keep``, where a ridge pulls towards ``weight``.

    Rows that keep the same columns share one factorization. Else it takes conjugate gradients over many rows at once:
    the Gram matrix is shared, so one product per step serves every row; the mask projects and the diagonal
    preconditions.

    Args:
        problem: the layer's least squares.
        weight: where to start from; what is not kept counts as 0.
        keep: 0 and 1, of its shape.
    """
    columns = keep.amax(1, keepdim=True)
    if torch.equal(keep, columns.expand_as(keep)):
        return _solved(problem, weight, columns)
    gram, cross = problem.damped(weight.dtype)
    found = weight * keep
    before = problem.error(found)
    for part in zip(
        *(t.split(ROWS, 1) for t in (found, keep, cross, before / problem.size().squeeze(-1))), strict=True
    ):
        _descend(gram, *part)
    return found


def _solved(problem: Problem, weight: Tensor, columns: Tensor) -> Tensor:
    """Return the least squares on whole ``columns``, 0 and 1, ``(groups, 1, inputs)``."""
    gram, cross = problem.damped(torch.float64)
    columns = columns.double()
    gram.mul_(columns).mul_(columns.mT).diagonal(dim1=-2, dim2=-1).add_(1 - columns.squeeze(1))
    factor = torch.linalg.cholesky(gram)
    cross.add_(weight, alpha=RIDGE).mul_(columns)
    return torch.cholesky_solve(cross.mT, factor).mT.to(weight.dtype)


def _descend(gram: Tensor, found: Tensor, keep: Tensor, cross: Tensor, errors: Tensor) -> None:
    """Go down from ``found``, in place, to the least squares on the support ``keep``."""
    scale = gram.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
    residual = torch.add(cross, found, alpha=RIDGE).sub_(found @ gram).mul_(keep)
    direction = residual / scale
    slope = (residual * direction).sum(-1, keepdim=True)
    left, gained, noise = float(errors.sum()), 0.0, torch.finfo(found.dtype).eps
    for _ in range(ROUNDS):
        product = (direction @ gram).mul_(keep)
        curvature = (direction * product).sum(-1, keepdim=True)
        step = torch.where(curvature > 0, slope / curvature, 0.0)
        found.addcmul_(step, direction)
        gain = float((step * slope).sum())
        gained += gain
        if not gain > TOLERANCE * max(left - gained, noise * gained):
            break
        residual.addcmul_(step, product, value=-1)
        ahead = residual / scale
        before, slope = slope, (residual * ahead).sum(-1, keepdim=True)
        direction.mul_(torch.where(before > 0, slope / before, 0.0)).add_(ahead)


def split(problem: Problem, weight: Tensor, choose: Choose) -> Tensor:
    """Return the mask on which operator splitting (ADMM) between least squares and ``choose`` settles.

    Source: Meng, Behdin, Wang & Mazumder 2024, *ALPS: Improved Optimization for Highly Sparse One-Shot Pruning*,
    arXiv:2406.07831; Boza 2024, *Fast and Effective Weight Update for Pruned Large Language Models*, arXiv:2401.02938.
    """
    gram, cross = problem.damped(weight.dtype)
    scale = gram.diagonal(dim1=-2, dim2=-1).sqrt().unsqueeze(-2)
    gram.div_(scale).div_(scale.mT)
    cross.add_(weight, alpha=RIDGE).div_(scale)
    sparse = weight * scale
    mask = choose(sparse)
    sparse *= mask
    dual = torch.zeros_like(sparse)
    for step in range(SPLITTING):
        if step % EVERY == 0:
            penalty = PENALTY * GROWTH ** (step // EVERY)
            inverse = inverse_of(gram, penalty)
        for rows in zip(*(t.split(ROWS, 1) for t in (dual, sparse, cross)), strict=True):
            rows[0].add_(torch.sub(rows[1], rows[0]).mul_(penalty).add_(rows[2]) @ inverse)
        mask = choose(dual)
        torch.mul(dual, mask, out=sparse)
        dual -= sparse
    return mask


def inverse_of(gram: Tensor, shift: float = 0.0) -> Tensor:
    """Return the inverse of ``gram`` with ``shift`` added to its diagonal."""
    shifted = gram.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(shift)
    factor = torch.linalg.cholesky(shifted)
    del shifted  # each is as large as the layer
    return torch.cholesky_inverse(factor)


def magnitude_scores(problem: Problem, weight: Tensor) -> Tensor:
    """Return the size of each weight."""
    return weight.abs()


def wanda_scores(problem: Problem, weight: Tensor) -> Tensor:
    r"""Return the size of each weight times the norm of its input, :math:`|w_{ij}| \cdot \|x_j\|`.

    Source: Sun et al. 2023, *A Simple and Effective Pruning Approach for Large Language Models*, arXiv:2306.11695.
    """
    return weight.abs() * problem.input_norms().to(weight.dtype).unsqueeze(-2)


def obs_scores(problem: Problem, weight: Tensor) -> Tensor:
    r"""Return what deleting each entry costs once all others of its row adapt, :math:`w_i^2 / [G^{-1}]_{ii}`.

    Source: Hassibi & Stork 1992, *Second Order Derivatives for Network Pruning: Optimal Brain Surgeon*.
    """
    gram, _ = problem.damped(weight.dtype)
    inverse = inverse_of(gram)
    return weight.square() / inverse.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)


def prune_columns(
    gram: Tensor, weight: Tensor, width: int, choose: Callable[[Tensor, int], Tensor]
) -> tuple[Tensor, Tensor]:
    """Prune one matrix column by column, each error made up for by the columns behind it.

    Args:
        gram: second moments of the inputs, ``(inputs, inputs)``.
        weight: ``(outputs, inputs)``.
        width: how many columns are chosen from at a time.
        choose: from scores of at most ``width`` columns and the number of the first to a mask of 0 and 1.

    Returns:
        The new weights and their mask.

    Source: Frantar & Alistarh 2023, *SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot*,
    arXiv:2301.00774, algorithm 1.
    """
    weight, gram, mask = weight.clone(), gram.to(weight.dtype), torch.ones_like(weight)
    dead = gram.diagonal() <= 0
    weight[:, dead] = 0
    damp = 0.01 * gram.diagonal().mean()
    gram = gram + torch.diag(torch.where(dead, 1.0, damp))
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)
    block = max(BLOCK // width, 1) * width  # whole groups
    for start in range(0, weight.shape[1], block):
        stop = min(start + block, weight.shape[1])
        errors = torch.zeros_like(weight[:, start:stop])
        for i in range(start, stop):
            if (i - start) % width == 0:
                here = slice(i, min(i + width, stop))
                mask[:, here] = choose(weight[:, here].square() / inverse.diagonal()[here].square(), i)
            pruned = weight[:, i] * mask[:, i]
            errors[:, i - start] = (weight[:, i] - pruned) / inverse[i, i]
            weight[:, i + 1 : stop] -= errors[:, i - start, None] * inverse[i, i + 1 : stop]
            weight[:, i] = pruned
        weight[:, stop:] -= errors @ inverse[start:stop, stop:]
    return weight, mask
