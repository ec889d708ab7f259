"""Models to be made smaller, and how their units are pruned."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from torchprune_ext._graph import Group, graph_of


def block(inputs: int, outputs: int, size: int = 1) -> nn.Sequential:
    """A convolution, a BatchNorm with real statistics, and an activation."""
    norm = nn.BatchNorm2d(outputs)
    for tensor in (norm.weight.data, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 1.5)
    for tensor in (norm.bias.data, norm.running_mean):
        nn.init.normal_(tensor)
    return nn.Sequential(nn.Conv2d(inputs, outputs, size, padding=size // 2), norm, nn.GELU())


class Told(nn.Module):
    """Modules by name, and what to do with them."""

    def __init__(self, forward: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.told = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.told(self, *args, **kwargs)


def image(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 4, 6, 6))


# ------------------------------------------------- the models of Torch-Pruning's own tests, each written anew


def cascaded_concat() -> tuple[nn.Module, Any]:
    def forward(self: Any, x: Tensor) -> Tensor:
        ends = torch.cat([self.a(x), self.b(x)], 1)
        ends = torch.cat([ends, self.c(x)], 1)
        return self.out(torch.cat([ends, self.d(x)], 1))

    parts = {"a": block(4, 4), "b": block(4, 8), "c": block(4, 12), "d": block(4, 24)}
    return Told(forward, **parts, out=nn.Conv2d(48, 10, 1)), image()


def concat() -> tuple[nn.Module, Any]:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = x.reshape(x.shape[0], -1)
        return torch.sigmoid(self.out(torch.concat([self.wide(x), self.deep(x)], dim=-1)))

    deep = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 6))
    return Told(forward, wide=nn.Linear(8, 5), deep=deep, out=nn.Linear(11, 1)), torch.randn(2, 8)


def concat_split() -> tuple[nn.Module, Any]:
    def forward(self: Any, x: Tensor) -> Tensor:
        beside, x = self.beside(x), self.first(x)
        width = self.second[0].in_channels - self.beside[-2].num_features
        one, other = torch.split(x, (width, self.first[-2].num_features - width), 1)
        return self.out(self.second(torch.cat([one, beside], 1))) + self.out(self.third(other))

    parts = {"first": block(4, 16), "beside": block(4, 8), "second": block(16, 8), "third": block(8, 8)}
    return Told(forward, **parts, out=nn.Conv2d(8, 3, 1)), image()


def split() -> tuple[nn.Module, Any]:
    def forward(self: Any, x: Tensor) -> tuple[Tensor, ...]:
        x, small, large = self.first(x), self.small[0].in_channels, self.large[0].in_channels
        one, two, three = torch.split(x, [small, small, large], dim=1)
        return self.small(one), self.small(two), self.large(three)

    return Told(forward, first=block(4, 32), small=block(8, 3), large=block(16, 3)), image()


def reshape() -> tuple[nn.Module, Any]:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = F.relu(self.linear(x)).view(-1, self.one.in_channels, 4, 4)
        return self.final(torch.flatten(F.relu(self.two(F.relu(self.one(x)))), 1))

    one = nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1)
    two = nn.ConvTranspose2d(6, 4, 4, stride=2, padding=1)
    return Told(forward, linear=nn.Linear(5, 128), one=one, two=two, final=nn.Linear(1024, 3)), torch.randn(2, 5)


def grouped() -> tuple[nn.Module, Any]:
    layers = [block(4, 16), nn.Conv2d(16, 24, 3, groups=4), nn.ReLU(), nn.Conv2d(24, 12, 1, groups=2)]
    return nn.Sequential(*layers, nn.Conv2d(12, 3, 1)), image()


def depthwise() -> tuple[nn.Module, Any]:
    layers = [block(4, 16), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.ReLU6()]
    layers += [nn.Conv2d(16, 8, 1), nn.Conv2d(8, 24, 3, groups=8), nn.Conv2d(24, 2, 1)]
    return nn.Sequential(*layers), image()


def several() -> tuple[nn.Module, Any]:
    def forward(self: Any, x1: Tensor, x2: Tensor) -> tuple[Tensor, ...]:
        one, two = F.relu(self.one(x1)), F.relu(self.two(x2))
        return self.end(one), F.relu(self.three(torch.cat([one, two], dim=1)))

    parts = {"one": nn.Linear(6, 8), "two": nn.Linear(5, 7), "three": nn.Linear(15, 4), "end": nn.Linear(8, 2)}
    return Told(forward, **parts), {"x1": torch.randn(2, 6), "x2": torch.randn(2, 5)}


class Scaled(nn.Module):
    """As a ConvNeXt block: parameters of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(width, 1, 1)), nn.Parameter(torch.randn(width, 1, 1))
        self.unused = nn.Parameter(torch.randn(10))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


def unwrapped() -> tuple[nn.Module, Any]:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.out(x + self.scaled(self.inner(x)))

    return Told(forward, first=block(4, 8), inner=block(8, 8), scaled=Scaled(8), out=nn.Conv2d(8, 3, 1)), image()


def customized() -> tuple[nn.Module, Any]:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(x))
        norm = x.pow(2).sum(dim=1, keepdim=True).sqrt() + 1
        return self.fc2(F.relu(self.inner(x / norm * self.fc1.bias.abs() + self.extra.bias)))

    parts = {"fc1": nn.Linear(6, 8), "extra": nn.Linear(1, 8), "inner": nn.Linear(8, 8), "fc2": nn.Linear(8, 2)}
    return Told(forward, **parts), torch.randn(3, 6)


