"""Where torch has the same method, the masks are the same."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe

try:
    from torch.ao.pruning import WeightNormSparsifier
except ImportError as error:
    WeightNormSparsifier, REASON = None, f"this torch has no WeightNormSparsifier to compare with: {error}"
else:
    REASON = ""

amounts = st.one_of(st.floats(0, 1), st.integers(0, 3))


def twins(rows, columns, seed):
    """Return two equal layers without ties."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(rows * columns, generator=generator)
    weight = ((order + 1.0) * (1 - 2 * (order % 2)) / 64).reshape(rows, columns)
    layers = [nn.Linear(columns, rows, device="meta") for _ in range(2)]
    for layer in layers:
        layer.weight = nn.Parameter(weight.clone())
    return layers


@given(st.integers(3, 7), st.integers(3, 7), st.integers(0, 99), amounts, st.integers(-2, 1))
def test_vectors_of_a_matrix_are_the_structures_of_native_pruning(rows, columns, seed, amount, dim):
    ours, native = twins(rows, columns, seed)
    for _ in range(2 if isinstance(amount, float) else 1):
        tpe.vector_ln(ours, "weight", amount, n=1, dim=dim)
        prune.ln_structured(native, "weight", amount, n=1, dim=(1 - dim) % 2)  # native: the axis that is indexed
        norms = ours.weight_orig.abs().sum(dim)
        if len(norms.unique()) == len(norms):
            assert torch.equal(ours.weight_mask, native.weight_mask)
        assert int(ours.weight_mask.sum()) == int(native.weight_mask.sum())


@given(st.integers(1, 7), st.integers(3, 7), st.integers(0, 99), amounts)
def test_the_gradient_method_with_the_weight_as_gradient_is_native_l1(rows, columns, seed, amount):
    ours, native = twins(rows, columns, seed)
    for _ in range(2 if isinstance(amount, float) else 1):
        tpe.gradient_magnitude(ours, "weight", amount, grad=ours.weight.detach())
        prune.l1_unstructured(native, "weight", amount)
        assert torch.equal(ours.weight_mask, native.weight_mask)


@given(st.integers(1, 7), st.integers(3, 7), st.integers(0, 99), amounts)
def test_scores_through_the_class_are_native_l1(rows, columns, seed, amount):
    ours, native = twins(rows, columns, seed)
    scores = ours.weight.detach().abs()
    parameters = {(ours, "weight"): scores}
    prune.global_unstructured(parameters, tpe.GradientMagnitude, importance_scores=parameters, amount=amount)
    prune.l1_unstructured(native, "weight", amount)
    assert torch.equal(ours.weight_mask, native.weight_mask)


@pytest.mark.skipif(WeightNormSparsifier is None, reason=REASON)
@given(
    st.integers(1, 7), st.integers(1, 5), st.integers(0, 99), st.sampled_from([(2, 4), (1, 4), (3, 4), (1, 2), (4, 8)])
)
def test_n_of_m_is_what_the_weight_norm_sparsifier_makes(rows, groups, seed, pattern):
    n, m = pattern
    ours, theirs = twins(rows, groups * m, seed)
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, m), zeros_per_block=m - n)
    sparsifier.prepare(nn.Sequential(theirs), config=[{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    tpe.nm_structured(ours, "weight", n, m)
    mask = theirs.parametrizations.weight[0].mask
    assert mask.shape == ours.weight_mask.shape
    assert torch.equal(ours.weight_mask == 1, mask == 1)
