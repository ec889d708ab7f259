"""Gradients at pruned entries too: those of the loss with respect to the product of weights and mask.

The gradient of ``weight_orig`` is that of the product times the mask, so nothing is left of it where the mask is 0.
Here a hook is put on each product that the host makes, for as long as somebody listens.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from torchprune_ext._host import Target
from torchprune_ext._statistics import Key


class DenseGradients:
    """Sums the dense gradients of pruned tensors between :meth:`start` and :meth:`stop`.

    All backward passes count, and all uses of a tensor in each; passes without gradients do not.

    Args:
        places: for each tensor, where it is used: one module and name, or several if it is tied.
    """

    def __init__(self, places: Sequence[Sequence[Key]]) -> None:
        self._sums: list[Tensor | None] = [None] * len(places)
        # made once, as compiled code is made anew for each other object that it meets
        self._taps = [_Tap(self, number, key) for number, keys in enumerate(places) for key in keys]

    def start(self) -> None:
        """Listen from now on, and begin at nothing."""
        self.stop()
        for tap in self._taps:
            tap.insert()

    def stop(self) -> None:
        """Listen no longer, and forget what was summed."""
        for tap in self._taps:
            tap.take_out()
        self._sums = [None] * len(self._sums)

    def intact(self) -> bool:
        """Return whether nobody has replaced a hook since :meth:`start`, so that nothing was missed.

        Raises:
            ValueError: another one listens to the same tensors, and both would miss something for ever.
        """
        return all(tap.is_in() for tap in self._taps)

    def sums(self) -> list[Tensor | None]:
        """Return the sum of each tensor, float32 or wider; None where no backward pass came by."""
        return list(self._sums)

    def add(self, number: int, gradient: Tensor) -> None:
        """Add a gradient to the sum of a tensor."""
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        gradient = gradient.detach().to(torch.promote_types(gradient.dtype, torch.float32))
        so_far = self._sums[number]
        self._sums[number] = gradient if so_far is None else so_far + gradient


class _Tap:
    """Stands in for the ``apply_mask`` of one hook of the host: the same product, which is listened to.

    Copied or pickled with its module, it becomes the method that it stands in for.
    """

    def __init__(self, owner: DenseGradients, number: int, key: Key) -> None:
        self.owner, self.number = weakref.ref(owner), number
        self.module, self.name = key
        self.hook: BasePruningMethod | None = None

    def insert(self) -> None:
        """Stand in for the method of the hook that is there now."""
        target = Target.found(self.module, self.name)
        self.hook = None if target is None else target.hook()[1]
        if self.hook is not None:
            vars(self.hook)["apply_mask"] = self

    def take_out(self) -> None:
        """Let the hook do its work by itself again."""
        if self.hook is not None and vars(self.hook).get("apply_mask") is self:
            del vars(self.hook)["apply_mask"]

    def is_in(self) -> bool:
        """Return whether the module's products still come by here, and raise if they go to another one."""
        target = Target.found(self.module, self.name)
        hook = None if target is None else target.hook()[1]
        found = None if hook is None else vars(hook).get("apply_mask")
        if target is not None and isinstance(found, _Tap) and found is not self and found.owner() is not None:
            raise ValueError(f"{target.where} is trained by two DynamicSparse. Call step() of the newer one only.")
        return found is self

    def __call__(self, module: nn.Module) -> Tensor:
        """Return the product, as the host makes it."""
        hook, owner, number = self.hook, self.owner(), self.number
        kind: Any = type(hook)
        product: Tensor = kind.apply_mask(hook, module)
        if owner is None:  # nobody listens any more
            self.take_out()
        elif product.requires_grad and module is self.module:
            product.register_hook(lambda gradient: owner.add(number, gradient))
        return product

    def __reduce__(self) -> Any:
        return getattr, (self.hook, "apply_mask")  # of a hook that is just being made, and has no other yet
