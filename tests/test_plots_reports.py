"""Pictures of layers, reports, histories, schedules and comparisons: what they show, and that it can be read."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe
from torchprune_ext import plots
from torchprune_ext.deploy.compare import Comparison, Row

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
from matplotlib import colors, pyplot  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.testing.compare import compare_images  # noqa: E402
from matplotlib.text import Text  # noqa: E402
from PIL import Image, ImageChops  # noqa: E402

BASELINE = Path(__file__).parent / "baseline"
TOLERANCE = 12  # root of the mean squared difference of pixels, of 255: a release draws cubes a bit otherwise, by 9


@pytest.fixture(autouse=True)
def _nothing_stays_open():
    yield
    pyplot.close("all")


def one_ax(width=6.4, height=4.8, **options):
    return Figure(figsize=(width, height)).add_subplot(**options)


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8))
    for _ in range(3):
        tpe.global_unstructured([(model[0], "weight"), (model[4], "weight")], amount=0.1)
    tpe.bn_scaling(model[0], "weight", 1, bn=model[1])
    tpe.nm_structured(model[4], "weight", 2, 4)
    prune.l1_unstructured(model[4], "weight", 0.1)
    return model


def row(name, metric=1.0, latency=1e-3, spread=1e-4, macs=1000, parameters=100, nonzero=100, nbytes=400):
    return Row(name, {"accuracy": metric}, latency, spread, macs, parameters, nonzero, nbytes)


def comparison(*rows):
    return Comparison(tuple(rows), 1, 5)


# ---------------------------------------------------------------------------------------------------------- mask_image


def colours_of(ax):
    (image,) = ax.get_images()
    return image.cmap(image.norm(image.get_array()))


def test_a_layer_is_grey_where_its_mask_is_zero_and_not_where_a_kept_value_is():
    layer = nn.Linear(3, 2)
    layer.weight.data = torch.tensor([[1.0, 0.0, 2.0], [3.0, 4.0, 0.0]])
    prune.custom_from_mask(layer, "weight", torch.tensor([[1, 1, 0], [0, 1, 1]]))
    (image,) = plots.mask_image(layer, ax=one_ax()).get_images()
    assert image.get_array().tolist() == [[1, 1, 0], [0, 1, 1]]
    ax = plots.mask_image(layer, ax=one_ax())
    assert [text.get_text() for text in ax.texts] == ["1", "0", "0", "0", "4", "0"]
    tpe.remove_all(layer)
    (image,) = plots.mask_image(layer, ax=one_ax()).get_images()
    assert image.get_array().tolist() == [[1, 0, 0], [0, 1, 0]]  # no mask: zeros


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_a_convolution_is_a_tile_for_each_kernel(kind):
    layer = kind(2, 3, 2)
    prune.random_unstructured(layer, "weight", 0.5)
    ax = plots.mask_image(layer, ax=one_ax())
    shown, mask = ax.get_images()[0].get_array(), layer.weight_mask
    kernel = mask.shape[2:]
    rows = list(itertools.product(*[range(size) for size in kernel[:-1]]))
    for o, i, column in itertools.product(range(3), range(2), range(kernel[-1])):
        for place, above in enumerate(rows):
            assert shown[o * len(rows) + place, i * kernel[-1] + column] == mask[(o, i, *above, column)]
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("filters", "channels")
    transposed = plots.mask_image(nn.ConvTranspose2d(2, 3, 2), ax=one_ax())
    assert (transposed.get_ylabel(), transposed.get_xlabel()) == ("channels", "filters")


def test_other_tensors_of_a_layer_by_name():
    lstm = nn.LSTM(3, 2)
    prune.l1_unstructured(lstm, "weight_ih_l0", 0.5)
    (image,) = plots.mask_image(lstm, ax=one_ax(), name="weight_ih_l0").get_images()
    assert image.get_array().sum() == 12
    (image,) = plots.mask_image(lstm, ax=one_ax(), name="bias_ih_l0").get_images()
    assert image.get_array().shape == (1, 8)
    with pytest.raises(ValueError, match=r"LSTM, which has no parameter 'weight'.*name= one of \['weight_hh_l0'"):
        plots.mask_image(lstm)
    with pytest.raises(ValueError, match=r"Sequential, which has no parameter.*Pass a layer of it, e\.g\. \['0', '1'"):
        plots.mask_image(network())
    with pytest.raises(ValueError, match="on the meta device"):
        plots.mask_image(nn.Linear(2, 2, device="meta"))
    with pytest.raises(TypeError, match=r"tensor is a Report\. Pass a torch\.Tensor"):
        plots.mask_image(tpe.report(nn.Linear(2, 2)))


@pytest.mark.parametrize("shape", [(401, 3), (3, 1001), (850, 1300)])
def test_large_tensors_are_images_of_densities(shape):
    torch.manual_seed(0)
    mask = torch.rand(shape) < torch.linspace(0, 1, shape[1])
    ax = plots.mask_image(mask, ax=one_ax())
    (image,) = ax.get_images()
    shown = torch.as_tensor(image.get_array().data)
    high, wide = (-(-size // 400) for size in shape)
    assert shown.shape == (-(-shape[0] // high), -(-shape[1] // wide))
    for i, j in itertools.product(range(0, shown.shape[0], 37), range(0, shown.shape[1], 41)):
        part = mask[i * high : (i + 1) * high, j * wide : (j + 1) * wide]
        assert shown[i, j].item() == pytest.approx(part.double().mean().item())
    assert image.get_extent() == [-0.5, shape[1] - 0.5, shape[0] - 0.5, -0.5]
    assert f"a pixel is {high} x {wide}" in ax.get_xlabel()
    assert len(ax.findobj()) < 100  # no patches, lines or texts for entries


def test_full_and_empty_pixels_have_the_colours_of_entries():
    mask = torch.zeros(1000, 10)
    mask[500:] = 1
    shown = colours_of(plots.mask_image(mask, ax=one_ax()))
    assert tuple(shown[0, 0]) == colors.to_rgba(plots.PRUNED)
    assert tuple(shown[-1, 0]) == colors.to_rgba(plots.KEPT)


def test_cubes_of_a_layer_are_those_of_its_mask():
    layer = nn.Conv2d(2, 3, 2)
    prune.random_unstructured(layer, "weight", 0.5)
    axes = [plots.mask_cubes(each, ax=one_ax(projection="3d")) for each in (layer, layer.weight_mask)]
    faces = [torch.as_tensor(ax.collections[0].get_facecolor()) for ax in axes]
    assert torch.equal(*faces)
    with pytest.raises(ValueError, match=r"36,864 cubes.*or draw the whole layer by mask_image\(layer\)"):
        plots.mask_cubes(nn.Conv2d(64, 64, 3))
    with pytest.raises(ValueError, match="has 2 axes"):
        plots.mask_cubes(nn.Linear(2, 2))


# -------------------------------------------------------------------------------------------- density_bars of a report


def bars_of(ax):
    return {
        label.get_text(): [bars[place].get_width() for bars in ax.containers]
        for place, label in enumerate(ax.get_yticklabels())
    }


def test_a_report_is_drawn_as_its_model():
    model = network()
    drawn = [plots.density_bars(each, ax=one_ax()) for each in (model, tpe.report(model))]
    assert bars_of(drawn[0]) == bars_of(drawn[1])
    assert len({tuple(text.get_text() for text in ax.texts) for ax in drawn}) == 1
    dense = tpe.undo_all(tpe.copy_pruned(model))
    assert bars_of(plots.density_bars(tpe.report(dense), model, ax=one_ax())) == bars_of(
        plots.density_bars(dense, tpe.report(model), ax=one_ax())
    )
    with pytest.raises(ValueError, match="model of type ReLU has no parameter"):
        plots.density_bars(tpe.report(nn.ReLU()))
    with pytest.raises(TypeError, match=r"model is a Report, which has counts and no values\. Pass the model itself"):
        plots.weight_histograms(tpe.report(model))


# ------------------------------------------------------------------------------------------------------------- history


def test_history_is_a_field_for_each_call_and_the_density_of_now():
    model = network()
    ax = plots.history(model, ax=one_ax())
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["0.weight", "0.bias", "1.weight", "1.bias", "4.weight"]
    told = {call.get_text(): handle for call, handle in zip(*legend_of(ax), strict=True)}
    assert list(told) == ["global_unstructured", "BNScaling", "NMStructured", "L1Unstructured"]
    for place, name in enumerate(names):
        fields = sorted(
            (bar for bars in ax.containers for bar in bars if round(bar.get_y() + bar.get_height() / 2) == place),
            key=lambda bar: bar.get_x(),
        )
        module, own = model[int(name[0])], name[2:]
        calls = [call.partition("(")[0] for call in tpe.history(module, own)]
        drawn = []
        for bar in fields:
            colour = next(call for call, handle in told.items() if handle.get_facecolor() == bar.get_facecolor())
            assert bar.get_x() == len(drawn)
            drawn += [colour] * round(bar.get_width())
        assert drawn == calls
    notes = [text.get_text() for text in ax.texts if "kept" in text.get_text()]
    assert notes == [f"{100 * tpe.report(model)[name].density:.1f} % kept" for name in names]
    assert [text.get_text() for text in ax.texts].count("3 x") == 2


def legend_of(ax):
    legend = ax.get_legend()
    return legend.get_texts(), legend.legend_handles


def test_history_of_reports_of_lost_hooks_and_of_nothing():
    model = network()
    assert len(plots.history(tpe.report(model), ax=one_ax()).containers) == len(
        plots.history(model, ax=one_ax()).containers
    )
    layer = prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)
    layer._forward_pre_hooks.clear()
    (note,) = plots.history(layer, ax=one_ax()).texts
    assert note.get_text() == "50.0 % kept, history lost"
    with pytest.raises(ValueError, match="model of type Sequential has no tensor that a mask prunes"):
        plots.history(tpe.remove_all(model))
    with pytest.raises(TypeError, match="model=3 is a int"):
        plots.history(3)


# ------------------------------------------------------------------------------------------------------------ schedule


@pytest.mark.parametrize(
    "schedule",
    [
        tpe.schedules.cubic(0, 10, final=0.9),
        tpe.schedules.linear(5, 50, 7, 0.2, final=0.8),
        tpe.schedules.one_shot(0, 0.5),
        tpe.schedules.one_shot(7, 0.5),
    ],
    ids=["cubic", "linear", "at_once", "one_shot"],
)
def test_a_schedule_has_its_value_at_every_step(schedule):
    ax = plots.schedule(schedule, ax=one_ax())
    (line,) = ax.lines
    assert line.get_drawstyle() == "steps-post"
    steps, values = list(line.get_xdata()), list(line.get_ydata())
    assert steps[0] == 0
    assert steps[-1] > schedule.end
    for step in range(steps[-1] + 1):  # stairs: the value of the last corner
        assert values[max(place for place, corner in enumerate(steps) if corner <= step)] == 100 * schedule(step)
    assert [steps[place] for place in line.get_markevery()] == list(schedule.updates())[: len(line.get_markevery())]


def test_a_schedule_of_a_million_steps_is_a_thousand_corners():
    schedule = tpe.schedules.cubic(0, 1_000_003, final=0.9)
    (line,) = plots.schedule(schedule, ax=one_ax()).lines
    assert len(line.get_xdata()) < 1010
    assert all(y == 100 * schedule(x) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True))
    assert line.get_ydata()[-1] == 90


def test_schedules_on_the_same_axes_are_told_apart():
    ax = one_ax()
    for schedule in (tpe.schedules.cubic(0, 10, final=0.9), tpe.schedules.linear(0, 10, 2, final=0.9)):
        assert plots.schedule(schedule, ax=ax) is ax
    assert len({(line.get_color(), line.get_linestyle()) for line in ax.lines}) == 2
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["cubic", "linear, every 2 steps"]
    with pytest.raises(TypeError, match=r"schedule is a float\. Pass e\.g\. schedules\.cubic"):
        plots.schedule(0.9)


# ------------------------------------------------------------------------------------------------------------- compare


def test_bars_are_ratios_to_the_first_and_notes_are_numbers():
    found = comparison(row("a", 0.5), row("b", 0.25, 2e-3, macs=250, nonzero=30, nbytes=200))
    ax = plots.compare(found, ax=one_ax())
    assert bars_of(ax) == {
        "accuracy": [100, 50],
        "latency": [100, 200],
        "MACs": [100, 25],
        "parameters": [100, 100],
        "nonzero": [100, 30],
        "bytes": [100, 50],
    }
    notes = [text.get_text() for text in ax.texts]
    assert notes[6:] == ["0.25", "2.00 ms ± 0.100", "250", "100", "30", "200 B"]
    ranges = [list(line.get_xdata()) for line in ax.lines[:2]]
    assert ranges == [[pytest.approx(95), pytest.approx(105)], [pytest.approx(195), pytest.approx(205)]]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]
    assert ax.get_xlabel() == "% of a"


def test_what_is_not_known_has_no_bar_and_what_is_too_long_is_cut():
    ax = plots.compare(comparison(row("a", -1.0, macs=None), row("b", 2.0, nbytes=4000, macs=5)), ax=one_ax())
    bars, notes = bars_of(ax), [text.get_text() for text in ax.texts]
    assert bars["MACs"] == [0, 0]
    assert bars["accuracy"] == [100, 0]
    assert bars["bytes"] == [100, 250]
    assert notes[2] == "-"
    assert notes[-1] == "4.00 kB →"
    with pytest.raises(TypeError, match=r"comparison is a dict\. Pass what compare"):
        plots.compare({})


def test_many_models_can_be_told_apart():
    ax = plots.compare(comparison(*[row(str(number)) for number in range(20)]))
    looks = {(bars[0].get_facecolor(), bars[0].get_hatch()) for bars in ax.containers}
    assert len(looks) == 20


# ------------------------------------------------------------------------------------------------ that it can be read


LONG = "encoder.layers.11.attention.self.query"


def deep():
    model = nn.Sequential()
    for number in range(12):
        model.add_module(f"block{number}_with_quite_a_name", nn.Linear(64, 64))
    for _ in range(2):
        tpe.global_unstructured(tpe.prunable_parameters(model), amount=0.3)
    tpe.global_nm_structured(tpe.prunable_parameters(model), target_sparsity=0.6, m=4)
    return model


def curve(count):
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(count)])

    def size(model):
        return sum(float(layer.weight.detach().norm()) for layer in model)

    return tpe.allocation.sensitivity(model, size, tpe.prunable_parameters(model), (0.25, 0.5), progress=False)


DRAWN = {
    "mask_image": lambda ax: plots.mask_image(network()[0], ax=ax),
    "mask_image_of_many": lambda ax: plots.mask_image(torch.ones(900, 900), ax=ax),
    "density_bars": lambda ax: plots.density_bars(network(), ax=ax),
    "density_bars_of_two": lambda ax: plots.density_bars(tpe.undo_all(deep()), deep(), ax=ax),
    "history": lambda ax: plots.history(network(), ax=ax),
    "history_of_many": lambda ax: plots.history(deep(), ax=ax),
    "schedule": lambda ax: plots.schedule(tpe.schedules.cubic(0, 1000, 100, final=0.9), ax=ax),
    "compare": lambda ax: plots.compare(comparison(row("dense"), row("pruned", nbytes=800)), ax=ax),
    "compare_of_four": lambda ax: plots.compare(comparison(*map(row, ("a", "b", LONG, "d"))), ax=ax),
    "sensitivity": lambda ax: plots.sensitivity(curve(4), ax=ax),
    "sensitivity_of_many": lambda ax: plots.sensitivity(curve(35), ax=ax),
}
SMALL = ("mask_image", "mask_image_of_many", "density_bars", "history", "schedule", "compare")


def texts_of(ax):
    """Return all that is written in a figure, and the boxes around it."""
    ax.figure.draw_without_rendering()
    beyond = set()  # of the axis: not drawn
    sides = [(each.xaxis, sorted(each.get_xlim())) for each in ax.figure.axes]
    sides += [(each.yaxis, sorted(each.get_ylim())) for each in ax.figure.axes]
    for axis, (low, high) in sides:
        beyond |= {tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
    texts = [text for text in ax.figure.findobj(Text) if text.get_visible() and text.get_text() and text not in beyond]
    return [(text.get_text(), text.get_window_extent()) for text in texts]


def check_readable(ax):
    shown = texts_of(ax)
    page = ax.figure.bbox
    for text, box in shown:
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= page.x1 + 1 and box.y1 <= page.y1 + 1
        assert inside, f"{text!r} leaves the figure"
    for (first, one), (second, other) in itertools.combinations(shown, 2):
        across = min(one.x1, other.x1) - max(one.x0, other.x0)
        down = min(one.y1, other.y1) - max(one.y0, other.y0)
        assert across < 2 or down < 3, f"{first!r} and {second!r} overlap"


@pytest.mark.parametrize("name", DRAWN)
def test_nothing_that_is_written_overlaps_or_leaves_the_figure(name):
    check_readable(DRAWN[name](None))


def test_histograms_can_be_read_too():
    model = nn.Sequential()
    for number, name in enumerate(("a", "layers_11_attention_output_dense", LONG.replace(".", "_"), "b" * 60)):
        model.add_module(f"{number}{name}", nn.Linear(30, 30))
    axes = plots.weight_histograms(model)
    check_readable(axes[0])
    titles = [ax.get_title() for ax in axes]
    assert titles[0] == "0a.weight: 100.0 % kept"
    assert titles[-1] == f"…{'b' * 24}.weight\n100.0 % kept"


@pytest.mark.parametrize("name", SMALL)
def test_small_axes_can_be_read_too(name):
    figure = Figure(figsize=(3.4, 2.6), layout="constrained")  # a column of a paper
    check_readable(DRAWN[name](figure.add_subplot()))


@pytest.mark.parametrize("name", DRAWN)
def test_text_is_at_least_five_points_large(name):
    ax = DRAWN[name](None)
    assert min(text.get_fontsize() for text in ax.figure.findobj(Text) if text.get_text()) >= 5


@pytest.mark.parametrize("name", [name for name in DRAWN if name in (*SMALL, "sensitivity")])
def test_the_given_axes_are_drawn_on_and_nothing_else_is_opened(name):
    ax = one_ax()
    assert DRAWN[name](ax) is ax
    assert pyplot.get_fignums() == []
    settings = dict(matplotlib.rcParams)
    new = DRAWN[name](None)
    assert new.figure is pyplot.figure(1)
    assert dict(matplotlib.rcParams) == settings
    with pytest.raises(TypeError, match="ax is a Figure"):
        DRAWN[name](Figure())
    with pytest.raises(TypeError, match="projection '3d'"):
        DRAWN[name](one_ax(projection="3d"))


def test_parts_of_figures_can_be_drawn_on():
    left, right = Figure(figsize=(8, 3)).subfigures(1, 2)
    plots.density_bars(network(), ax=left.subplots())
    plots.history(network(), ax=right.subplots())


# ------------------------------------------------------------------------------------------- compared with pictures


def tile_picture(figure):
    mask = (torch.arange(4 * 2 * 9) % 5 > 1).view(4, 2, 3, 3)
    layer = prune.custom_from_mask(nn.Conv2d(2, 4, 3), "weight", mask)
    plots.mask_image(layer, ax=figure.add_axes((0, 0, 1, 1)))


def cube_picture(figure):
    mask = (torch.arange(2 * 2 * 9) % 5 > 1).view(2, 2, 3, 3)
    plots.mask_cubes(mask, ax=figure.add_axes((0, 0, 1, 1), projection="3d"))


def compare_picture(figure):
    found = comparison(row("a"), row("b", 0.5, 2e-3, nonzero=30, nbytes=600))
    plots.compare(found, ax=figure.add_axes((0, 0, 1, 1))).set_xlim(0, 250)


def history_picture(figure):
    plots.history(network(), ax=figure.add_axes((0, 0, 1, 1))).set_xlim(0, 6)


@pytest.mark.parametrize("draw", [tile_picture, cube_picture, compare_picture, history_picture])
def test_pictures_look_as_they_did(draw, tmp_path):
    """Without text, whose letters each release sets otherwise. To renew one, delete it and run the test."""
    figure = Figure(figsize=(4, 3), dpi=60)
    draw(figure)
    for text in figure.findobj(Text):
        text.set_visible(False)
    for ax in figure.axes:
        if ax.get_legend() is not None:
            ax.get_legend().remove()
    expected, actual = BASELINE / f"{draw.__name__}.png", tmp_path / f"{draw.__name__}.png"
    figure.savefig(actual)
    with Image.open(actual) as picture:  # without its margins, which releases also make otherwise in three dimensions
        content = ImageChops.invert(picture.convert("RGB")).getbbox()
        picture.convert("RGB").crop(content).resize((240, 180)).save(actual)
    if not expected.exists():
        expected.write_bytes(actual.read_bytes())
        pytest.fail(f"{expected.name} was missing and has been drawn: look at it, and commit it")
    assert compare_images(str(expected), str(actual), TOLERANCE) is None
