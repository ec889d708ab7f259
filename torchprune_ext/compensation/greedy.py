r"""Which units of neighbouring columns a layer keeps, removed one after the other at what each costs. No modules.

The cost is that of the ridge least squares of all outputs together, after all columns that are left have adapted.
"""

import torch
from torch import Tensor

from torchprune_ext.compensation.solvers import Problem, inverse_of

PANEL = 64  # columns that are removed before the matrices are brought up to date, by one product for all of them


def greedy_units(problem: Problem, mask: Tensor, width: int, keep: int) -> Tensor:
    r"""Return which units stay when the cheapest goes, again and again, until ``keep`` are left in each group.

    With :math:`P = (G + \lambda I)^{-1}` of the columns that are left and :math:`W = C P`, the least squares on them,
    removing the columns :math:`u` costs :math:`\operatorname{tr}(W_u P_{uu}^{-1} W_u^\top)` and leaves
    :math:`W - W_u P_{uu}^{-1} P_u` and :math:`P - P_u^\top P_{uu}^{-1} P_u`, which is exact. Of :math:`W` only
    :math:`A = W^\top W` is needed, so that outputs cost nothing.

    Args:
        problem: the layer's least squares.
        mask: what earlier pruning left, ``(groups, outputs, inputs)``, 0 and 1. A unit of which nothing is left counts
            as pruned; of one that is left in part, the part counts, with the weights that whole columns would have.
        width: number of neighbouring columns of a unit.
        keep: number of units that stay in each group, at least 1; all, where fewer are left.

    Returns:
        Bool, ``(groups, units)``. Of units that cost the same, the earlier ones stay.

    Source: Kurtic, Frantar & Alistarh 2023, *ZipLM: Inference-Aware Structured Pruning of Language Models*,
    arXiv:2302.04089, section 3.1, after Hassibi & Stork 1992; here with a ridge, and from the least squares on all
    columns rather than from the weights as they are.
    """
    gram, cross = problem.damped(torch.float64)
    alive: Tensor = mask.unflatten(-1, (-1, width)).amax((1, 3)) != 0
    for group, units in enumerate(alive):
        columns = units.repeat_interleave(width)
        inverse = inverse_of(gram[group][columns][:, columns])
        weight = (cross[group][:, columns] @ inverse) * mask[group][:, columns]
        left = units.nonzero().squeeze(1)
        stay = _eliminate(inverse, weight.mT @ weight, width, keep)
        units[left] = False
        units[left[stay]] = True
    return alive


def of_units(stay: Tensor, width: int, mask: Tensor) -> Tensor:
    """Return ``mask``, ``(groups, outputs, inputs)``, without the units that do not ``stay``, ``(groups, units)``."""
    return mask * stay.to(mask.dtype).repeat_interleave(width, -1).unsqueeze(-2)


def _eliminate(inverse: Tensor, squares: Tensor, width: int, keep: int) -> Tensor:
    """Return the places of the units that stay; ``inverse`` and ``squares`` are P and A, (columns, columns)."""
    left = torch.arange(len(inverse) // width, device=inverse.device)
    while len(left) > keep:
        some = min(max(PANEL // width, 1), len(left) - keep)
        gone, low, half = _panel(inverse, squares, width, some)
        stay = torch.ones_like(left, dtype=torch.bool)
        stay[gone] = False
        left = left[stay]
        columns = stay.repeat_interleave(width)
        low, half = low[columns], half[columns]
        inverse = inverse[columns][:, columns].addmm_(low, low.mT, alpha=-1)
        change = low @ half.mT
        squares = squares[columns][:, columns].sub_(change).sub_(change.mT)
    return left


def _panel(inverse: Tensor, squares: Tensor, width: int, some: int) -> tuple[list[int], Tensor, Tensor]:
    r"""Choose ``some`` units to remove, and return them with L and M, ``(columns, some * width)``.

    The matrices without them are :math:`P - L L^\top` and :math:`A - L M^\top - M L^\top`, as in a pivoted Cholesky
    decomposition. Here only what the next choice needs is brought up to date: the columns of the unit that goes, and
    the blocks on the diagonals.
    """
    units = len(inverse) // width
    low, half = (inverse.new_empty(len(inverse), some * width) for _ in range(2))
    blocks, energies = (_diagonal_blocks(each, width) for each in (inverse, squares))
    gone: list[int] = []
    for step in range(some):
        costs = _costs(blocks, energies)
        costs[gone] = torch.inf
        unit = units - 1 - int(costs.flip(0).argmin())  # of equal ones the last
        gone.append(unit)
        own, done, new = (slice(at * width, end * width) for at, end in ((unit, unit + 1), (0, step), (step, step + 1)))
        p = inverse[own].mT - low[:, done] @ low[own, done].mT
        a = squares[own].mT - half[:, done] @ low[own, done].mT - low[:, done] @ half[own, done].mT
        factor = torch.linalg.cholesky(p[own])
        low[:, new] = p = _behind(p, factor)
        a = _behind(a, factor)
        half[:, new] = a = a - p @ torch.linalg.solve_triangular(factor, a[own], upper=False) / 2
        p, a = p.unflatten(0, (units, width)), a.unflatten(0, (units, width))
        blocks -= p @ p.mT
        blocks[unit] = torch.eye(width, dtype=blocks.dtype, device=blocks.device)  # it is gone
        change = p @ a.mT
        energies -= change + change.mT
    return gone, low, half


def _costs(blocks: Tensor, energies: Tensor) -> Tensor:
    """Return the trace of the inverse of each of ``blocks`` times the one of ``energies``."""
    if blocks.shape[-1] == 1:
        return (energies / blocks).flatten()
    products: Tensor = torch.linalg.solve(blocks, energies)
    return products.diagonal(dim1=-2, dim2=-1).sum(-1)


def _diagonal_blocks(matrix: Tensor, width: int) -> Tensor:
    """Return the blocks on the diagonal, ``(units, width, width)``."""
    blocks: Tensor = matrix.unflatten(0, (-1, width)).unflatten(2, (-1, width))
    return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0).clone()


def _behind(matrix: Tensor, factor: Tensor) -> Tensor:
    """Return ``matrix`` times the inverse of the transposed, lower triangular ``factor``."""
    product: Tensor = torch.linalg.solve_triangular(factor.mT, matrix, upper=True, left=False)
    return product
