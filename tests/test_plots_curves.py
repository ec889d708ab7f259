"""Pictures of what was measured show the numbers that were."""

import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure
from torch import nn

import torchprune_ext as tpe
from torchprune_ext import plots


def curve_of(count, sparsities=(0.25, 0.5)):
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(count)])

    def size(model):
        return sum(float(layer.weight.detach().norm()) for layer in model)

    return tpe.allocation.sensitivity(model, size, tpe.prunable_parameters(model), sparsities, progress=False)


def test_each_layer_is_a_line_through_what_was_measured():
    curve, ax = curve_of(3), Figure().subplots()
    assert plots.sensitivity(curve, ax=ax) is ax
    dense, *lines = ax.lines
    assert set(dense.get_ydata()) == {curve.dense}
    assert [line.get_label() for line in lines] == ["0.weight", "1.weight", "2.weight"]
    for line in lines:
        rows = [row for row in curve.rows if row.layer == line.get_label()]
        assert list(line.get_xdata()) == [0, 25, 50]
        assert list(line.get_ydata()) == [curve.dense, *(row.metric for row in rows)]
    assert ax.get_legend() is not None
    assert pyplot.get_fignums() == []


def test_lines_of_many_layers_can_be_told_apart():
    ax = plots.sensitivity(curve_of(30, (0.5,)), ax=Figure().subplots())
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in ax.lines[1:]}
    assert len(looks) == 30


def test_a_new_figure_by_default_and_refusals():
    ax = plots.sensitivity(curve_of(1))
    assert ax.figure.number in pyplot.get_fignums()
    pyplot.close(ax.figure)
    with pytest.raises(TypeError, match="curve is a dict"):
        plots.sensitivity({})
    with pytest.raises(TypeError, match="ax is a str"):
        plots.sensitivity(curve_of(1), ax="ax")
