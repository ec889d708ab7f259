"""``Linear`` layers that skip their zeros on the CPU, in ``torch.sparse_csr``, where that is measured to be faster."""

import functools
import warnings
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchprune_ext._checks import check_fraction, check_whole
from torchprune_ext.deploy.conversion import Report, converted, examine
from torchprune_ext.deploy.sparse_layers import SparseLinear

M = TypeVar("M", bound=nn.Module)
WIDTH = 16  # rows of the input that go at once: as many as keep the kernel's dense operand in the cache
BLOCKS = (32, 16, 8, 4)  # sides of blocks that are tried, the largest that is zero as often as single entries must be


class CSRLinear(SparseLinear):
    """A ``Linear`` layer for inference whose weight is stored as compressed sparse rows.

    It computes what ``nn.Linear`` with the same weight does, but that 0 in the weight times anything is 0, NaN and
    infinity in the input too. Its state dict is that of the ``nn.Linear``, with a dense weight, and either loads what
    the other has saved. Gradients flow to the input; the weight is not trained.

    Args:
        weight: shape ``(out_features, in_features)``; is copied.
        bias: shape ``(out_features,)`` or None; is copied.
        block: side of the square blocks that are stored and skipped as a whole, where larger than 1
            (``torch.sparse_bsr``).

    Raises:
        TypeError: ``weight`` is not a dense tensor of float32 or float64.
        ValueError: ``weight`` is not a matrix, or ``bias`` does not fit it, or ``block`` does not divide its sizes.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0]]))
        >>> sparse = CSRLinear(layer.weight, layer.bias)
        >>> sparse
        CSRLinear(in_features=3, out_features=2, bias=True, sparsity=83.3%)
        >>> torch.equal(sparse(torch.ones(4, 3)), layer(torch.ones(4, 3)))
        True
    """

    stored = "values"
    dtypes = (torch.float32, torch.float64)  # that torch has kernels for, on the CPU
    crow: Tensor
    col: Tensor
    values: nn.Parameter

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, block: int = 1) -> None:
        check_whole("block", block, 1)
        self.block = int(block)
        super().__init__(weight, bias)

    def store(self, weight: Tensor) -> None:
        """Keep the entries of the dense ``weight`` that are not 0, or the blocks of them, and where they stand."""
        _accept_beta()
        side = self.block
        if any(size % side for size in weight.shape):
            raise ValueError(f"block={side} does not divide weight of shape {tuple(weight.shape)}. Pass a divisor.")
        csr = weight.clone().to_sparse_csr() if side == 1 else weight.clone().to_sparse_bsr((side, side))
        # 32 bits are what the kernel of MKL reads; of 64 it makes a copy at every call
        whole = torch.int32 if weight.numel() < 2**31 else torch.int64
        self.register_buffer("crow", csr.crow_indices().to(whole), persistent=False)
        self.register_buffer("col", csr.col_indices().to(whole), persistent=False)
        self.values = nn.Parameter(csr.values().clone(), requires_grad=False)

    def _csr(self) -> Tensor:
        # made anew at each call, of the same memory: that takes microseconds, and follows whatever changes the three
        size = (self.out_features, self.in_features)
        layout = torch.sparse_csr if self.block == 1 else torch.sparse_bsr
        return torch.sparse_compressed_tensor(
            self.crow,
            self.col,
            self.values,
            size,
            layout=layout,
            device=self.values.device,
            check_invariants=False,
        )

    def dense(self) -> Tensor:
        """Return the weight, dense."""
        return self._csr().to_dense()

    def product(self, input: Tensor) -> Tensor:
        """Return ``input @ weight.T + bias``, under autocast in its dtype, though computed in that of the weight."""
        dtype, device = self.values.dtype, self.values.device.type
        if device == "cpu" and dtype not in self.dtypes:
            raise TypeError(
                f"CSRLinear.values.dtype={dtype}, for which torch has no sparse kernel on the CPU. "
                "Call .float() or .double() on the model."
            )
        if torch.is_autocast_enabled(device):  # which would cast the operands to what no kernel takes
            with torch.autocast(device, enabled=False):
                return self._product(input.to(dtype)).to(torch.get_autocast_dtype(device))
        return self._product(input)

    def _product(self, input: Tensor) -> Tensor:
        if self.block > 1 and torch.is_grad_enabled() and input.requires_grad:  # which torch has for rows only
            return F.linear(input, self.weight, self.bias)
        weight, bias = self._csr(), self.bias
        rows = input.reshape(-1, self.in_features)
        if rows.shape[0] == 1:
            product = torch.mv(weight, rows[0]) if bias is None else torch.addmv(bias, weight, rows[0])
        else:
            parts = rows.split(WIDTH if self.block == 1 else max(1, len(rows)))
            if bias is None:
                products = [torch.mm(weight, part.t()) for part in parts]
            else:
                products = [torch.addmm(bias.unsqueeze(1), weight, part.t()) for part in parts]
            product = torch.cat([each.t() for each in products])
        return product.view(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Return sizes and the fraction of zeros, for ``repr``."""
        zeros = 1 - self.values.numel() / max(1, self.out_features * self.in_features)
        block = f", block={self.block}" if self.block > 1 else ""
        return f"{super().extra_repr()}, sparsity={zeros:.1%}{block}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _accept_beta()


@functools.cache
def _accept_beta() -> None:
    """Let torch say, once in a process and to nobody, that sparse CSR tensors are in beta."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        torch.zeros(1, 1, device="cpu").to_sparse_csr()


class _CSR:
    """The format, for the layers with at least ``least`` zeros."""

    def __init__(self, least: float) -> None:
        self.least = least

    def obstacle(self, weight: Tensor) -> str | None:
        if weight.device.type != "cpu":
            return f"is on {weight.device}; sparse rows are for the CPU"
        if weight.dtype not in CSRLinear.dtypes:
            return f"is of {weight.dtype}, for which torch has no sparse kernel on the CPU. Call .float() on the model"
        if not weight.numel():
            return "has no weights"
        zeros = weight.numel() - int(torch.count_nonzero(weight))
        if zeros / weight.numel() < self.least:
            return f"has {zeros} zeros of {weight.numel()}, less than min_sparsity={self.least}"
        return None

    def modules(self, weight: Tensor, bias: Tensor | None) -> Iterator[CSRLinear]:
        yield CSRLinear(weight, bias)
        for side in BLOCKS:
            rows, columns = weight.shape
            if rows % side == columns % side == 0:
                alive = (weight != 0).reshape(rows // side, side, columns // side, side).any(1).any(-1)
                if 1 - int(alive.sum()) / alive.numel() >= self.least:
                    yield CSRLinear(weight, bias, block=side)
                    return


def csr_report(model: nn.Module, *, min_sparsity: float = 0.8, example_inputs: Any = None) -> Report:
    """Tell what :func:`to_csr` would do to each ``Linear`` of ``model``, with times and reasons, and change nothing.

    Times vary, so that a layer near the break-even may be judged otherwise in the next call.

    Args:
        model: as in :func:`to_csr`.
        min_sparsity: as there.
        example_inputs: as there.

    Returns:
        A row for each layer; ``print`` shows them as a table.

    Raises:
        Exception: as :func:`to_csr`, but none where nothing would be converted.

    Example:
        >>> print(csr_report(nn.Sequential(nn.Linear(4, 4))))
        layer  shape  zeros        dense ms  sparse ms  why
        0      4x4    0.0%   left                       has 0 zeros of 16, less than min_sparsity=0.8
    """
    check_fraction("min_sparsity", min_sparsity)
    return examine(model, example_inputs, _CSR(min_sparsity))[0]


def to_csr(model: M, *, min_sparsity: float = 0.8, example_inputs: Any = None) -> M:
    """Return a copy of ``model``, for inference on the CPU, whose sparse ``Linear`` layers skip their zeros.

    A layer becomes a :class:`CSRLinear` if it is a plain ``nn.Linear`` of float32 or float64, at least ``min_sparsity``
    of its weight is 0, by a mask or plainly, and it is measured to be faster so. Where as many square blocks are 0 as a
    whole, these are tried too, and the fastest is taken. All other layers are copied as they are, with their pruning.
    Outputs differ by rounding, since sums run in another order.

    Args:
        model: any module, pruned by whatever method; is left as it was. A layer that it uses twice is used twice in
            the copy. Of a weight that is tied to another module's, the new layer holds a copy of its own.
        min_sparsity: fraction of zeros, in [0, 1], from which on a layer is tried.
        example_inputs: what the model will be called with: a tensor, a tuple of positional or a dictionary of keyword
            arguments. One forward in eval mode records the shapes of each layer's inputs, and the layer is timed on
            these, dense and sparse by turns, with the number of threads that torch has. How many rows come at once
            decides much, so pass a batch as large as in use. By default each layer is timed on a single row.

    Returns:
        The new model. Its state dict has the keys and dense shapes of the model's without pruning.

    Raises:
        TypeError: ``model`` is not a module, or ``min_sparsity`` not a number.
        ValueError: ``min_sparsity`` is not in [0, 1], or no layer is to be converted; tells of each why.
        Exception: whatever the model raises.

    Example:
        >>> from torch.nn.utils import prune
        >>> model = nn.Sequential(prune.l1_unstructured(nn.Linear(4096, 2048), "weight", 0.95))
        >>> fast = to_csr(model)
        >>> fast
        Sequential(
          (0): CSRLinear(in_features=4096, out_features=2048, bias=True, sparsity=95.0%)
        )
        >>> x = torch.randn(1, 4096)
        >>> torch.allclose(fast(x), model(x), atol=1e-5)
        True
    """
    check_fraction("min_sparsity", min_sparsity)
    report, replaced = examine(model, example_inputs, _CSR(min_sparsity))
    return converted(model, report, replaced, "csr_report(model, ...)")
