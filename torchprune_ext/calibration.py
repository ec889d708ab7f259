"""Scores from data: run a model over batches and collect what the criteria need.

All functions return ``{(module, name): tensor}``, the form that native ``global_unstructured`` and every call here take
as ``importance_scores`` (or ``hessian_diag``). The tensors have the shape and device of the parameter and are at least
float32. Pruned models are calibrated at their effective weights, and what a pruned entry would be worth is told too.
The model is left exactly as it was. The options of all functions are those of :class:`.Options`.

Beside a training step's memory a statistic takes one tensor per parameter, one more per pruned parameter, at most
64 MB where it needs the gradients of single samples, and what its docstring says beyond that.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from typing_extensions import Unpack

from torchprune_ext._checks import check_fraction, check_whole
from torchprune_ext._host import targets_of
from torchprune_ext._passes import (
    Batch,
    Key,
    LossFn,
    Options,
    Run,
    calibrating,
    check_loss,
    check_shape,
    leaves,
    part,
    tree_map,
    wide,
)
from torchprune_ext.masks import identity
from torchprune_ext.selection import Scores, kept, select_smallest

Statistics = dict[Key, Tensor]
EXACT_LIMIT = 20_000  # most parameters for the exact Hessian diagonal
OUTPUT_LIMIT = 2_048  # most outputs per sample for the square root of the loss's Hessian


def gradients(
    model: nn.Module, loss_fn: LossFn, loader: Iterable[Any], params: Iterable[Key], **options: Unpack[Options]
) -> Statistics:
    r"""Return the size of the mean gradient, :math:`|\frac1N \sum_i \partial L_i / \partial w|`.

    Args:
        model: any module; runs in eval mode.
        loss_fn: from the model's output and the targets to a number, a mean over the samples of the batch.
        loader: batches, see :class:`.Options`.
        params: ``(module, name)`` pairs within ``model``.
        **options: see :class:`.Options`.

    Returns:
        Scores in units of the loss per unit of weight. At a minimum they are near zero and say little.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: no data, a loss that is no finite number, or a parameter that the loss does not depend on.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> data = [(torch.tensor([[1.0, -3.0]]), None)]
        >>> scores = gradients(layer, lambda out, _: out.sum(), data, [(layer, "weight")])
        >>> scores[layer, "weight"]
        tensor([[1., 3.]])
    """
    with calibrating(model, params, options) as run:
        sums, count = run.zeros(), 0
        for batch in run.batches(loader, "gradients"):
            _add(sums, run.grads(run.loss(loss_fn, batch)), batch.size)
            count += batch.size
    return {key: mean.abs_() for key, mean in run.mean(sums, count).items()}


def taylor(
    model: nn.Module,
    loss_fn: LossFn,
    loader: Iterable[Any],
    params: Iterable[Key],
    *,
    per: Literal["sample", "batch"] = "sample",
    **options: Unpack[Options],
) -> Statistics:
    r"""Return the mean of the first-order estimate of deleting a weight, :math:`\frac1N \sum_i |g_i w|`.

    Args:
        model: any module; runs in eval mode.
        loss_fn: from the model's output and the targets to a number, a mean over the samples of the batch.
        loader: batches, see :class:`.Options`.
        params: ``(module, name)`` pairs within ``model``.
        per: take the absolute value for each ``"sample"``, or for each ``"batch"``, which is cheaper and lets samples
            of a batch cancel.
        **options: see :class:`.Options`.

    Returns:
        Scores in units of the loss; 0 where a weight is pruned, as it is 0.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: as :func:`gradients`, or ``per`` is unknown.

    Source: Molchanov et al. 2017, *Pruning Convolutional Neural Networks for Resource Efficient Inference*,
    arXiv:1611.06440, equation 7, for weights instead of feature maps.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.constant_(layer.weight, 2.0)
        >>> data = [(torch.tensor([[1.0, 3.0], [-1.0, 1.0]]), torch.zeros(2))]
        >>> taylor(layer, lambda out, _: out.mean(), data, [(layer, "weight")])[layer, "weight"]
        tensor([[2., 4.]])
        >>> taylor(layer, lambda out, _: out.mean(), data, [(layer, "weight")], per="batch")[layer, "weight"]
        tensor([[0., 4.]])
    """
    with calibrating(model, params, options) as run:
        if per not in ("sample", "batch"):
            raise ValueError(f"per={per!r} is unknown. Pass 'sample' or 'batch'.")
        sums, count = run.zeros(), 0
        for batch in run.batches(loader, "taylor"):
            if per == "batch":
                grads = run.grads(run.loss(loss_fn, batch))
                _add(sums, ((g * t).abs() for g, t in zip(grads, run.tensors, strict=True)), batch.size)
            else:
                for each in run.sample_grads(loss_fn, batch, batch.targets):
                    _add(sums, ((g * t).abs().sum(0) for g, t in zip(each, run.tensors, strict=True)))
            count += batch.size
    return run.mean(sums, count)


def fisher(
    model: nn.Module, loss_fn: LossFn, loader: Iterable[Any], params: Iterable[Key], **options: Unpack[Options]
) -> Statistics:
    r"""Return the diagonal of the empirical Fisher information, :math:`\frac1N \sum_i (\partial L_i / \partial w)^2`.

    Gradients are squared per sample, not per batch. Pass the result as ``hessian_diag`` to score by Fisher times
    :math:`w^2 / 2`.

    Args:
        model: any module; runs in eval mode.
        loss_fn: from the model's output and the targets to a number, a mean over the samples of the batch.
        loader: batches, see :class:`.Options`.
        params: ``(module, name)`` pairs within ``model``.
        **options: see :class:`.Options`.

    Returns:
        Statistics in squared units of the loss per squared unit of weight.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: as :func:`gradients`.

    Source: Theis et al. 2018, *Faster Gaze Prediction with Dense Networks and Fisher Pruning*, arXiv:1801.05787.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> data = [(torch.tensor([[1.0, 3.0], [-1.0, 1.0]]), torch.zeros(2))]
        >>> fisher(layer, lambda out, _: out.mean(), data, [(layer, "weight")])[layer, "weight"]
        tensor([[1., 5.]])
    """
    with calibrating(model, params, options) as run:
        sums, count = run.zeros(), 0
        for batch in run.batches(loader, "fisher"):
            for each in run.sample_grads(loss_fn, batch, batch.targets):
                _add(sums, (g.square().sum(0) for g in each))
            count += batch.size
    return run.mean(sums, count)


class HessianDiagonal(dict[Key, Tensor]):
    """The diagonal of a Hessian: a dictionary as all statistics here are, of any sign.

    Args:
        standard_error: one standard deviation of each entry, where the entries were estimated from random probes by
            ``method="hutchinson"``; otherwise None.
    """

    standard_error: Statistics | None = None


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
        generator: source of the probes, on the CPU; by default one with a fixed seed. Give each process of a
            ``process_group`` one of its own, or their errors add up and ``standard_error`` is too small.
        **options: see :class:`.Options`.

    Returns:
        Curvature in units of the loss per squared unit of weight; ``standard_error`` for ``"hutchinson"``.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: as :func:`gradients`; ``method`` is unknown, there are too many weights for ``"exact"``, or too
            many outputs per sample for ``"ggn"``.

    Source: LeCun, Denker & Solla 1989 for the use; Schraudolph 2002, *Fast Curvature Matrix-Vector Products*, for the
    Gauss-Newton matrix; Bekas, Kokiopoulou & Saad 2007, *An estimator for the diagonal of a matrix*, for the probes.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> data = [(torch.tensor([[1.0, 3.0], [-1.0, 1.0]]), torch.zeros(2, 1))]
        >>> hessian_diagonal(layer, nn.functional.mse_loss, data, [(layer, "weight")])[layer, "weight"].round()
        tensor([[ 2., 10.]])
    """
    with calibrating(model, params, options) as run:
        if samples is not None:
            check_whole("samples", samples, 1)
        if generator is None:  # probes of its own for each rank, as the ranks' errors shall not add up
            generator = torch.Generator().manual_seed(run.ranks.rank)
        if method == "hutchinson":
            sums, variances, count = _hutchinson(run, loss_fn, loader, samples or 100, generator)
        elif method == "ggn":
            sums, count = _gauss_newton(run, loss_fn, loader, samples, generator)
        elif method == "exact":
            sums, count = _column_by_column(run, loss_fn, loader)
        else:
            raise ValueError(f"method={method!r} is unknown. Pass 'ggn', 'hutchinson' or 'exact'.")
    found = HessianDiagonal(run.mean(sums, count))
    if method == "hutchinson" and samples != 1:  # one probe does not tell how much they vary
        # the mean weighs each batch by its samples, so its variance weighs them by the square
        squared = run.mean(variances, 1 / run.ranks.size)
        number = run.ranks.total(count)
        found.standard_error = {key: variance.sqrt_().div_(number) for key, variance in squared.items()}
    return found


