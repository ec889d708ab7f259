"""Which entries a layer keeps, by operator splitting between least squares and masks. No modules, no hooks."""

from collections.abc import Callable
from statistics import NormalDist

import torch
from torch import Tensor

from torchprune_ext.compensation.solvers import RIDGE, ROWS, Problem, inverse_of

Choose = Callable[[Tensor], Tensor]  # from values (groups, outputs, inputs) to a mask of the largest, 0 and 1
STEPS = 20  # of the splitting
PENALTY = 0.45  # its penalty at first, of the geometric mean of the eigenvalues
LEAST = 0.02  # added to the eigenvalues for that, and the least penalty: what float32 can still invert
GROWTH, EVERY = 1.5, 5  # by what it grows every so many steps
COUNTS = 2  # how often thresholds are corrected for each mask
FAR = 0.25  # of a row, kept too many or too few: the thresholds are found anew


def split(problem: Problem, weight: Tensor, choose: Choose, near: Choose | None = None) -> tuple[Tensor, Tensor]:
    r"""Return the mask on which operator splitting (ADMM) settles, and weights to start its re-fit from.

    With the Gram matrix :math:`G`, its diagonal 1, and the cross moments :math:`C`, steps alternate between

    .. math::
        D = (C + \rho (Z - U)) (G + \rho I)^{-1}, \qquad Z = \operatorname{choose}(D + U), \qquad U \leftarrow D + U - Z

    while the penalty :math:`\rho` grows.

    Args:
        problem: the layer's least squares.
        weight: the weights as they are, ``(groups, outputs, inputs)``, to which a ridge pulls.
        choose: gives the mask of the largest values.
        near: what all steps but the last use instead, if that is cheaper and much the same.

    Source: Meng, Behdin, Wang & Mazumder 2024, *ALPS: Improved Optimization for Highly Sparse One-Shot Pruning*,
    arXiv:2406.07831; Boza 2024, *Fast and Effective Weight Update for Pruned Large Language Models*, arXiv:2401.02938.
    """
    gram, cross = problem.damped(weight.dtype)
    scale = gram.diagonal(dim1=-2, dim2=-1).sqrt().unsqueeze(-2)
    gram.div_(scale).div_(scale.mT)
    cross.add_(weight, alpha=RIDGE).div_(scale)
    sparse = weight * scale
    near = choose if near is None else near
    sparse *= near(sparse)
    dual = torch.zeros_like(sparse)
    first = max(PENALTY * _mean_eigenvalue(gram), LEAST)
    for step in range(STEPS):
        if step % EVERY == 0:
            penalty = first * GROWTH ** (step // EVERY)
            inverse = _inverse(problem, gram, penalty)
        for u, z, c in zip(*(t.split(ROWS, 1) for t in (dual, sparse, cross)), strict=True):
            u.baddbmm_(torch.add(c, z - u, alpha=penalty), inverse)
        mask = choose(dual) if step == STEPS - 1 else near(dual)
        torch.mul(dual, mask, out=sparse)
        dual -= sparse
    return mask, sparse.div_(scale)


def _mean_eigenvalue(gram: Tensor) -> float:
    """Return the geometric mean of the eigenvalues, the mean over the groups: small where inputs are much alike."""
    shifted = gram.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(LEAST)
    pivots: Tensor = torch.linalg.cholesky(shifted).diagonal(dim1=-2, dim2=-1)
    return float(pivots.log().mean(-1).mul(2).exp().mean())


def _inverse(problem: Problem, gram: Tensor, penalty: float) -> Tensor:
    """Return the inverse of ``gram`` with the penalty; kept if other layers have the same."""
    kept, key = problem.inputs.inverses, (gram.dtype, problem.bias is None, penalty)
    if kept is None:
        return inverse_of(gram, penalty)
    if key not in kept:
        kept[key] = inverse_of(gram, penalty)
    return kept[key]


class Thresholds:
    """Chooses about ``keep`` entries of each row, those beyond a threshold that follows the values from call to call.

    A call changes each threshold by what it kept too many or too few, as if the values were normally distributed. What
    is left to correct shrinks from call to call, while the values change little.

    Args:
        keep: how many entries of a row, at least 1.
        alive: what earlier pruning left, ``(groups, outputs, inputs)``, 0 and 1; never more than that is kept.
    """

    def __init__(self, keep: int, alive: Tensor) -> None:
        normal, inputs = NormalDist(), alive.shape[-1]
        place = normal.inv_cdf(1 - min(keep / inputs, 0.99) / 2)
        self.rate = 1 / (2 * place * normal.pdf(place) * inputs)  # of the threshold's logarithm, for an entry too many
        self.alive = None if bool((alive != 0).all()) else alive
        self.below, self.keep = inputs - keep, alive.sum(-1, keepdim=True).clamp_max_(keep)
        self.cuts: Tensor | None = None

    def __call__(self, values: Tensor) -> Tensor:
        """Return the mask for ``values``, of the shape of ``alive``."""
        sizes = values.abs()
        if self.alive is not None:
            sizes *= self.alive
        mask, far = torch.empty_like(sizes), self.cuts is None
        for _ in range(COUNTS):
            if self.cuts is not None and not far:
                off = torch.gt(sizes, self.cuts, out=mask).sum(-1, keepdim=True).sub_(self.keep)
                far = float(off.abs().max()) > FAR * sizes.shape[-1]
                self.cuts *= off.mul_(self.rate).clamp_(-0.5, 0.5).exp_()
        if far and self.below:
            self.cuts = sizes.kthvalue(self.below, dim=-1, keepdim=True).values
        return mask.copy_(sizes > 0) if self.cuts is None else torch.gt(sizes, self.cuts, out=mask)
