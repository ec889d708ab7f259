"""Channels whose BatchNorm scale is small: the filter, its bias and the BatchNorm go together."""

import pytest
import torch
from cases import HOSTS, batch_norm_for, flat, output_axis
from oracles import channels, prune_units
from snapshots import Snapshot
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe

every_host = pytest.mark.parametrize("host", HOSTS)


def pair(host, **options):
    module = HOSTS[host]()
    return module, batch_norm_for(module, **options)


def batch(module):
    channels_in = getattr(module, "in_channels", None) or module.in_features
    size = (3, channels_in, *[5] * (module.weight.dim() - 2))
    return torch.linspace(-2, 2, torch.Size(size).numel()).sin().reshape(size)


def gone(module):
    """Return the channels that have nothing left."""
    units = channels(tuple(module.weight_mask.shape), *output_axis(module))
    mask = flat(module.weight_mask)
    return [c for c, unit in enumerate(units) if not any(mask[i] for i in unit)]


@every_host
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("amount", [0.5, 3, 1.0])
def test_pruned_channels_put_out_exactly_zero(host, training, amount):
    module, bn = pair(host)
    bn.running_mean.fill_(0.7)
    tpe.bn_scaling(module, "weight", amount, bn)
    dead = gone(module)
    assert len(dead) == (amount if isinstance(amount, int) else round(amount * bn.num_features))
    model = nn.Sequential(module, bn).train(training)
    for _ in range(2):
        out = model(batch(module))
        assert torch.all(out[:, dead] == 0)
        alive = [c for c in range(bn.num_features) if c not in dead]
        assert all(torch.any(out[:, c] != 0) for c in alive)
    assert torch.all(module(batch(module))[:, dead] == 0)


@every_host
def test_the_same_channels_are_masked_in_all_four_tensors(host):
    module, bn = pair(host)
    gamma = flat(bn.weight)
    units = channels(tuple(module.weight.shape), *output_axis(module))
    tpe.bn_scaling(module, "weight", 3, bn=bn)
    one_each = [[c] for c in range(bn.num_features)]
    expected = prune_units(one_each, [abs(g) for g in gamma], [1] * bn.num_features, 3)
    assert gone(module) == [c for c, keep in enumerate(expected) if not keep]
    for owner, name in [(module, "bias"), (bn, "weight"), (bn, "bias")]:
        mask = getattr(owner, f"{name}_mask")
        assert flat(mask) == expected
        assert mask.dtype == getattr(owner, f"{name}_orig").dtype
    assert len(units) == bn.num_features
    assert list(module._parameters) == ["weight_orig", "bias_orig"]
    assert list(bn._parameters) == ["weight_orig", "bias_orig"]
    assert [(path, name) for path, _, name in tpe.pruned_parameters(nn.Sequential(module, bn))] == [
        ("0", "weight"), ("0", "bias"), ("1", "weight"), ("1", "bias"),
    ]  # fmt: skip
    tpe.undo_all(nn.Sequential(module, bn))
    assert flat(bn.weight) == gamma


@every_host
def test_unpaired_masks_the_weight_alone(host):
    module, bn = pair(host)
    before, bias = Snapshot(bn), module.bias
    tpe.bn_scaling(module, "weight", 3, bn, paired=False)
    assert len(gone(module)) == 3
    assert before.differences() == []
    assert module.bias is bias
    assert list(module._parameters) == ["weight_orig", "bias"]


def test_no_bias_is_no_problem():
    module = nn.Conv2d(4, 6, 3, bias=False)
    bn = batch_norm_for(module)
    tpe.bn_scaling(module, "weight", 3, bn)
    dead = gone(module)
    assert torch.all(nn.Sequential(module, bn)(batch(module))[:, dead] == 0)
    assert list(module._parameters) == ["weight_orig", "bias"]
    assert module.bias is None


@every_host
def test_a_second_call_prunes_further_channels(host):
    module, bn = pair(host)
    tpe.bn_scaling(module, "weight", 2, bn)
    first = gone(module)
    tpe.bn_scaling(module, "weight", 2, bn)
    assert set(first) < set(gone(module))
    assert len(gone(module)) == 4
    out = nn.Sequential(module, bn)(batch(module))
    assert torch.all(out[:, gone(module)] == 0)
    left = bn.num_features - 4
    before = Snapshot(module, bn)
    with pytest.raises(ValueError, match=rf"of shape .*amount={left + 1}"):
        tpe.bn_scaling(module, "weight", left + 1, bn)
    assert before.differences() == []
    tpe.bn_scaling(module, "weight", left, bn)
    assert not module.weight_mask.any()


