"""Blocks fitted by gradient steps to what they gave in the dense model, while their masks stay."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from snapshots import Snapshot
from torch import nn

import torchprune_ext as tpe

QUIET = {"progress": False}


class Block(nn.Module):
    """Half of a transformer's: a mask comes as a keyword, and the output is a tuple."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x, *, keep=None):
        y = self.down(torch.tanh(self.up(self.norm(x))))
        return (x + (y if keep is None else y * keep.unsqueeze(-1)),)


class Stack(nn.Module):
    def __init__(self, layers=3, kind=Block):
        super().__init__()
        self.stem, self.layers, self.head = (
            nn.Linear(5, 6),
            nn.ModuleList(kind() for _ in range(layers)),
            nn.Linear(6, 3),
        )

    def forward(self, x, keep=None):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x, keep=keep)[0]
        return self.head(x)


def made(kind=Stack, seed=0, sparsity=0.5, **sizes):
    """Return a model, a dense copy of it, and what is pruned; pruned by magnitude."""
    torch.manual_seed(seed)
    model = kind(**sizes)
    dense = copy.deepcopy(model)
    params = tpe.prunable_parameters(model)
    tpe.global_unstructured(params, target_sparsity=sparsity)
    return model, dense, params


def data(batches=6, size=8, shape=(4, 5), seed=1):
    torch.manual_seed(seed)
    return [torch.randn(size, *shape) for _ in range(batches)]


def adam(rate):
    return lambda parameters: torch.optim.Adam(parameters, lr=rate)


# ---------------------------------------------------------------------------------------------------------- the oracle


def apart(output, dense):
    return (output - dense).square().sum() / (dense - dense.mean()).square().sum()


def split(batches, held_out=0.1):
    number = max(round(held_out * len(batches)), 1)
    aside = [int((i + 0.5) * len(batches) / number) for i in range(number)]
    return [b for i, b in enumerate(batches) if i not in aside], [batches[i] for i in aside]


