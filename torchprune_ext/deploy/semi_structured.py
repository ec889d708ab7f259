"""``Linear`` layers in the 2:4 format of sparse tensor cores, where they fit it and are measured to be faster."""

import warnings
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured
from torch.sparse import _semi_structured_conversions as conversions

from torchprune_ext._checks import check_module
from torchprune_ext.deploy.conversion import Report, converted, examine
from torchprune_ext.deploy.sparse_layers import SparseLinear

M = TypeVar("M", bound=nn.Module)
TILE = (32, 64)  # sizes whose multiples the packing by plain operations takes


class SemiStructuredLinear(SparseLinear):
    """A ``Linear`` layer for inference on a GPU whose weight is stored 2:4: of each four in a row at most two.

    Its state dict is that of the ``nn.Linear``, with a dense weight, and either loads what the other has saved, here if
    it is 2:4. The weight is not trained.

    Args:
        weight: shape ``(out_features, in_features)``, on a CUDA device; is copied.
        bias: shape ``(out_features,)`` or None; is copied.

    Raises:
        TypeError: ``weight`` is not a dense tensor of float16 or bfloat16.
        ValueError: ``weight`` is not a matrix or does not fit the format, or ``bias`` does not fit it.
        RuntimeError: torch has no kernel for it on this device.
    """

    stored = "packed"
    dtypes = (torch.float16, torch.bfloat16)
    packed: nn.Parameter

    def store(self, weight: Tensor) -> None:
        """Keep the dense ``weight`` packed, and check that it can be unpacked again without loss."""
        reason = misfit(weight) or off_device(weight)
        if reason is not None:
            raise ValueError(f"weight of shape {tuple(weight.shape)} {reason}.")
        packed = pack(weight.contiguous())
        if not torch.equal(packed.to_dense(), weight):
            raise ValueError(
                f"weight of shape {tuple(weight.shape)} is not what the device unpacks again. Keep it dense."
            )
        self.packed = nn.Parameter(packed, requires_grad=False)

    def dense(self) -> Tensor:
        """Return the weight, dense."""
        return self.packed.to_dense()

    def product(self, input: Tensor) -> Tensor:
        """Return ``input @ weight.T + bias``."""
        if not input.numel():  # of which the kernels want at least one row
            return input.new_zeros(*input.shape[:-1], self.out_features)
        return F.linear(input.contiguous(), self.packed, self.bias)  # torch takes a view of it


