"""What was applied to a tensor, and what stays behind of what was pruned as one."""

import io

import pytest
import torch
from cases import CASES
from globally import Tied, weights
from snapshots import Snapshot
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe


def test_native_calls_and_ours_in_order_after_one_and_after_many():
    layer = nn.Linear(8, 4)
    assert tpe.history(layer, "weight") == []
    prune.l1_unstructured(layer, "weight", amount=0.2)
    assert tpe.history(layer, "weight") == ["L1Unstructured(amount=0.2)"]
    tpe.nm_structured(layer, "weight", 2, 4)
    prune.ln_structured(layer, "weight", 1, n=2, dim=0)
    prune.custom_from_mask(layer, "weight", torch.eye(4, 8))
    assert tpe.history(layer, "weight") == [
        "L1Unstructured(amount=0.2)",
        "NMStructured(n=2, m=4, dim=1, pad=False, groups=1)",
        "LnStructured(amount=1, n=2, dim=0)",
        "CustomFromMask(mask=...)",
    ]
    assert tpe.history(layer, "bias") == []
    tpe.undo(layer, "weight")
    assert tpe.history(layer, "weight") == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_method_tells_its_call(case):
    layer = nn.Linear(8, 6) if case.hosts[0] == "linear" else nn.Conv2d(8, 6, 3)
    case.function(layer, "weight", **case.arguments(layer))
    assert tpe.history(layer, "weight") == [case.repr]


def test_scores_that_were_given_are_told():
    layer, other = nn.Linear(8, 4), nn.Linear(8, 4)
    tpe.vector_ln(layer, "weight", 1, importance_scores=torch.rand(4, 8))
    scores = {(module, "weight"): torch.rand(4, 8) for module in (layer, other)}
    tpe.global_unstructured(weights(layer, other), amount=0.1, importance_scores=scores)
    tpe.global_vector_ln(weights(layer, other), amount=1, importance_scores=scores, min_keep=0)
    tpe.global_nm_structured(weights(layer, other), m=2, amount=0.2, importance_scores=scores)
    told = tpe.history(layer, "weight")
    assert told[0] == "VectorLn(amount=1, n=2, dim=-1, importance_scores=...)"
    assert all(call.endswith("importance_scores=...)") for call in told)
    assert len(told) == 4
    assert tpe.history(copy_of(layer), "weight") == told


