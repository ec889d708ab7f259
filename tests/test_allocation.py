"""How much per layer: exact budgets, and the equations of the papers as plain loops."""

import math
from collections import OrderedDict
from itertools import pairwise

import pytest
import torch
import toys
from cases import draw_tensor
from globally import Tied, weights
from hypothesis import example, given
from hypothesis import strategies as st
from snapshots import Snapshot
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe
from torchprune_ext.workflow.allocation import by_name, erk, lamp, owl, uniform

pytestmark = toys.unwarned
SHAPES = st.lists(
    st.sampled_from([(3,), (1, 1), (2, 3), (8, 1), (4, 16), (20, 30), (2, 3, 5), (6, 1, 5, 5), (16, 6, 5, 5), (0, 4)]),
    min_size=1,
    max_size=5,
)
SPARSITIES = st.sampled_from([0.0, 0.5, 0.8, 0.9]) | st.floats(0, 0.97)


class Owner(nn.Module):
    """A module with one weight of any shape."""

    def __init__(self, values):
        super().__init__()
        self.weight = nn.Parameter(values)


def listed(shapes):
    return weights(*[Owner(torch.randn(shape)) for shape in shapes])


def sizes_of(params):
    return [getattr(module, name).numel() for module, name in params]


def counts_of(amounts, params):
    """Return how many entries of each tensor go; the amounts must be multiples of one."""
    counts = [amounts[key] * size for key, size in zip(params, sizes_of(params), strict=True)]
    assert all(abs(count - round(count)) < 1e-9 for count in counts)
    return [round(count) for count in counts]


def check_budget(amounts, params, sparsity):
    """Check that the amounts add up, and that one entry of each tensor stays."""
    counts, sizes = counts_of(amounts, params), sizes_of(params)
    assert list(amounts) == params
    assert sum(counts) == round(sparsity * sum(sizes))
    assert all(count <= max(size - 1, 0) for count, size in zip(counts, sizes, strict=True))
    return counts


def possible(params, sparsity):
    sizes = sizes_of(params)
    return round(sparsity * sum(sizes)) <= sum(max(size - 1, 0) for size in sizes)


def refused(call, *args):
    with pytest.raises(ValueError, match="leaves less than one for each"):
        call(*args)


@given(SHAPES, SPARSITIES)
def test_uniform_is_the_same_up_to_rounding(shapes, sparsity):
    params = listed(shapes)
    if not possible(params, sparsity):
        return refused(uniform, params, sparsity)
    counts = check_budget(uniform(params, sparsity), params, sparsity)
    if all(sparsity * size <= size - 1 for size in sizes_of(params)):
        assert all(abs(count - sparsity * size) < 1 for count, size in zip(counts, sizes_of(params), strict=True))
    return None


def erk_densities(shapes, sparsity):
    """Return the densities by the loop of the paper's code: the largest above 1 becomes dense, the rest is rescaled."""
    dense = set()
    while True:
        left = (1 - sparsity) * sum(map(math.prod, shapes)) - sum(math.prod(shapes[i]) for i in dense)
        raw = {i: sum(s) / math.prod(s) for i, s in enumerate(shapes) if i not in dense}
        if not raw:
            return [1.0] * len(shapes)
        scale = left / sum(raw[i] * math.prod(shapes[i]) for i in raw)
        if max(raw.values()) * scale <= 1:
            return [1.0 if i in dense else scale * raw[i] for i in range(len(shapes))]
        dense |= {i for i in raw if raw[i] == max(raw.values())}


@given(SHAPES.map(lambda shapes: [s for s in shapes if 0 not in s]).filter(len), SPARSITIES)
@example([(6, 1, 5, 5), (16, 6, 5, 5), (120, 256), (84, 120), (10, 84)], 0.9)
def test_erk_by_the_loop_of_the_paper(shapes, sparsity):
    params = listed(shapes)
    if not possible(params, sparsity):
        return refused(erk, params, sparsity)
    counts = check_budget(erk(params, sparsity), params, sparsity)
    wanted = [(1 - d) * math.prod(s) for d, s in zip(erk_densities(shapes, sparsity), shapes, strict=True)]
    if all(want <= math.prod(shape) - 1 for want, shape in zip(wanted, shapes, strict=True)):
        assert all(abs(count - want) < 1 + 1e-6 for count, want in zip(counts, wanted, strict=True))
    return None


