"""Input channels in another order, so that N:M keeps more, while the model computes the same."""

import copy

import pytest
import torch
import torch.nn.functional as F
from compacting import MORE, THEIRS, Attention, Told, block, image
from cutting import Residual, bert, encoder
from permuting import assert_same, chain, kept, outputs, weights
from torch import nn

import torchprune_ext as tpe
from torchprune_ext._graph import graph_of
from torchprune_ext._reordering import Order, reorder
from torchprune_ext._swaps import best_order

INPUT = "it is multiplied with the model's input, or other values without channels of their own"


# ------------------------------------------------------------------------------------------------ which may move


def random_orders(model, inputs):
    """Return a random order of every group, of all channels that are said to be free to change places."""
    generator = torch.Generator().manual_seed(1)
    orders = []
    for group in graph_of(model, inputs, in_order=True):
        if group.fixed is None:
            orders.append(Order(group, torch.randperm(group.size, generator=generator)))
    return orders


def told_apart():
    def forward(self, x):
        one, other = self.first(x).chunk(2, -1)
        return self.out(torch.cat([one.relu(), other.tanh()], -1))

    return Told(forward, first=nn.Linear(3, 16), out=nn.Linear(16, 2)), torch.randn(2, 3)


def picked():
    def forward(self, x):
        x = self.first(x)
        return self.out(x * x[:, 3:4]) + x[:, 5].tanh().unsqueeze(1)

    return Told(forward, first=nn.Linear(3, 8), out=nn.Linear(8, 2)), torch.randn(2, 3)


def cropped():
    def forward(self, x):
        return self.out(F.pad(self.first(x), (-2, 2)))

    return Told(forward, first=nn.Linear(3, 8), out=nn.Linear(8, 2)), torch.randn(2, 3)


def normed():
    return nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2)), torch.randn(2, 3)


def averaged():
    def forward(self, x):
        x = self.first(x)
        one = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * x.softmax(-1) / x.norm(dim=-1, keepdim=True)
        return self.out(one + x.amax(-1, keepdim=True))

    return Told(forward, first=nn.Linear(3, 8), out=nn.Linear(8, 2)), torch.randn(2, 3)


def transformer():
    return encoder(), torch.randn(2, 5, 16)


def resnet():
    return Residual(), image(2, 3, 8, 8)


OTHERS = [told_apart, picked, cropped, normed, averaged, transformer, resnet]


@pytest.mark.parametrize("make", [*THEIRS, *MORE, *OTHERS], ids=lambda make: make.__name__)
def test_any_order_that_the_graph_allows_computes_the_same(make):
    torch.manual_seed(0)
    model, inputs = make()
    before = outputs(model, inputs)
    with torch.no_grad():
        reorder(model, random_orders(model, inputs), inputs)
    assert_same(model, before, inputs)


@pytest.mark.parametrize("make", [*THEIRS, *MORE, *OTHERS], ids=lambda make: make.__name__)
def test_more_is_kept_and_the_model_computes_the_same(make):
    torch.manual_seed(0)
    model, inputs = make()
    before, dense = outputs(model, inputs), copy.deepcopy(model)
    names = [(name, id(each), each._version) for name, each in model.named_parameters()]
    report = tpe.permute_for_nm(model, inputs, weights(model))
    assert_same(model, before, inputs)
    assert [(name, id(each)) for name, each in model.named_parameters()] == [each[:2] for each in names]
    assert sum(r.after for r in report.rows) >= sum(r.before for r in report.rows)
    for row in report.rows:
        weight, old = model.get_parameter(row.tensor), dense.get_parameter(row.tensor)
        assert torch.equal(weight.flatten().sort().values, old.flatten().sort().values)
        assert row.after == pytest.approx(kept(weight), rel=1e-6)
        assert row.before == pytest.approx(kept(old), rel=1e-6)
        assert row.moved or row.reason
    for each in model.buffers():
        assert torch.isfinite(each).all()