def copy_of(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_call_that_changes_nothing_adds_nothing():
    layer, other = nn.Linear(8, 4), nn.Linear(8, 4)
    for _ in range(2):
        tpe.nm_structured(layer, "weight", 2, 4)
        tpe.vector_ln(layer, "weight", amount=0)
        tpe.global_unstructured(weights(layer, other), target_sparsity=0.5)
    told = tpe.history(layer, "weight")
    assert [call.partition("(")[0] for call in told] == ["NMStructured", "global_unstructured"]
    hook = next(iter(layer._forward_pre_hooks.values()))
    tpe.nm_structured(layer, "weight", 2, 4)
    assert next(iter(layer._forward_pre_hooks.values())) is hook


def test_a_lost_hook_has_lost_its_history_and_is_repaired():
    layer = prune.l1_unstructured(nn.Linear(8, 4), "weight", amount=0.5)
    layer._forward_pre_hooks.clear()
    assert tpe.history(layer, "weight") == []
    tpe.threshold(layer, "weight", 0.0)
    assert tpe.history(layer, "weight") == ["Threshold(threshold=0.0)"]
    assert prune.is_pruned(layer)


@pytest.mark.parametrize("bad", ["nothing", "weight_mask"])
def test_what_is_not_there_has_no_history(bad):
    layer = tpe.every_other(nn.Linear(8, 4), "weight")
    with pytest.raises(ValueError, match=bad):
        tpe.history(layer, bad)
    with pytest.raises(TypeError, match="module"):
        tpe.history("layer", "weight")


# ------------------------------------------------------------------------------------------- halves of what is one


def pair(bias=True):
    conv, bn = nn.Conv2d(3, 4, 3, bias=bias), nn.BatchNorm2d(4)
    bn.weight.data = torch.tensor([0.9, 0.1, 0.8, 0.2])
    return nn.Sequential(conv, bn)


BY = {
    "bn_scaling": lambda model: tpe.bn_scaling(model[0], "weight", amount=2, bn=model[1]),
    "global_bn_scaling": lambda model: tpe.global_bn_scaling([(model[0], model[1])], amount=2),
}
every_call = pytest.mark.parametrize("call", BY.values(), ids=BY)


@every_call
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("copied", [False, True])
def test_half_of_a_pair_is_named(call, bias, copied):
    model = pair(bias)
    call(model)
    model = copy_of(model) if copied else model
    before = Snapshot(model)
    rest = (r"Conv2d\.bias.*" if bias else "") + r"BatchNorm2d\.weight of shape \(4,\).*BatchNorm2d\.bias.*undo_all"
    with pytest.raises(UserWarning, match=rf"undo of Conv2d\.weight.*{rest}"):  # as an error it leaves no trace
        tpe.undo(model[0], "weight")
    assert before.differences() == []
    with pytest.warns(UserWarning, match=rest):
        tpe.undo_all(model, [(model[0], "weight")])
    with pytest.warns(UserWarning, match=r"BatchNorm2d\.bias of shape"):
        tpe.undo(model[1], "weight")
    tpe.undo_all(model)  # nothing stays behind


@every_call
def test_a_whole_pair_is_undone_and_half_is_made_permanent_without_a_word(call):
    model = pair()
    call(model)
    tpe.undo_all(model)
    call(model)
    tpe.remove(model[0], "weight")  # the channels are silent all the same
    tpe.remove_all(model)


def test_a_pair_that_is_none_is_undone_without_a_word():
    model = pair()
    tpe.bn_scaling(model[0], "weight", amount=2, bn=model[1], paired=False)
    prune.l1_unstructured(model[1], "bias", amount=1)
    tpe.undo(model[0], "weight")


@pytest.mark.parametrize("call", [lambda params: tpe.global_unstructured(params, amount=0.5), None], ids=["prune", "0"])
def test_one_place_of_a_tied_tensor_is_half_of_it(call):
    model = Tied()
    model.decoder.weight.data[::2] = 0
    params = weights(model.embedding, model.decoder)
    tpe.mask_zeros(params)
    if call is not None:
        call(params)
    with pytest.warns(UserWarning, match=r"Linear\.weight of shape \(10, 6\)"):
        tpe.undo(model.embedding, "weight")
    tpe.undo(model.decoder, "weight")
    assert isinstance(model.decoder.weight, nn.Parameter)


# ------------------------------------------------------------------------------------------- an adapter that is merged


def test_an_adapter_that_was_merged_is_not_lost_in_silence():
    layer = prune.l1_unstructured(nn.Linear(8, 4), "weight", amount=0.5)
    low, high = torch.randn(2, 8), torch.randn(4, 2)
    layer.weight.data += high @ low  # what merge_and_unload does
    for end in (tpe.undo, tpe.remove):
        before = Snapshot(layer)
        with pytest.raises(UserWarning, match=r"Linear\.weight of shape \(4, 8\).*merged.*lost"):
            end(layer, "weight")
        assert before.differences() == []
    layer(torch.ones(1, 8))  # the host has forgotten it
    tpe.remove(layer, "weight")
    assert int((layer.weight == 0).sum()) == 16
    layer.weight.data += high @ low  # and this way it stays
    assert int((layer.weight == 0).sum()) == 0


def test_training_is_not_taken_for_merging():
    layer = prune.l1_unstructured(nn.Linear(8, 4), "weight", amount=0.5)
    layer(torch.ones(1, 8)).sum().backward()
    torch.optim.Adam(layer.parameters(), lr=0.1).step()
    tpe.remove(layer, "weight")
