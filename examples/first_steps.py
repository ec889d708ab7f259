"""The first example to read: prune a network by one budget, train what is left, make it permanent."""

import torch
from torch import nn

import torchprune_ext as tpe

torch.manual_seed(0)
inputs = torch.randn(512, 20)
targets = inputs.matmul(torch.randn(20, 5)).argmax(dim=1)  # something that can be learned
model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))


def train(steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()


def evaluate(when: str) -> None:
    right = (model(inputs).argmax(dim=1) == targets).float().mean()
    print(f"{when:<12} {right:.1%} of the samples right")


train(100)
evaluate("dense")
params = tpe.prunable_parameters(model, exclude="4")  # (module, name) pairs; the last layer stays dense
tpe.global_unstructured(params, target_sparsity=0.9)  # 90 % of all their entries, the smallest
evaluate("pruned")
train(100)  # pruned entries stay 0
evaluate("fine-tuned")
tpe.remove_all(model)  # masks and hooks are gone, zeros remain
print(tpe.report(model))
