"""Reorderings, reports and pictures under attack: what was silently wrong, or failed without a word that helps."""

import copy

import pytest
import torch
from torch import nn

import torchprune_ext as tpe
from torchprune_ext import plots

DATA = [(torch.randn(64, 6, generator=torch.Generator().manual_seed(0)), None)]


def chain(*between):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), *between, nn.ReLU(), nn.Linear(16, 5))


def as_module(model, params):
    return copy.deepcopy(model)


def as_state_dict(model, params):
    return copy.deepcopy(model.state_dict())


def call_compensate(model, dense):
    params = tpe.prunable_parameters(model)
    tpe.nm_structured(model[-1], "weight", n=2, m=4)
    tpe.compensate(model, DATA, params, dense=dense, progress=False)


def call_prune_and_compensate(model, dense):
    params = tpe.prunable_parameters(model)
    tpe.prune_and_compensate(model, DATA, params, target_sparsity=0.5, dense=dense, progress=False)


def call_refine(model, dense):
    tpe.nm_structured(model[-1], "weight", n=2, m=4)
    tpe.refine(model, DATA * 3, dense=dense, progress=False)


@pytest.mark.parametrize("take", [as_module, as_state_dict, tpe.dense_values], ids=["module", "state", "values"])
@pytest.mark.parametrize(
    "call", [call_compensate, call_prune_and_compensate, call_refine], ids=["compensate", "prune", "refine"]
)
def test_a_reference_from_before_a_reordering_is_refused(take, call):
    model = chain()
    old = take(model, tpe.prunable_parameters(model))
    assert tpe.permute_for_nm(model, DATA[0][0], [(model[-1], "weight")]).rows[0].moved
    new = take(model, tpe.prunable_parameters(model))
    twin = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"same values in another order.*permute_for_nm"):
        call(model, old)
    call(twin, new)


def test_a_reference_is_seen_to_be_reordered_after_half_the_model_was_trained():
    model = chain(nn.BatchNorm1d(16)).half()
    nn.init.normal_(model[1].weight)
    old = copy.deepcopy(model).float()
    tpe.permute_for_nm(model, DATA[0][0].half(), [(model[-1], "weight")])
    for module in (model[0], model[-1]):
        module.weight.data += 1
        module.bias.data += 1
    with pytest.raises(ValueError, match=r"1\.weight.*same values in another order"):
        call_compensate(model.float(), old.half().float())


def test_few_values_in_another_order_are_no_reordering():
    model = chain()
    signs = torch.tensor([1.0, -1.0]).repeat(48).view(16, 6)
    model[0].weight.data.copy_(signs)
    old = copy.deepcopy(model)
    model[0].weight.data.neg_()  # as binary weights may change in training
    call_compensate(model, old)


class Private(nn.Module):
    """Layers whose names matplotlib would take for something else."""

    def __init__(self):
        super().__init__()
        for name in ("_stem", r"$\frac$", "head"):
            self.add_module(name, nn.Linear(4, 4))


def legend(ax):
    return [text.get_text().strip().replace(r"\$", "$") for text in ax.get_legend().get_texts()]


def drawn(ax):
    """The axes, once all of them could be drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(ax.figure).draw()
    return ax


@pytest.fixture
def axes():
    figure = pytest.importorskip("matplotlib.figure", reason="needs matplotlib")
    return figure.Figure().subplots()


def test_the_legend_of_sensitivity_names_every_layer(axes):
    model, levels = Private(), (0.5,)
    curve = tpe.allocation.sensitivity(
        model, lambda m: m.head.weight.norm().detach(), tpe.prunable_parameters(model), levels, progress=False
    )
    ax = drawn(plots.sensitivity(curve, axes))
    assert legend(ax) == ["dense", *(f"{name}.weight" for name, _ in model.named_children())]


def test_the_legend_of_a_comparison_names_every_model(axes):
    names = ["$5 and $3", "_private", "plain"]
    found = tpe.compare({name: nn.Linear(2, 2) for name in names}, torch.ones(1, 2), rounds=2)
    ax = drawn(plots.compare(found, axes))
    assert legend(ax) == names
    assert ax.get_xlabel().replace(r"\$", "$") == "% of $5 and $3"


class _Own(torch.nn.utils.prune.L1Unstructured):
    pass


def test_names_of_layers_and_methods_are_no_formulas(axes):
    model = Private()
    for module in model.children():
        _Own.apply(module, "weight", amount=4)
    wanted = [f"{name}.weight" for name, _ in model.named_children()]
    for draw in (plots.history, plots.density_bars):
        axes.clear()
        ax = drawn(draw(model, ax=axes))
        assert [text.get_text().strip().replace(r"\$", "$") for text in ax.get_yticklabels()] == wanted
        assert draw is not plots.history or legend(ax) == ["_Own"]
    some = axes.figure.subplots(1, 3)
    for ax, name in zip(plots.weight_histograms(model, some), wanted, strict=True):
        assert name in drawn(ax).get_title().replace(r"\$", "$")


class Holder(nn.Module):
    def __init__(self, tensor):
        super().__init__()
        self.w = nn.Parameter(tensor, requires_grad=False)


def test_a_report_knows_which_names_it_has():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    found = tpe.report(model)
    assert [name in found for name in ("0.weight", "1.weight", "2.weight", None)] == [True, True, False, False]
    assert found.rows[0] in found


def test_a_report_does_not_read_formats_without_a_way_to():
    if not hasattr(torch, "float4_e2m1fn_x2"):
        pytest.skip("needs torch 2.8 or newer for float4")
    found = tpe.report(Holder(torch.zeros(4, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)))
    assert (found["w"].source, found["w"].kept) == ("unread", 16)


def test_no_multiplications_are_not_said_to_lack_a_formula():
    found = tpe.report(nn.Embedding(4, 4), torch.tensor([1]), rounds=2)
    assert found.macs is None
    assert "no product was seen, or one" in str(found)


def test_a_lazy_model_is_named_in_words():
    with pytest.raises(ValueError, match=r"model, a LazyLinear, has no shape yet"):
        tpe.report(nn.LazyLinear(4))
    with pytest.raises(ValueError, match=r"model\.0, a LazyLinear, has no shape yet"):
        tpe.report(nn.Sequential(nn.LazyLinear(4)))


def test_a_lazy_layer_is_not_drawn(axes):
    with pytest.raises(ValueError, match=r"LazyLinear\.weight has no shape yet\. Run one forward first"):
        plots.mask_image(nn.LazyLinear(4), axes)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantized_tensors_are_drawn(axes):
    tensor = torch.quantize_per_tensor(torch.eye(3), 0.5, 0, torch.qint8)
    image = drawn(plots.mask_image(tensor, axes)).get_images()[0]
    assert image.get_array().tolist() == torch.eye(3).tolist()
    ax = drawn(plots.density_bars(Holder(tensor), ax=type(axes.figure)().subplots()))
    assert [text.get_text() for text in ax.texts] == ["33.3 % (3 of 9)"]
