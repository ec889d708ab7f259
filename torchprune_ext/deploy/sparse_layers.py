"""What layers with a sparse weight have in common: an ``nn.Linear`` for inference that stores less."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchprune_ext._host import outside_of_inference


class SparseLinear(nn.Module):
    """A ``Linear`` layer for inference. A subclass says how its weight is stored, and how it multiplies.

    The state dict is that of an ``nn.Linear``, with a dense weight, so that either loads what the other has saved.
    Gradients flow to the input where torch's kernel has them; the weight is not trained.

    Args:
        weight: shape ``(out_features, in_features)``; is copied.
        bias: shape ``(out_features,)`` or None; is copied.

    Raises:
        TypeError: ``weight`` is not a dense tensor of a dtype that the format takes.
        ValueError: ``weight`` is not a matrix, or does not fit the format, or ``bias`` does not fit it.
    """

    stored: ClassVar[str]  # name of the parameter that holds the weight's values
    dtypes: ClassVar[tuple[torch.dtype, ...]]  # of the weight
    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        if not isinstance(weight, Tensor) or weight.layout != torch.strided or weight.dtype not in self.dtypes:
            told = f"of {weight.dtype}, {weight.layout}" if isinstance(weight, Tensor) else repr(weight)
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            raise TypeError(f"weight is a {type(weight).__name__} {told}. Pass a dense tensor of {wanted}.")
        if weight.dim() != 2:
            raise ValueError(f"weight.shape={tuple(weight.shape)} is not (out_features, in_features).")
        if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
            raise ValueError(
                f"bias of shape {tuple(bias.shape)}, {bias.dtype} does not fit weight of shape {tuple(weight.shape)}, "
                f"{weight.dtype}. Pass one number for each row, of the same dtype, or None."
            )
        self.out_features, self.in_features = weight.shape
        with outside_of_inference(), torch.no_grad():
            copied = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
            self.register_parameter("bias", copied)
            self.store(weight.detach())

    def store(self, weight: Tensor) -> None:
        """Keep the dense ``weight`` in the format; ``ValueError`` if it does not fit, and nothing changes."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """Return the weight, dense."""
        raise NotImplementedError

    def product(self, input: Tensor) -> Tensor:
        """Return ``input @ weight.T + bias``."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The weight, dense, made anew at each reading, so that who writes into it changes nothing."""
        with torch.no_grad():
            return self.dense()

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input @ weight.T + bias`` for an input of shape ``(*, in_features)``.

        Raises:
            ValueError: the last axis of the input is not ``in_features`` long.
            TypeError: the values were converted to a dtype that torch has no kernel for.
            RuntimeError: the values require a gradient; or another dtype than theirs in the input.
        """
        kind = type(self).__name__
        if input.dim() == 0 or input.shape[-1] != self.in_features:
            raise ValueError(
                f"input.shape={tuple(input.shape)} does not end in in_features={self.in_features} of this {kind}."
            )
        if self._parameters[self.stored].requires_grad and torch.is_grad_enabled():  # type: ignore[union-attr]
            raise RuntimeError(
                f"{kind}.{self.stored} requires a gradient, but only what is dense can be trained here. Train the "
                "dense model and convert it anew (layer.to_linear() is dense), or call requires_grad_(False) on this."
            )
        return self.product(input)

    def to_linear(self) -> nn.Linear:
        """Return an ``nn.Linear`` with the same weight and bias, which can be trained."""
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        with outside_of_inference():
            layer.weight = nn.Parameter(self.weight)
            if self.bias is not None:
                layer.bias = nn.Parameter(self.bias.detach().clone())
        return layer.train(self.training)

    def extra_repr(self) -> str:
        """Return the sizes, for ``repr``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}{self.stored}"]

    def _load_from_state_dict(  # type: ignore[no-untyped-def]
        self, state_dict: Mapping[str, Any], prefix: str, metadata, strict, missing, unexpected, errors
    ) -> None:
        key, size = f"{prefix}weight", (self.out_features, self.in_features)
        mine, values = dict(state_dict), self._parameters[self.stored]
        weight = mine.pop(key, None)
        if isinstance(weight, Tensor) and weight.shape == size:
            try:
                with outside_of_inference(), torch.no_grad():
                    self.store(weight.detach().to(values.device, values.dtype))  # type: ignore[union-attr]
            except ValueError as error:
                errors.append(f"{key}: {error}")
        elif weight is not None:
            told = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
            errors.append(f"size mismatch for {key}: {told} in the state dict, {size} in this {type(self).__name__}.")
        elif strict:
            missing.append(key)
        own = self._parameters.pop(self.stored)  # the last of them, and not a key of the state dict
        try:
            super()._load_from_state_dict(mine, prefix, metadata, strict, missing, unexpected, errors)
        finally:
            self._parameters[self.stored] = own
