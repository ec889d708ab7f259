"""compact: what is the same on the example may depend on its size, and constants go only where biases are free."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from compacting import Told
from torch import Tensor, nn

import torchprune_ext as tpe


def constant(layer: nn.Module, value: float = 1.0) -> nn.Module:
    """A layer whose first two channels give a value, whatever comes in."""
    layer.weight.data[:2] = 0
    layer.bias.data[:2] = value
    return layer


def check(model: nn.Module, example: Tensor, *others: Tensor) -> None:
    """Compact the model or be told why not; what is left computes the same on inputs of any size."""
    model.double().eval()
    try:
        small = tpe.compact(model, example.double())
    except ValueError as error:
        refusal = str(error)
        if not any(each in refusal for each in ("no channels that can be", "no dead", "depends on what they give")):
            raise
        return
    for x in others:
        torch.testing.assert_close(small(x.double()), model(x.double()))


OVER_PLACES = {
    "sum": lambda x: x.sum(1),
    "norm": lambda x: x.norm(dim=1),
    "prod": lambda x: (x * 2).prod(1),
    "softmax": lambda x: x.softmax(1),
    "logsumexp": lambda x: x.logsumexp(1),
    "cumsum": lambda x: x.cumsum(1)[:, -1],
    "normalize": lambda x: F.normalize(x, dim=1),
    "over the batch": lambda x: x / x.sum(0, keepdim=True),
    "a number": lambda x: x * x.shape[1],
    "a number in a tensor": lambda x: x / torch.tensor(float(x.shape[1])),
    "pooled": lambda x: F.avg_pool1d(x.mT, x.shape[1], padding=x.shape[1] // 2).mT,
}


@pytest.mark.parametrize("name", OVER_PLACES)
@pytest.mark.parametrize("length", [1, 5])
def test_a_constant_may_depend_on_the_number_of_places(name, length):
    model = Told(
        lambda self, x: self.out(OVER_PLACES[name](self.first(x))),
        first=constant(nn.Linear(4, 8)),
        out=nn.Linear(8, 3),
    )
    check(model, torch.randn(2, length, 4), torch.randn(3, 9, 4), torch.randn(1, 1, 4))


@pytest.mark.parametrize("name", ["mean", "amax", "std"])
def test_means_of_constants_do_not(name):
    model = Told(
        lambda self, x: self.out(getattr(self.first(x), name)(1)),
        first=constant(nn.Linear(4, 8)),
        out=nn.Linear(8, 3),
    )
    x = torch.randn(3, 9, 4)
    small = tpe.compact(model, torch.randn(2, 5, 4))
    assert small.first.out_features == 6
    torch.testing.assert_close(small(x), model(x))


PARTS = {  # of nine places, of which those that the example reaches are zero
    "slice": lambda p, n: p.tanh()[:n],
    "split": lambda p, n: p.split([n, 9 - n])[0],
    "split into equal parts": lambda p, n: p.split(n)[0],
    "unbind": lambda p, n: torch.stack(p.unbind(0)[:n]),
    "crop": lambda p, n: F.pad(p, (0, 0, 0, n - 9)),
    "unfold": lambda p, n: (p * 1).unfold(0, n, 1)[0].t(),
    "diagonal": lambda p, n: torch.stack([p, p], 0)[:, :n].diagonal().t()[1:],
}


@pytest.mark.parametrize("name", PARTS)
def test_places_of_a_parameter_that_the_example_does_not_reach(name):
    model = Told(
        lambda self, x: self.out(self.first(x) + PARTS[name](self.places.weight, x.shape[1])),
        first=constant(nn.Linear(4, 8), 0.0),
        places=nn.Embedding(9, 8),
        out=nn.Linear(8, 3),
    )
    model.places.weight.data[:5, :2] = 0
    check(model, torch.randn(2, 5, 4), *([torch.randn(2, 9, 4)] if name != "diagonal" else []))


def test_places_that_are_interpolated():
    model = Told(
        lambda self, x: self.out(self.first(x) + F.interpolate(self.places.weight[None], size=x.shape[-1])),
        first=constant(nn.Conv1d(4, 8, 1), 0.0),
        places=nn.Embedding(8, 9),
        out=nn.Conv1d(8, 3, 1),
    )
    model.places.weight.data[:2, [0, 1, 3, 5, 7]] = 0
    check(model, torch.randn(2, 4, 5), torch.randn(2, 4, 9))


def multiple(x: Tensor) -> Tensor:
    more = -x.shape[-1] % 8
    return F.pad(x, (0, more, 0, more))


IMAGES = {
    "padded to a multiple": (multiple, 8),
    "depthwise": (lambda x: F.conv2d(x, torch.ones(8, 1, 3, 3).to(x), padding=1, groups=8), 1),
    "pooled": (lambda x: F.avg_pool2d(x, 3, 1, 1), 1),
    "divided": (lambda x: F.avg_pool2d(x, x.shape[-1], divisor_override=1), 8),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images_of_another_size(name):
    inner, size = IMAGES[name]
    model = Told(
        lambda self, x: self.out(inner(self.first(x))), first=constant(nn.Conv2d(3, 8, 1)), out=nn.Conv2d(8, 4, 1)
    )
    check(model, torch.randn(2, 3, size, size), torch.randn(1, 3, 9, 9), torch.randn(2, 3, 16, 16))


def test_a_depthwise_convolution_of_the_model_that_pads():
    layers = [constant(nn.Conv2d(3, 8, 1)), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 4, 1)]
    check(nn.Sequential(*layers), torch.randn(2, 3, 1, 1), torch.randn(2, 3, 6, 6))


NOT_FREE = {
    "alpha": (lambda s, x: torch.addmm(s.out.bias, x, s.out.weight.t(), alpha=2), True),
    "beta": (lambda s, x: torch.addmm(s.out.bias, x, s.out.weight.t(), beta=0.5), True),
    "read twice": (lambda s, x: s.out(x) * s.out.bias, True),
    "no module called": (lambda s, x: F.linear(x, s.out.weight), False),
    "transposed": (lambda s, x: F.linear(x, s.back.weight.t()), False),
}


@pytest.mark.parametrize("name", NOT_FREE)
@pytest.mark.parametrize("zeros", [0, 2])
def test_a_constant_stays_where_no_bias_can_take_it_in_and_zeros_go(name, zeros):
    told, bias = NOT_FREE[name]
    model = Told(
        lambda self, x: told(self, torch.relu(self.first(x))),
        first=constant(nn.Linear(4, 8)),
        out=nn.Linear(8, 3, bias=bias),
        back=nn.Linear(3, 8, bias=False),
    )
    if not zeros:
        with pytest.raises(ValueError, match=r"no channels that can be removed|what they give"):
            tpe.compact(model, torch.randn(2, 4))
        return
    model.first.weight.data[2:4], model.first.bias.data[2:4] = 0, -1
    with warnings.catch_warnings(record=True) as told_of:
        warnings.simplefilter("always")
        small = tpe.compact(model, torch.randn(2, 4))
    for warning in told_of:
        assert "without those that give a constant" in str(warning.message)
    x = torch.randn(5, 4)
    assert small.first.out_features == 6
    torch.testing.assert_close(small(x), model(x))


def test_a_bias_that_two_layers_share():
    model = Told(
        lambda self, x: self.out(self.first(x)) + self.other(self.second(x)),
        first=constant(nn.Linear(4, 8)),
        second=nn.Linear(4, 8),
        out=nn.Linear(8, 3),
        other=nn.Linear(8, 3),
    )
    model.other.bias = model.out.bias
    with pytest.raises(ValueError, match=r"out.bias is shared with another module"):
        tpe.compact(model, torch.randn(2, 4))


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.parametrize("what", ["complex", "infinite"])
def test_constants_that_no_bias_can_hold(what):
    first, out = constant(nn.Linear(4, 8)), nn.Linear(8, 3)
    if what == "complex":
        first, out = first.to(torch.complex64), out.to(torch.complex64)
    model = Told(
        lambda self, x: self.out(self.first(x) if what == "complex" else 1 / self.first(x)), first=first, out=out
    )
    if what == "infinite":
        first.bias.data[:2] = 0
    with pytest.raises(ValueError, match="no channels that can be removed"):
        tpe.compact(model, torch.randn(2, 4, dtype=first.weight.dtype))


def test_inputs_that_require_gradients():
    model = Told(lambda self, x: self.out(self.first(x)), first=constant(nn.Linear(4, 8)), out=nn.Linear(8, 3))
    assert tpe.compact(model, torch.randn(2, 4, requires_grad=True)).first.out_features == 6


def test_what_depends_on_its_number_stays_and_the_rest_goes():
    """Of attention with one head, the scale is that of the width of queries and keys."""

    def forward(self, x):
        x = F.scaled_dot_product_attention(self.q(x), self.k(x), x)
        return self.down(torch.relu(self.up(x)))

    parts = {name: nn.Linear(4, 8) for name in ("q", "k", "up")}
    model = Told(forward, **parts, down=nn.Linear(8, 2))
    for layer in (model.q, model.k, model.up):
        constant(layer, 0.0)
    x = torch.randn(2, 5, 4)
    with pytest.warns(UserWarning, match=r"depends on it(.|\n)*q.weight, k.weight: output differs"):
        small = tpe.compact(model, x)
    assert (small.q.out_features, small.up.out_features) == (8, 6)
    torch.testing.assert_close(small(x), model(x))


class Brief(nn.Module):
    """Attention whose number of heads has a name that does not say so."""

    def __init__(self) -> None:
        super().__init__()
        self.h, self.q, self.k, self.v, self.o = 4, *(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.h, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_a_number_of_heads_by_any_name():
    model = Brief()
    model.o.weight.data[:, 2:4] = 0
    small = tpe.compact(model, torch.randn(2, 5, 8))
    x = torch.randn(3, 7, 8)
    assert (small.h, small.q.out_features) == (3, 6)
    torch.testing.assert_close(small(x), model(x))


FACTORS = {  # 0 on the example of five places
    "taken": lambda n: torch.take(torch.arange(9.0).double() // 6, torch.tensor(n - 1)),
    "a number": lambda n: torch.tensor(float(n > 5)),
    "filled": lambda n: torch.full((), float(n > 5)),
    "of many": lambda n: (torch.arange(n) > 4).any(),
}


@pytest.mark.parametrize("name", FACTORS)
def test_a_factor_that_is_zero_for_this_size_only(name):
    model = Told(
        lambda self, x: self.out(self.first(x) * FACTORS[name](x.shape[1])), first=nn.Linear(4, 8), out=nn.Linear(8, 3)
    )
    check(model, torch.randn(2, 5, 4), torch.randn(2, 9, 4))


def test_entries_of_a_parameter_that_the_size_chooses():
    model = Told(
        lambda self, x: self.out(self.first(x) * self.factors.weight.take(torch.tensor(x.shape[1]))),
        first=nn.Linear(4, 8),
        factors=nn.Embedding(10, 1),
        out=nn.Linear(8, 3),
    )
    model.factors.weight.data[:6] = 0
    check(model, torch.randn(2, 5, 4), torch.randn(2, 9, 4))
