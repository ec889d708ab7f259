"""Draw the picture of the README: what can be pruned, and what comes of it.

The masks are computed here, of one convolution with half of its weights pruned in six ways. The figures below them are
those of the documentation; the scripts named in ``docs/benchmarks.rst`` measure them.
Run: ``python examples/readme_picture.py [--out docs/images/pruning.png]``.
"""

import argparse
from pathlib import Path

from pictures import granularity_masks, pyplot
from torch import Tensor

from torchprune_ext.plots import mask_image

KEPT, PALE, TEXT = "#0072b2", "#b3d0e4", "#444444"
RESULTS = [
    (
        "A LeNet pruned by 74 %, not trained:\n% of MNIST right",
        [("dense", 97.99), ("pruned", 66.46), ("re-fitted in a second", 97.32)],
    ),
    (
        "ResNet-18, whole channels cut out:\n% left",
        [("dense", 100), ("multiplications", 54), ("time, 8 images", 64)],
    ),
    (
        "ResNet-18, 90 % zeros:\n% of the bytes in a file",
        [("dense", 100), ("torch.save, with masks", 199.9), ("tpe.save_sparse", 11.7)],
    ),
]


def draw_mask(ax: pyplot.Axes, mask: Tensor, title: str) -> None:
    """Draw the mask of a convolution as a matrix: a tile for each kernel, a row of tiles for each filter."""
    filters, channels, height, width = mask.shape
    mask_image(mask.transpose(1, 2).reshape(filters * height, channels * width), ax=ax)
    ax.set(xticks=[], yticks=[], xlabel="", ylabel="")
    for place in range(1, channels):
        ax.axvline(place * width - 0.5, color="white", linewidth=2.5)
    for place in range(1, filters):
        ax.axhline(place * height - 0.5, color="white", linewidth=2.5)
    unit, call = title.split("\n")
    ax.set_title(unit, fontsize=10)
    ax.set_xlabel(call.replace(", ", "\n"), fontsize=8, color=TEXT, family="monospace")


def draw_bars(ax: pyplot.Axes, title: str, bars: list[tuple[str, float]]) -> None:
    """Draw horizontal bars with their labels and values."""
    for place, (label, value) in enumerate(bars):
        ax.barh(-place, value, height=0.56, color=KEPT if place == len(bars) - 1 else PALE)
        ax.text(value, -place, f" {value:g}", va="center", fontsize=9)
        ax.text(0, -place + 0.46, label, va="center", fontsize=8, color=TEXT)
    ax.set_title(title, fontsize=10, loc="left")
    ax.set(xlim=(0, 1.18 * max(value for _, value in bars)), ylim=(-len(bars) + 0.7, 0.65), xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def main() -> None:
    """Draw and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs/images/pruning.png")
    out = parser.parse_args().out
    figure = pyplot.figure(figsize=(10, 4.6), facecolor="white")
    top = figure.add_gridspec(1, 6, left=0.015, right=0.985, top=0.865, bottom=0.47, wspace=0.12)
    figure.text(0.015, 0.955, "Half of one convolution pruned, in units of six kinds: blue is kept", fontsize=10)
    for place, (title, mask) in zip(top, granularity_masks(seed=0).items(), strict=True):
        draw_mask(figure.add_subplot(place), mask, title)
    bottom = figure.add_gridspec(1, 3, left=0.02, right=0.985, top=0.285, bottom=0.01, wspace=0.1)
    for place, (title, bars) in zip(bottom, RESULTS, strict=True):
        draw_bars(figure.add_subplot(place), title, bars)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
