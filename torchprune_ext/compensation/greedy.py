r"""Which units of neighbouring columns a layer keeps, removed one after the other at what each costs. No modules.

The cost is that of the ridge least squares of all outputs together, after all columns that are left have adapted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchprune_ext.compensation.solvers import Problem, inverse_of

PANEL = 64  # columns that are removed before the matrices are brought up to date, by one product for all of them


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What one matrix that reads some units says of them.

    Args:
        inverse: P, ``(units * width, units * width)``, the columns of a unit side by side.
        squares: A, of the same shape.
        width: number of columns of a unit.
    """

    inverse: Tensor
    squares: Tensor
    width: int


def greedy_units(problem: Problem, mask: Tensor, width: int, keep: int) -> Tensor:
    """Return which units stay when the cheapest goes, again and again, until ``keep`` are left in each group.

    Args:
        problem: the layer's least squares.
        mask: what earlier pruning left, ``(groups, outputs, inputs)``, 0 and 1. A unit of which nothing is left counts
            as pruned; of one that is left in part, the part counts, with the weights that whole columns would have.
        width: number of neighbouring columns of a unit.
        keep: number of units that stay in each group, at least 1; all, where fewer are left.

    Returns:
        Bool, ``(groups, units)``. Of units that cost the same, the earlier ones stay.
    """
    alive: Tensor = mask.unflatten(-1, (-1, width)).amax((1, 3)) != 0
    places = torch.arange(mask.shape[-1], device=mask.device).view(-1, width)
    for units, damped in zip(alive, zip(*weighed(problem), mask, strict=True), strict=True):
        left = units.nonzero().squeeze(1)
        [part] = parts_of(*damped, [places[left]])
        units[left[eliminate([part], keep)[0]]] = False
    return alive


