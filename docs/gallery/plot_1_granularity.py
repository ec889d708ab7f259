"""
Granularity: what goes at once
==============================

Pruning sets weights to zero. Which of them may go *together* is the granularity: single
entries, two of every four, vectors, kernels, filters or channels. The finer it is, the
better the choice, and the less of it a computer can use. This script prunes a small
matrix and a small convolution at each of them, and draws what is left: blue is kept,
grey is pruned.
"""

# sphinx_gallery_thumbnail_number = 6

# %%
# A weight as a picture
# ---------------------
#
# :func:`~torchprune_ext.plots.mask_image` draws a matrix and tells its zeros from the
# rest. This one has two zeros that nobody has pruned.

from itertools import combinations

import torch
from matplotlib import pyplot
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe
from torchprune_ext import plots

weight = torch.tensor(
    [
        [-0.46, -0.40, 0.39, 0.19, 0.37],
        [0.00, 0.40, 0.17, -0.15, 0.16],
        [-0.20, -0.23, 0.36, 0.25, 0.03],
        [0.24, 0.41, 0.07, 0.00, -0.15],
        [0.48, -0.09, -0.36, 0.12, 0.45],
    ]
)
_, ax = pyplot.subplots(figsize=(4.2, 4.4), layout="constrained")
plots.mask_image(weight, ax=ax).set_title("weight")

# %%
# Pruning needs a place where the weight lives: a module, and the name of its parameter.
# All matrices below are the weight of a linear layer of eight inputs and eight outputs,
# with the same random entries between 0 and 1.

torch.manual_seed(0)
entries = torch.rand(8, 8)


def linear():
    layer = nn.Linear(8, 8, bias=False)
    layer.weight.data.copy_(entries)
    return layer


def draw(title, *weights):
    _, axes = pyplot.subplots(
        1,
        len(weights),
        figsize=(4.2 * len(weights), 4.6),  # with room for the titles
        layout="constrained",
        squeeze=False,
    )
    for ax, matrix, when in zip(axes.flat, weights, ["before", title], strict=False):
        plots.mask_image(matrix, ax=ax).set_title(when)


# %%
# Fine-grained: every entry for itself
# ------------------------------------
#
# Whatever is below a threshold goes. The mask is computed for the whole tensor at once,
# as PyTorch's own methods do it; two loops over rows and columns would give the same
# zeros, and take far longer on a real layer. Here and everywhere else in this
# package, ``weight`` becomes the product of the dense values and a mask of zeros and
# ones.

layer = tpe.threshold(linear(), "weight", threshold=0.5)
draw("threshold 0.5", entries, layer.weight)
print(f"{layer.weight_mask.mean():.0%} of the entries are kept")

# %%
# The position of each zero is free, so the choice is the best one for this number of
# zeros. But to profit from it, a computer has to look up where the entries are.
#
# Pattern: two of every four
# --------------------------
#
# With the pattern 2:4, every four consecutive entries of a row keep two. There are six
# ways to do that:

patterns = torch.zeros(6, 4)
for row, kept in enumerate(combinations(range(4), 2)):
    patterns[row, list(kept)] = 1
_, ax = pyplot.subplots(figsize=(2.8, 4.4), layout="constrained")
plots.mask_image(patterns, ax=ax).set_title("the six patterns")

# %%
# The best of them keeps the two largest, which is how
# :func:`~torchprune_ext.nm_structured` finds it without trying all six. Half of the
# entries go, as before; but now every row has as many as the next.

layer = tpe.nm_structured(linear(), "weight", n=2, m=4)
draw("2:4", entries, layer.weight)

# %%
# That is what lets the hardware keep up. A matrix of half the width holds the kept
# values, and a second one their places, which take two bits each, since a place is 0,
# 1, 2 or 3. NVIDIA's sparse tensor cores read exactly this.

kept = layer.weight_mask.nonzero()[:, 1].reshape(8, 4)  # in which columns
places = kept % 4
_, (left, right) = pyplot.subplots(1, 2, figsize=(6.4, 5), layout="constrained")
plots.mask_image(layer.weight.gather(1, kept), ax=left).set_title("values")
right.imshow(places.numpy(), cmap="Blues", vmin=0, vmax=6)
right.set(title="places in their groups of 4", xticks=[], yticks=[])
for row, column in torch.ones_like(places).nonzero().tolist():
    right.text(column, row, str(int(places[row, column])), ha="center", va="center")

