"""Second derivatives of the loss, for Optimal Brain Damage."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap
from typing_extensions import Unpack

from torchprune_ext._checks import check_generator, check_whole
from torchprune_ext._runs import (
    Batch,
    Key,
    LossFn,
    Options,
    Run,
    add,
    calibrating,
    check_loss,
    check_shape,
    wide,
)
from torchprune_ext._statistics import Curvature

EXACT_LIMIT = 20_000  # most parameters for the exact Hessian diagonal
OUTPUT_LIMIT = 2_048  # most outputs per sample for the square root of the loss's Hessian


class HessianDiagonal(Curvature):
    """The diagonal of a Hessian: a dictionary as all statistics here are, of any sign.

    Args:
        standard_error: one standard deviation of each entry, where the entries were estimated from random probes by
            ``method="hutchinson"``; otherwise None.
    """

    standard_error: dict[Key, Tensor] | None = None


def hessian_diagonal(
    model: nn.Module,
    loss_fn: LossFn,
    loader: Iterable[Any],
    params: Iterable[Key],
    *,
    method: Literal["ggn", "hutchinson", "exact"] = "ggn",
    samples: int | None = None,
    generator: torch.Generator | None = None,
    **options: Unpack[Options],
) -> HessianDiagonal:
    r"""Return the second derivative of the loss with respect to each weight, for Optimal Brain Damage.

    - ``"ggn"``: diagonal of the generalised Gauss-Newton matrix :math:`\frac1N \sum_i J_i^\top H_i J_i` with the
      Jacobian :math:`J_i` of the output and the Hessian :math:`H_i` of the loss with respect to the output. Never
      negative for convex losses as cross-entropy and squared error; for networks that are piecewise linear in each
      weight, such as ReLU networks, it *is* the diagonal of the Hessian. Costs a backward pass per output and sample,
      or ``samples`` of them for an unbiased estimate. Negative curvature of the loss with respect to the output, as
      some losses have, counts as none. Holds some matrices of outputs x outputs for each sample of a batch.
    - ``"hutchinson"``: mean of :math:`v \odot Hv` over ``samples`` random sign vectors :math:`v` (default 100) by
      double backward. Unbiased for any network, but noisy: see ``standard_error`` of the result.
    - ``"exact"``: column by column, for at most 20,000 weights.

    ``"hutchinson"`` and ``"exact"`` keep the graph of the gradient, about the memory of a second training step, and
    ``"hutchinson"`` six tensors per parameter instead of one.

    Args:
        model: any module; runs in eval mode.
        loss_fn: from the model's output and the targets to a number, a mean over the samples of the batch.
        loader: batches, see :class:`.Options`.
        params: ``(module, name)`` pairs within ``model``.
        method: see above.
        samples: number of random probes; by default none for ``"ggn"`` (exact) and 100 for ``"hutchinson"``.
        generator: source of the probes, on any device; by default one on the CPU with a fixed seed. Give each process
            of a ``process_group`` one of its own, or their errors add up and ``standard_error`` is too small.
        **options: see :class:`.Options`.

    Returns:
        Curvature in units of the loss per squared unit of weight; ``standard_error`` for ``"hutchinson"``.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: as :func:`gradients`; ``method`` is unknown, there are too many weights for ``"exact"``, or too
            many outputs per sample for ``"ggn"``, or it is asked for where samples mix.

    Source: LeCun, Denker & Solla 1989 for the use; Schraudolph 2002, *Fast Curvature Matrix-Vector Products*, for the
    Gauss-Newton matrix; Bekas, Kokiopoulou & Saad 2007, *An estimator for the diagonal of a matrix*, for the probes.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> data = [(torch.tensor([[1.0, 3.0], [-1.0, 1.0]]), torch.zeros(2, 1))]
        >>> hessian_diagonal(layer, nn.functional.mse_loss, data, [(layer, "weight")])[layer, "weight"].round()
        tensor([[ 2., 10.]])
    """
    with calibrating(model, params, options, loss_fn) as run:
        check_generator(generator)
        if samples is not None:
            check_whole("samples", samples, 1)
        if generator is None:  # probes of its own for each rank, as the ranks' errors shall not add up
            generator = torch.Generator("cpu").manual_seed(run.ranks.rank)
        if method == "hutchinson":
            sums, variances, count = _hutchinson(run, loader, samples or 100, generator)
        elif method == "ggn":
            sums, count = _gauss_newton(run, loader, samples, generator)
        elif method == "exact":
            sums, count = _column_by_column(run, loader)
        else:
            raise ValueError(f"method={method!r} is unknown. Pass 'ggn', 'hutchinson' or 'exact'.")
    found = HessianDiagonal(run.mean(sums, count))
    run.refuse_zeros(found)
    if method == "hutchinson" and samples != 1:  # one probe does not tell how much they vary
        # the mean weighs each batch by its samples, so its variance weighs them by the square
        squared = run.mean(variances, 1 / run.ranks.size)
        number = run.ranks.total(count)
        found.standard_error = {key: variance.sqrt_().div_(number) for key, variance in squared.items()}
    return found


def _column_by_column(run: Run, loader: Iterable[Any]) -> tuple[list[Tensor], int]:
    if (number := sum(tensor.numel() for tensor in run.tensors)) > EXACT_LIMIT:
        raise ValueError(
            f"method='exact' takes a backward pass per weight, and params hold {number} weights of {EXACT_LIMIT} "
            "that it allows. Use method='ggn', or list fewer."
        )
    sums, count = run.zeros(), 0
    for batch in run.batches(loader, "hessian, exact"):
        grads = run.differentiable_grads(batch)
        for total, gradient, tensor in zip(sums, grads, run.tensors, strict=True):
            flat, rows = torch.zeros_like(total).reshape(-1), gradient.reshape(-1)
            for i in range(len(flat) if rows.requires_grad else 0):
                [row] = torch.autograd.grad(rows[i], tensor, retain_graph=True, allow_unused=True)
                flat[i] = 0 if row is None else row.reshape(-1)[i]
            total.add_(flat.view(total.shape), alpha=batch.size)
        count += batch.size
    return sums, count


def _gauss_newton(
    run: Run, loader: Iterable[Any], samples: int | None, generator: torch.Generator
) -> tuple[list[Tensor], int]:
    sums, count = run.zeros(), 0
    for batch in run.batches(loader, "hessian, Gauss-Newton"):
        run.check_samples(batch)
        roots = _loss_roots(run, batch)  # (samples of the batch, outputs, outputs)
        if samples is not None:
            signs = _signs((len(roots), samples, roots.shape[1]), generator).to(roots)
            roots = signs @ roots / samples**0.5
        for cotangents in roots.unbind(1):
            if not cotangents.any():
                continue  # the Hessian of cross-entropy, for one, has a direction without curvature

            def along(output: Tensor, cotangent: Tensor) -> Tensor:
                return (output.reshape(-1) * cotangent.reshape(-1)).sum()

            for each in run.sample_grads(batch, along, cotangents):
                add(sums, (g.square().sum(0) for g in each))
        count += batch.size
    return sums, count


def _signs(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return 1 or -1 in each entry at random, on the device of ``generator``."""
    return torch.randint(2, shape, generator=generator, device=generator.device) * 2 - 1