def lamp_order(tensors, masks):
    """Return ``(score, place of the tensor, rank within it)`` of all entries that live, by the equation."""
    scored = []
    for place, (values, mask) in enumerate(zip(tensors, masks, strict=True)):
        rising = sorted(abs(v) for v, m in zip(values, mask, strict=True) if m)
        for rank, value in enumerate(rising):
            rest = sum(other**2 for other in rising[rank:])
            scored.append((value**2 / rest if rest else 0.0, -place, rank))
    return sorted(scored)


@given(st.data(), SPARSITIES)
def test_lamp_by_its_equation(data, sparsity):
    shapes = data.draw(SHAPES)
    levels = data.draw(st.sampled_from([(-3.0, -1.0, 0.5, 2.0), (-1.0, 0.0, 1.0), (0.25, 0.5, 1.0, 1e-3)]))
    params = weights(*[Owner(draw_tensor(data.draw, shape, levels, torch.float64)) for shape in shapes])
    holes = st.sampled_from([(0.0, 1.0, 1.0, 1.0), None, None])
    drawn = [(shape, data.draw(holes)) for shape in shapes]
    masks = [None if h is None else draw_tensor(data.draw, s, h, torch.float64) for s, h in drawn]
    for (module, _), mask in zip(params, masks, strict=True):
        if mask is not None:
            prune.custom_from_mask(module, "weight", mask)
    tensors = [getattr(m, "weight_orig", m.weight).flatten().tolist() for m, _ in params]
    flat = [[1] * len(t) if m is None else m.flatten().tolist() for t, m in zip(tensors, masks, strict=True)]
    if not possible(params, sparsity):
        return refused(lamp, params, sparsity)
    goal, dead = round(sparsity * sum(map(len, tensors))), sum(f.count(0) for f in flat)
    alive = [sum(1 for m in f if m) for f in flat]
    if 0 in [stay for stay, size in zip(alive, map(len, tensors), strict=True) if size]:
        with pytest.raises(ValueError, match="nothing is left of it"):
            lamp(params, sparsity)
        return None
    if goal < dead:
        with pytest.raises(ValueError, match=f"{dead} are pruned already"):
            lamp(params, sparsity)
        return None
    before = Snapshot(*[module for module, _ in params])
    amounts = lamp(params, sparsity)
    assert before.differences() == []
    left = list(alive)
    for _, place, _ in lamp_order(tensors, flat):
        if goal > sum(map(len, tensors)) - sum(left) and left[-place] > 1:
            left[-place] -= 1
    counts = counts_of(amounts, params)
    assert counts == [len(t) - stay for t, stay in zip(tensors, left, strict=True)]
    tpe.prune_to(params, amounts)  # and what is pruned already counts
    return None


def test_lamp_does_not_change_with_the_scale_of_a_layer():
    torch.manual_seed(0)
    params = listed([(8, 8), (4, 30)])
    amounts = lamp(params, 0.7)
    for factor in (1e-30, 1e30):
        params[0][0].weight.data *= factor
        assert lamp(params, 0.7) == amounts
    params[1][0].weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"params\[1\].*NaN"):
        lamp(params, 0.7)


def owl_sparsities(scores, sizes, sparsity, m, lam):
    """Return the sparsities by the equations, where all layers have one size."""
    ratios = [sum(v > m * sum(layer) / len(layer) for v in layer) / len(layer) for layer in scores]
    spread = max(ratios) - min(ratios)
    more = [2 * lam * (r - min(ratios)) / spread if spread else 0.0 for r in ratios]
    mean = sum(extra * size for extra, size in zip(more, sizes, strict=True)) / sum(sizes)
    return [sparsity - extra + mean for extra in more]


