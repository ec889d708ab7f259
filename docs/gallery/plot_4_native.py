"""
Beside torch.nn.utils.prune
===========================

PyTorch has a pruning module of its own. This package adds methods to it and does not
replace it: the same masks, the same hooks, the same containers. This script walks
through the native module on an untrained LeNet, and at each step shows what this
package adds to it.
"""

# %%
# A network
# ---------

import copy
import warnings

import torch
import torch.nn.functional as F
from matplotlib import pyplot
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe
from torchprune_ext import plots


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


torch.manual_seed(0)
model = LeNet()
conv1 = model.conv1
print(
    [name for name, _ in conv1.named_parameters()],
    [name for name, _ in conv1.named_buffers()],
)

# %%
# Local pruning: one tensor
# -------------------------
#
# Two of the six filters go, by chance. The arguments are the module, the name of its
# tensor, how many units (a float is a fraction), and the axis that counts them.

prune.random_structured(conv1, name="weight", amount=2, dim=0)
print(
    [name for name, _ in conv1.named_parameters()],
    [name for name, _ in conv1.named_buffers()],
)

# %%
# The parameter is now ``weight_orig``, a buffer ``weight_mask`` holds zeros and ones,
# and ``weight`` is an attribute: the product of the two, renewed by a hook before each
# forward pass.

print("a parameter:", isinstance(conv1.weight, nn.Parameter))
print("the product:", torch.equal(conv1.weight, conv1.weight_orig * conv1.weight_mask))
print("hooks:", [type(hook).__name__ for hook in conv1._forward_pre_hooks.values()])

# %%
# A call from this package does exactly the same by another rule. Of every four inputs
# of ``fc1``, each output keeps two:

tpe.nm_structured(model.fc1, "weight", n=2, m=4)
print(
    [name for name, _ in model.fc1.named_parameters()],
    [name for name, _ in model.fc1.named_buffers()],
)
print("native code agrees that it is pruned:", prune.is_pruned(model.fc1))

# %%
# Pruning again: the container and its history
# --------------------------------------------
#
# A second call on the same tensor prunes more, here by the norm, half of the filters
# that are left. PyTorch puts both methods into one container, which keeps one mask.

prune.ln_structured(conv1, name="weight", amount=0.5, n=2, dim=0)
(container,) = conv1._forward_pre_hooks.values()
print(type(container).__name__, [type(method).__name__ for method in container])

# %%
# To see with which arguments, the native way is to look into the objects.
# :func:`~torchprune_ext.history` reads them, whoever made them:

tpe.gradient_magnitude(conv1, "weight", amount=10, grad=torch.rand(6, 1, 5, 5))
for entry in tpe.history(conv1, "weight"):
    print(entry)

# %%
# The mask after each of the three steps. A row is a filter; blue is kept:

steps = [
    lambda conv: prune.random_structured(conv, "weight", amount=2, dim=0),
    lambda conv: prune.ln_structured(conv, "weight", amount=0.5, n=2, dim=0),
    lambda conv: tpe.gradient_magnitude(
        conv, "weight", amount=10, grad=torch.rand(6, 1, 5, 5)
    ),
]
torch.manual_seed(0)
conv = LeNet().conv1
_, axes = pyplot.subplots(3, figsize=(7, 6), layout="constrained")
for ax, step in zip(axes, steps, strict=True):
    step(conv)
    plots.mask_image(conv.weight_mask.flatten(1), ax=ax).set_title(
        tpe.history(conv, "weight")[-1], fontsize="small"
    )

# %%
# Other tensors of the same module are pruned by themselves. This is a bias:

prune.random_unstructured(conv1, name="bias", amount=1)
for module in model.modules():
    if isinstance(module, nn.Conv2d):
        prune.l1_unstructured(module, name="bias", amount=0.2)
print(list(model.state_dict()))

# %%
# What is pruned now, tensor by tensor, native calls or not:

print(tpe.report(model))

# %%
# Remove: to make it permanent
# ----------------------------
#
# ``prune.remove`` writes the zeros into the parameter, and mask and hook are gone. It
# is the end of the mask, not of the pruning. In PyTorch the order of the parameters has
# changed on the way, which mixes up optimizers and checkpoints that go by order; this
# package keeps it:

native = LeNet().conv1
prune.l1_unstructured(native, "weight", amount=0.5)
prune.remove(native, "weight")
print("prune.remove:", [name for name, _ in native.named_parameters()])

ours = LeNet().conv1
tpe.vector_ln(ours, "weight", amount=0.5)
tpe.remove(ours, "weight")
print("tpe.remove:  ", [name for name, _ in ours.named_parameters()])