def _column_by_column(run: Run, loss_fn: LossFn, loader: Iterable[Any]) -> tuple[list[Tensor], int]:
    if (number := sum(tensor.numel() for tensor in run.tensors)) > EXACT_LIMIT:
        raise ValueError(
            f"method='exact' takes a backward pass per weight, and params hold {number} weights of {EXACT_LIMIT} "
            "that it allows. Use method='ggn', or list fewer."
        )
    sums, count = run.zeros(), 0
    for batch in run.batches(loader, "hessian, exact"):
        grads = run.differentiable_grads(loss_fn, batch)
        for total, gradient, tensor in zip(sums, grads, run.tensors, strict=True):
            flat, rows = torch.zeros_like(total).reshape(-1), gradient.reshape(-1)
            for i in range(len(flat) if rows.requires_grad else 0):
                [row] = torch.autograd.grad(rows[i], tensor, retain_graph=True, allow_unused=True)
                flat[i] = 0 if row is None else row.reshape(-1)[i]
            total.add_(flat.view(total.shape), alpha=batch.size)
        count += batch.size
    return sums, count


def _gauss_newton(
    run: Run, loss_fn: LossFn, loader: Iterable[Any], samples: int | None, generator: torch.Generator
) -> tuple[list[Tensor], int]:
    sums, count = run.zeros(), 0
    for batch in run.batches(loader, "hessian, Gauss-Newton"):
        run.check_reached(loss_fn, batch, batch.targets)
        roots = _loss_roots(run, loss_fn, batch)  # (samples of the batch, outputs, outputs)
        if samples is not None:
            signs = torch.randint(2, (len(roots), samples, roots.shape[1]), generator=generator) * 2.0 - 1
            roots = signs.to(roots) @ roots / samples**0.5
        for cotangents in roots.unbind(1):
            if not cotangents.any():
                continue  # the Hessian of cross-entropy, for one, has a direction without curvature

            def along(output: Tensor, cotangent: Tensor) -> Tensor:
                return (output.reshape(-1) * cotangent.reshape(-1)).sum()

            for each in run.sample_grads(along, batch, cotangents):
                _add(sums, (g.square().sum(0) for g in each))
        count += batch.size
    return sums, count


