"""What a model costs, in numbers that do not depend on the machine: multiplications, parameters, bytes."""

import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils.flop_counter import FlopCounterMode

from torchprune_ext._host import targets_in

PRODUCT = re.compile(
    r"(?<!_thnn_fused_)(?<![^_])(\w*mm|(add)?mv|v?dot|ger|addr|matmul|(bi|tri)?linear|conv([123]d)?|convolution|rnn|lstm|"
    r"gru|attention|transformer|encoder|einsum|tensordot|cdist)(?![^_])"
)  # in the names of operations that multiply and add up
NAMESPACES = frozenset(
    ("aten", "prim", "prims", "profiler", "torchvision", "c10d", "_c10d_functional")
)  # known by names


def count_macs(model: nn.Module, call: Callable[[], object]) -> int | None:
    """Return how many multiplications ``call`` makes ``model`` do in matrix products, convolutions and attention.

    Counted by :class:`torch.utils.flop_counter.FlopCounterMode`, which takes two operations for one. It knows nothing
    of what it has no formula for, so what is fused is done in its parts here: attention, transformer layers, recurrent
    layers, compiled code. A product with a sparse matrix has as many multiplications as the matrix has stored entries.

    Returns:
        The number; None if there was a product of which it is not known, as of quantized and semi-structured weights
        and of custom kernels, or if no product was seen at all.

    Example:
        >>> layer = nn.Linear(8, 4)
        >>> count_macs(layer, lambda: layer(torch.ones(3, 8)))
        96
    """
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    products = _Products(counter.flop_registry)
    with _in_parts(model), products, counter:
        call()
    return counter.get_total_flops() // 2 if products.all_known else None


def macs_by_weight(model: nn.Module, call: Callable[[], object]) -> tuple[dict[str, int], int]:
    """Return how many multiplications ``call`` makes ``model`` do with each parameter, by its first name, and in all.

    Counted as by :func:`count_macs`, without those of which the number is not known.

    Example:
        >>> layer = nn.Linear(8, 4)
        >>> macs_by_weight(layer, lambda: layer(torch.ones(3, 8)))
        ({'weight': 96}, 96)
    """
    weights = _Weights(model, FlopCounterMode(display=False, custom_mapping=FORMULAS).flop_registry)
    with _in_parts(model), weights:
        call()
    return weights.found, weights.total


@contextmanager
def _in_parts(model: nn.Module) -> Iterator[None]:
    """Let what is fused in ``model`` be done in its parts."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of what is switched off, and of hooks on compiled modules
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):  # of torch 2.6
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


class _Weights(TorchDispatchMode):
    """Counts multiplications by weight.

    Args:
        model: whose parameters count.
        formulas: of operations.
    """

    def __init__(self, model: nn.Module, formulas: Mapping[Any, Any]) -> None:
        super().__init__()
        self.names: dict[int, list[tuple[int, str]]] = {}  # by memory, which several may share, and where they begin
        for name, each in model.named_parameters():
            if each.numel() and _has_memory(each):
                self.names.setdefault(each.untyped_storage().data_ptr(), []).append((int(each.storage_offset()), name))
        self.formulas, self.total = formulas, 0
        self.found: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do an operation, and count."""
        out = func(*args, **(kwargs or {}))
        formula = self.formulas.get(getattr(func, "_overloadpacket", func))
        if formula is not None:
            macs = formula(*args, **(kwargs or {}), out_val=out) // 2
            self.total += macs
            factors = [each for each in args if isinstance(each, Tensor) and each.dim() > 1]
            names = [self._name(each) for each in factors[-2:]]  # what is added is first
            for name in [name for name in names if name is not None][:1]:
                self.found[name] = self.found.get(name, 0) + macs
        return out

    def _name(self, tensor: Tensor) -> str | None:
        """Return the parameter that ``tensor`` is, or is a part of."""
        known = self.names.get(tensor.untyped_storage().data_ptr(), []) if _has_memory(tensor) else []
        return max(((start, name) for start, name in known if start <= tensor.storage_offset()), default=(0, None))[1]


