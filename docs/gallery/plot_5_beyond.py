"""
Beyond masks: refit, cut, skip
==============================

A mask shows what a sparsity costs, and saves nothing. This script goes on from there:
the weights that are left are fitted anew without training, whole units are cut out,
single zeros are skipped, and in the end it is measured what has become faster.
"""

# sphinx_gallery_thumbnail_number = -1

# %%
# A network
# ---------
#
# LeNet-5 on the digits that come with scikit-learn, scaled to 28 x 28 pixels.

import copy

import torch
import torch.nn.functional as F
from matplotlib import pyplot
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe
from torchprune_ext import plots

pixels, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
images = F.interpolate(
    pixels.float().view(-1, 1, 8, 8) / 16, size=(28, 28), mode="bilinear"
)
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
train_images, train_labels = images[order[:1347]], labels[order[:1347]]
test_images, test_labels = images[order[1347:]], labels[order[1347:]]

torch.manual_seed(0)
dense = nn.Sequential(
    nn.Conv2d(1, 6, kernel_size=5),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Conv2d(6, 16, kernel_size=5),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Flatten(),
    nn.Linear(256, 120),
    nn.ReLU(),
    nn.Linear(120, 84),
    nn.ReLU(),
    nn.Linear(84, 10),
)
optimizer = torch.optim.SGD(dense.parameters(), lr=0.02, momentum=0.9)
for _ in range(15):
    for rows in torch.randperm(len(train_labels)).split(32):
        optimizer.zero_grad()
        F.cross_entropy(dense(train_images[rows]), train_labels[rows]).backward()
        optimizer.step()
dense.eval()


@torch.no_grad()
def accuracy(model):
    return 100 * (model(test_images).argmax(dim=1) == test_labels).float().mean().item()


print(f"dense: {accuracy(dense):.1f} % of {len(test_labels)} test images right")

# %%
# Refit
# -----
#
# Where weights are gone, those that are left have to change, and training is one way to
# do that. It takes labels, a loss and patience. Here is another one: each layer is
# fitted by least squares to what the dense network computes there, on unlabelled
# images, in one pass. :func:`~torchprune_ext.compensate` does so for any masks, and
# :func:`~torchprune_ext.prune_and_compensate`, further below, chooses the masks as
# well.

data = list(train_images.split(256))


def magnitude(model, sparsity):
    tpe.global_unstructured(tpe.prunable_parameters(model), target_sparsity=sparsity)


def magnitude_and_refit(model, sparsity):
    params = tpe.prunable_parameters(model)
    tpe.global_unstructured(params, target_sparsity=sparsity)
    tpe.compensate(model, data, params, dense=dense, progress=False)


sparsities = (0.8, 0.9, 0.95, 0.97, 0.98)
curves = {}
for call in (magnitude, magnitude_and_refit):
    curves[call.__name__.replace("_", " ")] = reached = []
    for sparsity in sparsities:
        model = copy.deepcopy(dense)
        call(model, sparsity)
        reached.append(accuracy(model))
    print(f"{call.__name__:<20}" + "".join(f"{value:>7.1f}" for value in reached))

# %%

_, ax = pyplot.subplots(figsize=(6.5, 3.6), layout="constrained")
for (name, reached), marker in zip(curves.items(), "os", strict=True):
    ax.plot(sparsities, reached, marker=marker, label=name)
ax.axhline(accuracy(dense), color="black", linewidth=1, linestyle="--", label="dense")
ax.set(
    xlabel="sparsity",
    ylabel="test accuracy in percent",
    title="without labels, without training",
)
ax.legend()

# %%
# Cut
# ---
#
# Zeros that are scattered are still multiplied. Whole hidden units and channels are not
# if they are cut out: with ``target_macs``, those go that cost least once the others
# are fitted anew, until so much of the multiplications is left.
# :func:`~torchprune_ext.compact` returns a smaller network of plain layers, with the
# same outputs.

model = copy.deepcopy(dense)
tpe.prune_and_compensate(
    model, data, tpe.prunable_parameters(model), target_macs=0.4, progress=False
)
small = tpe.compact(model, train_images[:1])
print(small)
with torch.no_grad():
    difference = (small(test_images) - model(test_images)).abs().max()
print(f"largest difference of an output to the pruned network's: {difference:.0e}")

# %%

found = tpe.compare(
    {"dense": dense, "masked": model, "compact": small},
    test_images[:64],
    evaluate=accuracy,
    threads=1,
    rounds=5,
)
print(found)
ax = plots.compare(found)

# %%
# Skip
# ----
#
# Where single entries are zero, sparse storage can leave them out, and on a CPU the
# sparse product is faster than the dense one if the layer is large and almost empty.
# :func:`~torchprune_ext.to_csr` times each layer both ways, and converts those that
# gain. This network is large and untrained, since only its time matters here.

torch.manual_seed(0)
wide = nn.Sequential(
    nn.Linear(1024, 2048),
    nn.ReLU(),
    nn.Linear(2048, 2048),
    nn.ReLU(),
    nn.Linear(2048, 10),
).eval()
masked = copy.deepcopy(wide)
tpe.prune_to(tpe.prunable_parameters(masked, exclude="4"), 0.95, scope="layer")
permanent = tpe.remove_all(tpe.copy_pruned(masked))
x = torch.randn(1, 1024)
print(tpe.csr_report(permanent, example_inputs=x))
csr = tpe.to_csr(permanent, example_inputs=x)

# %%
# What really gets faster
# -----------------------
#
# One image at a time, one thread. Half of the hidden units are cut out in the last one.

halved = copy.deepcopy(wide)
for layer in (halved[2], halved[4]):
    prune.ln_structured(layer, "weight", amount=0.5, n=2, dim=1)
halved = tpe.compact(halved, x)

found = tpe.compare(
    {
        "dense": wide,
        "masked, 95 %": masked,
        "permanent, 95 %": permanent,
        "CSR, 95 %": csr,
        "compact, half of the units": halved,
    },
    x,
    threads=1,
)
print(found)

# %%

_, ax = pyplot.subplots(figsize=(6.5, 2.8), layout="constrained")
bars = ax.barh(
    [row.name for row in found.rows],
    [1000 * row.latency for row in found.rows],
    color=plots.KEPT,
)
ax.bar_label(bars, fmt="%.2f", padding=3)
ax.invert_yaxis()
ax.margins(x=0.12)
ax.set(xlabel="milliseconds of a forward pass, batch of 1")

# %%
# - *Masked* is slower than dense: the mask is multiplied in at every forward pass.
#   :func:`~torchprune_ext.frozen` and :func:`~torchprune_ext.remove_all` end that.
# - *Permanent* is as fast as dense. Zeros are numbers.
# - *CSR* is faster, at this sparsity and this size. For a LeNet it is not, and
#   ``to_csr`` says so.
# - *Compact* needs nothing special: its layers are dense and smaller, for any runtime,
#   and so is its file. Small layers gain less: each costs some time before it
#   multiplies.
#
# :doc:`/compare` says how to measure, and when the time does not follow the
# multiplications; :doc:`/sparse_inference` is about 2:4 on GPUs too.
