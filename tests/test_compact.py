"""compact: the same outputs from fewer channels."""

from typing import Any

import pytest
import torch
from compacting import MORE, THEIRS, Told, attention, close, open_groups
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import torchprune_ext as tpe
from torchprune_ext._batches import tree_map
from torchprune_ext._graph import call, outputs_in
from torchprune_ext._host import as_plain


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        return [tensor for _, tensor in outputs_in(call(model, inputs))]


def size(model: nn.Module) -> int:
    with as_plain(model):
        return sum(parameter.numel() for parameter in model.parameters())


def expected_size(model: nn.Module, gone: list[tuple[Any, list[int]]]) -> int:
    """The definition: each tensor loses its rows and columns."""
    shapes = {name: list(tensor.shape) for name, tensor in model.named_parameters()}
    for group, channels in gone:
        for member in group.members:
            if member.name in shapes:
                shapes[member.name][member.axis] -= member.indices[channels].numel()
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def prepared(make: Any) -> tuple[nn.Module, Any]:
    """A model in eval mode and its inputs, in float64, in which what is equal in theory is equal to the last bits."""
    model, inputs = make()
    return model.double().eval(), tree_map(lambda x: x.double() if x.is_floating_point() else x, inputs)


@pytest.mark.parametrize("how", ["unread", "zero"])
@pytest.mark.parametrize("make", [*THEIRS, *MORE], ids=lambda make: make.__name__)
@settings(max_examples=4, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(data=st.data())
def test_outputs_are_equal_and_what_was_pruned_is_gone(make, how, data):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    model, inputs = prepared(make)
    gone = []
    for group in open_groups(model, inputs):
        if how == "zero" and make is attention and "qkv" in group.names[0]:
            continue  # below
        if how == "unread" and any(reading.reader is None for reading in group.readings):
            continue  # a sum reads them
        channels = data.draw(st.lists(st.integers(0, group.size - 1), unique=True, max_size=group.size - 1))
        gone += [(group, channels)] if channels else []
    wanted = expected_size(model, gone)
    for group, channels in gone:
        close(group, channels, how)
    dense, before = outputs(model, inputs), {name: t.clone() for name, t in model.state_dict().items()}
    if not gone:
        with pytest.raises(ValueError, match="no dead channels"):
            tpe.compact(model, inputs)
        return
    small = tpe.compact(model, inputs)
    assert size(small) == wanted
    for one, other in zip(dense, outputs(small, inputs), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-11)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("make", THEIRS, ids=lambda make: make.__name__)
def test_their_models_have_what_their_tests_prune(make):
    """Each hidden width can shrink, by all channels but one."""
    torch.manual_seed(0)
    model, inputs = prepared(make)
    groups = open_groups(model, inputs)
    for group in groups:
        close(group, [*range(1, group.size)], "zero")
    small = tpe.compact(model, inputs)
    assert groups
    assert size(small) == expected_size(model, [(group, [*range(1, group.size)]) for group in groups])
    for one, other in zip(outputs(model, inputs), outputs(small, inputs), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-11)


# ------------------------------------------------------------------------------------------------------- constants


def chain(between: nn.Module, reader: nn.Module, *, dead: tuple[int, ...] = (1, 4)) -> nn.Sequential:
    """A convolution of 6 channels, of which some have no weights but still a bias."""
    torch.manual_seed(0)
    first = nn.Conv2d(3, 6, 1)
    first.weight.data[[*dead]] = 0
    first.bias.data[[*dead]] = 0.7
    return nn.Sequential(first, between, reader).eval()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "reader",
    [
        lambda bias: nn.Conv2d(6, 4, 3, bias=bias),
        lambda bias: nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect", bias=bias),
        lambda bias: nn.Conv2d(6, 4, 3, stride=2, dilation=2, bias=bias),
        lambda bias: nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(6 * 16, 4, bias=bias)),
    ],
    ids=["conv", "reflect", "dilated", "flat"],
)
def test_a_constant_goes_into_the_bias_of_its_reader(reader, bias):
    model, x = chain(nn.Sequential(nn.BatchNorm2d(6), nn.SiLU()), reader(bias)), torch.randn(2, 3, 8, 8)
    small = tpe.compact(model, x)
    assert small[0].out_channels == 4
    y = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(small(y), model(y))
    last = [module for module in small.modules() if isinstance(module, nn.Conv2d | nn.Linear)][-1]
    assert last.bias is not None
    assert last.bias.requires_grad


def test_a_reader_that_is_called_twice_takes_a_constant_in_once():
    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.reader(x) * self.reader(x)

    model = Told(forward, first=chain(nn.Identity(), nn.Identity())[0], reader=nn.Conv2d(6, 2, 3))
    x = torch.randn(2, 3, 5, 5)
    small = tpe.compact(model, x)
    assert small.first.out_channels == 4
    torch.testing.assert_close(small(x), model(x))


