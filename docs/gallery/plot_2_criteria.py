"""
Criteria: which go first
========================

Once it is settled what goes at once, something has to say *which* entries, filters or
channels are dispensable. This script trains a small network on real handwritten digits,
prunes its layers by magnitude, by norms, by the gradient, by curvature and by BatchNorm
scales, and then compares these criteria at equal sparsity.
"""

# sphinx_gallery_thumbnail_number = -1

# %%
# A network to prune
# ------------------
#
# LeNet-5 on the 1,797 digits that come with scikit-learn, scaled to the 28 x 28 pixels
# that this network is made for.

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


class LeNet(nn.Module):
    """Two convolutions, with or without BatchNorm, and three linear layers."""

    def __init__(self, batch_norm=False):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, kernel_size=5)
        self.bn1 = nn.BatchNorm2d(6) if batch_norm else nn.Identity()
        self.conv2 = nn.Conv2d(6, 16, kernel_size=5)
        self.bn2 = nn.BatchNorm2d(16) if batch_norm else nn.Identity()
        self.fc1 = nn.Linear(256, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x):
        """Return the logits of images of shape (batch, 1, 28, 28)."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))


def train(model, epochs, penalty=0.0):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, epochs)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(train_labels)).split(32):
            loss = F.cross_entropy(model(train_images[rows]), train_labels[rows])
            if penalty:
                loss = loss + tpe.bn_l1_penalty(model, penalty)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        decay.step()
    model.eval()


@torch.no_grad()
def accuracy(model):
    return 100 * (model(test_images).argmax(dim=1) == test_labels).float().mean().item()


torch.manual_seed(0)
dense = LeNet()
train(dense, epochs=15)
print(f"{accuracy(dense):.1f} % of {len(test_labels)} test images right")

# %%
# Most of its weights are close to zero, which is why pruning works at all:

axes = plots.weight_histograms(dense)

# %%
# Magnitude: L1 and L2
# --------------------
#
# The simplest score of an entry is its size, :math:`|w|`. Half of ``conv2`` goes by it.
# Its square, :math:`w^2`, would give the same: the order is the same, and nothing but
# the order counts.

model = copy.deepcopy(dense)
prune.l1_unstructured(model.conv2, "weight", amount=0.5)
squares = copy.deepcopy(dense)
scores = squares.conv2.weight.detach() ** 2
prune.l1_unstructured(squares.conv2, "weight", amount=0.5, importance_scores=scores)
print("same mask:", torch.equal(model.conv2.weight_mask, squares.conv2.weight_mask))
ax = plots.density_bars(dense, model)

# %%
# The histogram of ``conv2`` has lost its middle; the outline shows what it was.

axes = plots.weight_histograms(model.conv2)

# %%
# The two norms differ where several entries are judged together. The score of a filter
# is
#
# .. math:: \sum_{i \in S} |w_i| \qquad \text{or} \qquad \sqrt{\sum_{i \in S} |w_i|^2}
#
# and the second one cares more for single large entries, so the two need not agree. The
# darker, the higher a filter of ``conv2`` ranks; the one with the rank 0 goes first:

ranks = []
for n in (1, 2):
    norms = torch.linalg.vector_norm(
        dense.conv2.weight.detach().flatten(1), ord=n, dim=1
    )
    ranks.append(norms.argsort().argsort())
_, ax = pyplot.subplots(figsize=(7, 1.8), layout="constrained")
ax.imshow(torch.stack(ranks).numpy(), cmap="Blues", vmax=24)
ax.set(
    yticks=[0, 1],
    yticklabels=["L1", "L2"],
    xticks=range(16),
    xlabel="filter of conv2; the number is its rank",
)
for row, line in enumerate(ranks):
    for column, rank in enumerate(line.tolist()):
        ax.text(column, row, str(rank), ha="center", va="center")

# %%
# PyTorch's ``prune.ln_structured`` and this package's functions that end in ``_ln``
# take the order of the norm as ``n``.
#
# Gradient
# --------
#
# A small weight may be one that the loss depends on. The gradient of the loss,
# :math:`|\partial L / \partial w|`, says how much.
# :func:`~torchprune_ext.gradient_magnitude` reads it from the parameter, so a backward
# pass comes first.

model = copy.deepcopy(dense)
F.cross_entropy(model(train_images), train_labels).backward()
gradient = model.fc2.weight.grad.abs()
tpe.gradient_magnitude(model.fc2, "weight", amount=0.5)
by_gradient = model.fc2.weight_mask
by_size = prune.l1_unstructured(
    copy.deepcopy(dense).fc2, "weight", amount=0.5
).weight_mask
print(
    f"{(by_gradient == by_size).float().mean():.0%} of the entries of fc2",
    "get the same verdict as by magnitude",
)

_, ax = pyplot.subplots(figsize=(6, 4), layout="constrained")
sizes = dense.fc2.weight.detach().abs().flatten()
ax.loglog(
    sizes.numpy(), gradient.flatten().numpy(), ".", markersize=1, color=plots.KEPT
)
ax.set(
    xlabel="|w|",
    ylabel="|gradient|",
    title="fc2: size and gradient are two different things",
    ylim=(1e-9, None),
)

# %%
# A trained network is near a minimum, where the gradient of *all* the data is close to
# zero. What is left of it is mostly noise. Products with the weight, sample by sample
# (``tpe.calibration.taylor``), hold more.
#
# Curvature: Optimal Brain Damage
# -------------------------------
#
# At a minimum, the first-order term vanishes, and deleting a weight raises the loss by
# about
#
# .. math:: \delta L \approx \frac{1}{2} h_{kk} w_k^2, \qquad
#    h_{kk} = \frac{\partial^2 L}{\partial w_k^2}
#
# if what other weights do meanwhile is ignored.
# :func:`~torchprune_ext.calibration.hessian_diagonal` estimates :math:`h_{kk}` for
# every weight from data. It assumes a trained network; LeCun, Denker & Solla derived it
# in 1989.

params = [
    (dense.get_submodule(path), "weight")
    for path in ("conv1", "conv2", "fc1", "fc2", "fc3")
]
loader = list(zip(train_images.split(64), train_labels.split(64), strict=True))
curvature = tpe.calibration.hessian_diagonal(
    dense, F.cross_entropy, loader, params, samples=1, progress=False
)
model = copy.deepcopy(dense)
tpe.obd_saliency(
    model.fc2, "weight", amount=0.5, hessian_diag=curvature[dense.fc2, "weight"]
)
print(f"half of fc2 by curvature: {accuracy(model):.1f} %")

# %%
# Is the prediction any good? One entry at a time, the true rise of the loss against the
# predicted one:


@torch.no_grad()
def loss():
    return F.cross_entropy(dense(train_images), train_labels).item()


weight, h, base = dense.fc3.weight.detach(), curvature[dense.fc3, "weight"], loss()
predicted, true = [], []
for place in torch.randperm(weight.numel())[:60].tolist():
    saved = weight.view(-1)[place].clone()
    weight.view(-1)[place] = 0
    true.append(loss() - base)
    weight.view(-1)[place] = saved
    predicted.append((h.view(-1)[place] * saved**2 / 2).item())
_, ax = pyplot.subplots(figsize=(5, 4.4), layout="constrained")
ax.plot(predicted, true, "o", markersize=4, color=plots.KEPT)
most = max(predicted)
ax.plot([0, most], [0, most], color="black", linewidth=1, label="as predicted")
ax.set(
    xlabel="predicted rise of the loss",
    ylabel="true rise",
    title="60 entries of fc3, deleted one by one",
)
ax.legend()

# %%
# BatchNorm scales: Network Slimming
# ----------------------------------
#
# The scale :math:`\gamma` of a BatchNorm says how much of a channel passes. With an L1
# penalty on all scales, :func:`~torchprune_ext.bn_l1_penalty`, training pushes those to
# zero that it can do without. Without the penalty, there is little to tell channels
# apart by:

networks = {}
for penalty in (0.0, 0.1):
    torch.manual_seed(0)
    networks[penalty] = LeNet(batch_norm=True)
    train(networks[penalty], epochs=10, penalty=penalty)

_, ax = pyplot.subplots(figsize=(6, 3), layout="constrained")
for (penalty, network), colour in zip(
    networks.items(), (plots.DENSE, plots.KEPT), strict=True
):
    scales = network.bn2.weight.detach().abs().sort().values
    ax.plot(
        scales.numpy(),
        "o-",
        color=colour,
        label=f"penalty {penalty:g}" if penalty else "no penalty",
    )
ax.set(
    xlabel="channel of conv2, in the order of the scales",
    ylabel="size of the scale",
    ylim=(0, None),
)
ax.legend()

# %%
# :func:`~torchprune_ext.bn_scaling` prunes by them. It masks a channel's filter, its
# bias and what the BatchNorm adds, so that nothing is left of the channel;
# ``tpe.global_bn_scaling`` has one threshold for a whole network.

for penalty, network in networks.items():
    before = accuracy(network)
    tpe.bn_scaling(network.conv2, "weight", amount=0.5, bn=network.bn2)
    print(
        f"penalty {penalty:g}: {before:.1f} % right,",
        f"without half of the channels {accuracy(network):.1f} %",
    )

# %%
# All together
# ------------
#
# The same five weights, one budget for all of them, no training afterwards:

statistics = {
    "magnitude": {
        (module, name): getattr(module, name).detach().abs() for module, name in params
    },
    "gradient": tpe.calibration.gradients(
        dense, F.cross_entropy, loader, params, progress=False
    ),
    "gradient x weight": tpe.calibration.taylor(
        dense, F.cross_entropy, loader, params, progress=False
    ),
    "activations (Wanda)": tpe.calibration.activations(
        dense, loader, params, progress=False
    ),
    "random": tpe.calibration.random(
        params, generator=torch.Generator().manual_seed(0)
    ),
}
sparsities = (0.5, 0.7, 0.8, 0.9, 0.95)
found = {name: [] for name in (*statistics, "curvature (OBD)")}
for sparsity in sparsities:
    for name, scores in statistics.items():
        tpe.global_unstructured(
            params, target_sparsity=sparsity, importance_scores=scores
        )
        found[name].append(accuracy(dense))
        tpe.undo_all(dense)
    tpe.global_obd_saliency(params, target_sparsity=sparsity, hessian_diag=curvature)
    found["curvature (OBD)"].append(accuracy(dense))
    tpe.undo_all(dense)

print(f"{'':<20}" + "".join(f"{sparsity:>8.0%}" for sparsity in sparsities))
for name, row in found.items():
    print(f"{name:<20}" + "".join(f"{value:>8.1f}" for value in row))
_, ax = pyplot.subplots(figsize=(7, 4), layout="constrained")
for (name, row), marker in zip(found.items(), "osD^xv", strict=True):
    ax.plot(sparsities, row, marker=marker, label=name)
ax.set(
    xlabel="sparsity",
    ylabel="test accuracy in percent",
    title="pruned at once, not trained again",
)
ax.legend()

# %%
# Magnitude needs no data and does well; so it is what to begin with. The order of the
# others changes with the network and with how much is pruned. What happens *after*
# pruning matters more than the criterion: see the next page.
