"""The pictures of ``prune_digits.py``: one small convolution pruned in units of every size, and a pruned network."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from recipes import AMOUNT
from torch import Tensor, nn
from torch.nn.utils import prune

import torchprune_ext as tpe
from torchprune_ext.plots import density_bars, mask_cubes, mask_image, weight_histograms

try:
    import matplotlib
except ImportError:
    sys.exit("error: matplotlib is not installed: pip install torchprune-ext[demo]")
matplotlib.use("Agg")  # draws into files, needs no screen
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

GRANULARITIES: dict[str, Callable[[nn.Module], object]] = {
    "entry\nprune.l1_unstructured": lambda conv: prune.l1_unstructured(conv, "weight", AMOUNT),
    "2 of 4 input channels\ntpe.nm_structured": lambda conv: tpe.nm_structured(conv, "weight", n=2, m=4),
    "vector\ntpe.vector_ln": lambda conv: tpe.vector_ln(conv, "weight", AMOUNT),
    "kernel\ntpe.kernel_ln": lambda conv: tpe.kernel_ln(conv, "weight", AMOUNT),
    "filter\nprune.ln_structured, dim=0": lambda conv: prune.ln_structured(conv, "weight", AMOUNT, n=2, dim=0),
    "channel\nprune.ln_structured, dim=1": lambda conv: prune.ln_structured(conv, "weight", AMOUNT, n=2, dim=1),
}


def granularity_masks(seed: int) -> dict[str, Tensor]:
    """Return the masks that the granularities make of the same small convolution, half of it pruned."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        conv = nn.Conv2d(4, 4, kernel_size=3)
    masks = {}
    for title, prune_one in GRANULARITIES.items():
        copied = copy.deepcopy(conv)
        prune_one(copied)
        masks[title] = copied.get_buffer("weight_mask")
    return masks


def draw_masks(masks: dict[str, Tensor]) -> Figure:
    """Draw the masks as matrices: a row of tiles per filter, a column per channel, a tile per kernel."""
    figure = pyplot.figure(figsize=(12, 8.6), layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15))
    figure.suptitle("One convolution, half of its weights pruned: grey is pruned, blue is left")
    for position, (title, mask) in enumerate(masks.items(), start=1):
        filters, channels, height, width = mask.shape
        ax = figure.add_subplot(2, 3, position, title=title)
        mask_image(mask.transpose(1, 2).reshape(filters * height, channels * width), ax=ax)
        ax.set_xticks([width * (i + 0.5) - 0.5 for i in range(channels)], [f"channel {i}" for i in range(channels)])
        ax.set_yticks([height * (o + 0.5) - 0.5 for o in range(filters)], [f"filter {o}" for o in range(filters)])
        for channel in range(1, channels):
            ax.axvline(channel * width - 0.5, color="white", linewidth=5)
        for filter_ in range(1, filters):
            ax.axhline(filter_ * height - 0.5, color="white", linewidth=5)
    return figure


def draw_cubes(masks: dict[str, Tensor]) -> Figure:
    """Draw the same masks as cubes."""
    figure = pyplot.figure(figsize=(15, 6.4))
    figure.suptitle("One convolution, half of its weights pruned: transparent is pruned, blue is left")
    figure.subplots_adjust(left=0.03, right=0.99, bottom=0.0, top=0.94, wspace=0, hspace=0)
    for position, (title, mask) in enumerate(masks.items(), start=1):
        ax = mask_cubes(mask, ax=figure.add_subplot(2, 3, position, projection="3d"))
        ax.set_title(title, y=0.86)
    return figure


def figure_of(ax: Axes) -> Figure:
    """Return the figure that ``ax`` is in."""
    figure = ax.get_figure()
    assert isinstance(figure, Figure)
    return figure


def save_pictures(dense: nn.Module, pruned: nn.Module, folder: Path, seed: int) -> list[Path]:
    """Save the four pictures in ``folder`` and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    masks = granularity_masks(seed)
    figures = {
        "granularities_2d.png": draw_masks(masks),
        "granularities_3d.png": draw_cubes(masks),
        "histograms.png": figure_of(weight_histograms(pruned)[0]),
        "density.png": figure_of(density_bars(dense, pruned)),
    }
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=150)
        pyplot.close(figure)
    return [folder / name for name in figures]