def test_native_pruning_of_all_four_tensors_is_kept():
    module, bn = pair("conv2d")
    for owner, name in [(module, "weight"), (module, "bias"), (bn, "bias")]:
        prune.random_unstructured(owner, name, amount=0.4)
    prune.custom_from_mask(bn, "weight", torch.tensor([1, 1, 1, 1, 1, 1]))
    earlier = [getattr(o, f"{n}_mask").clone() for o in (module, bn) for n in ("weight", "bias")]
    tpe.bn_scaling(module, "weight", 3, bn)
    masks = [getattr(o, f"{n}_mask") for o in (module, bn) for n in ("weight", "bias")]
    assert all(torch.all(mask <= old) for mask, old in zip(masks, earlier, strict=True))
    dead = gone(module)
    assert all(torch.all(mask[dead] == 0) for mask in masks)
    alive = [c for c in range(6) if c not in dead]
    assert all(torch.equal(mask[alive], old[alive]) for mask, old in zip(masks, earlier, strict=True))
    hooks = [h for m in (module, bn) for h in m._forward_pre_hooks.values()]
    assert len(hooks) == 4
    assert all(isinstance(hook, prune.PruningContainer) for hook in hooks)


def test_gamma_is_scored_as_it_is_now():
    module, bn = pair("conv2d")
    prune.identity(bn, "weight")
    with torch.no_grad():
        bn.weight_orig.copy_(torch.tensor([6.0, -1, 5, 2, -4, 3]))
    tpe.bn_scaling(module, "weight", 2, bn)
    assert gone(module) == [1, 3]


def test_a_tie_keeps_the_lower_channel_and_the_sign_does_not_matter():
    module, bn = pair("linear", gamma=torch.tensor([-1.0, 1, 2, -1, 1, -2]))
    tpe.bn_scaling(module, "weight", 2, bn)
    assert gone(module) == [3, 4]
    module, bn = pair("transposed2d-grouped", gamma=torch.ones(8))
    tpe.bn_scaling(module, "weight", 3, bn)
    assert gone(module) == [5, 6, 7]


@every_host
@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("earlier", [False, True])
def test_what_does_not_fit_changes_neither_module(host, paired, earlier):
    module, bn = pair(host)
    if earlier:
        tpe.bn_scaling(module, "weight", 1, bn)
    wide, plain = batch_norm_for(module, size=20), batch_norm_for(module, affine=False)
    for bad, error, words in [
        (wide, ValueError, r"20"),
        (plain, ValueError, r"affine"),
        (nn.Identity(), TypeError, r"bn=|Identity"),
        (bn.running_mean, TypeError, r"bn"),
    ]:
        before = Snapshot(module, bn, wide, plain)
        with pytest.raises(error, match=words) as caught:
            tpe.bn_scaling(module, "weight", 2, bad, paired=paired)
        assert str(caught.value).startswith(f"{type(module).__name__}.weight of shape ")
        assert before.differences() == []


@pytest.mark.parametrize("host", ["linear", "conv2d", "transposed2d", "transposed2d-grouped"])
def test_a_bias_alone_goes_by_channel_too(host):
    module, bn = pair(host)
    tpe.bn_scaling(module, "bias", 2, bn, paired=False)
    assert sorted(bn.weight.abs()[module.bias_mask == 0].tolist()) == sorted(bn.weight.abs().tolist())[:2]
    assert list(module._parameters) == ["weight", "bias_orig"]


def test_channels_that_were_empty_before_put_out_zero_too():
    module, bn = pair("conv2d")
    prune.custom_from_mask(module, "weight", (torch.arange(6) > 0).view(6, 1, 1, 1).expand(6, 8, 3, 3))
    tpe.bn_scaling(module, "weight", 1, bn)
    assert len(gone(module)) == 2
    assert torch.all(nn.Sequential(module, bn)(batch(module))[:, gone(module)] == 0)


def test_other_batch_norms_work():
    module = HOSTS["conv2d"]()
    bn = nn.SyncBatchNorm(6)
    tpe.bn_scaling(module, "weight", 2, bn)
    assert len(gone(module)) == 2
    assert int(bn.weight_mask.sum()) == 4


def test_a_weight_that_is_unusable_in_the_batch_norm_is_named():
    module, bn = pair("conv2d")
    with torch.no_grad():
        bn.weight[2] = float("nan")
    before = Snapshot(module, bn)
    with pytest.raises(ValueError, match=r"Conv2d\.weight of shape .*bn.*(NaN|nan|finite)"):
        tpe.bn_scaling(module, "weight", 2, bn)
    assert before.differences() == []