def outlying(*widths):
    """Return a chain of layers of which the later ones have more outliers, and data."""
    torch.manual_seed(0)
    layers = [nn.Linear(a, b, bias=False) for a, b in pairwise(widths)]
    for depth, layer in enumerate(layers):
        layer.weight.data.uniform_(0.5, 1.0).view(-1)[:depth].mul_(50)
        layer.weight.data /= widths[depth]
    return nn.Sequential(*layers), [torch.randn(32, widths[0]), torch.randn(16, widths[0])]


def wanda(model, data):
    """Return the scores of each layer."""
    x, scores = torch.cat(data), []
    for layer in model:
        scores.append((layer.weight.abs() * x.norm(dim=0)).flatten().tolist())
        x = layer(x)
    return scores


@pytest.mark.parametrize("widths", [(8, 8, 8, 8, 8), (8, 12, 5, 9)], ids=str)
@pytest.mark.parametrize(("sparsity", "m", "lam"), [(0.5, 5, 0.08), (0.7, 3.0, 0.15), (0.5, 1e9, 0.1), (0.6, 5.0, 0.0)])
def test_owl_by_its_equations(widths, sparsity, m, lam):
    model, data = outlying(*widths)
    params = tpe.prunable_parameters(model)
    before = Snapshot(model)
    amounts = owl(model, data, (pair for pair in params), sparsity, m=m, lam=lam, progress=False)
    assert before.differences() == []
    counts = check_budget(amounts, params, sparsity)
    scores = wanda(model, data)
    wanted = owl_sparsities(scores, sizes_of(params), sparsity, m, lam)
    assert all(abs(c - w * s) < 1 + 1e-4 for c, w, s in zip(counts, wanted, sizes_of(params), strict=True))


def test_owl_takes_blocks_as_layers_and_stays_within_what_is_there():
    model, data = outlying(8, 8, 8, 8, 8)
    params, blocks = tpe.prunable_parameters(model), [model[:2], model[2:]]
    amounts = list(owl(model, data, params, 0.5, blocks=blocks, progress=False).values())
    scores = wanda(model, data)
    first, second = owl_sparsities([scores[0] + scores[1], scores[2] + scores[3]], [128, 128], 0.5, 5.0, 0.08)
    assert abs(first - second) == pytest.approx(0.16)
    assert amounts == pytest.approx([first, first, second, second], abs=1 / 64)
    for sparsity in (0.02, 0.97):
        amounts = owl(model, data, params, sparsity, lam=0.3, progress=False)
        counts = check_budget(amounts, params, sparsity)
        assert len(set(counts)) > 1
    with pytest.raises(ValueError, match=r"params\[1\].* is in blocks\[0\] and in blocks\[1\]"):
        owl(model, data, params, 0.5, blocks=[model[:2], model[1:]], progress=False)
    for bad, error in (({"m": 0}, ValueError), ({"m": math.nan}, ValueError), ({"lam": 0.6}, ValueError),
                       ({"lam": "x"}, TypeError), ({"blocks": [3]}, TypeError), ({"n": 1}, TypeError)):  # fmt: skip
        with pytest.raises(error):
            owl(model, data, params, 0.5, **{"progress": False, **bad})
    with pytest.raises(ValueError, match="no batch"):
        owl(model, [], params, 0.5, progress=False)


@pytest.mark.parametrize("call", [uniform, erk, lamp], ids=lambda call: call.__name__)
def test_what_all_of_them_refuse_and_how_they_treat_tied_tensors(call):
    params = listed([(4, 4), (4, 4)])
    for sparsity, error in ((1.0, ValueError), (-0.1, ValueError), (math.nan, ValueError), ("half", TypeError)):
        with pytest.raises(error, match="sparsity="):
            call(params, sparsity)
    with pytest.raises(ValueError, match="lists nothing"):
        call([], 0.5)
    with pytest.raises(TypeError, match="params is a Tied"):
        call(Tied(), 0.5)
    refused(call, params, 0.97)
    model = Tied()
    amounts = call(tpe.prunable_parameters(model), 0.5)
    assert amounts[model.embedding, "weight"] == amounts[model.decoder, "weight"]
    assert round(60 * amounts[model.embedding, "weight"] + 36 * amounts[model.layer, "weight"]) == 48