def test_a_new_bias_loses_the_rows_that_its_weight_loses():
    model, x = chain(nn.ReLU(), nn.Conv2d(6, 8, 3, bias=False)), torch.randn(2, 3, 8, 8)
    model.extend([nn.InstanceNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)])
    model[-1].weight.data[:, 2:5] = 0
    small = tpe.compact(model, x)
    assert [small[place].out_channels for place in (0, 2, 5)] == [4, 5, 2]
    assert small[2].bias.shape == (5,)
    torch.testing.assert_close(small(x), model(x))  # and no warning of InstanceNorm


LEFT = {
    "padding": (lambda: chain(nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1)), "pads with zeros"),
    "zeros around": (lambda: chain(nn.ZeroPad2d(1), nn.Conv2d(6, 4, 3)), "not at all places that 2.weight reads"),
    "depthwise padding": (
        lambda: chain(nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 4, 1)),
        "not at all places that 2.weight reads",
    ),
    "transposed": (lambda: chain(nn.ReLU(), nn.ConvTranspose2d(6, 4, 3)), "pads with zeros"),
    "mean": (lambda: chain(nn.ReLU(), Told(lambda self, x: x.mean(1))), "mean is taken over all channels"),
    "norm": (lambda: chain(nn.GroupNorm(2, 6), nn.Conv2d(6, 4, 1)), "GroupNorm"),
    "softmax": (lambda: chain(nn.Softmax(1), nn.Conv2d(6, 4, 1)), "softmax is taken over all channels"),
    "output": (lambda: chain(nn.ReLU(), nn.Identity()), "the model returns it"),
    "input in the way": (
        lambda: Told(
            lambda self, x: self.b(self.a(x) * x.mean()), a=chain(nn.ReLU(), nn.ReLU())[0], b=nn.Conv2d(6, 2, 1)
        ),
        "b.weight reads it",
    ),
    "two constants": (
        lambda: Told(
            lambda self, x: self.b(self.a(x)) + self.b(self.a(x).tanh()),
            a=chain(nn.ReLU(), nn.ReLU())[0],
            b=nn.Conv2d(6, 2, 1),
        ),
        "several constants",
    ),
    "no bias of its own": (
        lambda: Told(
            lambda self, x: torch.conv2d(self.a(x), self.b.weight),
            a=chain(nn.ReLU(), nn.ReLU())[0],
            b=nn.Conv2d(6, 2, 1),
        ),
        "without its own bias",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_go_exactly_is_left_and_the_error_says_why(name):
    make, why = LEFT[name]
    model, x = make(), torch.randn(1, 3, 8, 8)
    with pytest.raises(ValueError, match="no channels that can be removed") as error:
        tpe.compact(model, x)
    assert why in str(error.value)
    assert "2 left" in str(error.value)
    [row] = [row for row in tpe.dead_units(model, x) if any(why in reason for _, reason in row.left)]
    assert (row.removable, sum(count for count, _ in row.left)) == (0, 2)


@pytest.mark.parametrize("places", [slice(5, None), slice(0, 0)])
def test_positions_that_the_example_does_not_reach_count(places):
    """A channel of positions that is zero only at the first ones is not a constant."""
    model = Told(
        lambda self, x: self.out(self.first(x) + self.places.weight[: x.shape[1]]),
        first=nn.Linear(4, 8),
        places=nn.Embedding(9, 8),
        out=nn.Linear(8, 3),
    )
    for parameter in (model.first.weight, model.first.bias):
        parameter.data[:2] = 0
    kept = model.places.weight.data[places, :2].clone()
    model.places.weight.data[:, :2] = 0
    model.places.weight.data[places, :2] = kept
    x = torch.randn(2, 5, 4)
    if len(kept):
        with pytest.raises(ValueError, match=r"no dead channels|reads it"):
            tpe.compact(model, x)
    else:
        assert tpe.compact(model, x).first.out_features == 6


SLEEPING = {
    "linear": (lambda: (nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (3, 4)),
    "convolution": (lambda: (nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3)), (2, 4, 6, 6)),
    "behind zeros": (lambda: (nn.ZeroPad2d(1), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3)), (2, 4, 6, 6)),
    "depthwise": (
        lambda: (nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.ReLU(), nn.Conv2d(4, 2, 3)),
        (2, 4, 6, 6),
    ),
    "normed": (lambda: (nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)), (3, 4)),
}


@pytest.mark.parametrize("name", SLEEPING)
def test_units_that_happen_to_be_silent_on_the_example_stay(name):
    make, shape = SLEEPING[name]
    torch.manual_seed(0)
    model, x = nn.Sequential(*make()).eval(), torch.randn(shape)
    [first, *_] = [module for module in model if hasattr(module, "bias")]
    first.bias.data[:3] = -100
    reader = model[-1]
    seen = []
    reader.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(x)
    assert not seen[0][:, :3].any()
    with pytest.raises(ValueError, match="no dead channels"):
        tpe.compact(model, x)
