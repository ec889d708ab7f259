"""Which entries of a model are one channel."""

import pytest
import torch
import torch.nn.functional as F
from compacting import MORE, THEIRS, Told, block, image
from torch import nn

from torchprune_ext._graph import Group, graph_of


def shown(model: nn.Module, inputs: object) -> list[tuple[int, dict[str, list[list[int]]]]]:
    """Return size and places of all channels that could go, by tensor and axis, readers with a star."""
    return [
        (group.size, {f"{m.name}:{m.axis}{'*' * m.reads}": m.indices.tolist() for m in group.members})
        for group in graph_of(model, inputs)
        if group.fixed is None
    ]


def ones(size: int) -> list[list[int]]:
    return [[place] for place in range(size)]


def test_a_chain():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    assert shown(model, torch.ones(1, 4)) == [(3, {"0.weight:0": ones(3), "0.bias:0": ones(3), "2.weight:1*": ones(3)})]


def test_a_flattened_map():
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Flatten(), nn.Linear(8, 1))
    assert shown(model, torch.ones(1, 1, 2, 2)) == [
        (2, {"0.weight:0": ones(2), "2.weight:1*": [[0, 1, 2, 3], [4, 5, 6, 7]]})
    ]


def test_a_concatenation_has_offsets():
    model = Told(
        lambda self, x: self.out(torch.cat([self.a(x), x, self.b(x)], 1)),
        a=nn.Linear(2, 2, bias=False),
        b=nn.Linear(2, 3, bias=False),
        out=nn.Linear(7, 1),
    )
    assert shown(model, torch.ones(1, 2)) == [
        (2, {"a.weight:0": ones(2), "out.weight:1*": [[0], [1]]}),
        (3, {"b.weight:0": ones(3), "out.weight:1*": [[4], [5], [6]]}),
    ]


def test_a_split_has_offsets():
    def forward(self, x):
        one, other = self.both(x).split([2, 3], 1)
        return self.a(one), self.b(other)

    model = Told(forward, both=nn.Linear(2, 5, bias=False), a=nn.Linear(2, 2), b=nn.Linear(3, 2))
    assert shown(model, torch.ones(1, 2)) == [
        (2, {"both.weight:0": [[0], [1]], "a.weight:1*": ones(2)}),
        (3, {"both.weight:0": [[2], [3], [4]], "b.weight:1*": ones(3)}),
    ]


def test_halves_that_meet_are_one():
    model = Told(lambda self, x: self.out(F.glu(self.both(x))), both=nn.Linear(2, 6, bias=False), out=nn.Linear(3, 1))
    assert shown(model, torch.ones(1, 2)) == [
        (3, {"both.weight:0": [[0, 3], [1, 4], [2, 5]], "out.weight:1*": ones(3)})
    ]


def test_groups_of_a_convolution_stay_of_one_size():
    model = nn.Sequential(nn.Conv2d(1, 6, 1, bias=False), nn.Conv2d(6, 4, 1, groups=2, bias=False), nn.Conv2d(4, 1, 1))
    assert shown(model, torch.ones(1, 1, 2, 2)) == [
        (3, {"0.weight:0": [[0, 3], [1, 4], [2, 5]], "1.weight:1*": ones(3)}),
        (2, {"1.weight:0": [[0, 2], [1, 3]], "2.weight:1*": [[0, 2], [1, 3]]}),
    ]


def test_depthwise_filters_belong_to_their_input():
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 4, 1, groups=2, bias=False), nn.Conv2d(4, 1, 1))
    assert shown(model, torch.ones(1, 1, 2, 2)) == [
        (2, {"0.weight:0": ones(2), "1.weight:0": [[0, 1], [2, 3]], "2.weight:1*": [[0, 1], [2, 3]]})
    ]


def test_a_residual_stream_and_what_squeezes_and_excites():
    def forward(self, x):
        x = self.first(x)
        x = x + self.inner(x) * torch.sigmoid(self.up(self.down(x.mean((2, 3), keepdim=True))))
        return self.out(x)

    model = Told(
        forward,
        first=nn.Conv2d(4, 3, 1, bias=False),
        inner=nn.Conv2d(3, 3, 3, padding=1, bias=False),
        down=nn.Conv2d(3, 2, 1, bias=False),
        up=nn.Conv2d(2, 3, 1, bias=False),
        out=nn.Conv2d(3, 1, 1, bias=False),
    )
    stream = ["first.weight:0", "inner.weight:0", "inner.weight:1*", "down.weight:1*", "up.weight:0", "out.weight:1*"]
    assert shown(model, image()) == [
        (3, dict.fromkeys(stream, ones(3))),
        (2, {"down.weight:0": ones(2), "up.weight:1*": ones(2)}),
    ]


