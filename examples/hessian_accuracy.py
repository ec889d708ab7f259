"""How close the estimates of the Hessian's diagonal come to the exact one, and what that means for pruning.

Trains three networks of under 300 parameters for a moment, takes the exact diagonal from ``torch.func.hessian`` in
float64, and compares every method: relative error of the diagonal, rank correlation (Spearman) of the saliency
h x w^2 / 2 that pruning ranks by, and seconds.
Run: ``python examples/hessian_accuracy.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian
from torch.nn.attention import SDPBackend, sdpa_kernel

import torchprune_ext as tpe
from torchprune_ext import calibration

SAMPLES = 64
TRAINING_STEPS = 100

Diagonal = dict[tuple[nn.Module, str], Tensor]


class Attention(nn.Module):
    """A block of self-attention and a classifier of what it gives for the tokens on average."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, num_heads=2, batch_first=True)
        self.classifier = nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits, shape (batch, 3), of ``tokens``, shape (batch, length, 6)."""
        mixed, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        logits: Tensor = self.classifier((tokens + mixed).mean(1))
        return logits


@dataclass(frozen=True)
class Problem:
    """A network with its loss and its data, in float64."""

    name: str
    model: nn.Module
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    inputs: Tensor
    targets: Tensor

    @property
    def params(self) -> list[tuple[nn.Module, str]]:
        """All matrices and kernels."""
        named = (
            (module, name) for module in self.model.modules() for name, _ in module.named_parameters(recurse=False)
        )
        return [(module, name) for module, name in named if module.get_parameter(name).dim() > 1]

    def train(self) -> Problem:
        """Train for a moment, so that the weights are not random any more, and return the problem."""
        optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        for _ in range(TRAINING_STEPS):
            optimizer.zero_grad()
            self.loss_fn(self.model(self.inputs), self.targets).backward()
            optimizer.step()
        return self

    def exact(self) -> Tensor:
        """Return the diagonal of the whole Hessian of the listed tensors."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        tensors = {names[id(module.get_parameter(name))]: module.get_parameter(name) for module, name in self.params}

        def loss(flat: Tensor) -> Tensor:
            parts = flat.split([tensor.numel() for tensor in tensors.values()])
            named = {name: part.view_as(tensors[name]) for name, part in zip(tensors, parts, strict=True)}
            return self.loss_fn(functional_call(self.model, named, (self.inputs,)), self.targets)

        with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no second derivative
            whole: Tensor = hessian(loss)(self.weights())
        return whole.diagonal()

    def flat(self, found: Diagonal) -> Tensor:
        """Return the entries of all tensors in one row."""
        return torch.cat([found[pair].detach().flatten() for pair in self.params])

    def weights(self) -> Tensor:
        """Return the weights in one row."""
        return self.flat({(module, name): module.get_parameter(name) for module, name in self.params})


def problems() -> list[Problem]:
    """Return the three networks, trained."""
    torch.manual_seed(0)
    convolution = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 4))
    perceptron = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 2))
    found = [
        Problem(
            "conv + pool + ReLU, cross-entropy",
            convolution.double(),
            F.cross_entropy,
            torch.randn(SAMPLES, 1, 8, 8).double(),
            torch.randint(4, (SAMPLES,)),
        ),
        Problem(
            "tanh MLP, squared error",
            perceptron.double(),
            F.mse_loss,
            torch.randn(SAMPLES, 6).double(),
            torch.randn(SAMPLES, 2).double(),
        ),
        Problem(
            "attention block, cross-entropy",
            Attention().double(),
            F.cross_entropy,
            torch.randn(SAMPLES, 5, 6).double(),
            torch.randint(3, (SAMPLES,)),
        ),
    ]
    return [problem.train() for problem in found]


def estimate(problem: Problem, method: str, samples: int | None) -> Diagonal:
    """Return the diagonal by ``method``; "fisher" is the empirical Fisher, which often stands in for it."""
    data = [(problem.inputs, problem.targets)]
    if method == "fisher":
        return calibration.fisher(problem.model, problem.loss_fn, data, problem.params, progress=False)
    return calibration.hessian_diagonal(
        problem.model, problem.loss_fn, data, problem.params, method=method, samples=samples, progress=False
    )


METHODS: tuple[tuple[str, int | None], ...] = (
    ("exact", None),
    ("ggn", None),
    ("ggn", 1),
    ("ggn", 10),
    ("ggn", 100),
    ("hutchinson", 10),
    ("hutchinson", 100),
    ("hutchinson", 1000),
    ("fisher", None),
)


def ranks(values: Tensor) -> Tensor:
    """Return the rank of each value; equal ones share the mean of theirs."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[place]


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Return Spearman's correlation."""
    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)  # the networks are tiny
    print(f"{'method':<14}{'probes':>8}{'relative error':>17}{'rank correlation':>18}{'seconds':>10}")
    for problem in problems():
        exact, weights = problem.exact().detach(), problem.weights()
        estimate(problem, "ggn", 1)  # warm up
        saliency = tpe.criteria.obd_saliency(weights, exact)
        negative = int((exact < 0).sum())
        print(f"\n{problem.name}: {len(weights)} weights, {negative} of them with negative curvature")
        for method, samples in METHODS:
            start = time.perf_counter()
            found = problem.flat(estimate(problem, method, samples))
            seconds = time.perf_counter() - start
            error = float((found - exact).norm() / exact.norm())
            correlation = rank_correlation(tpe.criteria.obd_saliency(weights, found), saliency)
            print(f"{method:<14}{samples or '-':>8}{error:>17.2g}{correlation:>18.3f}{seconds:>10.3f}")


if __name__ == "__main__":
    main()