def moved(make, *names):
    """Return how many inputs of tensors have moved, and why others have not."""
    torch.manual_seed(0)
    model, inputs = make() if callable(make) else make
    rows = {row.tensor: row for row in tpe.permute_for_nm(model, inputs, weights(model)).rows}
    return [(rows[name].moved > 0, rows[name].reason) for name in names]


def test_what_the_code_tells_apart_stays_on_its_side():
    torch.manual_seed(0)
    model, inputs = told_apart()
    old = model.out.weight.detach().clone()
    tpe.permute_for_nm(model, inputs, weights(model))
    for side in (slice(0, 8), slice(8, 16)):
        assert torch.equal(model.out.weight[:, side].sum(1), old[:, side].sum(1)) or torch.allclose(
            model.out.weight[:, side].sum(1), old[:, side].sum(1)
        )
    assert not torch.equal(model.out.weight, old)


def test_channels_that_are_picked_out_stay():
    torch.manual_seed(0)
    model, inputs = picked()
    old = model.out.weight.detach().clone()
    tpe.permute_for_nm(model, inputs, weights(model))
    assert torch.equal(model.out.weight[:, [3, 5]], old[:, [3, 5]])
    assert not torch.equal(model.out.weight, old)


def test_a_norm_over_all_channels_lets_them_move_though_none_can_go():
    assert moved(normed, "0.weight", "2.weight") == [(False, INPUT), (True, None)]
    assert moved(averaged, "out.weight") == [(True, None)]


def test_a_residual_stream_gets_one_order():
    torch.manual_seed(0)
    model = Residual(width=16)
    stem, outer = model.stem[0].weight.detach().clone(), model.outer.weight.detach().clone()
    tpe.permute_for_nm(model, image(2, 3, 8, 8), [(model.inner, "weight")])
    order = [int((stem == row).flatten(1).all(1).nonzero()) for row in model.stem[0].weight]
    assert order != list(range(16))
    assert [int((outer == row).flatten(1).all(1).nonzero()) for row in model.outer.weight] == order


def test_inputs_and_outputs_of_the_model_stay():
    met = "it meets a tensor of fixed width that the model makes or is given"
    found = moved(transformer, "layers.0.linear1.weight", "layers.0.linear2.weight")
    assert found == [(False, met), (True, None)]

    def forward(self, x):
        x = self.first(x)
        return x, self.out(x)

    model = Told(forward, first=nn.Linear(3, 16), out=nn.Linear(16, 2))
    assert moved((model, torch.randn(2, 3)), "out.weight") == [(False, "the model returns it, in output[0]")]


def test_the_residual_stream_of_a_transformer():
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(3, 16), encoder(), nn.Linear(16, 2)), torch.randn(2, 5, 3)
    before = outputs(model, inputs)
    report = tpe.permute_for_nm(model, inputs, weights(model))
    assert_same(model, before, inputs)
    assert [row.tensor for row in report.rows if not row.moved] == ["0.weight"]
    assert sum(row.tensor.endswith("out_proj.weight") for row in report.rows) == 2


def test_channels_of_a_flattened_map_stay_and_of_one_with_channels_last_move():
    maps = [nn.Conv2d(1, 8, 1), nn.ReLU()]
    last = Told(
        lambda self, x: self.out(self.maps(x).permute(0, 2, 3, 1).flatten(1)),
        maps=nn.Sequential(*maps),
        out=nn.Linear(72, 2),
    )
    first = nn.Sequential(*maps, nn.Flatten(), nn.Linear(72, 2))
    whole = nn.Sequential(*maps, nn.MaxPool2d((3, 1), padding=(1, 0)), nn.Flatten(), nn.Linear(96, 2))
    spans = "groups of 4 inputs span several of one channel, as where maps are flattened channel by channel"
    assert moved((last, image(2, 1, 3, 3)), "out.weight") == [(True, None)]
    assert moved((first, image(2, 1, 3, 3)), "3.weight") == [(False, spans)]
    reason = "whole groups of 4 inputs are one channel, wherever it stands"
    assert moved((whole, image(2, 1, 6, 6)), "4.weight") == [(False, reason)]


