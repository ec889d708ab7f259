"""Pictures show what is there: every bar, bin and colour against a plain loop over the entries."""

import copy
import itertools
import os
import subprocess
import sys

import pytest
import torch
from snapshots import Snapshot
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe
from torchprune_ext.plots import DENSE, KEPT, PRUNED, density_bars, mask_cubes, mask_image, weight_histograms

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
from matplotlib import colors, pyplot  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402


@pytest.fixture(autouse=True)
def _nothing_is_shown(monkeypatch):
    settings = dict(matplotlib.rcParams)

    def show(*_, **__):
        raise AssertionError("shown")

    monkeypatch.setattr(pyplot, "show", show)
    yield
    pyplot.close("all")
    assert dict(matplotlib.rcParams) == settings


def one_ax(**options):
    return Figure().add_subplot(**options)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def dense(model):
    pass


def natively(model):
    prune.random_unstructured(model[0], "weight", amount=0.3)
    prune.l1_unstructured(model[4], "weight", amount=10)
    prune.l1_unstructured(model[4], "bias", amount=1)


def by_us(model):
    tpe.kernel_ln(model[0], "weight", amount=0.5)
    tpe.nm_structured(model[4], "weight", n=2, m=4)


def by_both_in_turn(model):
    by_us(model)
    natively(model)


def channels(model):
    tpe.bn_scaling(model[0], "weight", amount=2, bn=model[1])


def without_hooks(model):
    natively(model)
    model[0]._forward_pre_hooks.clear()


STATES = [dense, natively, by_us, by_both_in_turn, channels, without_hooks]
every_state = pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)


def in_state(state):
    model = network()
    state(model)
    return model


def expected(model):
    """Return label, values and flags of what is drawn, from the names of the state dict."""
    state, found = model.state_dict(), {}
    for name, _ in model.named_parameters():
        mask = state.get(name.replace("_orig", "_mask")) if name.endswith("_orig") else None
        if mask is not None or state[name].dim() > 1:
            values = state[name].flatten().tolist()
            flags = values if mask is None else mask.flatten().tolist()
            found[name.removesuffix("_orig")] = (values, [flag != 0 for flag in flags])
    return found


def labels_of(ax):
    return [text.get_text() for text in ax.get_yticklabels()]


def widths(ax, number=0):
    return [bar.get_width() for bar in ax.containers[number]]


# -------------------------------------------------------------------------------------------------------- mask_image


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64])
def test_cells_are_blue_where_an_entry_is_not_zero(dtype):
    matrix = torch.tensor([[1, 0, 2], [0, 0, 3]]).to(dtype)
    (image,) = mask_image(matrix, ax=one_ax()).get_images()
    shown = image.cmap(image.norm(image.get_array()))
    for row in range(2):
        for column in range(3):
            colour = KEPT if matrix[row, column] != 0 else PRUNED
            assert tuple(shown[row, column]) == colors.to_rgba(colour)
    assert image.origin == "upper"


def test_a_matrix_of_one_kind_keeps_its_colour():
    for value, colour in ((0.0, PRUNED), (1.0, KEPT)):
        (image,) = mask_image(torch.full((2, 2), value), ax=one_ax()).get_images()
        assert tuple(image.cmap(image.norm(image.get_array()))[0, 0]) == colors.to_rgba(colour)


def test_values_are_written_into_their_cells_but_not_into_masks():
    ax = mask_image(torch.tensor([[0.5, -0.0], [-1.25, 300.0]]), ax=one_ax())
    written = {text.get_position(): text.get_text() for text in ax.texts}
    assert written == {(0, 0): "0.5", (1, 0): "0", (0, 1): "-1.2", (1, 1): "3e+02"}
    assert not mask_image(torch.tensor([[1.0, 0.0]]), ax=one_ax()).texts
    assert not mask_image(torch.tensor([[True, False]]), ax=one_ax()).texts


@pytest.mark.parametrize("shape", [(3, 4), (2, 8), (8, 2), (300, 2), (2, 300), (300, 300), (1, 1)])
def test_written_values_stay_inside_their_cells(shape):
    ax = mask_image(torch.full(shape, -0.123456), ax=one_ax())
    ax.figure.canvas.draw()
    (left, top), (right, bottom) = ax.transData.transform([(-0.5, -0.5), (0.5, 0.5)])
    for text in ax.texts:
        box = text.get_window_extent()
        assert box.width < right - left
        assert box.height < top - bottom
    assert bool(ax.texts) == (max(shape) < 300)


# -------------------------------------------------------------------------------------------------------- mask_cubes