# %%
# There is a way back, too, which PyTorch does not have: :func:`~torchprune_ext.undo`
# gives the dense values back.

before = model.fc1.weight_orig.detach().clone()
tpe.undo(model.fc1, "weight")
print(
    "as before:",
    torch.equal(model.fc1.weight, before),
    "still pruned:",
    prune.is_pruned(model.fc1),
)

# %%
# Global pruning: one threshold for the network
# ---------------------------------------------
#
# One budget for a list of tensors lets the scores decide where it falls. The native
# call and this package's prune the same entries:

networks = {"prune.global_unstructured": LeNet(), "tpe.global_unstructured": None}
networks["tpe.global_unstructured"] = copy.deepcopy(
    networks["prune.global_unstructured"]
)
native, ours = (
    [(getattr(network, path), "weight") for path in ("conv1", "conv2", "fc1", "fc2")]
    for network in networks.values()
)
prune.global_unstructured(native, pruning_method=prune.L1Unstructured, amount=0.2)
tpe.global_unstructured(ours, amount=0.2)
same = all(
    torch.equal(a.weight_mask, b.weight_mask)
    for (a, _), (b, _) in zip(native, ours, strict=True)
)
print("the same masks:", same)
print(tpe.report(networks["tpe.global_unstructured"]))

# %%
# The sparsities of the layers differ: the entries of the larger layers are smaller, as
# PyTorch initializes them.

ax = plots.density_bars(networks["tpe.global_unstructured"])

# %%
# What the native call does not have is a floor. A layer whose entries are small is
# emptied, and then nothing gets through the network any more. With a floor, it keeps a
# tenth, and a warning says that this is not what its scores ask for:

scaled = LeNet()
scaled.conv2.weight.data.mul_(0.01)
weights = [
    (getattr(scaled, path), "weight")
    for path in ("conv1", "conv2", "fc1", "fc2", "fc3")
]
prune.global_unstructured(weights, prune.L1Unstructured, amount=0.5)
print(
    f"native: {int(scaled.conv2.weight_mask.sum())} of {scaled.conv2.weight.numel()}",
    "entries of conv2 are left",
)

tpe.undo_all(scaled)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    tpe.global_unstructured(weights, amount=0.5, min_keep=0.1)
print(f"ours: {int(scaled.conv2.weight_mask.sum())}, and a warning:")
print(told[0].message)

# %%
# PyTorch has no global call for whole units, since norms of units of different sizes do
# not compare. :func:`~torchprune_ext.global_ln_structured`, ``global_kernel_ln`` and
# others compare them per entry.
#
# A method of one's own
# ---------------------
#
# A subclass of ``BasePruningMethod`` needs one method, ``compute_mask``. This one drops
# every other entry:


class EveryOther(prune.BasePruningMethod):
    """Drops the entries with even places."""

    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t, default_mask):
        """Return the mask, zeros where ``default_mask`` or the rule says so."""
        mask = default_mask.clone()
        mask.view(-1)[::2] = 0
        return mask


layer = LeNet().fc1
EveryOther.apply(layer, "bias")
print(layer.bias_mask[:12])
print(tpe.every_other(LeNet().fc1, "bias", step=2).bias_mask[:12])

# %%
# Here it is a call, :func:`~torchprune_ext.every_other`. But mostly, a method of one's
# own needs no class at all. What is new about it is the score, and any score can be
# passed, as a tensor in the shape of the weight, for any unit:

layer = LeNet().conv2
score = layer.weight.detach().abs() * torch.rand(
    6, 1, 1
)  # whatever you think an entry is worth
tpe.kernel_ln(layer, "weight", amount=0.5, importance_scores=score)
prune.l1_unstructured(layer, "weight", amount=0.2, importance_scores=score)
for entry in tpe.history(layer, "weight"):
    print(entry)

# %%
# When a call fails
# -----------------
#
# A native call that fails on a pruned tensor leaves the module broken: the old hook is
# gone, ``weight`` no longer follows the parameter, and ``remove`` raises. Ours change
# everything or nothing, and say what to do.

broken, whole = LeNet().fc1, LeNet().fc1
for layer, call in (
    (broken, lambda layer: prune.l1_unstructured(layer, "weight", amount=1_000_000)),
    (whole, lambda layer: tpe.vector_ln(layer, "weight", amount=1_000_000)),
):
    prune.l1_unstructured(layer, "weight", amount=0.5)
    try:
        call(layer)
    except ValueError as error:
        print(f"{type(error).__name__}: {error}")
    print("  still pruned:", prune.is_pruned(layer))

# %%
# :doc:`/host_traps` has the others, and what is done about each of them.