# ------------------------------------------------------------------------------------------------------- by name


def lenet():
    block = nn.Sequential(OrderedDict(conv=nn.Conv2d(4, 4, 3), relu=nn.ReLU()))
    layers = {"conv1": nn.Conv2d(1, 4, 3), "block": block, "fc1": nn.Linear(4, 4), "fc2": nn.Linear(4, 4)}
    return nn.Sequential(OrderedDict(layers, head=nn.Linear(4, 2)))


def named(model, amounts):
    paths = {module: path for path, module in model.named_modules()}
    return {f"{paths[module]}.{name}": amount for (module, name), amount in amounts.items()}


@pytest.mark.parametrize(
    ("amounts", "expected"),
    [
        ({"conv1": 0.85, "fc*": 0.75, "head": None}, {"conv1.weight": 0.85, "fc1.weight": 0.75, "fc2.weight": 0.75}),
        ({"*": 0.5, "fc?": 0.75, "fc2": None, "block": 0.0, "head": None},
         {"conv1.weight": 0.5, "block.conv.weight": 0.0, "fc1.weight": 0.75}),
        ({"block.*": 0.25}, {"block.conv.weight": 0.25}),
        ({"fc1.weight": 0.25, "[bh]*": 0.5}, {"fc1.weight": 0.25, "block.conv.weight": 0.5, "head.weight": 0.5}),
        ({"head": None}, {}),
    ],
    ids=str,
)  # fmt: skip
def test_the_last_name_that_matches_counts(amounts, expected):
    model = lenet()
    found = named(model, by_name(model, amounts))
    assert found == expected
    order = [f"{path}.weight" for path in ("conv1", "block.conv", "fc1", "fc2", "head")]
    assert list(found) == [path for path in order if path in expected]


def test_biases_and_the_model_itself_have_names_too():
    model = lenet()
    params = [(model.fc1, "weight"), (model.fc1, "bias"), (model.fc2, "bias")]
    assert named(model, by_name(model, {"fc1": 0.5, "*.bias": 0.25}, params)) == {
        "fc1.weight": 0.5,
        "fc1.bias": 0.25,
        "fc2.bias": 0.25,
    }
    layer = nn.Linear(4, 4)
    assert by_name(layer, {"weight": 0.5}) == by_name(layer, {"*": 0.5}) == {(layer, "weight"): 0.5}


def test_tied_tensors_go_by_the_last_of_their_names():
    model = Tied()
    for amounts, expected in (({"decoder": 0.5}, 0.5), ({"*": 0.5, "embedding": 0.25}, 0.25)):
        found = by_name(model, amounts)
        assert found[model.embedding, "weight"] == found[model.decoder, "weight"] == expected
    tpe.prune_to(tpe.prunable_parameters(model), by_name(model, {"decoder": 0.5}))
    assert int(model.embedding.weight_mask.sum()) == 30
    assert not hasattr(model.layer, "weight_mask")


@pytest.mark.parametrize(
    ("amounts", "error", "words"),
    [
        ({"conv2": 0.5}, ValueError, r"amounts\['conv2'\] matches no tensor.*Did you mean \['conv1'"),
        ({"Fc1": 0.5}, ValueError, "'fc1'"),
        ({"block.relu": 0.5}, ValueError, "'block"),
        ({"xyz": None}, ValueError, r"Did you mean \['conv1'"),
        ({"fc1": 0.5, "fc*": 0.75}, ValueError, r"amounts\['fc1'\] decides nothing"),
        ({"fc1": 1.0}, ValueError, r"amounts\['fc1'\]=1.0"),
        ({"fc1": 75}, ValueError, "0.9 for 90 %"),
        ({"fc1": "0.5"}, TypeError, r"amounts\['fc1'\]='0.5'"),
        ({1: 0.5}, TypeError, "the key 1, a int"),
        ([("fc1", 0.5)], TypeError, "amounts is a list"),
    ],
    ids=str,
)
def test_names_that_are_refused(amounts, error, words):
    with pytest.raises(error, match=words):
        by_name(lenet(), amounts)
    with pytest.raises(TypeError, match="model="):
        by_name(amounts, {})