def test_a_concatenation_that_groups_of_m_reach_across():
    model = Told(
        lambda self, x: self.out(torch.cat([self.a(x), x, self.b(x)], 1)),
        a=nn.Linear(2, 7, bias=False),
        b=nn.Linear(2, 9, bias=False),
        out=nn.Linear(18, 3),
    )
    torch.manual_seed(0)
    row = tpe.permute_for_nm(model, torch.randn(2, 2), [(model.out, "weight")]).rows[0]
    assert row.after == pytest.approx(kept(model.out.weight), rel=1e-6)
    assert row.after > row.before
    assert row.reason == "it is joined to values that are not channels"


def test_several_readers_of_different_alignment_share_an_order():
    torch.manual_seed(0)
    model = Told(
        lambda self, x: self.one(self.a(x)) + self.two(torch.cat([x, self.a(x)], 1)),
        a=nn.Linear(2, 12),
        one=nn.Linear(12, 3),
        two=nn.Linear(14, 3),
    )
    both = [(model.one, "weight"), (model.two, "weight")]
    inputs = torch.randn(2, 2)
    before = outputs(model, inputs)
    rows = tpe.permute_for_nm(model, inputs, both).rows
    assert_same(model, before, inputs)
    whole = [float(layer.weight.detach().abs().sum()) for layer, _ in both]
    sums = [
        sum(a * b for a, b in zip(shares, whole, strict=True))
        for shares in zip(*((r.before, r.after) for r in rows), strict=True)
    ]
    assert sums[1] > sums[0]


def test_only_listed_readers_count():
    def forward(self, x):
        x = self.first(x)
        return self.one(x), self.two(x)

    model = Told(forward, first=nn.Linear(3, 4), one=nn.Linear(4, 2), two=nn.Linear(4, 3))
    with torch.no_grad():  # one wants channels 0 and 3 side by side, two wants them apart, and has more to lose
        model.one.weight.copy_(torch.tensor([[9.0, 9, 0, 0], [9, 0, 9, 0]]))
        model.two.weight.copy_(torch.tensor([[9.0, 1, 1, 9]] * 3))
    inputs, one, two = torch.randn(2, 3), (model.one, "weight"), (model.two, "weight")
    rows = tpe.permute_for_nm(model, inputs, [one, two], 1, 2).rows
    assert [(row.before, row.after, row.moved) for row in rows] == [(0.75, 0.75, 0), (0.9, 0.9, 0)]
    rows = tpe.permute_for_nm(model, inputs, [one], 1, 2).rows
    assert [(row.before, row.after, row.moved) for row in rows] == [(0.75, 1.0, 2)]
    assert kept(model.two.weight, 1, 2) == 0.5


def test_transposed_convolutions_sum_over_axis_0():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 16, 1), nn.ConvTranspose2d(16, 3, 2))
    inputs = image(1, 2, 4, 4)
    before = outputs(model, inputs)
    row = tpe.permute_for_nm(model, inputs, [(model[1], "weight")]).rows[0]
    assert_same(model, before, inputs)
    assert row.after == pytest.approx(kept(model[1].weight.transpose(0, 1)), rel=1e-6)
    assert row.after > row.before


@pytest.mark.parametrize("width", [8, 10, 3], ids=["whole", "short group", "one group"])
def test_a_short_last_group_counts_as_filled_up(width):
    model = chain(width)
    row = tpe.permute_for_nm(model, torch.randn(2, 6), [(model[2], "weight")]).rows[0]
    assert row.after == pytest.approx(kept(model[2].weight), rel=1e-6)
    assert (row.moved > 0) == (width > 3)
    assert row.reason == (None if width > 3 else "no exchange of two channels keeps more")


def test_tied_weights_count_once():
    torch.manual_seed(0)
    model = Told(
        lambda self, x: self.two(self.mid(self.one(self.first(x)).relu())),
        first=nn.Linear(3, 16),
        one=nn.Linear(16, 16),
        mid=nn.Linear(16, 16),
        two=nn.Linear(16, 16),
    )
    model.two.weight = model.one.weight
    inputs = torch.randn(2, 3)
    before = outputs(model, inputs)
    report = tpe.permute_for_nm(model, inputs, [(model.two, "weight"), (model.one, "weight"), (model.mid, "weight")])
    assert_same(model, before, inputs)
    assert model.two.weight is model.one.weight
    assert [row.tensor for row in report.rows] == ["two.weight", "mid.weight"]
    assert report.rows[0].after == pytest.approx(kept(model.one.weight), rel=1e-6)


