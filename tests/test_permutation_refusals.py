"""Permutations for N:M: what must not move, and that nothing is left half done."""

import pytest
import torch
from compacting import Told, image
from permuting import chain, kept, weights
from snapshots import Snapshot
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe
from torchprune_ext._graph import graph_of
from torchprune_ext._reordering import Order, reorder

INPUT = "it is multiplied with the model's input, or other values without channels of their own"


# ------------------------------------------------------------------------------------------------ what must not move


def reason(model, inputs=None, **options):
    snapshot = Snapshot(model)
    row = tpe.permute_for_nm(model, torch.randn(2, 6) if inputs is None else inputs, [(model[2], "weight")]).rows[0]
    assert snapshot.differences() == []
    assert row.moved == 0
    assert row.before == row.after
    return row.reason


@pytest.mark.parametrize("layer", [0, 2])
def test_what_is_pruned_stays(layer):
    model = chain()
    prune.l1_unstructured(model[layer], "weight", amount=0.5)
    shape = tuple(model[layer].weight.shape)
    assert reason(model) == f"Linear.weight of shape {shape} is pruned: call this first, or after undo_all(model)"
    tpe.undo_all(model)
    assert tpe.permute_for_nm(model, torch.randn(2, 6), [(model[2], "weight")]).rows[0].moved


def test_what_keeps_its_zeros_stays():
    model = chain()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    tpe.remove_all(model, keep_zeros=True)
    assert reason(model) == "Linear.weight of shape (16, 6) keeps its zeros (keep_zeros)"


def test_a_weight_tied_to_a_pruned_one_stays():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    model[4].weight = model[2].weight
    prune.l1_unstructured(model[4], "weight", amount=0.5)
    assert "is pruned" in reason(model, torch.randn(2, 16))


def test_what_is_nm_already_stays_so():
    def forward(self, x):
        x = self.first(x)
        return self.one(x), self.two(x)

    torch.manual_seed(0)
    model = Told(forward, first=nn.Linear(3, 16), one=nn.Linear(16, 4), two=nn.Linear(16, 4))
    tpe.nm_structured(model.two, "weight", 2, 4)
    tpe.remove_all(model)
    row = tpe.permute_for_nm(model, torch.randn(2, 3), [(model.one, "weight")]).rows[0]
    assert row.reason == "two.weight is 2:4 already, and would not be in another order"
    assert kept(model.two.weight) == 1.0


def test_pruning_elsewhere_does_not_matter():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3), nn.ReLU())
    model += nn.Sequential(nn.Linear(3, 3))
    prune.l1_unstructured(model[6], "weight", amount=0.5)
    inputs = torch.randn(4, 6)
    before, mask = model(inputs).detach(), model[6].weight_mask
    rows = tpe.permute_for_nm(model, inputs, [(model[2], "weight"), (model[6], "weight")]).rows
    assert [row.moved > 0 for row in rows] == [True, False]
    assert torch.allclose(model(inputs), before, atol=1e-6)
    assert model[6].weight_mask is mask
    assert prune.is_pruned(model[6])


def expanded(model):
    model[0].register_buffer("scale", torch.ones(1).expand(16))
    model[0].register_forward_hook(lambda module, _, out: out * module.scale)
    return "0.scale is expanded, so that several entries are one"


def sparse(model):
    model[0].weight.grad = torch.ones(16, 6).to_sparse()
    return "0.weight has a sparse gradient"


def of_inference(model):
    with torch.inference_mode():
        model[0].bias = nn.Parameter(torch.randn(16), requires_grad=False)
    return "0.bias was made in inference mode"


@pytest.mark.parametrize("change", [expanded, sparse, of_inference], ids=lambda change: change.__name__)
def test_what_cannot_be_changed_in_place_stays(change):
    model = chain()
    why = change(model)
    values = [each.detach().clone() for each in model.parameters()]
    row = tpe.permute_for_nm(model, torch.randn(2, 6), [(model[2], "weight")]).rows[0]
    assert (row.moved, row.reason) == (0, why)
    assert all(map(torch.equal, values, model.parameters()))


def test_layers_with_one_input_for_each_output():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8))
    report = tpe.permute_for_nm(model, image(1, 3, 6, 6), [(model[1], "weight")])
    assert report.rows[0].reason == "each output has one input"


# -------------------------------------------------------------------------------------------------- nothing half done


class Hidden(nn.Module):
    """Its outputs depend on the order of channels in a way that no operation shows."""

    def __init__(self):
        super().__init__()
        self.first, self.mid, self.out = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.out(self.mid(self.first(x)).relu()) * float(self.out.weight.detach().numpy()[0, 0])


