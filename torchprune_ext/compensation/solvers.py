r"""Least squares of one layer under a mask: which entries to keep, and what they should be. No modules, no hooks.

All functions minimise :math:`\|Y - X W^\top\|^2` over :math:`W` through the second moments :math:`G = X^\top X` and
:math:`C = Y^\top X`, for one or more groups at once: ``weight`` has shape ``(groups, outputs, inputs)``.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchprune_ext._ranks import Ranks
from torchprune_ext.compensation.sources import Source

RIDGE = 3e-3  # of the mean diagonal of the Gram matrix
ROUNDS = 60  # most steps of the conjugate gradients
TOLERANCE = 1e-3  # of what is minimized: they end where a step gains less
ROWS = 256  # of a weight that are worked on at once, which bounds the memory for what lies in between
BLOCK = 128  # columns that SparseGPT treats at once, or as many as whole groups allow


class Moments:
    """Sums over the samples of a layer's inputs and outputs, in float64, taken about the means of the first ones.

    Args:
        before: the moments of an earlier layer, solved already, whose inputs this one is expected to get too. Where it
            does, their Gram matrix is taken over instead of being summed again.
    """

    def __init__(self, before: "Moments | None" = None) -> None:
        self.count = 0.0  # of samples, each by its weight
        self.sums: list[Tensor] = []
        self.before, self.followed = before, False  # whether this is the ``before`` of others
        self.sources: list[Source | None] = []
        self.scale: Tensor | None = None  # what the outputs are multiplied by before they go into a sum
        self.known: list[tuple[Callable[[], Iterable[Tensor]], float]] = []  # inputs that only ``before`` has, weighted

    def reads(self, source: Source | None, inputs: Callable[[], Iterable[Tensor]], weight: float = 1.0) -> bool:
        """Take note of the ``source`` of what is added next; return whether ``before`` had the same in its place.

        Args:
            source: what tells these inputs from others.
            inputs: gives them again, which is needed if later ones differ.
            weight: how much each of their samples counts.
        """
        place = len(self.sources)
        self.sources.append(source)
        others = [] if self.before is None or len(self.known) < place else self.before.sources
        if source is not None and place < len(others) and source.same(others[place]):
            self.known.append((inputs, weight))
            return True
        self.part()
        return False

    @property
    def shares(self) -> bool:
        """Whether all inputs are those of ``before``."""
        return self.before is not None and len(self.known) == len(self.before.sources)

    def part(self) -> None:
        """Part with ``before``: sum up the inputs that its sums have, since not all are the same."""
        for inputs, weight in self.known:
            for x in inputs():
                if x.shape[1]:
                    x = x.to(self.origin[0].dtype) - self.origin[0]
                    _add_square(self.sums[2], x, _times(x, weight))
        self.before, self.known = None, []

    def add(self, x: Tensor, y: Tensor, weight: float = 1.0, *, known: bool = False) -> None:
        """Take in samples: inputs ``(groups, samples, inputs)`` and dense outputs ``(groups, samples, outputs)``.

        Args:
            x: the inputs.
            y: the outputs.
            weight: how much each of these samples counts.
            known: whether the sums of ``before`` have the inputs.
        """
        if not x.shape[1]:
            return
        x, y = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x, y))
        if not self.count:
            self._start(x.mean(1, keepdim=True), y.mean(1, keepdim=True))
        x, y = x - self.origin[0], y - self.origin[1]
        sum_x, sum_y, gram, cross, energy = self.sums
        times_x = _times(x, weight)
        sum_x += times_x.sum(1)
        sum_y += y.sum(1).mul_(weight)
        if not known:
            _add_square(gram, x, times_x)
        for rows, squares, left in zip(cross.split(ROWS, 1), energy.split(ROWS, 1), y.split(ROWS, 2), strict=True):
            rows += left.mT @ times_x
            squares += left.square().sum(1).mul_(weight)
        self.count += x.shape[1] * weight

    def _start(self, x: Tensor, y: Tensor) -> None:
        """Take all sums, of which there are none yet, about ``x`` and ``y``."""
        self.origin = x, y
        groups, inputs, outputs = len(x), x.shape[2], y.shape[2]
        shapes = [(groups, inputs), (groups, outputs), (groups, inputs, inputs), (groups, outputs, inputs)]
        self.sums = [x.new_zeros(shape, dtype=torch.float64) for shape in [*shapes, (groups, outputs)]]

    def over(self, ranks: Ranks, matrix: Tensor) -> None:
        """Make these the moments of the samples of all ranks, on each of them; ``matrix`` is the layer's weight as one.

        Each rank takes its own about the mean of all samples before they are added. Inputs are those of the moments
        before only if they are so on all ranks.
        """
        if ranks.group is None:
            return
        sharing = ranks.total(self.shares)
        count = float(ranks.sum(torch.tensor(self.count, dtype=torch.float64, device="cpu")))
        if not count:
            return
        if sharing < ranks.size:
            self.part()
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
            if total is not gram or not self.shares:
                self.sums[place] = ranks.sum(total)
        self.count = count

    def problem(self, bias: Tensor | None) -> "Problem":
        """Return the least squares with the best bias for each weight, or with a fixed ``bias``, (groups, outputs).

        The sums are used up.
        """
        before = self.before if self.shares else None
        if before is None:
            self.part()
        sum_x, sum_y, gram, cross, energy = self.sums
        mean_x, mean_y = sum_x / self.count, sum_y / self.count
        cross.baddbmm_(mean_y.unsqueeze(-1), mean_x.unsqueeze(-2), alpha=-self.count)
        variation = energy - self.count * mean_y.square()
        if before is None:
            _fill_lower(gram)
            gram.baddbmm_(mean_x.unsqueeze(-1), mean_x.unsqueeze(-2), alpha=-self.count)
            mean_x = mean_x + self.origin[0].squeeze(1)
            self.inputs = Inputs(gram, mean_x, self.count, {} if self.followed else None)
        else:
            self.inputs = before.inputs
        self.sums, self.before, self.known = [], None, []
        scale = variation.new_ones(()) if self.scale is None else self.scale.to(variation)
        mean_y = mean_y + self.origin[1].squeeze(1)
        return Problem(self.inputs, cross, variation, mean_y, bias, scale.expand_as(variation))


def _times(x: Tensor, weight: float) -> Tensor:
    return x if weight == 1 else x * weight


def _add_square(gram: Tensor, x: Tensor, times_x: Tensor) -> None:
    """Add the upper half of the product of ``x`` with itself, weighted, in blocks of rows."""
    for start in range(0, x.shape[2], ROWS):
        gram[:, start : start + ROWS, start:] += x[..., start : start + ROWS].mT @ times_x[..., start:]


def _fill_lower(gram: Tensor) -> None:
    """Copy the upper half, in the same blocks, to the lower one."""
    for start in range(0, gram.shape[2], ROWS):
        stop = start + ROWS
        gram[:, stop:, start:stop] = gram[:, start:stop, stop:].mT


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """What the samples say of a layer's inputs alone, which layers that get the same inputs share.

    Args:
        gram: second moments about the means, ``(groups, inputs, inputs)``, in float64.
        mean: ``(groups, inputs)``.
        count: number of samples, each by its weight.
        inverses: what :func:`inverse_of` has found, for other layers; None if there are none.
    """

    gram: Tensor
    mean: Tensor
    count: float
    inverses: dict[tuple[object, ...], Tensor] | None


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """The least squares of one layer: all that its samples say of it.

    Args:
        inputs: what they say of the inputs.
        cross: second moments of outputs and inputs about the means, ``(groups, outputs, inputs)``.
        variation: squares of the outputs about their means, ``(groups, outputs)``.
        mean_y: means of the outputs, ``(groups, outputs)``.
        bias: the bias that stays, broadcast to ``(groups, outputs)``; None if it is fitted.
        scale: what outputs are multiplied by where they are added up with others, ``(groups, outputs)``.
    """

    inputs: Inputs
    cross: Tensor
    variation: Tensor
    mean_y: Tensor
    bias: Tensor | None
    scale: Tensor

    def total(self, squares: Tensor) -> float:
        """Return the sum over all rows of ``squares``, ``(groups, outputs)``, each in the scale in which it counts."""
        return float((squares * self.scale.square()).sum())

    @property
    def count(self) -> float:
        """Number of samples, each by its weight."""
        return self.inputs.count

    @property
    def gram(self) -> Tensor:
        """The Gram matrix: about the means, so that the bias is at its best, or about 0 where it stays."""
        if self.bias is None:
            return self.inputs.gram
        mean = self.inputs.mean
        return self.inputs.gram.baddbmm(mean.unsqueeze(-1), mean.unsqueeze(-2), alpha=self.count)

    def energy(self) -> Tensor:
        """Return the error of each row if all weights are 0, ``(groups, outputs)``."""
        if self.bias is None:
            return self.variation
        return self.variation + self.count * (self.mean_y - self.bias).square()

    def error(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the squared error of each row; without ``bias`` with the best one, or the one fixed in the problem."""
        found = self.variation.clone()
        for total, *rows in zip(*(t.split(ROWS, 1) for t in (found, weight, self.cross)), strict=True):
            some, cross = rows[0].double(), rows[1]
            total += (some @ self.inputs.gram).sub_(cross, alpha=2).mul_(some).sum(-1)
        found.clamp_min_(0)
        bias = self.bias if bias is None else bias
        return found if bias is None else found + self.count * (self.best_bias(weight) - bias).square()

    def best_bias(self, weight: Tensor) -> Tensor:
        """Return the best bias of each row, ``(groups, outputs)``."""
        rows = [part.double() @ self.inputs.mean.unsqueeze(-1) for part in weight.split(ROWS, 1)]
        return self.mean_y - torch.cat(rows, 1).squeeze(-1)

    def input_norms(self) -> Tensor:
        """Return the norm of each input over the samples, ``(groups, inputs)``."""
        about = self.count * self.inputs.mean.square()
        return (self.inputs.gram.diagonal(dim1=-2, dim2=-1) + about).sqrt()

    def size(self) -> Tensor:
        """Return the mean diagonal of the Gram matrix of each group, ``(groups, 1, 1)``; 1 where it is 0."""
        diagonal = self.inputs.gram.diagonal(dim1=-2, dim2=-1)
        if self.bias is not None:
            diagonal = diagonal + self.count * self.inputs.mean.square()
        size = diagonal.mean(-1)[:, None, None]
        return torch.where(size > 0, size, 1.0)

    def damped(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the Gram matrix and the cross moments, in units of :meth:`size`, the former with ``RIDGE``."""
        gram = self._scaled(self.inputs.gram, self.inputs.mean, dtype)
        cross = self._scaled(self.cross, self.mean_y if self.bias is None else self.mean_y - self.bias, dtype)
        gram.diagonal(dim1=-2, dim2=-1).add_(RIDGE)
        return gram, cross

    def _scaled(self, moments: Tensor, means: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``moments``, of something with these ``means`` and the inputs, in units of :meth:`size`."""
        size, scaled = self.size(), torch.empty_like(moments, dtype=dtype)
        for rows, values, mean in zip(*(t.split(ROWS, 1) for t in (scaled, moments, means)), strict=True):
            if self.bias is not None:
                values = values.baddbmm(mean.unsqueeze(-1), self.inputs.mean.unsqueeze(-2), alpha=self.count)
            rows.copy_(values / size)
        return scaled


def refit(problem: Problem, weight: Tensor, keep: Tensor, start: Tensor | None = None) -> Tensor:
    """Return the best weights on the support ``keep``, where a ridge pulls towards ``weight``.

    Rows that keep the same columns share one factorization. Else it takes conjugate gradients over many rows at once:
    the Gram matrix is shared, so one product per step serves every row; the mask projects and the diagonal
    preconditions.

    Args:
        problem: the layer's least squares.
        weight: what the ridge pulls to; what is not kept counts as 0.
        keep: 0 and 1, of its shape.
        start: where to start from, if something better than ``weight`` is known.
    """
    columns = keep.amax(1, keepdim=True)
    if torch.equal(keep, columns.expand_as(keep)):
        return _solved(problem, weight, columns)
    gram, cross = problem.damped(weight.dtype)
    cross.add_(weight, alpha=RIDGE)
    found = (weight if start is None else start) * keep
    worst = problem.energy() / problem.size().squeeze(-1) + RIDGE * (weight * keep).square().sum(-1)
    for part in zip(*(t.split(ROWS, 1) for t in (found, keep, cross, worst)), strict=True):
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


def _descend(gram: Tensor, found: Tensor, keep: Tensor, cross: Tensor, worst: Tensor) -> None:
    """Go down from ``found``, in place, to the least squares on the support ``keep``.

    Args:
        gram: the Gram matrix, with the ridge.
        found: weights, 0 where nothing is kept.
        keep: 0 and 1.
        cross: the cross moments, with the pull of the ridge.
        worst: what is minimized, error and ridge, of each row if all weights are 0.
    """
    scale = gram.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
    residual = cross - found @ gram
    left = total = float(worst.sum())
    left -= float((found * (cross + residual)).sum(dtype=torch.float64))
    residual.mul_(keep)
    direction = residual / scale
    slope = (residual * direction).sum(-1, keepdim=True)
    gained, noise = 0.0, torch.finfo(found.dtype).eps * total
    for _ in range(ROUNDS):
        product = (direction @ gram).mul_(keep)
        curvature = (direction * product).sum(-1, keepdim=True)
        step = torch.where(curvature > 0, slope / curvature, 0.0)
        found.addcmul_(step, direction)
        gain = float((step * slope).sum())
        gained += gain
        if not gain > TOLERANCE * max(left - gained, noise):
            break
        residual.addcmul_(step, product, value=-1)
        ahead = residual / scale
        before, slope = slope, (residual * ahead).sum(-1, keepdim=True)
        direction.mul_(torch.where(before > 0, slope / before, 0.0)).add_(ahead)


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