def test_what_a_head_gives_changes_places_within_it():
    torch.manual_seed(0)
    layer = Attention(6, 3, 8)
    model, inputs = nn.Sequential(layer, nn.Linear(6, 2)), torch.randn(2, 5, 6)
    before, old = outputs(model, inputs), copy.deepcopy(layer)
    row = tpe.permute_for_nm(model, inputs, [(layer.proj, "weight")]).rows[0]
    assert_same(model, before, inputs)
    assert row.moved
    assert row.reason is None
    for head in range(3):
        own = slice(8 * head, 8 * head + 8)
        assert torch.equal(layer.proj.weight[:, own].sort(1).values, old.proj.weight[:, own].sort(1).values)
    assert torch.equal(layer.qkv.weight[:48], old.qkv.weight[:48])  # queries and keys
    assert not torch.equal(layer.qkv.weight[48:], old.qkv.weight[48:])


def test_bert():
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = bert().eval()
    inputs = {"input_ids": torch.randint(50, (2, 7))}
    before = outputs(model, inputs)
    report = tpe.permute_for_nm(model, inputs, weights(model.encoder), 1, 2)
    assert_same(model, before, inputs)
    assert {row.tensor.rpartition(".layer.")[2] for row in report.rows if row.moved} == {
        f"{layer}.{name}output.dense.weight" for layer in range(2) for name in ("", "attention.")
    }


def test_a_language_model_with_grouped_queries():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=50, tie_word_embeddings=True, **sizes, **heads)
    model = transformers.LlamaForCausalLM(config).eval()
    inputs = {"input_ids": torch.randint(50, (2, 7)), "use_cache": False}
    before = outputs(model, inputs)
    report = tpe.permute_for_nm(model, inputs, weights(model.model))
    assert_same(model, before, inputs, torch.float32)  # of its norms and rotations
    assert len(report.rows) == 14
    assert all(row.moved and row.reason is None for row in report.rows)


# ---------------------------------------------------------------------------------------------- what it is ranked by


def test_scores_take_the_place_of_weights():
    model = chain(8)
    with torch.no_grad():
        model[2].weight.fill_(1.0)
    scores = torch.ones(5, 8)
    scores[:, :4] = 9.0
    pair = (model[2], "weight")
    row = tpe.permute_for_nm(model, torch.randn(2, 6), [pair], importance_scores={pair: scores}).rows[0]
    assert (row.before, row.after) == pytest.approx((20 / 40, 36 / 40))


def test_activations_as_scores():
    model, data = chain(16), torch.randn(64, 6)
    params = [(model[2], "weight")]
    scores = tpe.calibration.activations(model, [data], params, progress=False)
    row = tpe.permute_for_nm(model, data, params, importance_scores=scores).rows[0]
    again = tpe.calibration.activations(model, [data], params, progress=False)
    assert row.after == pytest.approx(kept(again[params[0]]), rel=1e-5)
    assert row.after > row.before


def test_n_and_m():
    model = chain(16)
    row = tpe.permute_for_nm(model, torch.randn(2, 6), [(model[2], "weight")], 1, 8).rows[0]
    assert row.after == pytest.approx(kept(model[2].weight, 1, 8), rel=1e-6)
    assert row.after > row.before


def test_of_large_layers_some_outputs_tell(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 60))
    searched = []

    def noted(stripes, channels, n):
        searched.append(stripes[0].scores.shape)
        return best_order(stripes, channels, n)

    monkeypatch.setattr("torchprune_ext.permutation.best_order", noted)
    monkeypatch.setattr("torchprune_ext.permutation.LARGE", 16 * 16 * 25)
    row = tpe.permute_for_nm(model, torch.randn(2, 6), [(model[2], "weight")]).rows[0]
    assert searched == [(20, 16)]
    assert row.after == pytest.approx(kept(model[2].weight), rel=1e-6)
    assert row.after > row.before


