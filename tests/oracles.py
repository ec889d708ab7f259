"""What every method means, as plain loops over lists: slow, obvious, and written without a look at the package.

A tensor is a flat list in row-major order together with its shape; a *unit* is the list of flat indices that live or
die together; a mask is a flat list of 0 and 1.
"""

import itertools
import math

import torch

Units = list[list[int]]


def positions(shape):
    """Map every coordinate of ``shape`` to its flat row-major index."""
    return {at: flat for flat, at in enumerate(itertools.product(*(range(size) for size in shape)))}


def collect(shape, key):
    """Group the flat indices by ``key(coordinate)``, the groups in the order of their first member."""
    units = {}
    for at, flat in positions(shape).items():
        units.setdefault(key(at), []).append(flat)
    return list(units.values())


def entries(shape):
    """Every entry is a unit of its own."""
    return collect(shape, lambda at: at)


def vectors(shape, dim):
    """A vector runs along ``dim``; all the other coordinates are fixed."""
    dim %= len(shape)
    return collect(shape, lambda at: at[:dim] + at[dim + 1 :])


def kernels(shape):
    """A kernel is ``weight[o, i]``, whatever the number of spatial axes."""
    return collect(shape, lambda at: at[:2])


def channels(shape, dim, groups=1, size=1):
    """Return channels along ``dim``, ``size`` neighbours together; each of ``groups`` blocks of axis 0 has its own."""
    dim %= len(shape)
    per_group, rows = shape[dim] // size, shape[0] // groups
    units = {c: [] for c in range(per_group * groups)}
    for at, flat in positions(shape).items():
        group = 0 if dim == 0 else at[0] // rows
        units[group * per_group + at[dim] // size].append(flat)
    return [units[c] for c in sorted(units)]


def runs(shape, m, dim):
    """``m`` consecutive entries along ``dim``; the last run may be short."""
    dim %= len(shape)
    return collect(shape, lambda at: (*at[:dim], at[dim] // m, *at[dim + 1 :]))


def how_many(amount, alive):
    """Return how many of ``alive`` units go: ints as they are, floats by Python's ``round``."""
    return amount if isinstance(amount, int) else round(amount * alive)


def prune_units(units, scores, mask, amount):
    """Prune the units of lowest score among those with a living entry; the higher index goes first in a tie."""
    alive = [u for u, unit in enumerate(units) if any(mask[i] for i in unit)]
    doomed = sorted(alive, key=lambda u: (scores[u], -u))[: how_many(amount, len(alive))]
    gone = {i for u in doomed for i in units[u]}
    return [0 if i in gone else mask[i] for i in range(len(mask))]


def rank_of_norm(values, n):
    """Return a number that orders lists as their Ln norm does, without the root that could blur a tie."""
    values = [abs(v) for v in values]
    if not values:
        return 0
    if n == math.inf:
        return max(values)
    if n == -math.inf:
        return min(values)
    if n == 0:
        return sum(v != 0 for v in values)
    if n < 0:
        return 0 if 0 in values else -sum(v**n for v in values)
    return sum(v**n for v in values)


def prune_by_norm(units, scores, mask, amount, n):
    """Prune units by the Ln norm of their scores, where masked entries count as 0."""
    effective = [s * m for s, m in zip(scores, mask, strict=True)]
    return prune_units(units, [rank_of_norm([effective[i] for i in unit], n) for unit in units], mask, amount)


def keep_n_of_m(units, scores, mask, n):
    """Keep the best ``n`` survivors of each group; a tie keeps the lower index."""
    kept = set()
    for unit in units:
        survivors = [i for i in unit if mask[i]]
        kept.update(sorted(survivors, key=lambda i: (-abs(scores[i]), i))[:n])
    return [1 if i in kept else 0 for i in range(len(mask))]


def below(scores, mask, threshold):
    """Prune what scores strictly below ``threshold``."""
    return [1 if m and abs(s) >= threshold else 0 for s, m in zip(scores, mask, strict=True)]


def every_other(mask, step, offset):
    """Prune every ``step``-th survivor, from the survivor number ``offset`` on."""
    survivors = [i for i, m in enumerate(mask) if m]
    gone = set(survivors[offset::step])
    return [0 if i in gone else m for i, m in enumerate(mask)]


def least_squares(gram, cross, columns):
    """Return how much of the energy the least squares on ``columns`` explains, for all outputs together."""
    if not columns:
        return 0.0
    gram, cross = gram[columns][:, columns], cross[:, columns]
    return float((torch.linalg.solve(gram, cross.mT).mT * cross).sum())


def greedy_units(gram, cross, alive, width, keep):
    """Remove, again and again, the unit without which the least squares explains most; a tie keeps the lower index.

    Return the units that stay, and how far the best was ahead of the second, at least, of what is explained by all.
    """
    alive, margin = list(alive), math.inf

    def explained(units):
        return least_squares(gram, cross, [unit * width + i for unit in units for i in range(width)])

    whole = explained(alive) or 1.0
    while len(alive) > keep:
        without = [explained([unit for unit in alive if unit != gone]) / whole for gone in alive]
        best, second = sorted(without, reverse=True)[:2]
        margin = min(margin, best - second)
        alive.pop(max(range(len(alive)), key=lambda place: (without[place], place)))
    return alive, margin