def hidden():
    torch.manual_seed(0)
    return Hidden()


def test_a_model_that_computes_something_else_is_put_back():
    model = hidden()
    snapshot = Snapshot(model)
    with pytest.raises(RuntimeError) as error:
        tpe.permute_for_nm(model, torch.randn(2, 6), weights(model))
    assert snapshot.differences() == []
    assert "the 16 channels of mid.weight the model computes something else (output differs by" in str(error.value)
    assert str(error.value).endswith("Leave what reads them out of params: out.weight.")
    rows = tpe.permute_for_nm(model, torch.randn(2, 6), [(model.mid, "weight")]).rows  # the remedy works
    assert rows[0].moved


def test_wiring_that_is_not_the_same_for_all_channels_is_found_out():
    def forward(self, x):
        x = self.first(x)
        one, other = x.chunk(2, -1)
        return self.product(one * other) + self.rolled(x.roll(1, -1))

    torch.manual_seed(0)
    model = Told(forward, first=nn.Linear(6, 16), product=nn.Linear(8, 2), rolled=nn.Linear(16, 2))
    inputs, snapshot = torch.randn(2, 6), Snapshot(model)
    [group] = [each for each in graph_of(model, inputs, in_order=True) if each.fixed is None]
    told = r"the 8 channels of first.weight .* params: product.weight, rolled.weight"
    with torch.no_grad(), pytest.raises(RuntimeError, match=told):
        reorder(model, [Order(group, torch.tensor([7, 1, 2, 3, 4, 5, 6, 0]))], inputs)
    assert snapshot.differences() == []


@pytest.mark.parametrize("call", [1, 3, 5])
def test_an_interrupt_puts_all_back(monkeypatch, call):
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    torch.manual_seed(0)
    calls = []
    select = torch.Tensor.index_select

    def interrupted(*args):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return select(*args)

    inputs, snapshot = torch.randn(2, 16), Snapshot(model)
    monkeypatch.setattr("torchprune_ext._reordering._problem", lambda *_: pytest.fail("too late"))
    monkeypatch.setattr("torchprune_ext._reordering._selected", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tpe.permute_for_nm(model, inputs, weights(model))
    assert snapshot.differences() == []


def test_an_interrupt_while_outputs_are_compared(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    model = chain()
    snapshot = Snapshot(model)
    monkeypatch.setattr("torchprune_ext.deploy.checking.Outputs.differ", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tpe.permute_for_nm(model, torch.randn(2, 6), [(model[2], "weight")])
    assert snapshot.differences() == []


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "n=5, m=4 is not an N:M pattern", {"n": 5}),
        (TypeError, "m=2.0 is a float", {"m": 2.0}),
        (TypeError, "model=3 is a int", {"model": 3}),
        (ValueError, r"params=\[\] lists nothing", {"params": []}),
        (ValueError, "params.0., Linear.weight of shape .1, 1.: it is not a tensor of model", {"other": True}),
        (ValueError, "importance_scores has no entry for this tensor", {"importance_scores": {}}),
    ],
)
def test_bad_input_is_named(error, message, change):
    model = chain()
    snapshot = Snapshot(model)
    arguments = {"model": model, "example_inputs": torch.randn(2, 6), "params": [(model[2], "weight")]}
    if change.pop("other", False):
        arguments["params"] = [(nn.Linear(1, 1), "weight")]
    with pytest.raises(error, match=message):
        tpe.permute_for_nm(**arguments | change)
    assert snapshot.differences() == []


def test_a_bias_has_no_groups():
    model = chain()
    with pytest.raises(ValueError, match=r"params\[0\], Linear.bias of shape \(5,\)"):
        tpe.permute_for_nm(model, torch.randn(2, 6), [(model[2], "bias")])


def test_a_weight_that_is_not_finite():
    model = chain()
    model[2].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weight has 1 NaN or infinite entries"):
        tpe.permute_for_nm(model, torch.randn(2, 6), [(model[2], "weight")])


def test_the_table():
    model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        for layer in (2, 4):
            model[layer].weight.copy_(torch.tensor([9.0, 8, 7, 6, 1, 1, 1, 1]).expand_as(model[layer].weight))
    report = tpe.permute_for_nm(model, torch.randn(4, 2), weights(model))
    assert str(report).splitlines() == [
        "tensor    inputs  moved  2:4 kept  keeps now",
        "0.weight       2      0   100.0 %    100.0 %",
        "2.weight       8      4    55.9 %     88.2 %",
        "4.weight       8      4    55.9 %     88.2 %",
        f"0.weight: {INPUT}",
    ]
    assert (report.n, report.m) == (2, 4)