def test_all_is_kept_of_n_of_n():
    model = chain(16)
    row = tpe.permute_for_nm(model, torch.randn(2, 6), [(model[2], "weight")], 4, 4).rows[0]
    assert (row.before, row.after, row.moved) == (1.0, 1.0, 0)
    assert row.reason == "n = m keeps all"


def test_weights_of_zero():
    model = chain(16)
    nn.init.zeros_(model[2].weight)
    row = tpe.permute_for_nm(model, torch.randn(2, 6), [(model[2], "weight")]).rows[0]
    assert (row.before, row.after, row.moved) == (1.0, 1.0, 0)


# ------------------------------------------------------------------------------------------------------ what follows


def test_everything_that_goes_by_channels_follows():
    torch.manual_seed(0)
    model = nn.Sequential(block(3, 16), nn.PReLU(16), nn.Conv2d(16, 4, 1))
    model = model.to(memory_format=torch.channels_last).train()
    model[0][0].weight.requires_grad_(requires_grad=False)
    inputs = image(4, 3, 6, 6)
    model(inputs).square().mean().backward()
    before, old = outputs(model, inputs), copy.deepcopy(model)
    grads = [(each, each.grad) for each in model.parameters() if each.grad is not None]
    report = tpe.permute_for_nm(model, inputs, [(model[2], "weight")])
    assert_same(model, before, inputs)
    order = [int((old[2].weight[0, :, 0, 0] == each).nonzero()) for each in model[2].weight[0, :, 0, 0]]
    assert report.rows[0].moved == sum(i != place for place, i in enumerate(order)) > 0
    for name, tensor in [*old.named_parameters(), *old.named_buffers()]:
        new = dict([*model.named_parameters(), *model.named_buffers()])[name]
        axis = 1 if name == "2.weight" else 0
        if tensor.dim() and tensor.shape[axis] == 16:
            assert torch.equal(new, tensor.index_select(axis, torch.tensor(order))), name
        assert new.stride() == tensor.stride()
        assert new.requires_grad == tensor.requires_grad
    for parameter, grad in grads:
        assert parameter.grad is grad
    for module, twin in ((model[0][1], old[0][1]), (model[1], old[1])):
        module, twin = module.weight, twin.weight
        assert torch.equal(module, twin[order])
    assert model.training
    model.zero_grad()
    model(inputs).square().mean().backward()  # gradients have moved with their entries
    for parameter, name in ((model[2].weight, "2.weight"), (model[1].weight, "1.weight")):
        twin = dict(old.named_parameters())[name]
        assert parameter.grad.shape == twin.shape


def test_gradients_move_with_their_entries():
    model = chain(16)
    model(torch.randn(4, 6)).sum().backward()
    for each in model.parameters():
        each.grad = each.detach() * 2
    tpe.permute_for_nm(model, torch.randn(2, 6), [(model[2], "weight")])
    for each in model.parameters():
        assert torch.equal(each.grad, each * 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=["half", "bfloat16", "double"])
def test_other_dtypes(dtype):
    model = chain(16).to(dtype)
    inputs = torch.randn(2, 6, dtype=dtype)
    before = outputs(model, inputs)
    assert tpe.permute_for_nm(model, inputs, [(model[2], "weight")]).rows[0].moved
    assert_same(model, before, inputs)


def test_pruning_afterwards_keeps_what_was_said():
    model = chain(16)
    report = tpe.permute_for_nm(model, torch.randn(2, 6), [(model[2], "weight")])
    whole = float(model[2].weight.detach().abs().sum())
    tpe.nm_structured(model[2], "weight", n=2, m=4)
    assert float(model[2].weight.detach().abs().sum()) / whole == pytest.approx(report.rows[0].after, rel=1e-6)


def test_inference_mode():
    model = chain(16)
    with torch.inference_mode():
        assert tpe.permute_for_nm(model, torch.randn(2, 6), [(model[2], "weight")]).rows[0].moved
    model(torch.randn(2, 6)).sum().backward()