def test_heads():
    def forward(self, x):
        q, k, v = (part.unflatten(-1, (-1, 2)).transpose(1, 2) for part in (self.q(x), self.k(x), self.v(x)))
        k, v = (part.repeat_interleave(2, 1) for part in (k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    parts = {"q": nn.Linear(3, 8, bias=False), "k": nn.Linear(3, 4, bias=False), "v": nn.Linear(3, 4, bias=False)}
    model = Told(forward, **parts, out=nn.Linear(8, 3, bias=False))
    large, little = [[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 1], [2, 3]]
    wanted = {"q.weight:0": large, "k.weight:0": little, "v.weight:0": little, "out.weight:1*": large}
    assert shown(model, torch.randn(2, 5, 3)) == [(2, wanted)]
    assert [group.heads for group in graph_of(model, torch.randn(2, 5, 3)) if group.fixed is None] == [True]


@pytest.mark.parametrize("make", [*THEIRS, *MORE], ids=lambda make: make.__name__)
def test_every_place_belongs_to_one_channel(make):
    torch.manual_seed(0)
    model, inputs = make()
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    seen: dict[tuple[str, int], list[int]] = {}
    for group in graph_of(model, inputs):
        assert group.size > 0
        for member in group.members:
            assert getattr(member.module, member.param) is tensors[member.name]
            assert len(member.indices) == group.size
            seen.setdefault((member.name, member.axis), []).extend(member.indices.flatten().tolist())
    wanted = {(name, axis): size for name, t in tensors.items() for axis, size in enumerate(t.shape) if size > 1}
    assert {key: sorted(places) for key, places in seen.items()} == {
        key: [*range(size)] for key, size in wanted.items()
    }


def by_removal(model: nn.Module, x: torch.Tensor) -> set[frozenset[tuple[str, int, int]]]:
    """Torch-Pruning's answer, one channel after the other."""
    tp = pytest.importorskip("torch_pruning")
    graph = tp.DependencyGraph().build_dependency(model, x, verbose=False)
    names = {module: name for name, module in model.named_modules()}
    found = set()
    for module in model.modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        pruner = graph.get_pruner_of_module(module)
        for channel in range(pruner.get_out_channels(module)):
            parts = set()
            for step, places in graph.get_pruning_group(module, pruner.prune_out_channels, [channel]):
                layer = step.target.module
                if isinstance(layer, nn.Conv2d | nn.Linear):
                    axis = 0 if graph.is_out_channel_pruning_fn(step.handler) else 1
                    parts |= {(names[layer], axis, place) for place in places}
            found.add(frozenset(parts))
    return found


def plain_models() -> list[tuple[nn.Module, torch.Tensor]]:
    return [
        nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)),
        nn.Sequential(block(4, 3), block(3, 5), nn.Flatten(), nn.Linear(180, 2)),
        THEIRS[0]()[0],
        THEIRS[10]()[0],
    ]


@pytest.mark.parametrize("place", range(4))
def test_the_groups_are_those_of_torch_pruning(place):
    model = plain_models()[place].eval()
    x = torch.randn(2, 6) if place == 3 else torch.randn(2, 4) if place == 0 else image()
    ours = set()
    for group in graph_of(model, x):
        for channel in range(group.size):
            parts = {
                (member.name.removesuffix(".weight"), member.axis, index)
                for member in group.members
                if member.param == "weight" and member.module.weight.dim() > 1
                for index in member.indices[channel].tolist()
            }
            if any(axis == 0 for _, axis, _ in parts):
                ours.add(frozenset(parts))
    theirs = {group for group in by_removal(model, x) if any(axis == 0 for _, axis, _ in group)}
    assert ours == theirs


def test_groups_are_frozen():
    [group, *_] = graph_of(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.ones(1, 4))
    with pytest.raises(AttributeError):
        group.size = 3
    assert isinstance(group, Group)
    assert group.names == ["0.weight"]