def _loss_roots(run: Run, loss_fn: LossFn, batch: Batch) -> Tensor:
    """Return, for each sample, the rows of a square root of the loss's Hessian with respect to the output."""
    with torch.no_grad():
        output = run.output(batch.inputs)
        if not isinstance(output, Tensor):
            raise ValueError(
                f"method='ggn' needs a model whose output is one tensor, not a {type(output).__name__}. "
                "Wrap the model, or use method='hutchinson'."
            )
        if not output.dim() or len(output) != batch.size:
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
    check_loss(loss_fn(output, batch.targets))

    def curvature(one: Tensor, target: Any) -> Tensor:
        def loss(z: Tensor) -> Tensor:
            return check_shape(loss_fn(z.unsqueeze(0), part(target, None)))

        second: Tensor = jacrev(jacrev(loss))(one)
        return second.reshape(width, width)

    try:
        matrices: Tensor = vmap(curvature)(output, batch.targets)
    except (RuntimeError, NotImplementedError, ValueError):
        matrices = torch.stack([curvature(z, part(batch.targets, i)) for i, z in enumerate(output)])
    values, vectors = torch.linalg.eigh(matrices.to(wide(matrices.dtype)))
    roots: Tensor = vectors.mT * values.clamp_min(0).sqrt().unsqueeze(-1)
    return roots