def cubes_of(weight):
    """Return the axes, and place, size and face colours of each cube that is drawn."""
    ax, calls = one_ax(projection="3d"), []
    draw = ax.bar3d
    ax.bar3d = lambda *args, **options: calls.append((args, options)) or draw(*args, **options)
    mask_cubes(weight, ax=ax)
    ((args, options),) = calls
    x, y, z, *size = args
    return ax, list(zip(x, y, z, strict=True)), size, torch.tensor(options["color"]).reshape(weight.numel(), 6, 4)


def test_cubes_are_solid_where_an_entry_is_not_zero():
    weight = torch.tensor([1.0, 0, 2, 0, 0, 3, 4, 0, 0, 0, 5, 6]).reshape(2, 1, 2, 3)
    _, places, _, faces = cubes_of(weight)
    assert torch.equal((faces[..., 3] == 1).all(1), weight.flatten() != 0)
    assert torch.equal((faces[..., 3] < 0.1).all(1), weight.flatten() == 0)
    solid = dict(zip(places, (faces[:, 0, 3] == 1).tolist(), strict=True))
    for row in range(2):
        for column in range(3):  # columns to the right, rows to the front
            assert solid[column, row, 0] == (weight[0, 0, row, column] != 0)


def test_each_entry_has_a_cube_of_its_own():
    ax, places, size, _ = cubes_of(torch.ones(2, 3, 4, 5))
    assert len(set(places)) == 120
    assert size == [1, 1, 1]
    rows = sorted(place for place in places if place[1:] == (0, 0))
    assert all(second[0] - first[0] >= 1 for first, second in itertools.pairwise(rows))
    assert len({z for _, _, z in places}) == 3
    assert [text.get_text() for text in ax.texts] == ["filter 0", "filter 1", "channel 0", "channel 1", "channel 2"]


def test_too_many_cubes_are_refused_with_a_part_that_can_be_drawn():
    weight = torch.ones(64, 64, 3, 3)
    with pytest.raises(ValueError, match=r"36,864 cubes.*at most 10,000.*tensor\[:4, :4\]"):
        mask_cubes(weight)
    mask_cubes(weight[:4, :4])


# ------------------------------------------------------------------------------------------------- weight_histograms


@every_state
@pytest.mark.parametrize("made_permanent", [False, True])
def test_histograms_count_every_entry_once(state, made_permanent):
    model = in_state(state)
    if made_permanent and prune.is_pruned(model):
        tpe.remove_all(model)
    axes = weight_histograms(model)
    rows = expected(model)
    assert len(axes) == len(rows)
    for ax, (label, (values, flags)) in zip(axes, rows.items(), strict=True):
        everything, kept = (patch.get_data() for patch in ax.patches)
        edges = everything.edges.tolist()
        for stairs, wanted in ((everything, values), (kept, [v for v, f in zip(values, flags, strict=True) if f])):
            assert stairs.edges.tolist() == edges
            counts = [0] * (len(edges) - 1)
            for value in wanted:  # bins are closed on the left, the last one on both sides
                place = sum(value >= edge for edge in edges) - 1
                counts[min(place, len(counts) - 1)] += 1
            assert stairs.values.tolist() == counts
        assert sum(everything.values) == len(values)
        assert ax.get_title() == f"{label}: {100 * sum(flags) / len(flags):.1f} % kept"
        outline, filled = ax.patches
        assert colors.same_color(outline.get_edgecolor(), DENSE)
        assert colors.same_color(filled.get_facecolor(), KEPT)


def test_a_tensor_of_equal_values_has_a_histogram():
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, 1.0)
    (ax,) = weight_histograms(model)
    assert sum(ax.patches[0].get_data().values) == 6


def test_the_legend_says_what_is_outlined_and_what_is_filled():
    on_given_axes = weight_histograms(network(), axes=Figure().subplots(1, 2))[0]
    on_new_figure = weight_histograms(network())[0].figure
    for legend in (on_given_axes.get_legend(), *on_new_figure.legends):
        assert [text.get_text() for text in legend.get_texts()] == ["all entries", "entries that are not pruned"]


def test_axes_of_any_arrangement_are_taken_and_the_spare_ones_left_alone():
    grid = Figure().subplots(2, 2)
    for axes in (grid.flat, list(grid.flat), tuple(grid.flat), iter(grid.flat)):
        drawn = weight_histograms(network(), axes=axes)
        assert all(ax is given for ax, given in zip(drawn, grid.flat, strict=False))
        assert len(drawn) == 2
    assert not grid[1, 0].patches


# ------------------------------------------------------------------------------------------------------ density_bars


