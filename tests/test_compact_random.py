"""compact on networks that are put together at random: what it returns computes the same, or it says why not."""

import random
from typing import Any

import pytest
import torch
from compacting import block
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import torchprune_ext as tpe
from torchprune_ext._graph import graph_of

LAYERS = {
    "conv": lambda c, o: nn.Conv2d(c, o, 1),
    "padded": lambda c, o: nn.Conv2d(c, o, 3, padding=1, bias=False),
    "transposed": lambda c, o: nn.ConvTranspose2d(c, o, 3, padding=1),
    "block": lambda c, o: block(c, o, 3),
    "grouped": lambda c, o: nn.Conv2d(c, 8, 3, padding=1, groups=2 if c % 2 == 0 else 1),
    "depthwise": lambda c, o: nn.Conv2d(c, 2 * c, 3, padding=1, groups=c),
    "excited": lambda c, o: nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, 3, 1), nn.ReLU(), nn.Conv2d(3, c, 1), nn.Sigmoid()
    ),
    "act": lambda c, o: random.choice(
        [nn.ReLU(), nn.Sigmoid(), nn.PReLU(c), nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1)]
    ),
    "norm": lambda c, o: random.choice([nn.GroupNorm(1, c), nn.InstanceNorm2d(c), nn.InstanceNorm2d(c, affine=True)]),
    "twice": lambda c, o: nn.Conv2d(c, c, 1),
}
JOINS = ("add", "mul", "cat", "halves", "shuffle", "centred", "shifted")


class Random(nn.Module):
    """Steps, each of which reads what one or two steps before it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[str, int, int]] = []
        self.layers, widths = nn.ModuleList(), [4]
        for _ in range(random.randint(3, 8)):
            kind, a = random.choice([*LAYERS, *JOINS]), random.randrange(len(widths))
            c, b = widths[a], random.choice([place for place, width in enumerate(widths) if width == widths[a]])
            layer = LAYERS[kind](c, random.choice([4, 6])) if kind in LAYERS else nn.Identity()
            self.layers.append(layer)
            self.steps.append((kind, a, b))
            with torch.no_grad():
                widths.append(self.step(kind, layer, torch.ones(1, c, 5, 5), torch.ones(1, c, 5, 5)).shape[1])
        self.out, self.also = nn.Linear(25 * widths[-1], 3), nn.Conv2d(widths[-2], 2, 1)

    def step(self, kind: str, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        b, c, h, w = x.shape
        if kind == "excited":
            return x * layer(x)
        if kind == "twice":
            return layer(torch.relu(layer(x)))
        if kind in LAYERS:
            return layer(x)
        if kind == "halves" and c % 2 == 0:
            left, right = x.chunk(2, 1)
            return left * right.sigmoid()
        if kind == "shuffle" and c % 2 == 0:
            return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        if kind == "centred":
            return x - x.mean(1, keepdim=True)
        if kind == "shifted":
            return nn.functional.pad(x[:, :, 1:], (0, 0, 1, 0))
        return {"add": x + y, "mul": x * y}.get(kind, torch.cat([x, y], 1) if kind == "cat" else x)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = [x]
        for (kind, a, b), layer in zip(self.steps, self.layers, strict=True):
            found.append(self.step(kind, layer, found[a], found[b]))
        return self.out(found[-1].flatten(1)), self.also(found[-2])


def zero(model: nn.Module, x: Tensor, how: str) -> None:
    """Zero places of a third of the channels: in all readers, in all givers, in their matrices only, or anywhere."""
    for group in graph_of(model, x):
        channels = [channel for channel in range(group.size) if random.random() < 1 / 3]
        for member in group.members if how == "anywhere" or group.fixed is None else ():
            tensor: Any = getattr(member.module, member.param)
            wanted = {
                "unread": member.reads,
                "zero": not member.reads,
                "constant": not member.reads and tensor.dim() > 1,
                "anywhere": random.random() < 0.6,
            }[how]
            if wanted and isinstance(tensor, nn.Parameter) and channels:
                tensor.data.index_fill_(member.axis, member.indices[channels].flatten(), 0)


@settings(max_examples=30, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(seed=st.integers(0, 1 << 30), how=st.sampled_from(["unread", "zero", "constant", "anywhere"]))
def test_outputs_are_equal_or_there_is_a_reason(seed, how):
    random.seed(seed)
    torch.manual_seed(seed)
    model = Random().double().eval()
    x, other = torch.randn(2, 4, 5, 5).double(), torch.randn(3, 4, 5, 5).double()
    zero(model, x, how)
    rows = tpe.dead_units(model, x)
    if not any(row.removable for row in rows):
        with pytest.raises(ValueError, match=r"no dead channels|no channels that can be removed"):
            tpe.compact(model, x)
        return
    small = tpe.compact(model, x)
    with torch.no_grad():
        for one, two in zip(model(other), small(other), strict=True):
            torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-10)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters()) + 100  # new biases
