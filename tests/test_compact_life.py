"""What a compacted model is: plain, alive, and in the state of the model it was made of."""

import copy
import io

import pytest
import torch
from compacting import Told, attention, close, depthwise, grouped, image, open_groups, residual
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe
from torchprune_ext._graph import outputs_in


def pruned() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3),
        nn.Flatten(),
        nn.Linear(288, 5),
    )
    prune.ln_structured(model[3], "weight", amount=10, n=2, dim=1)
    return model


X = torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize(("round_to", "width"), [(1, 6), (2, 6), (4, 8), (5, 10), (8, 8), (10, 10), (15, 15)])
def test_round_to_keeps_dead_channels_up_to_a_multiple(round_to, width):
    model = pruned().eval()
    small = tpe.compact(model, X, round_to=round_to)
    assert small[0].out_channels == width
    torch.testing.assert_close(small(X), model(X))


@pytest.mark.parametrize("round_to", [16, 100])
def test_round_to_that_keeps_all_is_refused(round_to):
    with pytest.raises(ValueError, match=rf"round_to={round_to} keeps all channels"):
        tpe.compact(pruned(), X, round_to=round_to)


@pytest.mark.parametrize(("wrong", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)])
def test_round_to_must_be_a_whole_number(wrong, error):
    with pytest.raises(error, match="round_to"):
        tpe.compact(pruned(), X, round_to=wrong)


def test_no_channel_is_left_without_all():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model[2].weight.data.zero_()
    small = tpe.compact(model, torch.ones(1, 4))
    assert small[0].out_features == 1
    assert torch.equal(small(torch.ones(3, 4)), model(torch.ones(3, 4)))


def test_the_model_is_left_as_it_was():
    model = pruned()
    model.train()
    model[2].eval()
    model(X).sum().backward()
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = [*map(id, model.parameters())]
    grads = [p.grad.clone() for p in model.parameters()]
    random = torch.get_rng_state()
    tpe.compact(model, X)
    tpe.dead_units(model, X)
    assert torch.equal(torch.get_rng_state(), random)
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert [module.training for module in model.modules()] == modes
    assert tensors == [*map(id, model.parameters())]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), grads, strict=True))
    assert prune.is_pruned(model)


def test_also_when_the_model_fails():
    class Failing(nn.Module):
        def forward(self, x):
            raise KeyboardInterrupt

    model = pruned().train()
    model.append(Failing())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for function in (tpe.compact, tpe.dead_units):
        with pytest.raises(KeyboardInterrupt):
            function(model, X)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert prune.is_pruned(model)
    assert all(module.training for module in model.modules())


def test_it_is_plain_and_keeps_modes_flags_and_formats():
    model = pruned().to(memory_format=torch.channels_last)
    model.train()
    model[1].eval()
    model[3].weight_orig.requires_grad_(False)
    model[5].bias.requires_grad_(False)
    small = tpe.compact(model, X)
    assert not prune.is_pruned(small)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in small.modules())
    assert [m.training for m in small.modules()] == [m.training for m in model.modules()]
    wanted = {name: p.requires_grad for name, p in tpe.copy_pruned(model).named_parameters()}
    assert {
        name.replace("3.weight", "3.weight_orig"): p.requires_grad for name, p in small.named_parameters()
    } == wanted
    assert small[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert (small[0].out_channels, small[1].num_features, small[3].in_channels) == (6, 6, 6)
    assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in small.parameters())
    small(X).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    model = pruned().to(dtype).eval()
    small = tpe.compact(model, X.to(dtype))
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert small[0].out_channels == 6
    torch.testing.assert_close(small(X.to(dtype)), model(X.to(dtype)), rtol=0.1, atol=0.05)


def test_it_is_copied_saved_trained_and_pruned_again():
    small = tpe.compact(pruned(), X).train()
    clone = copy.deepcopy(small)
    clone.load_state_dict(small.state_dict())
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    optimizer = torch.optim.SGD(loaded.parameters(), 0.1)
    loaded(X).square().mean().backward()
    optimizer.step()
    prune.ln_structured(loaded[3], "weight", amount=2, n=2, dim=1)
    again = tpe.compact(loaded.eval(), X)
    assert again[0].out_channels == 4
    torch.testing.assert_close(again(X), loaded(X))
    with pytest.raises(ValueError, match="no dead channels"):
        tpe.compact(again, X)


def test_it_is_exported():
    small = tpe.compact(pruned(), X).eval()
    exported = torch.export.export(small, (X,))
    torch.testing.assert_close(exported.module()(X), small(X))


def test_zeros_that_are_kept_go_along():
    model = pruned()
    prune.l1_unstructured(model[0], "weight", 0.5)
    tpe.remove_all(model, keep_zeros=True)
    small = tpe.compact(model, X)
    optimizer = torch.optim.Adam(small.parameters(), 0.1)
    zeros = small[0].weight == 0
    with tpe.keep_zeros(small, optimizer):
        small(X).square().mean().backward()
        optimizer.step()
    assert torch.equal(small[0].weight == 0, zeros)
    assert zeros.any()