@every_state
@pytest.mark.parametrize("made_permanent", [False, True])
def test_bars_are_as_long_as_the_share_that_is_kept(state, made_permanent):
    model = in_state(state)
    if made_permanent and prune.is_pruned(model):
        tpe.remove_all(model)
    ax = density_bars(model, ax=one_ax())
    rows = expected(model)
    assert labels_of(ax) == list(rows)
    assert widths(ax) == pytest.approx([100 * sum(flags) / len(flags) for _, flags in rows.values()])
    assert [text.get_text() for text in ax.texts] == [
        f"{100 * sum(flags) / len(flags):.1f} % ({sum(flags)} of {len(flags)})" for _, flags in rows.values()
    ]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first layer is at the top


@every_state
def test_two_rounds_stand_below_each_other(state):
    model, after = network(), in_state(state)
    ax = density_bars(model, after, ax=one_ax())
    rows = {label: flags for label, (_, flags) in expected(after).items() if label in expected(model)}
    assert labels_of(ax) == list(rows)
    assert widths(ax, 0) == [100] * len(rows)
    assert widths(ax, 1) == pytest.approx([100 * sum(flags) / len(flags) for flags in rows.values()])
    for first, second in zip(*ax.containers, strict=True):
        assert first.get_y() + first.get_height() == pytest.approx(second.get_y())
        assert colors.same_color(first.get_facecolor(), DENSE)
        assert colors.same_color(second.get_facecolor(), KEPT)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["before", "after"]
    assert labels_of(density_bars(after, model, ax=one_ax())) == list(rows)
    assert labels_of(density_bars(after, after, ax=one_ax())) == list(expected(after))  # vectors pruned in both


def test_notes_of_large_layers_fit_into_the_axes():
    ax = density_bars(nn.Linear(4096, 1024))
    ax.figure.canvas.draw()
    (note,) = ax.texts
    assert note.get_text() == "100.0 % (4,194,304 of 4,194,304)"
    assert note.get_window_extent().x1 <= ax.get_window_extent().x1


def test_models_that_do_not_match_are_refused_by_what_differs():
    with pytest.raises(ValueError, match=r"only model has \['0.bias.*only after has \['bias of shape \(3,\)'"):
        density_bars(network(), nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"only model has \['weight of shape \(3, 4\)'\].*'weight of shape \(3, 5\)'"):
        density_bars(nn.Linear(4, 3), nn.Linear(5, 3))


# -------------------------------------------------------------------------------------------------------- all of them


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight


def test_tied_weights_are_drawn_under_each_of_their_names():
    model = Tied()
    tpe.global_unstructured(tpe.prunable_parameters(model), amount=0.5)
    ax = density_bars(model, ax=one_ax())
    assert labels_of(ax) == ["embed.weight", "head.weight"]
    assert widths(ax) == [50, 50]
    one_side = Tied()
    prune.l1_unstructured(one_side.head, "weight", amount=0.5)
    assert widths(density_bars(one_side, ax=one_ax())) == [100, 50]