def weighed(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return the second moments in float64, those of the outputs in the scales in which they count."""
    gram, cross = problem.damped(torch.float64)
    return gram, cross.mul_(problem.scale.unsqueeze(-1))


def parts_of(gram: Tensor, cross: Tensor, mask: Tensor, units: Sequence[Tensor]) -> list[Part]:
    """Return what a matrix says of several kinds of units that it reads.

    Args:
        gram: second moments of its inputs, with a ridge.
        cross: those of its outputs and inputs, ``(outputs, inputs)``.
        mask: what earlier pruning left of it, of the same shape. Other columns than those of units count if something
            is left of them.
        units: of each kind, the columns that are left, ``(units, width)``.
    """
    alive = mask.amax(0) != 0
    for columns in units:
        alive[columns.flatten()] = True
    inverse = inverse_of(gram[alive][:, alive])
    weight = (cross[:, alive] @ inverse) * mask[:, alive]
    places, found = alive.cumsum(0) - 1, []
    for columns in units:
        own = places[columns.flatten()]
        some = weight[:, own]
        found.append(Part(inverse[own][:, own], some.mT @ some, columns.shape[1]))
    return found


def of_units(stay: Tensor, width: int, mask: Tensor) -> Tensor:
    """Return ``mask``, ``(groups, outputs, inputs)``, without the units that do not ``stay``, ``(groups, units)``."""
    return mask * stay.to(mask.dtype).repeat_interleave(width, -1).unsqueeze(-2)


def eliminate(parts: Sequence[Part], keep: int) -> tuple[list[int], list[float]]:
    r"""Return the units in the order in which they go until ``keep`` are left, and by what each raises the cost.

    With :math:`P = (G + \lambda I)^{-1}` of the columns that are left and :math:`W = C P`, the least squares on them,
    removing the columns :math:`u` costs :math:`\operatorname{tr}(W_u P_{uu}^{-1} W_u^\top)` and leaves
    :math:`W - W_u P_{uu}^{-1} P_u` and :math:`P - P_u^\top P_{uu}^{-1} P_u`, which is exact. Of :math:`W` only
    :math:`A = W^\top W` is needed, so that outputs cost nothing. Where several matrices read the units, the costs add
    up.

    Args:
        parts: the matrices, each with columns of all units.
        keep: number of units that stay, at least 1; all, where there are fewer.

    Source: Kurtic, Frantar & Alistarh 2023, *ZipLM: Inference-Aware Structured Pruning of Language Models*,
    arXiv:2302.04089, section 3.1, after Hassibi & Stork 1992; here with a ridge, from the least squares on all columns
    rather than from the weights as they are, and for several readers.
    """
    left = torch.arange(len(parts[0].inverse) // parts[0].width, device=parts[0].inverse.device)
    order: list[int] = []
    costs: list[float] = []
    while len(left) > keep:
        some = min(max(PANEL // max(part.width for part in parts), 1), len(left) - keep)
        gone, rises, panels = _panel(parts, some)
        order += left[gone].tolist()
        costs += rises
        stay = torch.ones_like(left, dtype=torch.bool)
        stay[gone] = False
        left = left[stay]
        if len(left) > keep:
            parts = [panel.rest(stay) for panel in panels]
    return order, costs


def _panel(parts: Sequence[Part], some: int) -> tuple[list[int], list[float], list["_Panel"]]:
    """Choose ``some`` units to remove; return them, their costs, and the matrices without them."""
    panels = [_Panel(part, some) for part in parts]
    gone: list[int] = []
    rises: list[float] = []
    for _ in range(some):
        costs = torch.stack([panel.costs() for panel in panels]).sum(0)
        costs[gone] = torch.inf
        unit = len(costs) - 1 - int(costs.flip(0).argmin())  # of equal ones the last
        gone.append(unit)
        rises.append(max(float(costs[unit]), 0.0))
        for panel in panels:
            panel.remove(unit)
    return gone, rises, panels


class _Panel:
    r"""One matrix while some units go, of which L and M, ``(columns, some * width)``, tell.

    The matrices without them are :math:`P - L L^\top` and :math:`A - L M^\top - M L^\top`, as in a pivoted Cholesky
    decomposition. Only what the next choice needs is brought up to date: the columns of the unit that goes, and the
    blocks on the diagonals.
    """

    def __init__(self, part: Part, some: int) -> None:
        self.part, self.done = part, 0
        self.low, self.half = (part.inverse.new_empty(len(part.inverse), some * part.width) for _ in range(2))
        self.blocks, self.energies = (_diagonal_blocks(each, part.width) for each in (part.inverse, part.squares))

    def costs(self) -> Tensor:
        """Return what each unit costs: the trace of the inverse of its block of P times that of A."""
        if self.part.width == 1:
            return (self.energies / self.blocks).flatten()
        products: Tensor = torch.linalg.solve(self.blocks, self.energies)
        return products.diagonal(dim1=-2, dim2=-1).sum(-1)

    def remove(self, unit: int) -> None:
        """Take a unit out."""
        low, half, width, done = self.low, self.half, self.part.width, slice(0, self.done)
        own, new = (slice(start, start + width) for start in (unit * width, self.done))
        p = self.part.inverse[own].mT - low[:, done] @ low[own, done].mT
        a = self.part.squares[own].mT - half[:, done] @ low[own, done].mT - low[:, done] @ half[own, done].mT
        factor = torch.linalg.cholesky(p[own])
        low[:, new] = p = _behind(p, factor)
        a = _behind(a, factor)
        half[:, new] = a = a - p @ torch.linalg.solve_triangular(factor, a[own], upper=False) / 2
        p, a = p.unflatten(0, (-1, width)), a.unflatten(0, (-1, width))
        self.blocks -= p @ p.mT
        self.blocks[unit] = torch.eye(width, dtype=p.dtype, device=p.device)  # it is gone
        change = p @ a.mT
        self.energies -= change + change.mT
        self.done += width

    def rest(self, stay: Tensor) -> Part:
        """Return the matrix with the units that ``stay``, bool."""
        columns = stay.repeat_interleave(self.part.width)
        low, half = self.low[columns], self.half[columns]
        inverse = self.part.inverse[columns][:, columns].addmm_(low, low.mT, alpha=-1)
        change = low @ half.mT
        squares = self.part.squares[columns][:, columns].sub_(change).sub_(change.mT)
        return Part(inverse, squares, self.part.width)


def _diagonal_blocks(matrix: Tensor, width: int) -> Tensor:
    """Return the blocks on the diagonal, ``(units, width, width)``."""
    blocks: Tensor = matrix.unflatten(0, (-1, width)).unflatten(2, (-1, width))
    return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0).clone()


def _behind(matrix: Tensor, factor: Tensor) -> Tensor:
    """Return ``matrix`` times the inverse of the transposed, lower triangular ``factor``."""
    product: Tensor = torch.linalg.solve_triangular(factor.mT, matrix, upper=True, left=False)
    return product
