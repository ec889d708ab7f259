"""A scope in which weights and masks are multiplied once, and what happens to writes in it."""

import contextlib
import copy
import io

import pytest
import releases
import torch
from snapshots import Snapshot
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe


def native(module, name="weight"):
    prune.l1_unstructured(module, name, amount=0.5)


def ours(module, name="weight"):
    tpe.every_other(module, name)


def both(module, name="weight"):
    native(module, name)
    ours(module, name)


BY = pytest.mark.parametrize("by", [native, ours, both], ids=lambda by: by.__name__)
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def network(by=native):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    by(model[0])
    return model


def want(model):
    layer = model[0]
    weight = layer.weight_orig * layer.weight_mask if hasattr(layer, "weight_orig") else layer.weight
    hidden = nn.functional.linear(X.to(weight.dtype), weight, layer.bias).relu()
    return nn.functional.linear(hidden, model[2].weight, model[2].bias)


def check(model):
    assert torch.equal(model(X.to(model[0].bias.dtype)), want(model))


@contextlib.contextmanager
def serving(model):
    with tpe.frozen(model) as same, torch.no_grad():
        assert same is model
        check(model)
        kept = model[0].weight
        check(model)
        assert model[0].weight is kept  # not multiplied again
        yield
        check(model)
        check(model)


@BY
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_product_is_made_once(by, mode):
    model = network(by)
    before, tensors = Snapshot(model), dict(model.state_dict())
    with tpe.frozen(model), mode():
        model(X)
        kept = model[0].weight
        check(model)
        assert model[0].weight is kept
        assert all(map(torch.equal, tensors.values(), model.state_dict().values()))
        assert list(model.state_dict()) == list(tensors)
        assert "apply_mask" not in repr([*model[0]._forward_pre_hooks.values()])
    assert [d for d in before.differences() if not d.startswith("Linear[1].weight:")] == []
    assert torch.equal(model[0].weight, model[0].weight_orig * model[0].weight_mask)
    model(X).sum().backward()  # as if nothing had been
    assert torch.equal(model[0].weight_orig.grad != 0, model[0].weight_orig.grad * model[0].weight_mask != 0)


def optimizer_step(model):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.parameters(), 0.1, momentum=0.9).step()


def fused_step(model):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(model.parameters(), 0.1, fused=True).step()


def data_assigned(model):
    model[0].weight_orig.data = torch.ones(8, 8)


def data_kept(model):
    data = model[0].weight_orig.data
    for factor in (2, 3):
        data.mul_(factor)
        check(model)
        check(model)


def new_parameter(model):
    model[0].weight_orig = nn.Parameter(torch.ones(8, 8))


def undone(model):
    tpe.undo(model[0], "weight")


def twice(model):
    native(model[0])
    ours(model[0])
    native(model[0])


def failed(model):
    with pytest.raises(ValueError, match="amount"):
        prune.l1_unstructured(model[0], "weight", amount=10**6)
    tpe.refresh(model)


WRITES = {
    "in place": lambda m: m[0].weight_orig.mul_(2),
    "copy_": lambda m: m[0].weight_orig.copy_(torch.ones(8, 8)),
    "view": lambda m: m[0].weight_orig[0].zero_(),
    "detached": lambda m: m[0].weight_orig.detach().mul_(2),
    "data": lambda m: m[0].weight_orig.data.mul_(2),
    "data copy_": lambda m: m[0].weight_orig.data.copy_(torch.ones(8, 8)),
    "data view": lambda m: m[0].weight_orig.data[0].fill_(9),
    "data kept": data_kept,
    "data assigned": data_assigned,
    "data of all": lambda m: [p.data.clamp_(-0.1, 0.1) for p in m.parameters()],
    "data swapped": lambda m: setattr(m[0].weight_orig, "data", m[0].weight_orig.data * 2),
    "set_": lambda m: m[0].weight_orig.set_(torch.ones(8, 8)),
    "sgd": optimizer_step,
    "fused": fused_step,
    "foreach": lambda m: torch._foreach_mul_(list(m.parameters()), 2.0),
    "load": lambda m: m.load_state_dict({k: 1 - v for k, v in m.state_dict().items()}),
    "load assign": lambda m: m.load_state_dict({k: 1 - v for k, v in m.state_dict().items()}, assign=True),
    "load pruned": lambda m: tpe.load_pruned_state_dict(m, network(ours).double().state_dict()),
    "load dense": lambda m: tpe.load_pruned_state_dict(m, network(lambda layer: None).state_dict()),
    "mask in place": lambda m: m[0].weight_mask.zero_(),
    "mask data": lambda m: m[0].weight_mask.data.zero_(),
    "new mask": lambda m: setattr(m[0], "weight_mask", 1 - m[0].weight_mask),
    "new parameter": new_parameter,
    "init": lambda m: nn.init.ones_(m[0].weight_orig),
    "native": lambda m: native(m[0]),
    "ours": lambda m: ours(m[0]),
    "twice": twice,
    "failed": failed,
    "double": lambda m: m.double(),
    "half and back": lambda m: m.half().float(),
    "to": lambda m: m.to("cpu", torch.bfloat16),
    "remove": lambda m: tpe.remove(m[0], "weight"),
    "native remove": lambda m: prune.remove(m[0], "weight"),
    "undo": undone,
    "undo and prune": lambda m: [tpe.undo(m[0], "weight"), native(m[0])],
    "refresh": tpe.refresh,
    "vector": lambda m: nn.utils.vector_to_parameters(torch.ones(144), m.parameters()),
    "ema": lambda m: [p.lerp_(torch.ones_like(p), 0.1) for p in m.parameters()],
}


