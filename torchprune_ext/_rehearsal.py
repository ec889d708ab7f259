"""Whether a loss is a mean over samples that do not depend on each other: a few of them tell, before all are used.

A few samples run through the model together, then the same twice over, then each alone. A mean stays when its samples
are repeated, and a sum doubles. Where samples are independent, the output of each is the same alone.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from torchprune_ext._batches import AXES_REMEDY, Batch, leaves
from torchprune_ext._checks import warn

FEW = 4  # samples
OFF = 1e-2  # of the largest output, by which one alone may differ; kernels for other batch sizes round differently
SAME = 3e-3  # of a loss, by which it may differ; time taken for samples was seen to give 6e-3 and more
ALIKE = 1e-2  # of a loss, by which unequal weights of samples may change it without a word
FAILURES = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, NotImplementedError)
NOT_SINGLE = (
    "Where samples cannot be told apart, as with BatchNorm without running statistics or a contrastive loss, take a "
    "statistic of batches: gradients(), taylor(per='batch') or hessian_diagonal(method='hutchinson')."
)
Output = Callable[[Any], Any]
Loss = Callable[[Any, Any], Tensor]


class Rehearsal:
    """A few samples of a batch, together, repeated, and alone.

    Args:
        output: from inputs to what the model makes of them.
        loss: from outputs and targets to a number.
        batch: a batch.
        eps: rounding of the model's dtype, relative.
    """

    def __init__(self, output: Output, loss: Loss, batch: Batch, eps: float) -> None:
        self.output, self.loss, self.batch, self.eps = output, loss, batch, eps
        self.count = min(batch.size, FEW)

    def refuse_sum(self) -> None:
        """Raise ``ValueError`` if the loss is a sum over samples; says nothing where samples cannot be repeated."""
        try:
            once, twice = self._times(1), self._times(2)
            summed = self._sums(once, twice) and self._close(self._times(3), 3 * once)
        except FAILURES:
            return
        if summed:
            raise _summed(once, twice)

    def refuse_mixed(self) -> None:
        """Raise ``ValueError`` unless the loss is a mean over independent samples; warn if they weigh differently."""
        self._refuse_other_lengths()
        few = range(self.count)
        try:
            together, whole = self._run(slice(0, self.count))
            twice = self._times(2)
            alone = [self._run(slice(i, i + 1)) for i in few]
        except FAILURES as error:
            raise ValueError(
                f"loader gave {self.batch.shapes()}, taken for {self.batch.size} samples, and the model or the loss "
                f"fails on some of them alone: {error}. {AXES_REMEDY}"
            ) from error
        losses = [loss for _, loss in alone]
        for i, loss in enumerate(losses):
            if loss != loss and whole == whole:
                raise ValueError(lost(i))
        self._refuse_hidden_samples(together)
        mean = sum(losses) / len(losses)
        told = (
            f"The loss of {self.count} samples together is {whole:.6g}, of the same samples twice {twice:.6g}, and the "
            f"mean of their losses alone {mean:.6g}"
        )
        if self._sums(whole, twice) and (self.count == 1 or self._close(whole, sum(losses))):
            raise _summed(whole, twice)
        far = self._off(together, [output for output, _ in alone])
        if far is not None and far > max(OFF, 16 * self.eps):
            again, _ = self._run(slice(0, self.count))
            if not _repeats(together, again, OFF):
                return  # the model draws random numbers
            raise ValueError(
                f"loader gave {self.batch.shapes()}, taken for {self.batch.size} samples, but the model's output for "
                f"one of them alone differs from that in a batch by {far:.0%} of the largest output. {told}. "
                f"{AXES_REMEDY} {NOT_SINGLE}"
            )
        within = min(losses) - abs(whole) * SAME <= whole <= max(losses) + abs(whole) * SAME
        if not self._close(whole, twice) or not (within if far is not None else self._close(whole, mean)):
            raise ValueError(
                f"loss_fn gives no mean over independent samples of {self.batch.shapes()}. {told}. {AXES_REMEDY} "
                f"{NOT_SINGLE}"
            )
        if not self._close(whole, mean, ALIKE):
            warn(
                f"loss_fn weighs samples differently, as a mean over tokens or with weights of classes does. {told}. "
                "The statistic counts every sample alike."
            )

    def _times(self, times: int) -> float:
        return self._run(*[slice(0, self.count)] * times)[1]

    def _run(self, *samples: slice) -> tuple[Any, float]:
        inputs, targets = self.batch.gathered(*samples)
        output = self.output(inputs)
        return output, float(self.loss(output, targets))

    def _close(self, a: float, b: float, by: float = SAME) -> bool:
        return not abs(a - b) > max(by, 4 * self.eps) * max(abs(a), abs(b)) + 64 * self.eps  # True for NaN

    def _sums(self, once: float, twice: float) -> bool:
        return self._close(twice, 2 * once) and not self._close(twice, once)

    def _refuse_other_lengths(self) -> None:
        """Refuse targets of which none has an entry per sample, unless that was said."""
        batch = self.batch
        of_targets = [(leaf, axis) for name, leaf, axis in batch.placed() if name.startswith("targets")]
        of_targets = [(leaf, axis) for leaf, axis in of_targets if isinstance(leaf, Tensor) and leaf.dim()]
        if batch.seen and batch.size > 1 and of_targets and all(axis is None for _, axis in of_targets):
            raise ValueError(
                f"loader gave {batch.shapes()}: the inputs look like {batch.size} samples, of which the targets do not "
                f"have one entry each. {AXES_REMEDY}"
            )

    def _refuse_hidden_samples(self, output: Any) -> None:
        """Refuse a batch taken for a single sample, if the output has as many rows as a tensor that was passed over."""
        batch = self.batch
        if batch.seen and batch.size == 1:
            lengths = {
                leaf.size(0)
                for _, leaf, axis in batch.placed()
                if axis is None and isinstance(leaf, Tensor) and leaf.dim()
            }
            if any(leaf.dim() and leaf.size(0) in lengths for leaf in leaves(output)):
                raise ValueError(
                    f"loader gave {batch.shapes()}, of which is not clear whether it is one sample or several. "
                    f"{AXES_REMEDY}"
                )

    def _off(self, together: Any, alone: list[Any]) -> float | None:
        """Return how far outputs alone are off those together, relative to the largest; None where no row is seen."""
        if self.count == 1:
            return None
        worst, singles = None, [leaves(output) for output in alone]
        for place, many in enumerate(leaves(together)):
            for i, single in enumerate(singles):
                one = single[place] if place < len(single) else many
                grown = [
                    a for a, pair in enumerate(zip(many.shape, one.shape, strict=False)) if pair == (self.count, 1)
                ]
                if not many.is_floating_point() or many.dim() != one.dim() or len(grown) != 1:
                    continue
                mine = many.narrow(grown[0], i, 1)
                for axis, (a, b) in enumerate(zip(mine.shape, one.shape, strict=True)):  # as when cut to the longest
                    mine, one = mine.narrow(axis, 0, min(a, b)), one.narrow(axis, 0, min(a, b))
                worst = max(worst or 0.0, _distance(mine, one, many))
        return worst


def _summed(once: float, twice: float) -> ValueError:
    return ValueError(
        f"loss_fn gives a sum over the samples: {once:.6g} for some of them, {twice:.6g} for the same twice over. "
        "A mean is needed: pass reduction='mean', or divide by the number of samples."
    )


def lost(i: int) -> str:
    """Return what to say of a sample ``i`` whose own loss is NaN though that of its batch is not."""
    return (
        f"loss_fn gave nan for sample {i} of a batch alone, as where all of its labels are ignored (-100). Leave such "
        "samples out of the data, or pass prepare= to do so."
    )


def _distance(a: Tensor, b: Tensor, scale: Tensor) -> float:
    """Return the largest difference of ``a`` and ``b``, relative to the largest finite entry of ``scale``."""
    most = float(scale.nan_to_num(0, 0, 0).abs().max()) if scale.numel() else 0.0
    off = (a - b).nan_to_num(0, 0, 0).abs()
    return float(off.max()) / most if most and off.numel() else 0.0


def _repeats(once: Any, again: Any, by: float) -> bool:
    """Return whether two runs on the same inputs gave the same."""
    pairs = list(zip(leaves(once), leaves(again), strict=False))
    return all(a.shape == b.shape and (not a.is_floating_point() or _distance(a, b, a) <= by) for a, b in pairs)