def fully_connected() -> tuple[nn.Module, Any]:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(x))
        return self.fc3(F.relu(self.fc2(x)) + x)

    return Told(forward, fc1=nn.Linear(6, 8), fc2=nn.Linear(8, 8), fc3=nn.Linear(8, 2)), torch.randn(2, 6)


def other_axis() -> tuple[nn.Module, Any]:
    def forward(self: Any, x: Tensor) -> Tensor:
        x1, x2 = self.one(x), self.two(x)
        x = self.three(torch.cat([x1, x2], dim=2))
        return self.four(torch.split(x, [x1.shape[2], x2.shape[2]], dim=2)[0])

    return Told(forward, one=block(4, 8), two=block(4, 8), three=block(8, 6), four=nn.Conv2d(6, 2, 1)), image()


def single_output() -> tuple[nn.Module, Any]:
    return nn.Sequential(block(4, 8, 3), block(8, 8, 3), block(8, 1, 3)), image()


def lenet() -> tuple[nn.Module, Any]:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.maps(x)
        return self.head(x.view(x.shape[0], -1))

    maps = [nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)]
    head = [nn.Linear(256, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU()]
    return Told(forward, maps=nn.Sequential(*maps), head=nn.Sequential(*head)), image(1, 1, 28, 28)


THEIRS = [
    *(cascaded_concat, concat, concat_split, split, reshape, grouped, depthwise, several, unwrapped, customized),
    *(fully_connected, other_axis, single_output, lenet),
]

# ---------------------------------------------------------------------------------------------------- more models


@dataclass
class Answer:
    """What a model may return."""

    scores: Tensor
    extra: dict[str, Any]


def residual() -> tuple[nn.Module, Any]:
    def forward(self: Any, x: Tensor) -> Answer:
        x = self.first(x)
        x = x + self.inner(x)
        return Answer(self.out(x.mean((2, 3))), {"n": 3, "also": self.also(x)})

    inner = nn.Sequential(block(8, 6, 3), nn.Conv2d(6, 8, 3, padding=1))
    return Told(forward, first=block(4, 8), inner=inner, out=nn.Linear(8, 3), also=nn.Conv2d(8, 2, 1)), image()


def excited() -> tuple[nn.Module, Any]:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.out(x * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1))))))

    return Told(
        forward, first=block(4, 8, 3), down=nn.Conv2d(8, 4, 1), up=nn.Conv2d(4, 8, 1), out=nn.Conv2d(8, 2, 3)
    ), image()


def halves() -> tuple[nn.Module, Any]:
    def forward(self: Any, x: Tensor) -> Tensor:
        gate, up = self.wide(x).chunk(2, -1)
        x = self.down(F.silu(gate) * up)
        return self.out(F.glu(self.glu(x), -1))

    parts = {"wide": nn.Linear(6, 16), "down": nn.Linear(8, 5), "glu": nn.Linear(5, 12), "out": nn.Linear(6, 2)}
    return Told(forward, **parts), torch.randn(2, 3, 6)


def shuffled() -> tuple[nn.Module, Any]:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.first(x)
        b, c, h, w = x.shape
        x = self.second(x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w))
        return self.out(F.pixel_shuffle(self.third(x), 2))

    parts = {"first": block(4, 8), "second": block(8, 8), "third": nn.Conv2d(8, 16, 1), "out": nn.Conv2d(4, 2, 3)}
    return Told(forward, **parts), image()


def one_and_three() -> tuple[nn.Module, Any]:
    def forward(self: Any, x: Tensor, y: Tensor) -> list[Tensor]:
        return [self.one(x), self.three(y)]

    one = nn.Sequential(
        nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.PReLU(6), nn.Upsample(scale_factor=2), nn.Conv1d(6, 2, 3)
    )
    three = nn.Sequential(nn.Conv3d(2, 6, 2), nn.InstanceNorm3d(6, affine=True), nn.AvgPool3d(2, 1), nn.Flatten())
    three += nn.Sequential(nn.Linear(6 * 8, 2))
    return Told(forward, one=one, three=three), (torch.randn(2, 3, 8), torch.randn(2, 2, 4, 4, 4))


class Attention(nn.Module):
    """Attention that reads its numbers from its own attributes."""

    def __init__(self, width: int, heads: int, each: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.inner_dim = heads, each, heads * each
        self.qkv, self.proj = nn.Linear(width, 3 * heads * each), nn.Linear(heads * each, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)
            for part in self.qkv(x).split(self.inner_dim, -1)
        )
        weights = (q @ k.mT / self.head_dim**0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(*x.shape[:2], self.inner_dim))


def attention() -> tuple[nn.Module, Any]:
    return nn.Sequential(nn.LayerNorm(6), Attention(6, 4, 2), nn.Linear(6, 3)), torch.randn(2, 5, 6)


MORE = [residual, excited, halves, shuffled, one_and_three, attention]


def open_groups(model: nn.Module, inputs: Any) -> list[Group]:
    """The groups of which channels could go."""
    return [group for group in graph_of(model, inputs) if group.fixed is None and group.size > 1]


def close(group: Group, channels: list[int], how: str) -> None:
    """Prune channels of a group: "unread", by masks on all who read them, or "zero", by zeros in all who give them."""
    for member in group.members:
        places = member.indices[channels].flatten()
        tensor = getattr(member.module, member.param)
        if how == "unread" and member.reads:
            mask = torch.ones_like(tensor).index_fill_(member.axis, places, 0)
            prune.custom_from_mask(member.module, member.param, mask)
        elif how == "zero" and not member.reads and isinstance(tensor, nn.Parameter):
            tensor.data.index_fill_(member.axis, places, 0)
