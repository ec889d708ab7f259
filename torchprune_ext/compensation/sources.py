"""Whether two layers get the very same inputs, as query, key and value do: told without keeping or comparing them."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """What tells a tensor, as it was at one time, from all others. Use :meth:`of` to make one.

    Args:
        storage: where its numbers lie; the memory may be freed, but no other tensor gets this storage meanwhile.
        version: how often it had been changed in place.
        place: which numbers of the storage it has.
        use: what else has to be the same.
        sums: of the numbers, over all axes but the last, in case that they were changed behind autograd's back.
    """

    storage: StorageWeakRef
    version: int
    place: tuple[object, ...]
    use: tuple[object, ...]
    sums: Tensor

    @classmethod
    def of(cls, x: Tensor, *use: object) -> "Source | None":
        """Return what tells ``x`` from others; None if that cannot be told, as in inference mode.

        Args:
            x: the tensor.
            use: values that say how it is used.
        """
        if type(x) is not Tensor or x.layout != torch.strided or x.is_inference() or not x.dim():
            return None
        place = x.data_ptr(), x.storage_offset(), x.shape, x.stride(), x.dtype, x.device
        sums = x.detach().sum(tuple(range(x.dim() - 1))) if x.dim() > 1 else x.detach().clone()
        return cls(StorageWeakRef(x.untyped_storage()), x._version, place, use, sums)

    def same(self, other: "Source | None") -> bool:
        """Return whether both are of one tensor that has not changed in between, used in the same way."""
        return (
            other is not None
            and (self.storage, self.version, self.place, self.use)
            == (other.storage, other.version, other.place, other.use)
            and torch.equal(self.sums, other.sums)
        )