class Masked(nn.Module):
    """Has a buffer that only looks as if it were the host's."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))
        self.register_buffer("weight_mask", torch.zeros(2, 2))


def test_a_mask_without_pruning_is_not_taken_for_one():
    assert widths(density_bars(Masked(), ax=one_ax())) == [100]


def test_empty_tensors_are_left_out():
    with pytest.warns(UserWarning, match="zero-element"):
        model = nn.Sequential(nn.Linear(0, 3), nn.Linear(3, 2))
    assert labels_of(density_bars(model, ax=one_ax())) == ["1.weight"]
    assert len(weight_histograms(model)) == 1


@every_state
def test_drawing_changes_nothing_in_the_model(state):
    model = in_state(state)
    before = Snapshot(model)
    weight_histograms(model)
    density_bars(model, model)
    assert not before.differences()


DRAW = {
    "mask_image": lambda **where: mask_image(torch.eye(3), **where),
    "mask_cubes": lambda **where: mask_cubes(torch.ones(1, 2, 2, 2), **where),
    "density_bars": lambda **where: density_bars(network(), **where),
}
every_drawing = pytest.mark.parametrize("name", DRAW)


@every_drawing
def test_the_given_axes_are_drawn_on_and_returned(name):
    ax = one_ax(projection="3d" if name == "mask_cubes" else None)
    assert DRAW[name](ax=ax) is ax
    assert pyplot.get_fignums() == []
    assert DRAW[name]().figure is pyplot.figure(1)  # without ax, on a new figure


@every_drawing
def test_what_is_not_axes_is_refused(name):
    flat, deep = ("3d", "rectilinear") if name == "mask_cubes" else ("rectilinear", "3d")
    for bad in (Figure(), Figure().subplots(2), pyplot, "ax", 0, False):
        with pytest.raises(TypeError, match=rf"ax is a {type(bad).__name__}\. Pass matplotlib axes, e\.g\. figure"):
            DRAW[name](ax=bad)
    with pytest.raises(TypeError, match=f"ax has the projection '{deep}', not '{flat}'"):
        DRAW[name](ax=one_ax(projection=deep))


@pytest.mark.parametrize(
    ("axes", "error", "words"),
    [
        (lambda: one_ax(), TypeError, r"axes=<Axes.*> is a Axes\. Pass several axes, e\.g\. \[ax\]"),
        (lambda: Figure().subplots(2, 2), TypeError, r"axes\[0\] is a ndarray"),
        (lambda: [one_ax(), None], TypeError, r"axes\[1\] is a NoneType"),
        (
            lambda: [one_ax()],
            ValueError,
            r"axes are 1, too few for the 2 weights of Sequential.*'0.weight', '4.weight'",
        ),
    ],
)
def test_bad_lists_of_axes_are_refused(axes, error, words):
    with pytest.raises(error, match=words):
        weight_histograms(network(), axes=axes())


@pytest.mark.parametrize(
    ("tensor", "error", "words"),
    [
        (torch.ones(3), ValueError, r"tensor\.shape=\(3,\) has 1 axes, and mask_\w+ draws"),
        (torch.ones(3, 3, 3), ValueError, r"tensor\.shape=\(3, 3, 3\) has 3 axes, and mask_\w+ draws"),
        ([[1.0]], TypeError, r"tensor is a list\. Pass a torch\.Tensor"),
        (None, TypeError, "tensor is a NoneType"),
    ],
)
@pytest.mark.parametrize("draw", [mask_image, mask_cubes])
def test_tensors_that_cannot_be_drawn_are_refused(draw, tensor, error, words):
    with pytest.raises(error, match=words):
        draw(tensor)
    assert pyplot.get_fignums() == []


@pytest.mark.parametrize(
    ("draw", "shape", "other"), [(mask_image, (2, 3), (2, 1, 1, 1)), (mask_cubes, (2, 3, 1, 1), (2, 3))]
)
def test_a_drawing_takes_its_own_number_of_axes_only(draw, shape, other):
    with pytest.raises(ValueError, match=f"draws {len(shape)}"):
        draw(torch.ones(other))
    with pytest.raises(ValueError, match="has no entries to draw"):
        draw(torch.ones(0, *shape[1:]))
    with pytest.raises(ValueError, match="on the meta device"):
        draw(torch.ones(shape, device="meta"))
    with pytest.raises(TypeError, match=r"complex \(torch.complex64\)"):
        draw(torch.ones(shape, dtype=torch.complex64))
    draw(torch.ones(shape))
    draw(torch.ones(shape).to_sparse())


def with_a_nan():
    model = network()
    model[4].weight.data[0, 0] = float("nan")
    return model


def on_meta():
    return network().to("meta")


@pytest.mark.parametrize("draw", [weight_histograms, density_bars])
def test_models_that_cannot_be_drawn_are_refused(draw):
    for bad in (None, torch.ones(2, 2), nn.Linear):
        with pytest.raises(TypeError, match=r"(?s)model=.* is a \w+\. Pass a torch\.nn\.Module"):
            draw(bad)
    with pytest.raises(ValueError, match="model of type ReLU has no parameter with two or more axes and no pruned one"):
        draw(nn.ReLU())
    with pytest.raises(ValueError, match=r"model: 0\.weight of shape \(4, 2, 3, 3\) is on the meta device"):
        draw(on_meta())
    with pytest.raises(ValueError, match=r"model: weight has no shape yet\. Run one forward first"):
        draw(nn.LazyLinear(3))
    assert pyplot.get_fignums() == []


def test_values_that_have_no_bin_are_refused_by_name():
    with pytest.raises(ValueError, match=r"model: 4\.weight of shape \(3, 16\) has 1 NaN or infinite entries"):
        weight_histograms(with_a_nan())
    assert pyplot.get_fignums() == []
    density_bars(with_a_nan(), copy.deepcopy(with_a_nan()))


def test_no_screen_is_needed_and_importing_does_not_load_matplotlib():
    code = """
import sys, torch
import torchprune_ext.plots as plots
assert "matplotlib" not in sys.modules
model = torch.nn.Linear(3, 3)
plots.mask_image(model.weight).figure.canvas.draw()
plots.mask_cubes(torch.ones(1, 1, 2, 2)).figure.canvas.draw()
plots.weight_histograms(model)[0].figure.canvas.draw()
plots.density_bars(model).figure.canvas.draw()
"""
    screens = ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")
    environment = {name: value for name, value in os.environ.items() if name not in screens}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (lambda: mask_image(torch.eye(2)), lambda: density_bars(network())):
        with pytest.raises(ImportError, match=r"matplotlib is not installed: pip install torchprune-ext\[plots\]"):
            draw()


def test_pictures_are_there_under_the_name_that_users_write():
    assert tpe.plots.mask_image is mask_image