# %%
# Other libraries say 4:2 for the same, or count the entries that are *removed*. In this
# package ``n`` of ``m`` are kept.
#
# Vectors: a row or a column
# --------------------------
#
# A whole row is an output that no longer depends on anything; a whole column is an
# input that nobody reads. Here one of each goes, the one of smallest norm. The second
# call finds the first one's mask and adds to it.

layer = tpe.vector_ln(linear(), "weight", amount=1, dim=1)
tpe.vector_ln(layer, "weight", amount=1, dim=0)
draw("one row, one column", entries, layer.weight)
print(tpe.history(layer, "weight"))

# %%
# Convolutions
# ------------
#
# The weight of a convolution has four axes: filters (outputs), channels (inputs),
# height and width. This one has 3 filters over 10 channels, with kernels of 4 by 5.
# :func:`~torchprune_ext.plots.mask_cubes` draws every entry as a cube: a block is a
# filter, a layer in it is the kernel for one channel.

torch.manual_seed(0)
cube_entries = torch.rand(3, 10, 4, 5)


def convolution():
    conv = nn.Conv2d(10, 3, kernel_size=(4, 5), bias=False)
    conv.weight.data.copy_(cube_entries)
    return conv


def draw_cubes(title, conv):
    ax = pyplot.figure(figsize=(6, 4.2), layout="constrained").add_subplot(
        projection="3d"
    )
    plots.mask_cubes(conv.weight_mask, ax=ax).set_title(
        f"{title}: {conv.weight_mask.mean():.0%} kept", y=1.0
    )


draw_cubes("entries", tpe.threshold(convolution(), "weight", threshold=0.2))

# %%
# Twenty percent of the **vectors** along the width, which are the rows of the kernels:

draw_cubes("vectors", tpe.vector_ln(convolution(), "weight", amount=0.2, dim=-1))

# %%
# Twenty percent of the **kernels**. A kernel connects one channel with one filter;
# without it, the filter does not see the channel.

draw_cubes("kernels", tpe.kernel_ln(convolution(), "weight", amount=0.2))

# %%
# One **filter**: the layer has an output less, and the next layer an input less.
# PyTorch's own function does that, so there is none for it here.

draw_cubes(
    "filters", prune.ln_structured(convolution(), "weight", amount=1, n=2, dim=0)
)

# %%
# Two of the ten **channels**, in all filters: the layer reads two inputs less, and the
# filters before it that made them can go as well.

draw_cubes(
    "channels", prune.ln_structured(convolution(), "weight", amount=0.2, n=2, dim=1)
)

# %%
# What the regularity is worth
# ----------------------------
#
# The coarser the unit, the less there is to choose from: of the same 600 entries, at
# the same sparsity, the ones that are left hold less and less. What is left of the
# squared norm is a first guess at what is left of the accuracy.

calls = {
    "entries": lambda conv: prune.l1_unstructured(conv, "weight", amount=0.4),
    "vectors": lambda conv: tpe.vector_ln(conv, "weight", amount=0.4),
    "kernels": lambda conv: tpe.kernel_ln(conv, "weight", amount=0.4),
    "channels": lambda conv: prune.ln_structured(
        conv, "weight", amount=0.4, n=2, dim=1
    ),
}
left = {}
for unit, call in calls.items():
    conv = call(convolution())
    left[unit] = (conv.weight.square().sum() / cube_entries.square().sum()).item()
    print(f"{unit:<9} {conv.weight_mask.mean():.0%} kept, {left[unit]:.0%} of the norm")

_, ax = pyplot.subplots(figsize=(6, 2.6), layout="constrained")
ax.barh(list(left), list(left.values()), color=plots.KEPT)
ax.axvline(0.6, color="black", linestyle="--", label="by chance")
ax.set(xlim=(0, 1), xlabel="part of the squared norm that is left, 40 % pruned")
ax.invert_yaxis()
ax.legend()

# %%
# What can use the zeros grows the other way:
#
# ========  =================================================================
# unit      what it takes to gain from it
# ========  =================================================================
# entries   sparse storage; sparse arithmetic at 90 % and more
# 2:4       a GPU with sparse tensor cores
# vectors   code that is written for it
# kernels   code that is written for it
# filters   nothing: the layer, cut, is a smaller dense layer
# channels  nothing: as filters, with the layer before
# ========  =================================================================
#
# The next page is about the other half of the question: which of the units go.