def pack(weight: Tensor) -> Tensor:
    """Return ``weight`` in torch's 2:4 format, without the warning that this is a prototype."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor is in prototype", UserWarning)
        packed: Tensor = to_sparse_semi_structured(weight)
    return packed


def packed_and_back(weight: Tensor) -> Tensor:
    """Return what is left of ``weight``, float16 or bfloat16, packed 2:4 and unpacked by plain operations of torch.

    Works on any device. What does not fit the pattern is lost, as on a GPU, where nothing tells.

    Args:
        weight: a matrix; 4 must divide the number of its columns.

    Returns:
        A matrix of the same shape.

    Example:
        >>> packed_and_back(torch.tensor([[1, 2, 3, 0] * 4]).half())[0, :4].tolist()
        [1.0, 2.0, 0.0, 0.0]
    """
    rows, columns = weight.shape
    whole = F.pad(weight, (0, -columns % TILE[1], 0, -rows % TILE[0])).contiguous()  # whole tiles
    packed, places = conversions.sparse_semi_structured_from_dense_cutlass(whole)
    dense: Tensor = conversions.sparse_semi_structured_to_dense_cutlass(packed, places)
    return dense[:rows, :columns]


def misfit(weight: Tensor) -> str | None:
    """Return why ``weight``, whatever device it is on, does not fit the format; None if it does."""
    if weight.dtype not in SemiStructuredLinear.dtypes:
        return f"is of {weight.dtype}; the format takes float16 and bfloat16. Call .half() or .bfloat16() on the model"
    backend = _backend()
    needed = backend._DTYPE_SHAPE_CONSTRAINTS[weight.dtype]
    sizes = needed.sparse_min_rows, needed.sparse_min_cols
    if not weight.numel() or any(size % least for size, least in zip(weight.shape, sizes, strict=True)):
        return f"is not a multiple of {sizes[0]}x{sizes[1]}, which {backend.BACKEND} needs"
    if weight.is_meta:
        return "is on the meta device and holds no values. Materialize the module first"
    kept = weight.reshape(len(weight), -1, 4).count_nonzero(-1)
    broken = int((kept > 2).sum())
    if broken:
        return (
            f"is not 2:4: {broken} of {kept.numel()} groups of four along in_features have more than two nonzero "
            "entries, which torch would drop. Prune it first: nm_structured(layer, 'weight', n=2, m=4)"
        )
    if not torch.equal(packed_and_back(weight), weight):
        return "cannot be packed without loss; does it hold NaN?"
    return None


def off_device(weight: Tensor) -> str | None:
    """Return why nothing on the device of ``weight`` computes with the format; None if something does."""
    if not weight.is_cuda:
        return f"fits, and packs without loss, but is on {weight.device}. Move the model to an NVIDIA GPU first"
    major, minor = torch.cuda.get_device_capability(weight.device)
    if major < 8:
        return f"fits, but is on a GPU of compute capability {major}.{minor}; sparse tensor cores begin with 8.0"
    return None


def _backend() -> Any:
    """Return the class whose kernels torch uses, which knows the sizes that they need."""
    forced = SparseSemiStructuredTensor._FORCE_CUTLASS
    sparse: Any = torch.sparse
    return sparse.SparseSemiStructuredTensorCUTLASS if forced else sparse.SparseSemiStructuredTensorCUSPARSELT


class _TwoOfFour:
    """The format."""

    def obstacle(self, weight: Tensor) -> str | None:
        return misfit(weight) or off_device(weight)

    def modules(self, weight: Tensor, bias: Tensor | None) -> list[SemiStructuredLinear]:
        return [SemiStructuredLinear(weight, bias)]


def semi_structured_report(model: nn.Module, *, example_inputs: Any = None) -> Report:
    """Tell what :func:`to_semi_structured` would do to each ``Linear`` of ``model``, and why, and change nothing.

    Without a GPU it checks all the rest: dtype, sizes, the 2:4 pattern, and that packing loses nothing.

    Args:
        model: as in :func:`to_semi_structured`.
        example_inputs: as there.

    Returns:
        A row for each layer; ``print`` shows them as a table.

    Raises:
        Exception: as :func:`to_semi_structured`, but none where nothing would be converted.

    Example:
        >>> from torchprune_ext import nm_structured
        >>> model = nn.Sequential(nm_structured(nn.Linear(64, 64), "weight", n=2, m=4), nn.Linear(64, 64)).half()
        >>> for row in semi_structured_report(model).rows:
        ...     print(row.layer, row.reason.partition(",")[0])
        0 fits
        1 is not 2:4: 1024 of 1024 groups of four along in_features have more than two nonzero entries
    """
    return examine(model, example_inputs, _TwoOfFour())[0]


def to_semi_structured(model: M, *, example_inputs: Any = None) -> M:
    """Return a copy of ``model``, for inference on an NVIDIA GPU, whose 2:4 ``Linear`` layers use sparse tensor cores.

    A layer becomes a :class:`SemiStructuredLinear` if it is a plain ``nn.Linear`` of float16 or bfloat16 on a GPU, if
    its sizes are multiples of those that torch's kernels need (16x16 with cuSPARSELt, 32x64 with CUTLASS), if at most
    two of each four consecutive entries along ``in_features`` are not 0, by a mask or plainly, and if it is measured to
    be faster so. All others are copied as they are, with their pruning. ``torch.sparse.to_sparse_semi_structured`` by
    itself drops silently what does not fit the pattern.

    Args:
        model: any module, pruned by whatever method; is left as it was. Convert it and move it to the GPU first.
        example_inputs: what the model will be called with: a tensor, a tuple of positional or a dictionary of keyword
            arguments. One forward in eval mode records the shapes of each layer's inputs, and the layer is timed on
            these, dense and sparse by turns. By default each layer is timed on a single row. Many rows at once are
            where the format gains; with few, it often loses.

    Returns:
        The new model. Its state dict has the keys and dense shapes of the model's without pruning.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: no layer is to be converted; tells of each why.
        Exception: whatever the model raises.

    Example:
        >>> try:
        ...     to_semi_structured(nn.Linear(64, 64))
        ... except ValueError as error:
        ...     print(str(error).splitlines()[0])
        model, a Linear, has no layer to convert:
    """
    check_module("model", model)
    report, replaced = examine(model, example_inputs, _TwoOfFour())
    return converted(model, report, replaced, "semi_structured_report(model, ...)")