def trained(parameters, error, fit, aside, epochs, rate, best_of):
    """Train in a plain loop, and return the error kept aside before and after each epoch; leave the best values."""
    optimizer = torch.optim.Adam(parameters, lr=rate)
    steps, step = epochs * len(fit), 0
    warm_up = min(30, -(-steps // 10))

    def kept_aside():
        with torch.no_grad():
            return float(sum(error(i).double() for i in aside) / len(aside))

    errors, states = [kept_aside()], [best_of()]
    for epoch in range(1, epochs + 1):
        for place in torch.randperm(len(fit), generator=torch.Generator().manual_seed(epoch)).tolist():
            optimizer.param_groups[0]["lr"] = rate * min((step + 1) / warm_up, (steps - step) / (steps - warm_up + 1))
            step += 1
            optimizer.zero_grad()
            error(fit[place]).backward()
            optimizer.step()
        errors.append(kept_aside())
        states.append(best_of())
        last = max(epochs // 5, 1) + 1
        if len(errors) >= last and sorted(set(errors[-last:])) == errors[-last:]:  # it only rises
            break
    return errors, states[min(range(len(errors)), key=errors.__getitem__)]


def outputs_of(model, x):
    found = []
    hooks = [layer.register_forward_hook(lambda m, a, y: found.append(y[0].clone())) for layer in model.layers]
    output = model(x)
    for hook in hooks:
        hook.remove()
    return [*found, output]


@pytest.mark.parametrize(("rate", "epochs"), [(1e-3, 4), (3e-2, 4), (1.0, 4), (2e-2, 10), (0.3, 11)])
def test_the_whole_model_is_fitted_as_a_plain_loop_would(rate, epochs):
    model, dense, _ = made()
    batches = data()
    expected = tpe.copy_pruned(model)  # with the host's masks and hooks
    fit, aside = split(batches)

    def error(x):
        with torch.no_grad():
            targets = outputs_of(dense, x)
        return torch.stack([apart(a, b) for a, b in zip(outputs_of(expected, x), targets, strict=True)]).mean()

    state = lambda: copy.deepcopy(expected.state_dict())  # noqa: E731
    errors, best = trained(list(expected.parameters()), error, fit, aside, epochs, rate, state)
    done = tpe.refine(model, batches, dense=dense, epochs=epochs, whole=True, optimizer=adam(rate), **QUIET)
    for name, value in model.state_dict().items():
        assert torch.equal(value, best[name]), name
    assert done.model.epochs == len(errors) - 1
    rows = [*done.blocks, done.model]
    assert sum(row.before for row in rows) / len(rows) == pytest.approx(errors[0])
    assert sum(row.after for row in rows) / len(rows) == pytest.approx(min(errors))
    assert [row.name for row in rows] == ["layers.0", "layers.1", "layers.2", "Stack"]
    if rate == 1e-3:
        assert done.model.best == 4
        assert errors[-1] < errors[0] * 0.99


@pytest.mark.parametrize("rate", [1e-2, 1.0])
def test_one_block_after_the_other_is_a_plain_loop_for_each(rate):
    model, dense, _ = made()
    batches = data()
    expected = tpe.copy_pruned(model)
    fit, aside = split(batches)
    best_of = {}
    for place, layer in enumerate(expected.layers):

        def error(x, place=place, layer=layer):
            with torch.no_grad():
                into, target = expected.stem(x), dense.stem(x)
                for before in expected.layers[:place]:
                    into = before(into)[0]
                for before in dense.layers[: place + 1]:
                    target = before(target)[0]
            return apart(layer(into)[0], target)

        state = lambda layer=layer: copy.deepcopy(layer.state_dict())  # noqa: E731
        errors, best = trained(list(layer.parameters()), error, fit, aside, 3, rate, state)
        layer.load_state_dict(best)
        best_of[f"layers.{place}"] = errors
    done = tpe.refine(model, batches, dense=dense, epochs=3, optimizer=adam(rate), **QUIET)
    for row in done.blocks:
        assert row.before == pytest.approx(best_of[row.name][0])
        assert row.epochs == len(best_of[row.name]) - 1
        if done.model.best:
            assert row.after == pytest.approx(min(best_of[row.name]))
    if rate == 1e-2:
        assert done.model.best > 0
        assert done.model.after < done.model.before
    if done.model.best:
        for name, value in model.state_dict().items():
            assert torch.equal(value, expected.state_dict()[name]), name


@pytest.mark.parametrize("whole", [False, True])
def test_a_model_that_is_one_block_is_fitted_alike_in_sequence_and_as_a_whole(whole):
    results = []
    for options in ({"blocks": [whole]}, {"whole": True, "blocks": None}, {"blocks": None}):
        model, dense, _ = made(layers=0)
        if options["blocks"] is not None:
            options = {"blocks": [model], "whole": whole}
        done = tpe.refine(model, data(), dense=dense, epochs=2, optimizer=adam(1e-2), **options, **QUIET)
        results.append((done, list(model.state_dict().values())))
    for done, values in results:
        assert done == results[0][0]
        assert not done.blocks
        assert done.model.after < done.model.before
        assert all(map(torch.equal, values, results[0][1]))


# ------------------------------------------------------------------------------------------------------------ promises


@torch.no_grad()
def aside_error(model, dense, batches, share):
    """The error of the output on the batches that are kept aside."""
    errors = [apart(model(x), dense(x)).double() for x in split(batches, share)[1]]
    return float(sum(errors) / len(errors))


rates = st.one_of(st.floats(1e-6, 10.0), st.sampled_from([1e12, 1e30, float("inf")]))
makers = st.sampled_from([torch.optim.SGD, torch.optim.Adam, torch.optim.Rprop, torch.optim.LBFGS])


@settings(max_examples=15)
@given(rate=rates, maker=makers, whole=st.booleans(), seed=st.integers(0, 99), share=st.sampled_from([0.1, 0.5]))
def test_never_worse_on_what_is_kept_aside_and_masks_stay(rate, maker, whole, seed, share):
    model, dense, params = made(seed=seed, layers=2)
    batches = data(batches=4, size=3, shape=(5,), seed=seed)
    masks = [module.weight_mask.clone() for module, _ in params]
    dead = [module.weight_orig.detach()[module.weight_mask == 0] for module, _ in params]
    before = aside_error(model, dense, batches, share)
    done = tpe.refine(
        model,
        batches,
        dense=dense,
        whole=whole,
        epochs=2,
        held_out=share,
        optimizer=lambda parameters: maker(parameters, lr=rate),
        **QUIET,
    )
    after = aside_error(model, dense, batches, share)
    assert after <= before * (1 + 1e-6)
    assert done.model.after == pytest.approx(after, rel=1e-5)
    assert done.model.before == pytest.approx(before, rel=1e-5)
    assert done.model.after <= done.model.before
    if not whole:
        assert all(row.after <= row.before for row in done.blocks)
    for (module, _), mask, values in zip(params, masks, dead, strict=True):
        assert torch.equal(module.weight_mask, mask)
        assert torch.equal(module.weight_orig.detach()[mask == 0], values)  # for undo
        assert not module.weight[mask == 0].any()
        assert torch.equal(module.weight, module.weight_orig * mask)
        assert all(torch.isfinite(each).all() for each in module.parameters())


class StopsError(Exception):
    pass


@pytest.mark.parametrize("kind", [StopsError, KeyboardInterrupt])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("step", [1, 7, 19])
def test_an_error_at_any_step_leaves_no_trace(kind, whole, step):
    model, dense, _ = made(layers=2)
    model.layers[0].train()
    model.head.bias.requires_grad_(False)
    model.stem.bias.grad = torch.ones(6)
    hook = model.layers[1].register_forward_hook(lambda *_: None)
    model(data()[0]).sum().backward()
    before, state = Snapshot(model), torch.get_rng_state()
    taken = []

    class Fails(torch.optim.SGD):
        def step(self, closure=None):
            taken.append(super().step(closure))
            if len(taken) == step:
                raise kind

    with pytest.raises(kind):
        tpe.refine(
            model,
            data(),
            dense=dense,
            whole=whole,
            epochs=5,
            optimizer=lambda parameters: Fails(parameters, lr=1e-3),
            keep_rng=True,
            **QUIET,
        )
    assert len(taken) == step
    assert not before.differences()
    assert torch.equal(state, torch.get_rng_state())
    hook.remove()


@pytest.mark.parametrize("whole", [False, True])
def test_what_is_not_fitted_stays(whole):
    model, dense, _ = made(layers=2, seed=1)
    model.layers[0].norm.weight.requires_grad_(False)
    model.layers[1].up.weight_orig.requires_grad_(False)
    model.train()
    model.stem.bias.grad = torch.ones(6)
    before = {name: (value, value.detach().clone(), value.requires_grad) for name, value in model.named_parameters()}
    done = tpe.refine(model, data(), dense=dense, whole=whole, epochs=2, optimizer=adam(1e-2), **QUIET)
    assert done.model.best
    assert all(module.training for module in model.modules())
    after = dict(model.named_parameters())
    for name, (parameter, values, flag) in before.items():
        assert after[name] is parameter
        assert parameter.requires_grad == flag
        outside = name.startswith(("stem", "head")) and not whole
        assert torch.equal(parameter, values) == (outside or not flag), name
    assert torch.equal(model.stem.bias.grad, torch.ones(6))