def _loss_roots(run: Run, batch: Batch) -> Tensor:
    """Return, for each sample, the rows of a square root of the loss's Hessian with respect to the output."""
    with torch.no_grad():
        output = run.output(batch.inputs)
        if not isinstance(output, Tensor):
            raise ValueError(
                f"method='ggn' needs a model whose output is one tensor, not a {type(output).__name__}. "
                "Wrap the model, or use method='hutchinson'."
            )
        elsewhere = any(axis for axis in batch.axes)  # so the output's samples may not stand on its first axis either
        alone = run.output(batch.gathered(slice(0, 1))[0]).shape if elsewhere else (1, *output.shape[1:])
        if not output.dim() or len(output) != batch.size or tuple(alone) != (1, *output.shape[1:]):
            raise ValueError(
                f"method='ggn' needs an output with a row per sample, and the model made one of shape "
                f"{tuple(output.shape)} of {batch.size} samples. Use method='hutchinson'."
            )
        width = output[0].numel()
        if width > OUTPUT_LIMIT:
            raise ValueError(
                f"method='ggn' factors the loss's Hessian for each sample, and the model has {width} outputs per "
                f"sample of {OUTPUT_LIMIT} that it allows. Use method='hutchinson', or fisher()."
            )
    check_loss(run.loss_fn(output, batch.targets))

    given, axes, alone = batch.split(slice(None))

    def curvature(one: Tensor, given: list[Any]) -> Tensor:
        _, targets = alone(given)

        def loss(z: Tensor) -> Tensor:
            return check_shape(run.loss_fn(z.unsqueeze(0), targets))

        second: Tensor = jacrev(jacrev(loss))(one)
        return second.reshape(width, width)

    try:
        matrices: Tensor = vmap(curvature, in_dims=(0, axes))(output, given)
    except (RuntimeError, NotImplementedError, ValueError):
        each = ([leaf.select(axis, i) for leaf, axis in zip(given, axes, strict=True)] for i in range(batch.size))
        matrices = torch.stack([curvature(z, one) for z, one in zip(output, each, strict=True)])
    values, vectors = torch.linalg.eigh(matrices.to(wide(matrices.dtype)))
    roots: Tensor = vectors.mT * values.clamp_min(0).sqrt().unsqueeze(-1)
    return roots


def _hutchinson(
    run: Run, loader: Iterable[Any], samples: int, generator: torch.Generator
) -> tuple[list[Tensor], list[Tensor], int]:
    """Return sums of the estimates and of their variances, and how many samples the data had."""
    sums, variances, count = run.zeros(), run.zeros(), 0
    for batch in run.batches(loader, "hessian, Hutchinson"):
        unique = dict(zip(run.names, run.differentiable_grads(batch), strict=True))  # tied ones once
        first, second = run.zeros(), run.zeros()
        for _ in range(samples):
            signs = {name: _signs(g.shape, generator).to(g) for name, g in unique.items()}
            products = torch.autograd.grad(
                [g for g in unique.values() if g.requires_grad],
                run.tensors,
                [signs[name] for name, g in unique.items() if g.requires_grad],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            estimate = [signs[name] * product for name, product in zip(run.names, products, strict=True)]
            add(first, estimate)
            add(second, (e.square() for e in estimate))
        means = [total / samples for total in first]
        add(sums, means, batch.size)
        for total, squares, mean in zip(variances, second, means, strict=True):
            total += (squares / samples - mean.square()).clamp_min(0) / max(samples - 1, 1) * batch.size**2
        count += batch.size
    return sums, variances, count
