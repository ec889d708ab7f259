"""
Timing: when to prune, and how often
====================================

A network can be pruned after it is trained, while it trains, or before. The usual way
is the first: train, prune, fine-tune, evaluate. This script goes it step by step, with
a sparsity for each layer, and then lets the other ways compete at a sparsity where it
matters.
"""

# sphinx_gallery_thumbnail_number = -1

# %%
# Train
# -----
#
# LeNet-5 on the digits that come with scikit-learn, scaled to 28 x 28 pixels. A part of
# them is kept for choosing the best epoch, and another one for the numbers at the end,
# which chooses nothing.

import copy

import torch
import torch.nn.functional as F
from matplotlib import pyplot
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torchprune_ext as tpe
from torchprune_ext import plots

pixels, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
images = F.interpolate(
    pixels.float().view(-1, 1, 8, 8) / 16, size=(28, 28), mode="bilinear"
)
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
training, held_out, test = (
    TensorDataset(images[rows], labels[rows]) for rows in order.split((1147, 200, 450))
)
loader = DataLoader(training, batch_size=32, shuffle=True)


class LeNet(nn.Module):
    """Two convolutions and three linear layers."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, kernel_size=5)
        self.conv2 = nn.Conv2d(6, 16, kernel_size=5)
        self.fc1 = nn.Linear(256, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x):
        """Return the logits of images of shape (batch, 1, 28, 28)."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))


def train(model, epochs, lr=0.02, pruner=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            if pruner is not None:
                pruner.step()


@torch.no_grad()
def accuracy(model, data=test):
    return (
        100
        * (model(data.tensors[0]).argmax(dim=1) == data.tensors[1])
        .float()
        .mean()
        .item()
    )


torch.manual_seed(0)
initial = LeNet()
dense = copy.deepcopy(initial)
train(dense, epochs=15)
print(f"dense: {accuracy(dense):.1f} % of the test images right")

# %%
# Prune
# -----
#
# Each layer gets a sparsity of its own; a first layer that has few weights could well
# get less. What is smallest goes.

amounts = {"conv1": 0.85, "conv2": 0.80, "fc1": 0.75, "fc2": 0.70, "fc3": 0.80}
model = copy.deepcopy(dense)
tpe.prune_to(
    [(model.get_submodule(path), "weight") for path in amounts],
    {(model.get_submodule(path), "weight"): amount for path, amount in amounts.items()},
)
print(tpe.report(model))
print(f"pruned: {accuracy(model):.1f} %")

# %%
# Three quarters of the weights are gone at once, and on digits as easy as these the
# network has hardly noticed.

axes = plots.weight_histograms(model)

# %%
# Fine-tune
# ---------
#
# The weights that are left learn to do without the others. Masks stay, so nothing comes
# back; the loop below needs no call that prunes again.
# :func:`~torchprune_ext.fine_tune` is such a loop, which also keeps the best epoch.

optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5)
done = tpe.fine_tune(
    model,
    loader,
    F.cross_entropy,
    optimizer,
    epochs=5,
    evaluate=lambda model: accuracy(model, held_out),
    progress=False,
)
print(done)
print(f"fine-tuned: {accuracy(model):.1f} %")

# %%
# The fine-tuned weights have moved away from zero, where the pruned ones were:

axes = plots.weight_histograms(model)

# %%
# Evaluate
# --------
#
# What has it brought? The parameters that are not zero are a quarter. But a mask makes
# nothing faster: the zeros are stored and multiplied like any other number, and while
# the masks are installed, they are multiplied in as well.

final = tpe.remove_all(copy.deepcopy(model))
found = tpe.compare(
    {"dense": dense, "pruned": model, "made permanent": final},
    images[:64],
    evaluate=accuracy,
    threads=1,
    rounds=5,
)
print(found)

# %%
# :doc:`plot_5_beyond` is about what does make it faster. The smaller number of
# parameters is real where only those are stored that are not zero: in a file of
# :func:`~torchprune_ext.save_sparse`, for example.
#
# How often, and when
# -------------------
#
# At three quarters, all ways are alike on such easy digits. At 95 % they are not. All
# get the same sparsity, one budget over all layers, and about the same training: 15
# epochs of the dense network and 6 more, or 21 from the beginning.

SPARSITY = 0.95


def weights(model):
    return [(model.get_submodule(path), "weight") for path in amounts]


def one_shot():
    """All at once, then fine-tune."""
    model = copy.deepcopy(dense)
    tpe.prune_to(weights(model), SPARSITY)
    train(model, epochs=6)
    return model


def iterative():
    """In six rounds, an epoch behind each; each takes the same part of the rest."""
    model = copy.deepcopy(dense)
    for done in range(1, 7):
        tpe.prune_to(weights(model), 1 - (1 - SPARSITY) ** (done / 6))
        train(model, epochs=1)
    return model


def while_training():
    """More and more from the first epoch on, and nothing more in the last third."""
    model = copy.deepcopy(initial)
    schedule = tpe.schedules.cubic(
        start=len(loader), end=14 * len(loader), every=10, final=SPARSITY
    )
    train(model, epochs=21, pruner=tpe.GradualPruner(model, weights(model), schedule))
    return model


def lottery_ticket():
    """The masks of a trained network, and the values that it began with."""
    model = copy.deepcopy(initial)
    ticket = tpe.LotteryTicket(model, weights(model))
    for _ in range(3):
        train(model, epochs=4)
        ticket.prune(1 - (1 - SPARSITY) ** (1 / 3))
        ticket.rewind()
    train(model, epochs=9)
    return model


def before_training():
    """By how sensitive the loss is to each weight, before the first step (SNIP)."""
    model = copy.deepcopy(initial)
    scores = tpe.calibration.snip(
        model, F.cross_entropy, loader, weights(model), progress=False
    )
    tpe.global_unstructured(
        weights(model), target_sparsity=SPARSITY, importance_scores=scores
    )
    train(model, epochs=21)
    return model


def random_before_training():
    """By chance."""
    model = copy.deepcopy(initial)
    generator = torch.Generator().manual_seed(0)
    scores = tpe.calibration.random(weights(model), generator=generator)
    tpe.global_unstructured(
        weights(model), target_sparsity=SPARSITY, importance_scores=scores
    )
    train(model, epochs=21)
    return model


ways = {
    "after, at once": one_shot,
    "after, in rounds": iterative,
    "while training": while_training,
    "lottery ticket": lottery_ticket,
    "before, SNIP": before_training,
    "before, random": random_before_training,
}
reached = {"dense": accuracy(dense)}
for name, way in ways.items():
    torch.manual_seed(0)
    model = way()
    reached[name] = accuracy(model)

_, ax = pyplot.subplots(figsize=(6.5, 3), layout="constrained")
bars = ax.barh(
    list(reached),
    list(reached.values()),
    color=[plots.DENSE] + [plots.KEPT] * len(ways),
)
ax.bar_label(bars, fmt="%.1f", padding=3)
ax.set(xlim=(0, 112), xlabel="test accuracy in percent, 95 % pruned")
ax.invert_yaxis()

# %%
# One run says nothing about differences of a percent or two; the large one is real.
# Masks that are drawn by lot before training leave a network that does not learn: too
# few paths lead through it. SNIP, which looks at the first gradients, finds some that
# do, and costs no more than training a small network. With the knowledge of a trained
# network, three ways lead to nearly the same place, and which of them is best depends
# on the network and on the epochs there are.