class _Products(TorchDispatchMode):
    """Sees whether there are products, and whether there is a formula for each.

    Args:
        formulas: operations that there is one for.
    """

    supports_higher_order_operators = True

    def __init__(self, formulas: Mapping[Any, Any]) -> None:
        super().__init__()
        self.formulas, self.known, self.unknown = formulas, 0, 0

    @property
    def all_known(self) -> bool:
        """Whether there were products, and a formula for each."""
        return self.known > 0 and self.unknown == 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at an operation, and do it."""
        packet, namespace = getattr(func, "_overloadpacket", func), getattr(func, "namespace", "")
        if packet in self.formulas:
            tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            sparse = sum(tensor.layout != torch.strided for tensor in tensors)
            wrapped = any(is_traceable_wrapper_subclass(tensor) for tensor in tensors)
            fits = not wrapped and sparse <= (packet in FORMULAS)
            self.known, self.unknown = self.known + fits, self.unknown + (not fits)
        elif namespace not in NAMESPACES or PRODUCT.search(str(packet).rpartition(".")[2]):
            self.unknown += 1
        return func(*args, **(kwargs or {}))


def _has_memory(tensor: Tensor) -> bool:
    """Return whether the entries of ``tensor`` stand in one piece of memory."""
    return tensor.layout == torch.strided and not is_traceable_wrapper_subclass(tensor)


def _raw(formula: Callable[..., int]) -> Callable[..., int]:
    """Let the counter pass ``formula`` the tensors, not their shapes."""
    vars(formula)["_get_raw"] = True
    return formula


@_raw
def _mm(a: Tensor, b: Tensor, **_: Any) -> int:
    """Return the operations of a product of two matrices, of which one may be sparse."""
    if a.layout == torch.strided and b.layout != torch.strided:
        return 2 * a.shape[0] * stored(b)
    return 2 * stored(a) * b.shape[1]


@_raw
def _addmm(_: Tensor, a: Tensor, b: Tensor, **rest: Any) -> int:
    return _mm(a, b)


@_raw
def _mv(a: Tensor, b: Tensor, **_: Any) -> int:
    """Return the operations of a product of a matrix, which may be sparse, or a vector with a vector."""
    return 2 * stored(a)


@_raw
def _addmv(_: Tensor, a: Tensor, b: Tensor, **rest: Any) -> int:
    return _mv(a, b)


_aten = torch.ops.aten
FORMULAS: dict[Any, Callable[..., int]] = {
    _aten.mm: _mm,
    _aten.addmm: _addmm,
    _aten._sparse_addmm: _addmm,
    _aten.mv: _mv,
    _aten.dot: _mv,
    _aten.addmv: _addmv,
}  # of operations that the counter has no formula for, or one for dense operands only


def stored(tensor: Tensor) -> int:
    """Return how many numbers ``tensor`` holds: all entries, or those that a sparse layout has stored."""
    return next(_parts(tensor)).numel()


def nonzero(tensor: Tensor) -> int:
    """Return how many entries of ``tensor`` are not zero."""
    return int(torch.count_nonzero(next(_parts(tensor))))


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the plain tensors that ``tensor`` consists of, that of its values first."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts(getattr(tensor, name))
    elif tensor.layout == torch.sparse_coo:
        yield from (tensor._values(), tensor._indices())
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (tensor.values(), tensor.crow_indices(), tensor.col_indices())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (tensor.values(), tensor.ccol_indices(), tensor.row_indices())
    else:
        yield tensor


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return how many numbers the parameters of ``model`` hold, and how many of those in effect are not zero.

    A tensor that several modules share counts once. A pruned tensor holds all of its entries, and those under its mask
    are zero in effect.

    Example:
        >>> from torch.nn.utils import prune
        >>> count_parameters(prune.l1_unstructured(nn.Linear(10, 10, bias=False), "weight", amount=0.9))
        (100, 10)
    """
    found = {id(target.parameter): target for module in model.modules() for target in targets_in(module)}
    with torch.no_grad():
        return (
            sum(stored(target.parameter) for target in found.values()),
            sum(nonzero(target.weight()) for target in found.values()),
        )


def count_bytes(model: nn.Module) -> int:
    """Return the bytes of the tensors in the state dict of ``model``, as :func:`torch.save` writes them.

    Memory that several of them share counts once, and whole, also where a tensor is a part of it.

    Example:
        >>> count_bytes(nn.Linear(10, 10, bias=False))
        400
    """
    tensors = [leaf for leaf in pytree.tree_leaves(dict(model.state_dict())) if isinstance(leaf, Tensor)]
    storages = [part.untyped_storage() for tensor in tensors for part in _parts(tensor)]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