@BY
@pytest.mark.parametrize("write", WRITES)
def test_every_change_is_seen_at_the_next_forward(write, by):
    model = network(by)
    with serving(model):
        WRITES[write](model)
        check(model)
    assert not [t for t in [*model.parameters(), *model.buffers()] if type(t) not in (nn.Parameter, torch.Tensor)]
    check(model)
    model(X.to(model[0].bias.dtype)).sum().backward()


@BY
@pytest.mark.parametrize(
    "hand_out",
    [lambda p: p.data, lambda p: p.detach().numpy(), lambda p: torch.from_dlpack(p.detach()).data],
    ids=["data", "numpy", "dlpack"],
)
def test_memory_handed_out_before_is_an_error_at_the_end(by, hand_out):
    model = network(by)
    memory = hand_out(model[0].weight_orig)
    scope = tpe.frozen(model)
    scope.__enter__()
    with torch.no_grad():
        model(X)
    memory[:] = 1
    with pytest.raises(RuntimeError, match=r"\['Linear.weight'\] were written in the frozen scope"):
        scope.__exit__(None, None, None)
    check(model)  # all is back
    assert type(model[0].weight_orig) is nn.Parameter
    with tpe.frozen(model), torch.no_grad():
        check(model)


def test_nan_is_no_change():
    model = network()
    model[0].weight_orig.data[0, 0] = float("nan")
    with tpe.frozen(model), torch.no_grad():
        model(X)


def test_with_gradients_it_trains_as_ever():
    model, twin = network(), network()
    with tpe.frozen(model):
        for each in (model, twin):
            optimizer = torch.optim.SGD(each.parameters(), 0.1)
            for _ in range(3):
                optimizer.zero_grad()
                each(X).square().mean().backward()
                optimizer.step()
                with torch.no_grad():
                    each(X)
    assert all(map(torch.equal, model.state_dict().values(), twin.state_dict().values()))


def test_parameters_that_need_no_gradient():
    model = network().requires_grad_(False)
    with tpe.frozen(model):
        model(X)
        kept = model[0].weight
        model(X)
        assert model[0].weight is kept
        model.requires_grad_(True)
        model(X).sum().backward()
        assert model[0].weight_orig.grad is not None


def test_scopes_nest_and_end_after_errors():
    model = network()
    before = Snapshot(model)
    with contextlib.suppress(KeyboardInterrupt), tpe.frozen(model):
        with tpe.frozen(model), torch.no_grad():
            model(X)
        with torch.no_grad():
            model(X)
            kept = model[0].weight
            model(X)
            assert model[0].weight is kept
        raise KeyboardInterrupt
    assert [d for d in before.differences() if not d.startswith("Linear[1].weight:")] == []


@pytest.mark.parametrize(
    "call",
    [copy.deepcopy, tpe.copy_pruned, lambda m: torch.save(m, io.BytesIO())],
    ids=["deepcopy", "copy_pruned", "save"],
)
def test_copying_is_refused_inside(call):
    model = network()
    with tpe.frozen(model), torch.no_grad():
        model(X)
        with pytest.raises(RuntimeError, match=r"Linear.weight is frozen.*outside of the frozen scope"):
            call(model)
        torch.save(model.state_dict(), io.BytesIO())
    call(tpe.refresh(model) if call is not copy.deepcopy else network(lambda layer: None))


@releases.fast_path
@pytest.mark.parametrize("tied", [False, True])
def test_attention_and_tied_weights(tied):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True).eval()
    if tied:
        model.linear2.weight = model.linear1.weight
    params = [(model.self_attn.out_proj, "weight"), (model.linear1, "weight"), (model.linear2, "weight")]
    tpe.global_unstructured(params, 0.5)
    x = X[None]
    with torch.no_grad():
        expected = model(x)
        with tpe.frozen(model):
            assert torch.equal(model(x), expected)
            assert model.self_attn.out_proj.weight is model.self_attn.out_proj.weight
            model.linear1.weight_orig.mul_(2)
            model.self_attn.out_proj.weight_orig.data.mul_(2)
            changed = model(x)
            assert not torch.equal(changed, expected)
        assert torch.equal(model(x), changed)


def test_recurrent():
    torch.manual_seed(0)
    model = nn.LSTM(8, 8)
    native(model, "weight_hh_l0")
    with torch.no_grad():
        expected = model(X)[0]
        with tpe.frozen(model):
            assert torch.equal(model(X)[0], expected)
            kept = model.weight_hh_l0
            assert torch.equal(model(X)[0], expected)
            assert model.weight_hh_l0 is kept
            model.weight_hh_l0_orig.data.mul_(2)
            changed = model(X)[0]
            assert not torch.equal(changed, expected)
        assert torch.equal(model(X)[0], changed)


@releases.compiled_property
def test_compiled():
    model = network()
    before = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(before(X), want(model))
        with tpe.frozen(model):
            inside = torch.compile(model, backend="aot_eager", fullgraph=True)
            for compiled in (before, inside):
                for _ in range(2):
                    model[0].weight_orig.data.mul_(2)
                    torch.testing.assert_close(compiled(X), want(model))
                    check(model)
        model[0].weight_orig.data.mul_(2)
        for compiled in (before, inside):
            torch.testing.assert_close(compiled(X), want(model))


def test_only_modules():
    with pytest.raises(TypeError, match=r"model=3 is a int. Pass a torch.nn.Module"), tpe.frozen(3):
        pass
