"""Permanent zeros that survive training."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, prune

import torchprune_ext as tpe

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "sgd momentum decay": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "sgd foreach": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1),
    "adam foreach": lambda p: torch.optim.Adam(p, 0.01, foreach=True),
    "adam fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    "adamw maximize": lambda p: torch.optim.AdamW(p, 0.01, maximize=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01, initial_accumulator_value=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, 0.01),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01),
    "rprop": lambda p: torch.optim.Rprop(p, 0.01),
    "asgd": lambda p: torch.optim.ASGD(p, 0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p),
}


def native(model):
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    prune.ln_structured(model[3], "weight", amount=0.5, n=2, dim=0)
    prune.random_unstructured(model[3], "bias", amount=2)


def ours(model):
    tpe.global_unstructured(tpe.prunable_parameters(model), 0.6)


def network(by=native):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    nn.init.uniform_(model[1].bias, 1, 2)  # no zeros but those that pruning makes
    by(model)
    return model


def train(model, optimizer, steps, clip=None, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(16, 8, generator=generator, dtype=model[0].weight.dtype)
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        if clip is not None:
            clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


def zeros(model):
    return {n: p == 0 for n, p in model.named_parameters() if (p == 0).any()}


def check(model, want):
    for name, where in want.items():
        assert torch.equal(model.get_parameter(name) == 0, where), name


@pytest.mark.parametrize(("when", "by"), [("before", native), ("after", ours)], ids=["before", "after"])
@pytest.mark.parametrize("which", OPTIMIZERS)
def test_zeros_are_exact_after_100_steps(which, when, by):
    model = network(by)
    optimizer = OPTIMIZERS[which](model.parameters())
    train(model, optimizer, 5)  # so that there is momentum where the zeros will be
    tpe.remove_all(model, keep_zeros=True)
    want = zeros(model)
    if when == "after":
        optimizer = OPTIMIZERS[which](model.parameters())
    tpe.keep_zeros(model, optimizer)
    start = model[0].weight.detach().clone()
    train(model, optimizer, 100, clip=1.0)
    assert not torch.equal(model[0].weight, start)
    check(model, want)


@pytest.mark.parametrize("which", ["sgd momentum decay", "adam", "adamw amsgrad", "rmsprop"])
def test_training_is_that_with_the_mask_to_the_last_bit(which):
    masked, removed = network(), network()
    optimizers = [OPTIMIZERS[which](m.parameters()) for m in (masked, removed)]
    tpe.remove_all(removed, keep_zeros=True)
    tpe.keep_zeros(removed, optimizers[1])
    for model, optimizer in zip((masked, removed), optimizers, strict=True):
        train(model, optimizer, 30, clip=0.1)  # a norm that counted the zeros would differ
    dense = tpe.dense_state_dict(masked)
    assert all(torch.equal(dense[name], value) for name, value in removed.state_dict().items())


def test_gradients_that_overflow():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    tpe.remove_all(model, keep_zeros=True)
    want = zeros(model)
    tpe.keep_zeros(model, optimizer)
    model[0].weight.grad = torch.full_like(model[0].weight, float("inf"))
    optimizer.step()
    assert bool((model[0].weight[want["0.weight"]] == 0).all())


def test_a_gradient_scaler():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=2)
    tpe.remove_all(model, keep_zeros=True)
    want = zeros(model)
    tpe.keep_zeros(model, optimizer)
    for i in range(100):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = (model(torch.randn(16, 8)) - 1).square().mean() * (1e30 if i == 3 else 1)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        check(model, want)


def test_lbfgs():
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=5)
    tpe.remove_all(model, keep_zeros=True)
    want = zeros(model)
    tpe.keep_zeros(model, optimizer)

    def closure():
        optimizer.zero_grad()
        loss = (model(torch.ones(16, 8)) - 1).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    check(model, want)


def test_dtype_and_memory_format():
    model = nn.Sequential(nn.Conv2d(4, 4, 3))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    tpe.remove_all(model, keep_zeros=True)
    model.to(torch.bfloat16, memory_format=torch.channels_last)
    want = zeros(model)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    tpe.keep_zeros(model, optimizer)
    for _ in range(5):
        model(torch.randn(2, 4, 4, 4, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
    check(model, want)
    model.double()
    optimizer.zero_grad()
    model(torch.randn(2, 4, 4, 4, dtype=torch.double)).sum().backward()
    assert bool((model[0].weight.grad[want["0.weight"]] == 0).all())


def test_they_can_be_let_go():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    tpe.remove_all(model, keep_zeros=True)
    want = zeros(model)
    with tpe.keep_zeros(model, optimizer) as handle:
        train(model, optimizer, 3)
        check(model, want)
    train(model, optimizer, 3)
    assert int((model[0].weight == 0).sum()) < int(want["0.weight"].sum())
    handle.remove()  # twice is harmless
    handle = tpe.keep_zeros(model, optimizer)  # and back: at once
    check(model, want)
    handle.remove()
    assert not optimizer._optimizer_step_post_hooks
    assert not model[0].weight._post_accumulate_grad_hooks


def test_state_dicts():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    names = list(tpe.dense_state_dict(model))
    tpe.remove_all(model, keep_zeros=True)
    assert list(model.state_dict()) == names
    want = zeros(model)
    tpe.keep_zeros(model, optimizer)
    train(model, optimizer, 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 3)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(model, optimizer, 3)
    check(model, want)
    model.load_state_dict({k: v + 1 for k, v in saved[0].items()})
    train(model, optimizer, 1)
    assert bool((model[0].weight[want["0.weight"]] == 0).all())
    # a model that is built anew does not know
    fresh = network(lambda model: None)
    fresh.load_state_dict(saved[0])
    with pytest.raises(ValueError, match="no zeros to keep"):
        tpe.keep_zeros(fresh, optimizer)


@pytest.mark.parametrize("copied", [copy.deepcopy, tpe.copy_pruned, lambda m: pickled(m)], ids=["deep", "ours", "file"])
def test_copies_remember_where_the_zeros_are(copied):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    tpe.remove_all(model, keep_zeros=True)
    want = zeros(model)
    tpe.keep_zeros(model, optimizer)
    train(model, optimizer, 1)
    clone = copied(model)
    assert clone[0].weight_zeros is not model[0].weight_zeros
    optimizer = torch.optim.SGD(clone.parameters(), 0.1, momentum=0.9)
    tpe.keep_zeros(clone, optimizer)
    train(clone, optimizer, 5)
    check(clone, want)
    check(model, want)


def pickled(model):
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_module_that_is_pruned_again():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    tpe.remove_all(model, keep_zeros=True)
    want = zeros(model)
    tpe.keep_zeros(model, optimizer)
    prune.l1_unstructured(model[0], "weight", amount=0.7)
    train(model, optimizer, 3)
    assert bool((model[0].weight_orig[want["0.weight"]] == 0).all())
    tpe.undo_all(model)
    check(model, want)


def test_two_optimizers_and_parameters_that_are_not_trained():
    model = network()
    tpe.remove_all(model, keep_zeros=True)
    model[3].weight.requires_grad_(False)
    want = zeros(model)
    one, two = torch.optim.SGD(model[0].parameters(), 0.1), torch.optim.SGD([model[3].bias], 0.1, momentum=0.9)
    for optimizer in (one, two):
        tpe.keep_zeros(model, optimizer)
    for _ in range(5):
        model(torch.randn(16, 8)).square().mean().backward()
        one.step()
        two.step()
    check(model, want)


def test_what_cannot_be_kept():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"Sequential has no zeros to keep. .*remove_all\(model, keep_zeros=True\)"):
        tpe.keep_zeros(model, optimizer)
    tpe.remove_all(model)
    with pytest.raises(ValueError, match="no zeros to keep"):
        tpe.keep_zeros(model, optimizer)
    tpe.every_other(model[0], "weight")
    tpe.remove(model[0], "weight", keep_zeros=True)
    with pytest.raises(ValueError, match="optimizer holds none of the 1 tensors"):
        tpe.keep_zeros(model, torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1))
    with pytest.raises(TypeError, match="optimizer is a list"):
        tpe.keep_zeros(model, [optimizer])
    with pytest.raises(TypeError, match="model=3 is a int"):
        tpe.keep_zeros(3, optimizer)


def test_a_failed_remove_changes_nothing():
    layer = nn.Linear(4, 4)
    layer.weight_zeros = 3
    prune.l1_unstructured(layer, "weight", amount=0.5)
    with pytest.raises(ValueError, match=r"weight_zeros of its own"):
        tpe.remove(layer, "weight", keep_zeros=True)
    assert prune.is_pruned(layer)
    assert not tpe.remove(layer, "weight").weight.all()


def test_a_second_remove_remembers_both():
    layer = nn.Linear(4, 4)
    for _ in range(2):
        prune.random_unstructured(layer, "weight", amount=0.5)
        tpe.remove(layer, "weight", keep_zeros=True)
        assert torch.equal(layer.weight_zeros, layer.weight == 0)