def test_tied_weights_are_cut_once():
    embed, head = nn.Embedding(11, 8), nn.Linear(8, 11)
    head.weight = embed.weight
    model = Told(
        lambda self, ids: self.head(self.embed(ids) + self.down(torch.relu(self.up(self.embed(ids))))),
        embed=embed,
        up=nn.Linear(8, 6),
        down=nn.Linear(6, 8),
        head=head,
    )
    embed.weight.data[:, [0, 5]] = 0
    for parameter in (model.down.weight, model.down.bias):
        parameter.data[[0, 5]] = 0
    ids = torch.randint(11, (2, 4))
    small = tpe.compact(model, ids)
    assert small.embed.weight is small.head.weight
    assert (small.embed.embedding_dim, small.head.in_features, small.up.in_features) == (6, 6, 6)
    torch.testing.assert_close(small(ids), model(ids))


def test_whole_heads_go_and_the_numbers_of_the_module_follow():
    torch.manual_seed(0)
    model, x = attention()
    model[1].proj.weight.data[:, 2:6] = 0  # heads 1 and 2 of 4
    model[1].proj.weight.data[:, 0] = 0  # half of head 0
    small = tpe.compact(model, x)
    assert (small[1].num_heads, small[1].head_dim, small[1].inner_dim) == (2, 2, 4)
    assert (small[1].qkv.out_features, small[1].proj.in_features) == (12, 4)
    torch.testing.assert_close(small(x), model(x))


def test_values_of_zero_make_a_head_dead():
    torch.manual_seed(0)
    model, x = attention()
    for parameter in (model[1].qkv.weight, model[1].qkv.bias):
        parameter.data[16:18] = 0  # v of head 0
    small = tpe.compact(model, x)
    assert small[1].num_heads == 3
    torch.testing.assert_close(small(x), model(x))


def test_a_width_in_the_models_code_stays_with_a_warning():
    model = Told(
        lambda self, x: self.out(torch.relu(self.inner(self.first(x).view(-1, 8 * 36)))),
        first=nn.Conv2d(4, 8, 1),
        inner=nn.Linear(288, 6),
        out=nn.Linear(6, 2),
    )
    x = image()
    for group in open_groups(model, x):
        close(group, [0, 2], "zero")
    with pytest.warns(UserWarning, match=r"the model's code fixes their number(.|\n)*first.weight"):
        small = tpe.compact(model, x)
    assert (small.first.out_channels, small.inner.out_features) == (8, 4)
    torch.testing.assert_close(small(x), model(x))
    with pytest.raises(ValueError, match=r"fixes all widths(.|\n)*first.weight: .* shape '\[-1, 288\]' is invalid"):
        tpe.compact(small, x)


def test_a_width_in_an_attribute_follows():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.width, self.up, self.down = 8, nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.down(self.up(x).view(-1, self.width))

    model = Wide()
    model.down.weight.data[:, :3] = 0
    small = tpe.compact(model, torch.randn(3, 4))
    assert small.width == 5
    assert model.width == 8


def test_a_model_that_counts_its_channels_is_found_out():
    model = Told(
        lambda self, x: self.out(self.first(x)) / self.first(x).shape[1],
        first=nn.Linear(4, 8),
        out=nn.Linear(8, 2),
    )
    model.out.weight.data[:, :3] = 0
    with pytest.raises(RuntimeError, match=r"computes something else(.|\n)*first.weight: output differs by"):
        tpe.compact(model, torch.randn(3, 4))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: nn.Sequential(nn.LazyLinear(3)), "no shape yet"),
        (lambda: nn.Sequential(nn.Linear(4, 4, device="meta")), "on the meta device"),
        (lambda: Told(lambda self, x: 3), "holds no tensor"),
    ],
)
def test_what_cannot_be_followed_is_refused(make, why):
    for function in (tpe.compact, tpe.dead_units):
        with pytest.raises(ValueError, match=why):
            function(make(), torch.randn(2, 4))


def test_a_model_must_be_a_module():
    for function in (tpe.compact, tpe.dead_units):
        with pytest.raises(TypeError, match=r"Pass a torch\.nn\.Module"):
            function(lambda x: x, torch.randn(2, 4))


def test_rows_say_what_is_dead():
    [row] = tpe.dead_units(pruned(), X)
    assert row == tpe.DeadUnits(("0.weight",), 16, 10, ())
    assert str(row) == "0.weight: 16 channels, 10 removable"
    row = tpe.DeadUnits(("a.weight", "b.weight"), 8, 1, ((2, "the model returns it"),))
    assert str(row) == "a.weight, b.weight: 8 channels, 1 removable; 2 left: the model returns it"


def test_inference_mode_and_no_grad():
    model = pruned().eval()
    with torch.inference_mode():
        small = tpe.compact(model, X)
    small(X).sum().backward()  # its parameters are none of inference mode
    assert small[0].out_channels == 6


def test_random_numbers_in_eval_mode():
    model = Told(lambda self, x: self.b(self.a(x)) + torch.rand(2), a=nn.Linear(4, 8), b=nn.Linear(8, 2))
    model.b.weight.data[:, :3] = 0
    assert tpe.compact(model, torch.randn(3, 4)).a.out_features == 5


@pytest.mark.parametrize("make", [grouped, depthwise, residual, attention], ids=lambda make: make.__name__)
def test_it_comes_back_from_a_file(make, tmp_path):
    torch.manual_seed(0)
    model, x = make()
    model.eval()
    for group in open_groups(model, x):
        close(group, [0, group.size - 2], "unread")
    small = tpe.compact(model, x)
    tpe.save_compact(small, tmp_path / "small.safetensors")
    loaded = tpe.load_compact(lambda: make()[0], tmp_path / "small.safetensors").eval()
    for one, other in zip(outputs_in(small(x)), outputs_in(loaded(x)), strict=True):
        assert torch.equal(one[1], other[1])
