"""One budget of multiplications or parameters for a model: whole units go, and compact takes them out."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from compensating import MARKS, never_worse, prune_and_compensate
from hypothesis import given
from hypothesis import strategies as st
from snapshots import Snapshot
from torch import nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

import torchprune_ext as tpe
from torchprune_ext._graph import call, graph_of
from torchprune_ext.compensation import greedy
from torchprune_ext.compensation.shares import Price, Shares

pytestmark = MARKS


# ------------------------------------------------------------------------------------------------- the greedy order


def least_squares(gram, cross, columns):
    """Return the squares that the best weights on some columns leave of an output, less a constant."""
    columns = list(columns)
    if not columns:
        return 0.0
    own = gram[columns][:, columns]
    return -float((cross[:, columns] @ torch.linalg.inv(own) * cross[:, columns]).sum())


@st.composite
def readers(draw):
    """Draw what some matrices say of the same units, which lie anywhere among their columns."""
    units, found = draw(st.integers(1, 5)), []
    torch.manual_seed(draw(st.integers(0, 99)))
    for _ in range(draw(st.integers(1, 3))):
        width, others, outputs = draw(st.integers(1, 3)), draw(st.integers(0, 3)), draw(st.integers(1, 3))
        inputs = units * width + others
        x = torch.randn(30, inputs).double() @ torch.randn(inputs, inputs).double()
        if draw(st.booleans()):
            x[:, draw(st.integers(0, inputs - 1))] = 0
        gram = x.mT @ x / 30 + 0.01 * torch.eye(inputs).double()
        cross = torch.randn(outputs, inputs).double() @ gram
        found.append((gram, cross, torch.randperm(inputs)[: units * width].view(units, width)))
    return units, found, draw(st.integers(1, units))


@given(drawn=readers(), panel=st.sampled_from([1, 4, greedy.PANEL]))
def test_units_go_as_all_their_readers_together_say(drawn, panel):
    units, matrices, keep = drawn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greedy, "PANEL", panel)
        parts = [greedy.parts_of(g, c, torch.ones_like(c), [columns])[0] for g, c, columns in matrices]
        order, rises = greedy.eliminate(parts, keep)
    assert len(order) == len(set(order)) == len(rises) == units - keep
    gone: list[int] = []

    def error(without):
        return sum(
            least_squares(g, c, sorted({*range(len(g))} - set(columns[without].flatten().tolist())))
            for g, c, columns in matrices
        )

    for unit, rise in zip(order, rises, strict=True):
        before = error(gone)
        found = {each: error([*gone, each]) - before for each in range(units) if each not in gone}
        scale = sum(abs(least_squares(g, c, range(len(g)))) for g, c, _ in matrices)
        assert abs(found[unit] - rise) <= 1e-7 * scale
        assert found[unit] <= min(found.values()) + 1e-7 * scale
        gone.append(unit)


# ---------------------------------------------------------------------------------------------------------- sharing


@st.composite
def budgets(draw):
    """Draw tensors whose axes are units of groups, counts and costs; ties are common."""
    groups = draw(st.integers(1, 3))
    sizes = [draw(st.integers(1, 6)) for _ in range(groups)]
    prices = []
    for _ in range(draw(st.integers(1, 4))):
        first, second = (draw(st.sampled_from([None, *range(groups)])) for _ in range(2))
        places = draw(st.integers(1, 2))
        losses = [(axis, g, places) for axis, g in ((0, first), (1, second)) if g is not None]
        shape = tuple(3 if g is None else places * sizes[g] for g in (first, second))
        prices.append(Price(draw(st.sampled_from([1, 2, 9])), shape, tuple(losses)))
    counts = []
    for size in sizes:
        now = draw(st.integers(1, size))
        counts.append([now, *(count for count in range(now - 1, 0, -1) if draw(st.booleans()))])
    steps = [draw(st.lists(st.sampled_from([0.0, 1.0, 2.5]), min_size=s, max_size=s)) for s in sizes]
    costs = [[sum(each[:n]) for n in range(len(each) + 1)] for each in steps]
    return Shares(prices, draw(st.sampled_from([0, 5, 40])), sizes, counts), costs


@given(drawn=budgets(), where=st.floats(0, 1))
def test_steps_go_by_what_they_cost_for_what_they_save(drawn, where):
    shares, costs = drawn
    low, high = shares.fraction(shares.fewest), shares.fraction(shares.sizes)
    target = low + where * (high - low)
    place = [0] * len(shares.sizes)

    def kept(change=None, by=0):
        where = [p + by * (g == change) for g, p in enumerate(place)]
        return [counts[p] for counts, p in zip(shares.counts, where, strict=True)]

    def cost(numbers):
        return sum(c[counts[0] - n] for c, counts, n in zip(costs, shares.counts, numbers, strict=True))

    def whole(numbers):
        return shares.total(numbers)

    goal = target * whole(shares.sizes)
    while whole(kept()) > goal * (1 + 1e-12):
        ratios = {}
        for group, counts in enumerate(shares.counts):
            if place[group] + 1 < len(counts) and (saved := whole(kept()) - whole(kept(group, 1))) > 0:
                ratios[group] = (cost(kept(group, 1)) - cost(kept())) / saved
        place[min(ratios, key=ratios.__getitem__)] += 1
    while True:
        back = {}
        for group in range(len(place)):
            if place[group] and whole(kept()) < whole(kept(group, -1)) <= goal * (1 + 1e-12):
                back[group] = cost(kept(group, -1)) - cost(kept())
        if not back:
            break
        place[min(back, key=back.__getitem__)] -= 1
    assert shares.spread(target * (1 + 1e-12), costs) == kept()


@given(drawn=budgets(), where=st.floats(0, 1))
def test_no_group_loses_much_more_than_in_equal_shares(drawn, where):
    shares, _ = drawn
    low, high = shares.fraction(shares.fewest), shares.fraction(shares.sizes)
    target = (low + where * (high - low)) * (1 + 1e-12)
    place = [0] * len(shares.sizes)

    def kept(change=None):
        return [counts[p + (g == change)] for g, (counts, p) in enumerate(zip(shares.counts, place, strict=True))]

    while shares.fraction(kept()) > target:
        after = {}
        for group, counts in enumerate(shares.counts):
            if place[group] + 1 < len(counts) and shares.total(kept(group)) < shares.total(kept()):
                after[group] = kept(group)[group] / shares.sizes[group]
        place[max(after, key=after.__getitem__)] += 1
    even = kept()
    moved = [(left, size) for left, size, p in zip(even, shares.sizes, place, strict=True) if p]
    lost = max((1 - left / size for left, size in moved), default=0)
    found = shares.near_even(target)
    for counts, all_counts, size, left in zip(found.counts, shares.counts, shares.sizes, even, strict=True):
        assert counts == [n for n in all_counts if 1 - n / size <= 1.5 * lost + 1e-9 or n >= left]
    assert found.fraction(found.fewest) <= target


# ------------------------------------------------------------------------------------------------------- whole models


class Built(nn.Module):
    def __init__(self, forward, **modules):
        super().__init__()
        self.told = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args, **kwargs):
        return self.told(self, *args, **kwargs)


def block(inputs, outputs, size=1, groups=1):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def mlp():
    layers = [nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 24), nn.BatchNorm1d(24), nn.Tanh(), nn.Linear(24, 5)]
    return nn.Sequential(*layers), lambda n: torch.randn(n, 12)


def residual():
    def forward(self, x):
        x = self.stem(x)
        x = F.relu(x + self.one(x))
        x = F.relu(self.down(x) + self.two(x))
        return self.head(x.mean((2, 3)))

    parts = {
        "one": nn.Sequential(block(8, 12, 3), block(12, 8, 3)),
        "two": nn.Sequential(block(8, 16, 3), block(16, 16)),
    }
    model = Built(forward, stem=block(3, 8, 3), **parts, down=nn.Conv2d(8, 16, 1), head=nn.Linear(16, 4))
    return model, lambda n: torch.randn(n, 3, 6, 6)


def squeezed():
    """As a block of MobileNet v3."""

    def forward(self, x):
        x = self.depthwise(self.expand(self.stem(x)))
        x = x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return self.head(self.project(x).mean((2, 3)))

    parts = {
        "expand": block(8, 24),
        "depthwise": block(24, 24, 3, 24),
        "down": nn.Conv2d(24, 8, 1),
        "up": nn.Conv2d(8, 24, 1),
    }
    model = Built(forward, stem=block(3, 8, 3), **parts, project=block(24, 12), head=nn.Linear(12, 4))
    return model, lambda n: torch.randn(n, 3, 5, 5)


def flattened():
    maps = [block(1, 8, 3), nn.MaxPool2d(2), block(8, 12, 3), nn.Flatten()]
    return nn.Sequential(*maps, nn.Linear(12 * 9, 16), nn.ReLU(), nn.Linear(16, 3)), lambda n: torch.randn(n, 1, 6, 6)


def concatenated():
    """As DenseNet."""

    def forward(self, x):
        for layer in (self.one, self.two, self.three):
            x = torch.cat([x, layer(x)], 1)
        return self.head(x.mean((2, 3)))

    parts = {"one": block(3, 8, 3), "two": block(11, 8, 3), "three": block(19, 8, 3)}
    return Built(forward, **parts, head=nn.Linear(27, 4)), lambda n: torch.randn(n, 3, 5, 5)


def grouped():
    layers = [block(3, 16, 3), block(16, 24, 3, 2), nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(24, 4, 1)), lambda n: torch.randn(n, 3, 5, 5)


def bert():
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 8,
    }
    model = transformers.BertModel(transformers.BertConfig(vocab_size=40, **sizes))
    return model, lambda n: {"input_ids": torch.randint(0, 40, (n, 6))}


def llama():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}
    config = transformers.LlamaConfig(vocab_size=40, **sizes, num_key_value_heads=3, tie_word_embeddings=False)
    return transformers.LlamaForCausalLM(config), lambda n: {
        "input_ids": torch.randint(0, 40, (n, 6)),
        "use_cache": False,
    }


MODELS = {each.__name__: each for each in (mlp, residual, squeezed, flattened, concatenated, grouped, bert, llama)}
several = pytest.mark.parametrize("name", MODELS)


def made(name):
    """Return a model with real statistics, two batches, and its weights."""
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                nn.init.normal_(tensor)
    return model.eval(), [batch(48), batch(16)], tpe.prunable_parameters(model)


def macs(model, inputs):
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        call(model, inputs)
    return counter.get_total_flops() / 2


def parameters(model, inputs=None):
    return sum(each.numel() for each in model.parameters())


def given_back(model, inputs, round_to):
    """Yield ``model``, made plain, with one step less pruned, for each group of units that has lost some."""
    tpe.remove_all(model)
    for group in graph_of(model, inputs):
        readers = [m for m in group.members if m.reads]
        if group.fixed is not None or not readers:
            continue
        more = copy.deepcopy(model)
        [reader, *_] = readers
        weight = more.get_parameter(reader.name).data.movedim(reader.axis, 0)
        gone = ((weight == 0).flatten(1).all(1)[reader.indices].all(1)).nonzero().flatten()
        if not len(gone):
            continue
        step = 1 if group.heads else round_to - (group.size - len(gone)) % round_to
        for member in readers:
            chosen = member.indices[gone[:step]].flatten()
            more.get_parameter(member.name).data.movedim(member.axis, 0)[chosen] = 1.0
        yield more


@several
@pytest.mark.parametrize(
    ("limit", "round_to"), [({"target_macs": 0.6}, 1), ({"target_macs": 0.7}, 4), ({"target_parameters": 0.65}, 2)]
)
def test_what_compact_leaves_is_within_the_budget_and_one_step_below(name, limit, round_to):
    model, batches, params = made(name)
    count = macs if "target_macs" in limit else parameters
    [target], whole = limit.values(), count(model, batches[0])
    fits = prune_and_compensate(model, batches, params, **limit, round_to=round_to)
    assert list(fits) == params
    never_worse(fits)
    small = tpe.compact(model, batches[0])
    left = count(small, batches[0]) / whole
    assert left <= target
    if name in ("bert", "llama") and count is macs:  # the products of attention count as if no head went
        assert left > target - 0.2
        return
    backs = [
        tpe.compact(more, batches[0]) if tpe.dead_units(more, batches[0]) else more
        for more in given_back(model, batches[0], round_to)
    ]
    assert backs
    assert all(count(more, batches[0]) / whole > target for more in backs)


def test_units_that_cost_nothing_do_not_all_go():
    model, batches, params = made("mlp")
    model[2].weight.data[1:] = model[2].weight.data[:1]  # one would do for all 24
    fits = prune_and_compensate(model, batches, params, target_macs=0.6)
    kept = [int(module.weight_mask.any(0).sum()) for module, _ in params[1:]]
    assert 12 <= kept[1] <= 16
    assert kept[0] > 28
    assert fits[params[2]].after < 1e-3


@pytest.mark.parametrize("name", ["mlp", "squeezed", "residual", "llama"])
def test_counts_are_rounded_but_heads_go_one_by_one(name):
    model, batches, params = made(name)
    prune_and_compensate(model, batches, params, target_macs=0.65, round_to=8)
    small = tpe.compact(model, batches[0], round_to=8)
    again = tpe.compact(model, batches[0])
    assert [each.shape for each in small.parameters()] == [each.shape for each in again.parameters()]
    widths = [module.weight.shape[0] for module in small.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    assert name == "llama" or all(width % 8 == 0 or width in (5, 4, 12, 24, 40) for width in widths)


def test_a_key_goes_with_all_its_queries():
    model, batches, _ = made("llama")
    heads = [(layer.self_attn.o_proj, "weight") for layer in model.model.layers]
    prune_and_compensate(model, batches, heads, target_parameters=0.92)
    small = tpe.compact(model, batches[0])
    lost = 0
    for layer in small.model.layers:
        keys, queries = layer.self_attn.k_proj.out_features // 4, layer.self_attn.q_proj.out_features // 4
        assert queries == 2 * keys
        lost += 3 - keys
    assert lost
    assert all(not prune.is_pruned(layer.mlp) for layer in model.model.layers)


@pytest.mark.parametrize("floor", [5, 0.5])
def test_floors(floor):
    model, batches, params = made("mlp")
    least = [5, 5] if floor == 5 else [20, 12]
    with pytest.raises(ValueError, match="out of reach") as caught:
        prune_and_compensate(model, batches, params, target_macs=0.01, min_keep=floor)
    reach = float(str(caught.value).split("at least ")[1].split(" ")[0])
    prune_and_compensate(model, batches, params, target_macs=reach, min_keep=floor)
    assert [int(module.weight_mask.any(0).sum()) for module, _ in params[1:]] == least


@pytest.mark.parametrize(("limit", "count"), [("target_macs", macs), ("target_parameters", parameters)])
def test_masks_stay_and_more_goes(limit, count):
    model, batches, params = made("squeezed")
    dense, before = copy.deepcopy(model), {}
    for target in (0.8, 0.6, 0.7):
        fits = prune_and_compensate(model, batches, params, **{limit: target}, dense=dense)
        never_worse(fits)
        masks = {path: module.weight_mask.clone() for path, module, _ in tpe.pruned_parameters(model)}
        assert all(bool((masks[path] <= mask).all()) for path, mask in before.items())
        if target == 0.7:  # it is reached
            assert all(torch.equal(masks[path], mask) for path, mask in before.items())
        before = masks
    assert count(tpe.compact(model, batches[0]), batches[0]) <= 0.6 * count(dense, batches[0])


def test_entries_that_are_pruned_stay_so():
    model, batches, params = made("residual")
    for module, name in params:
        prune.random_unstructured(module, name, amount=0.4)
    before = [module.weight_mask.clone() for module, _ in params]
    prune_and_compensate(model, batches, params, target_macs=0.6)
    assert all(bool((module.weight_mask <= mask).all()) for (module, _), mask in zip(params, before, strict=True))
    assert macs(tpe.compact(model, batches[0]), batches[0]) <= 0.6 * macs(made("residual")[0], batches[0])


def test_all_of_the_budget_means_a_re_fit():
    model, batches, params = made("mlp")
    fits = prune_and_compensate(model, batches, params, target_macs=1.0)
    assert list(fits) == params
    assert not any(prune.is_pruned(module) for module, _ in params)


def test_layers_that_lose_nothing_have_no_mask_and_others_a_history():
    model, batches, params = made("mlp")
    prune_and_compensate(model, batches, params, target_macs=0.6, round_to=4)
    assert [prune.is_pruned(module) for module, _ in params] == [False, True, True]
    [hook] = params[1][0]._forward_pre_hooks.values()
    assert "prune_and_compensate(target_macs=0.6, round_to=4, min_keep=1)" in repr(hook)


# ----------------------------------------------------------------------------------------------------------- refusals

REFUSED = {
    "both": ("mlp", {"target_macs": 0.5, "target_parameters": 0.5}, TypeError, "pass one of them"),
    "zero": ("mlp", {"target_macs": 0.0}, ValueError, "target_macs=0.0 leaves nothing"),
    "more": ("mlp", {"target_macs": 1.5}, ValueError, "target_macs=1.5 is not a fraction"),
    "nan": ("mlp", {"target_parameters": float("nan")}, ValueError, "target_parameters=nan"),
    "text": ("mlp", {"target_macs": "half"}, TypeError, "target_macs='half' is a str"),
    "rounding": ("mlp", {"target_macs": 0.5, "round_to": 0}, ValueError, "round_to=0"),
    "rounding type": ("mlp", {"target_macs": 0.5, "round_to": 8.0}, TypeError, "round_to=8.0"),
    "floor": ("mlp", {"target_macs": 0.5, "min_keep": 1.5}, ValueError, "min_keep=1.5"),
    "alone": ("mlp", {"round_to": 8, "target_sparsity": 0.5}, TypeError, "round_to=8.*go with a budget"),
    "sparsity": ("mlp", {"target_macs": 0.5, "target_sparsity": 0.5}, TypeError, "target_sparsity=0.5"),
    "pattern": ("mlp", {"target_macs": 0.5, "pattern": tpe.NM(2, 4)}, TypeError, "pattern=NM"),
    "criterion": ("mlp", {"target_macs": 0.5, "criterion": "wanda"}, TypeError, "criterion='wanda'"),
    "steps": ("mlp", {"target_macs": 0.5, "steps": 2}, TypeError, "steps=2"),
    "reach": ("mlp", {"target_macs": 0.01}, ValueError, "target_macs=0.01 is out of reach.* at least 0.0"),
    "outputs": ("mlp", {"target_macs": 0.5, "unit": tpe.Channel()}, ValueError, r"Pass Channel\(dim=1\)"),
    "size": (
        "flattened",
        {"target_macs": 0.5, "unit": tpe.Channel(1, size=3)},
        ValueError,
        r"Channel\(dim=1, size=9\)",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_refused_budgets_leave_no_trace(why):
    name, options, error, words = REFUSED[why]
    model, batches, params = made(name)
    if why == "size":
        options = {**options, "unit": {params[2]: options["unit"]}}
    before = Snapshot(model)
    with pytest.raises(error, match=words):
        prune_and_compensate(model, batches, params, **options)
    assert not before.differences()


def test_a_reader_that_is_not_listed_is_named():
    model, batches, _ = made("squeezed")
    params = [(model.down, "weight")]
    with pytest.raises(ValueError, match=r"out of reach(.|\n)*project.0.weight reads them too. List that as well"):
        prune_and_compensate(model, batches, params, target_macs=0.9)
    prune_and_compensate(model, batches, [*params, (model.project[0], "weight")], target_macs=0.9)


@pytest.mark.parametrize("how", ["tied", "twice"])
def test_a_reader_that_cannot_be_listed_is_not_asked_for_without_saying_so(how):
    layers = [nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20), nn.Linear(20, 3)]
    model = nn.Sequential(*layers)
    if how == "tied":
        model[4].weight = model[2].weight
    else:
        model[4] = model[2]
    params = [(model[place], "weight") for place in (0, 5)]
    with pytest.raises(ValueError, match=r"List that as well, if it can be: .*not tied"):
        prune_and_compensate(model, [torch.randn(30, 6)], params, target_macs=0.9)
    with pytest.raises(ValueError, match=r"tied|more than once"):
        prune_and_compensate(model, [torch.randn(30, 6)], [*params, (model[2], "weight")], target_macs=0.9)


def fixed_view():
    """As LeNet is often written."""

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.two(F.relu(self.one(x)))), 2)
        return self.head(F.relu(self.hidden(x.view(-1, 12 * 9))))

    parts = {"one": nn.Conv2d(1, 8, 3, padding=1), "two": nn.Conv2d(8, 12, 3, padding=1)}
    return Built(forward, **parts, hidden=nn.Linear(12 * 9, 40), head=nn.Linear(40, 3)), lambda n: torch.randn(
        n, 1, 6, 6
    )


def shuffled():
    """As ShuffleNet, whose halves are cut where half of the channels are."""

    def forward(self, x):
        x = self.stem(x)
        for unit in (self.one, self.two):
            left, right = x.chunk(2, 1)
            x = F.channel_shuffle(torch.cat([left, unit(right)], 1), 2)
        return self.head(self.last(x).mean((2, 3)))

    units = {name: nn.Sequential(block(8, 12), block(12, 8)) for name in ("one", "two")}
    model = Built(forward, stem=block(3, 16, 3), **units, last=block(16, 24), head=nn.Linear(24, 4))
    return model, lambda n: torch.randn(n, 3, 5, 5)


@pytest.mark.parametrize("built", [fixed_view, shuffled])
def test_units_whose_number_the_code_fixes_stay(built, monkeypatch):
    monkeypatch.setitem(MODELS, "built", built)
    model, batches, params = made("built")
    before = Snapshot(model)
    with pytest.raises(ValueError, match=r"out of reach(.|\n)*These stay:(.|\n)*with fewer channels the model's code"):
        prune_and_compensate(model, batches, params, target_macs=0.01)
    assert not before.differences()
    whole = macs(model, batches[0])
    prune_and_compensate(model, batches, params, target_macs=0.8)
    assert macs(tpe.compact(model, batches[0]), batches[0]) <= 0.8 * whole


def test_a_model_that_cannot_be_copied_is_pruned():
    model, batches, params = made("mlp")
    model.lock = threading.Lock()
    prune_and_compensate(model, batches, params, target_macs=0.8)
    assert any(prune.is_pruned(module) for module, _ in params)


def test_units_that_are_given_choose_the_readers():
    model, batches, params = made("flattened")
    unit = {params[2]: tpe.Channel(dim=1, size=9)}
    prune_and_compensate(model, batches, params, target_macs=0.9, unit=unit)
    assert [prune.is_pruned(module) for module, _ in params] == [False, False, True, False]
