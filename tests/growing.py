"""What the tests of dynamic sparse training share: a small model, data, and how it is trained."""

import torch
from torch import nn

import torchprune_ext as tpe


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))


def batches(number, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 12, generator=generator) for _ in range(number)]


def train(model, dst, optimizer, data):
    """Return after which batches the masks were updated."""
    done = []
    for x in data:
        model(x).square().sum().backward()
        optimizer.step()
        done.append(dst.step())
        optimizer.zero_grad()
    return done


def masks(model):
    return {path: module.weight_mask.clone() for path, module, _ in tpe.pruned_parameters(model)}


def alike(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x).tanh())
