"""The order of columns in which ``n`` of every ``m`` keep most: exchanges of two columns until none gains."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ENTRIES = 1 << 22  # of scores that are looked at together
LEAST = 1e-6  # share of a group that an exchange has to gain: less may be rounding


@dataclass(frozen=True, slots=True, eq=False)
class Stripes:
    """Scores, and which places of their columns are a group of ``m``: a stripe.

    Args:
        scores: float32 of shape ``(rows, channels + others)``, at least 0: a column for each channel, and for each
            place that no channel can take, as one of zeros that fills a short group up.
        places: int64 of shape ``(stripes, m)``: the places that each stripe has, each place in one stripe. A place less
            than ``channels`` is one where a channel stands, others always hold the column of their number.
    """

    scores: Tensor
    places: Tensor


def best_order(stripes: Sequence[Stripes], channels: int, n: int) -> Tensor:
    """Find an order of channels in which the ``n`` largest of each row of each stripe have a large sum.

    Begins with the order that there is. What an exchange of two channels would gain is known for all pairs at once: of
    ``m`` entries, of which one is replaced by ``x``, those kept sum to that of the ``n - 1`` largest of the others and
    ``max(t, x)``, where ``t`` is the n-th of the others; and ``max(t, x) = (t + x + |t - x|) / 2``, so that over all
    rows it is a distance of two columns. The best exchanges whose stripes are disjoint are made together, until none
    gains. Not every optimum is the best one.

    Args:
        stripes: the scores of everything that reads the channels in the same order.
        channels: how many there are.
        n: entries that each row of a stripe keeps, less than ``m``.

    Returns:
        int64 of shape ``(channels,)``: which channel stands at each place. Its sum is at least that of the order that
        there was, up to rounding.

    Source:
        Pool & Yu 2021, *Channel Permutations for N:M Sparsity*, whose objective this is, and whose greedy exchanges
        between stripes it makes many of at a time.
    """
    order = torch.arange(channels, device=stripes[0].scores.device)
    views = [_View(each, n, order) for each in stripes]
    best, kept = order.clone(), -1.0
    while True:
        total = sum(float(view.kept.sum()) for view in views)
        if total <= kept:  # rounding has led astray
            return best
        best, kept = order.clone(), total
        chosen = _exchanges(views, order)
        if not len(chosen):
            return best
        order[chosen] = order[chosen.flip(1)]
        for view in views:
            view.update(view.of[chosen.flatten()].unique(), order)


def _exchanges(views: Sequence["_View"], order: Tensor) -> Tensor:
    """Return pairs of places, ``(pairs, 2)``, whose exchanges gain and do not touch the same stripes."""
    gains = torch.zeros((len(order), len(order)), device=order.device)
    least = torch.zeros(len(order), device=order.device)
    for view in views:
        own = view.kept[view.of].float()
        after = view.replaced[:, order]
        gains += (after + after.t() - own[:, None] - own).masked_fill_(view.of[:, None] == view.of, 0)
        least += LEAST * own
    gains, partners = gains.max(1)
    falling = gains.argsort(descending=True, stable=True)
    falling = falling[gains[falling] > least[falling]]
    rows = torch.stack([falling, partners[falling], *(v.of[x] for v in views for x in (falling, partners[falling]))], 1)
    taken: list[set[int]] = [set() for _ in views]
    chosen = []
    for one, other, *touched in rows.tolist():
        both = [{touched[2 * place], touched[2 * place + 1]} for place in range(len(views))]
        if not any(a & b for a, b in zip(taken, both, strict=True)):
            chosen.append((one, other))
            for a, b in zip(taken, both, strict=True):
                a |= b
    return torch.tensor(chosen, dtype=torch.int64, device=order.device).view(-1, 2)


class _View:
    """What some stripes keep, and would keep with another channel at a place.

    Args:
        stripes: the scores and stripes.
        n: entries kept.
        order: which channel stands at each place.

    Attributes:
        of: int64, ``(channels,)``: the stripe of each place.
        kept: float64, ``(stripes,)``: the sum that each keeps.
        replaced: float32, ``(channels, channels)``: the sum that the stripe of a place would keep with a channel there.
    """

    def __init__(self, stripes: Stripes, n: int, order: Tensor) -> None:
        self.stripes, self.n = stripes, n
        count, places = len(order), stripes.places
        numbers = torch.arange(len(places), device=order.device)
        self.of = torch.empty(stripes.scores.shape[1], dtype=torch.int64, device=order.device)
        self.of[places] = numbers[:, None]
        self.of = self.of[:count]
        self.kept = torch.zeros(len(places), dtype=torch.float64, device=order.device)
        self.replaced = torch.zeros((count, count), device=order.device)
        self.update(numbers, order)

    def update(self, numbers: Tensor, order: Tensor) -> None:
        """Look again at the stripes of some numbers."""
        scores, count = self.stripes.scores, len(order)
        full = torch.cat([order, torch.arange(count, scores.shape[1], device=order.device)])
        places = self.stripes.places[numbers]
        inside = places < count
        slots = places[inside]
        kept = torch.zeros(len(numbers), dtype=torch.float64, device=order.device)
        sums = torch.zeros((len(slots), count), device=order.device)
        for rows in scores.split(max(1, ENTRIES // scores.shape[1])):
            entries = rows[:, full[places]]
            ranked = entries.sort(-1, descending=True).values
            last, next_ = ranked[..., self.n - 1 : self.n], ranked[..., self.n : self.n + 1]
            of_stripe = ranked[..., : self.n].sum(-1, keepdim=True)
            among = entries >= last  # the others' n-th is then one further
            threshold = torch.where(among, next_, last)[:, inside].t().contiguous()
            others = (of_stripe - torch.where(among, entries, last)).sum(0)[inside]
            columns = rows[:, :count].t().contiguous()
            apart = torch.cdist(threshold, columns, p=1)
            sums += (apart + threshold.sum(1, keepdim=True) + columns.sum(1)) / 2 + others[:, None]
            kept += of_stripe.squeeze(-1).sum(0, dtype=torch.float64)
        self.kept[numbers], self.replaced[slots] = kept, sums