def _hutchinson(
    run: Run, loss_fn: LossFn, loader: Iterable[Any], samples: int, generator: torch.Generator
) -> tuple[list[Tensor], list[Tensor], int]:
    """Return sums of the estimates and of their variances, and how many samples the data had."""
    sums, variances, count = run.zeros(), run.zeros(), 0
    for batch in run.batches(loader, "hessian, Hutchinson"):
        unique = dict(zip(run.names, run.differentiable_grads(loss_fn, batch), strict=True))  # tied ones once
        first, second = run.zeros(), run.zeros()
        for _ in range(samples):
            signs = {n: (torch.randint(2, g.shape, generator=generator) * 2 - 1).to(g) for n, g in unique.items()}
            products = torch.autograd.grad(
                [g for g in unique.values() if g.requires_grad],
                run.tensors,
                [signs[name] for name, g in unique.items() if g.requires_grad],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            estimate = [signs[name] * product for name, product in zip(run.names, products, strict=True)]
            _add(first, estimate)
            _add(second, (e.square() for e in estimate))
        means = [total / samples for total in first]
        _add(sums, means, batch.size)
        for total, squares, mean in zip(variances, second, means, strict=True):
            total += (squares / samples - mean.square()).clamp_min(0) / max(samples - 1, 1) * batch.size**2
        count += batch.size
    return sums, variances, count


def activations(
    model: nn.Module, loader: Iterable[Any], params: Iterable[Key], **options: Unpack[Options]
) -> Statistics:
    r"""Return the size of each weight times that of what it multiplies, :math:`|w_{ij}| \cdot \|x_j\|_2`.

    The norm of an input feature (``Linear``) or input channel (convolution) is taken over all samples, positions and
    tokens. Wanda compares these scores within each output row: pass them as ``importance_scores`` to
    ``nm_structured(layer, "weight", n=kept, m=inputs)``, or with ``n=2, m=4``.

    Args:
        model: any module; runs in eval mode.
        loader: batches, see :class:`.Options`; targets are not used.
        params: ``(module, name)`` pairs of the weights of ``Linear`` layers and convolutions.
        **options: see :class:`.Options`.

    Returns:
        Scores in units of the layer's output.

    Raises:
        TypeError: a layer of another type.
        ValueError: no data, or a layer that was never called, as ``out_proj`` of ``MultiheadAttention``.

    Source: Sun et al. 2023, *A Simple and Effective Pruning Approach for Large Language Models*, arXiv:2306.11695,
    equation 1.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.constant_(layer.weight, -2.0)
        >>> activations(layer, [(torch.tensor([[3.0, 0.0], [4.0, 1.0]]), None)], [(layer, "weight")])[layer, "weight"]
        tensor([[10.,  2.]])
    """
    with calibrating(model, params, options) as run:
        squares: dict[nn.Module, Tensor] = {}

        def watch(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            x = (inputs[0] if inputs else keywords["input"]).detach()
            axis = -module.get_parameter("weight").dim() + 1 if isinstance(module, _ConvNd) else -1
            x = x.movedim(axis, -1).flatten(0, -2)
            found = x.to(wide(x.dtype)).square().sum(0)
            squares[module] = squares[module] + found if module in squares else found

        for (module, name), tensor in zip(run.keys, run.tensors, strict=True):
            if not isinstance(module, (nn.Linear, _ConvNd)) or tensor.dim() < 2:
                raise TypeError(
                    f"params holds {type(module).__name__}.{name}, but only the weights of Linear layers and "
                    "convolutions have inputs to measure. Leave it out."
                )
        modules = dict.fromkeys(module for module, _ in run.keys)
        hooks = [module.register_forward_pre_hook(watch, with_kwargs=True) for module in modules]
        try:
            with torch.no_grad():
                for batch in run.batches(loader, "activations"):
                    run.output(batch.inputs)
        finally:
            for hook in hooks:
                hook.remove()
        sums = []
        for (module, _), name, tensor in zip(run.keys, run.names, run.tensors, strict=True):
            if module not in squares:
                raise ValueError(
                    f"params holds {name}, whose module is never called, as when its parent reads the weight. "
                    "Leave it out."
                )
            sums.append(_inputs_like(module, squares[module], tensor))
        weights = [tensor.detach() for tensor in run.tensors]
    norms = run.mean(sums, 1 / run.ranks.size)
    return {key: w.abs() * norms[key].sqrt() for key, w in zip(run.keys, weights, strict=True)}


def snip(
    model: nn.Module, loss_fn: LossFn, loader: Iterable[Any], params: Iterable[Key], **options: Unpack[Options]
) -> Statistics:
    r"""Return the connection sensitivity of each weight, :math:`|g_j w_j| / \sum_k |g_k w_k|`, before training.

    The gradient is that of the loss over all batches given (the paper takes one). The sum runs over all listed tensors.

    Args:
        model: a freshly initialized module; runs in eval mode.
        loss_fn: from the model's output and the targets to a number, a mean over the samples of the batch.
        loader: batches, see :class:`.Options`; ``max_batches=1`` is the paper's choice.
        params: ``(module, name)`` pairs within ``model``.
        **options: see :class:`.Options`.

    Returns:
        Scores that sum to 1 over all listed tensors, without unit; 0 where a weight is pruned.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: as :func:`gradients`.

    Source: Lee, Ajanthan & Torr 2019, *SNIP: Single-shot Network Pruning based on Connection Sensitivity*,
    arXiv:1810.02340, equation 6.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.constant_(layer.weight, 0.5)
        >>> snip(layer, lambda out, _: out.sum(), [(torch.tensor([[1.0, -3.0]]), None)], [(layer, "weight")])
        {(Linear(in_features=2, out_features=1, bias=False), 'weight'): tensor([[0.2500, 0.7500]])}
    """
    with calibrating(model, params, options) as run:
        sums, count = run.zeros(), 0
        for batch in run.batches(loader, "snip"):
            _add(sums, run.grads(run.loss(loss_fn, batch)), batch.size)
            count += batch.size
        weights = [tensor.detach() for tensor in run.tensors]
    scores = [(g * w).abs() for g, w in zip(run.mean(sums, count).values(), weights, strict=True)]
    total = sum(float(score.sum(dtype=torch.float64)) for score in scores)
    return {key: score / total if total else score for key, score in zip(run.keys, scores, strict=True)}


def grasp(
    model: nn.Module, loss_fn: LossFn, loader: Iterable[Any], params: Iterable[Key], **options: Unpack[Options]
) -> Statistics:
    r"""Return how much each weight preserves the gradient flow, :math:`w_j (Hg)_j` shifted to be >= 0.

    Removing a weight changes the squared norm of the gradient by about :math:`-2 w_j (Hg)_j`; the paper removes the
    weights with the largest :math:`-w_j (Hg)_j`, so those with the smallest score here. The gradient and the Hessian
    are those of the mean loss over all batches given, which takes two passes over the loader. Keeps the graph of the
    gradient, about the memory of a second training step, and two tensors per parameter.

    Args:
        model: a freshly initialized module; runs in eval mode.
        loss_fn: from the model's output and the targets to a number, a mean over the samples of the batch.
        loader: batches that can be gone through twice, such as a list or a ``DataLoader`` without shuffling.
        params: ``(module, name)`` pairs within ``model``.
        **options: see :class:`.Options`.

    Returns:
        Scores from which the smallest of all listed tensors is subtracted, so that they are >= 0; in squared units of
        the loss per squared unit of weight.

    Raises:
        TypeError: ``loader`` is an iterator, which can be gone through once, or as :func:`gradients`.
        ValueError: as :func:`gradients`.

    Source: Wang, Zhang & Grosse 2020, *Picking Winning Tickets Before Training by Preserving Gradient Flow*,
    arXiv:2002.07376, equation 8.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.constant_(layer.weight, 1.0)
        >>> data = [(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1))]  # g = 6 x, H = 2 x x', so w * Hg = 60 x
        >>> grasp(layer, nn.functional.mse_loss, data, [(layer, "weight")])[layer, "weight"]
        tensor([[ 0., 60.]])
    """
    with calibrating(model, params, options) as run:
        if isinstance(loader, Iterator):
            raise TypeError("loader is an iterator, but grasp reads the data twice. Pass a list or a DataLoader.")
        sums, count = run.zeros(), 0
        for batch in run.batches(loader, "grasp, gradient"):
            _add(sums, run.grads(run.loss(loss_fn, batch)), batch.size)
            count += batch.size
    gradient = run.mean(sums, count)
    with calibrating(model, run.keys, options) as run:
        sums, count = run.zeros(), 0
        for batch in run.batches(loader, "grasp, Hessian"):
            grads = run.differentiable_grads(loss_fn, batch)
            pairs = dict(zip(run.names, zip(grads, gradient.values(), strict=True), strict=True))  # tied ones once
            inner = torch.stack([(g * fixed.to(g)).sum() for g, fixed in pairs.values()]).sum()
            if inner.requires_grad:
                products = torch.autograd.grad(inner, run.tensors, allow_unused=True, materialize_grads=True)
                _add(sums, list(products), batch.size)
            count += batch.size
        weights = [tensor.detach() for tensor in run.tensors]
    scores = [h * w for h, w in zip(run.mean(sums, count).values(), weights, strict=True)]
    least = min(float(score.min()) for score in scores if score.numel())
    return {key: score - least for key, score in zip(run.keys, scores, strict=True)}


def synflow(
    model: nn.Module,
    example_inputs: Any,
    params: Iterable[Key],
    *,
    target_sparsity: float,
    steps: int = 100,
) -> Statistics:
    r"""Return iterative synaptic flow scores, which need no data and collapse no layer.

    With all parameters replaced by their absolute values and an input of ones, the sum :math:`R` of the outputs counts
    the paths through the network, and :math:`w \odot \partial R / \partial w` says how much of it goes through each
    weight. In ``steps`` rounds the kept fraction falls geometrically to ``1 - target_sparsity``, and the scores of what
    is left are computed anew in each. The result ranks all weights by the round in which they went, so one global call
    with the same ``target_sparsity`` prunes as the iteration did. In float64, and so about five times the size of the
    listed tensors.

    Args:
        model: any module whose output is a tensor, with or without training; runs in eval mode, in float64.
        example_inputs: tensor, or tuple of tensors, of the shapes that the model takes; only the shapes count.
        params: ``(module, name)`` pairs within ``model``.
        target_sparsity: fraction of the listed entries that shall be pruned in the end, what is pruned already counted
            in.
        steps: number of rounds.

    Returns:
        Scores in [0, steps + 1] without unit, namely how many rounds a weight survived, and behind the point its share
        of the flow in the last of them.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: ``target_sparsity`` is no fraction, or the output does not depend on one of the tensors.

    Source: Tanaka, Kunin, Yamins & Ganguli 2020, *Pruning neural networks without any data by iteratively conserving
    synaptic flow*, arXiv:2006.05467, algorithm 1.

    Example:
        >>> layer = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False))
        >>> _ = layer[0].weight.data.copy_(torch.tensor([[3.0, -0.5]]))
        >>> params = [(layer[0], "weight"), (layer[1], "weight")]
        >>> scores = synflow(layer, torch.zeros(1, 2), params, target_sparsity=0.3, steps=1)
        >>> scores[params[0]].argmin()
        tensor(1)
    """
    check_fraction("target_sparsity", target_sparsity)
    check_whole("steps", steps, 1)
    targets = list(targets_of(params).values())
    with calibrating(model, [(target.module, target.name) for target in targets], {}) as run:
        constants = {name: tensor.detach().double().abs() for name, tensor in model.named_parameters()}
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point():  # a shift by a mean would let flows cancel
                constants[name] = buffer.double() * (not name.endswith("running_mean"))
        ones = tree_map(
            lambda leaf: torch.ones_like(leaf, dtype=torch.float64) if leaf.is_floating_point() else leaf,
            example_inputs,
        )
        arguments = tuple(ones) if isinstance(ones, (tuple, list)) else (ones,)
        unique = dict(zip(run.names, targets, strict=True))  # tied tensors count once
        alive = [torch.ones_like(target.parameter, dtype=torch.bool) for target in unique.values()]
        alive = [a if t.mask is None else t.mask != 0 for a, t in zip(alive, unique.values(), strict=True)]
        total = sum(mask.numel() for mask in alive)
        ranks = [torch.zeros_like(mask, dtype=torch.float64) for mask in alive]
        for step in range(1, steps + 2):  # the last round ranks what survives
            tensors = [(constants[n] * mask).requires_grad_() for n, mask in zip(unique, alive, strict=True)]
            output = functional_call(model, constants | dict(zip(unique, tensors, strict=True)), arguments)
            flow = torch.stack([leaf.sum() for leaf in leaves(output)]).sum()
            grads = run.grads(flow, tensors)
            scores = [(t * g).abs().detach() for t, g in zip(tensors, grads, strict=True)]
            parts = [Scores.of(identity, score, alive=mask) for score, mask in zip(scores, alive, strict=True)]
            left = sum(part.count_alive() for part in parts)
            gone = 1 - (1 - target_sparsity) ** (step / steps) if step < steps else target_sparsity
            keep = total - round(total * gone) if step <= steps else 0
            cuts = select_smallest(parts, max(left - keep, 0))
            stay = [kept(part, cut).view(m.shape) for part, cut, m in zip(parts, cuts, alive, strict=True)]
            largest = max((float(score.max()) for score in scores if score.numel()), default=0.0) or 1.0
            for rank, score, before, after in zip(ranks, scores, alive, stay, strict=True):
                rank += (before & ~after) * (step - 1 + score / (2 * largest))
            alive = stay
    by_name = dict(zip(unique, ranks, strict=True))
    return {key: by_name[name] for key, name in zip(run.keys, run.names, strict=True)}


def random(params: Iterable[Key], *, generator: torch.Generator | None = None) -> Statistics:
    """Return random scores, the baseline that any other criterion should beat.

    Args:
        params: ``(module, name)`` pairs.
        generator: source of the numbers, on the CPU; by default torch's own. With a seeded one, all processes of a
            distributed run get the same scores.

    Returns:
        Scores uniform in [0, 1).

    Raises:
        TypeError: ``params`` is no iterable of pairs.
        ValueError: a pair does not name a parameter.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> scores = random([(layer, "weight")], generator=torch.Generator().manual_seed(0))
        >>> scores[layer, "weight"].shape
        torch.Size([1, 2])
    """
    return {
        (target.module, target.name): torch.rand(target.parameter.shape, generator=generator).to(
            target.parameter.device
        )
        for target in targets_of(params).values()
    }


def _inputs_like(module: nn.Module, inputs: Tensor, weight: Tensor) -> Tensor:
    """Return one value per input channel of ``module`` in the shape of ``weight``."""
    groups = getattr(module, "groups", 1)
    if isinstance(module, _ConvTransposeNd):  # (in, out / groups, *kernel)
        per_weight = inputs.view(-1, *[1] * (weight.dim() - 1))
    else:  # (out, in / groups, *kernel): the first of the equal blocks of outputs reads the first block of inputs
        blocks = inputs.view(groups, -1).repeat_interleave(weight.shape[0] // groups, dim=0)
        per_weight = blocks.view(weight.shape[0], -1, *[1] * (weight.dim() - 2))
    return per_weight.expand(weight.shape).clone()


def _add(sums: list[Tensor], values: Iterable[Tensor], weight: float = 1) -> None:
    for total, value in zip(sums, values, strict=True):
        total.add_(value.detach(), alpha=weight)
