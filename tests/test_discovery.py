"""What is found in models: prunable parameters, batch norms behind layers."""

import pytest
import torch
from globally import PlantedError, Tied, weights
from snapshots import Snapshot
from torch import nn

import torchprune_ext as tpe


class Conv1D(nn.Module):
    """A Linear whose weight lies transposed, as in ``transformers``."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


def test_layers_of_any_type_are_found_and_pruned():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.c_attn, self.norm, self.c_proj = Conv1D(12, 4), nn.LayerNorm(12), Conv1D(4, 12)

        def forward(self, x):
            return x + self.c_proj(self.norm(self.c_attn(x)))

    class Transformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.h, self.lm_head = nn.Embedding(9, 4), nn.Sequential(Block(), Block()), nn.Linear(4, 9)
            self.lm_head.weight = self.wte.weight

        def forward(self, tokens):
            return self.lm_head(self.h(self.wte(tokens)))

    model = Transformer()
    params = tpe.prunable_parameters(model, types=(nn.Linear, Conv1D))
    blocks = [layer for block in model.h for layer in (block.c_attn, block.c_proj)]
    assert params == [(layer, "weight") for layer in [model.wte, model.lm_head, *blocks]]
    assert tpe.prunable_parameters(model, types=Conv1D) == weights(*blocks)
    assert tpe.prunable_parameters(model, types=(Conv1D,), exclude="h.0") == weights(*blocks[2:])
    tpe.global_unstructured(params, amount=0.5)
    assert torch.equal(model.wte.weight_mask, model.lm_head.weight_mask)
    zeros = sum(int((layer.weight_mask == 0).sum()) for layer in [model.wte, *blocks])
    assert zeros == round(0.5 * (36 + 4 * 48))
    model(torch.arange(9)).sum().backward()


def test_prunable_parameters_are_those_of_the_given_types():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Sequential(nn.ConvTranspose1d(2, 2, 2), nn.Linear(2, 2)),
        nn.Linear(2, 3),
    )
    assert tpe.prunable_parameters(model) == weights(model[0], model[2][0], model[2][1], model[3])
    assert tpe.prunable_parameters(model, types=nn.Linear) == weights(model[2][1], model[3])
    assert tpe.prunable_parameters(model, types=(nn.BatchNorm2d,)) == weights(model[1])
    assert tpe.prunable_parameters(model, name="bias", types=(nn.Linear,)) == [
        (model[2][1], "bias"),
        (model[3], "bias"),
    ]
    assert tpe.prunable_parameters(model, exclude="2") == weights(model[0], model[3])
    assert tpe.prunable_parameters(model, exclude=["2.0", "3"]) == weights(model[0], model[2][1])
    assert tpe.prunable_parameters(model[3]) == weights(model[3])
    tpe.every_other(model[3], "weight")
    assert tpe.prunable_parameters(model) == weights(model[0], model[2][0], model[2][1], model[3])


def test_a_path_that_only_begins_alike_is_not_excluded():
    model = nn.Sequential(*[nn.Linear(1, 1) for _ in range(12)])
    assert tpe.prunable_parameters(model, exclude="1") == weights(model[0], *model[2:])


def test_excluding_one_end_of_a_tie_excludes_the_other():
    model = Tied()
    for path in ("embedding", "decoder"):
        assert tpe.prunable_parameters(model, exclude=path) == weights(model.layer)
    assert tpe.prunable_parameters(model) == weights(model.embedding, model.decoder, model.layer)


def test_tensors_without_a_parameter_are_left_out():
    model = nn.Sequential(
        nn.Linear(2, 2), nn.Linear(2, 2, bias=False), nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    )
    assert tpe.prunable_parameters(model) == weights(model[0], model[1])
    assert tpe.prunable_parameters(model, name="bias") == [(model[0], "bias"), (model[2], "bias")]


@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        ({"model": [nn.Linear(1, 1)]}, TypeError, r"model="),
        ({"exclude": "9"}, ValueError, r"exclude='9'.*'0'"),
        ({"exclude": ["0", "fc"]}, ValueError, r"exclude='fc'"),
        ({"exclude": ["0", "1"]}, ValueError, r"exclude=\['0', '1'\]"),
        ({"types": nn.Conv2d}, ValueError, r"types="),
        ({"name": "nope"}, ValueError, r"'nope'"),
    ],
)
def test_what_leaves_nothing_to_prune_is_refused(args, error, words):
    with pytest.raises(error, match=words):
        tpe.prunable_parameters(**{"model": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), **args})


def test_thousands_of_layers():
    model = nn.Sequential(*[nn.Linear(3, 3, bias=False) for _ in range(1500)])
    params = tpe.prunable_parameters(model, exclude=["7", "1499"])
    assert len(params) == 1498
    tpe.global_unstructured(params, amount=0.5, min_keep=0.3)
    left = [int(layer.weight_mask.sum()) for layer, _ in params]
    assert sum(left) == 1498 * 9 - round(0.5 * 1498 * 9)
    assert min(left) == 3


class Block(nn.Module):
    """Layers and BatchNorms with what may stand between them."""

    def __init__(self, between=None, raises=False):
        super().__init__()
        self.conv, self.bn, self.dropout = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.last, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.between, self.raises = between or (lambda x: x), raises

    def forward(self, x, *, scale=1.0):
        x = self.dropout(self.bn(self.between(self.conv(x * scale))))
        if self.raises:
            raise PlantedError("in the middle")
        return self.norm(self.last(x))


IMAGES = torch.linspace(-1, 1, 2 * 2 * 5 * 5).reshape(2, 2, 5, 5)


@pytest.mark.parametrize("inputs", [IMAGES, (IMAGES,), [IMAGES], {"x": IMAGES}, {"x": IMAGES, "scale": 2.0}])
def test_batch_norms_behind_layers_are_found(inputs):
    model = Block()
    assert tpe.bn_pairs(model, inputs) == [(model.conv, model.bn), (model.last, model.norm)]


@pytest.mark.parametrize(
    "between",
    [torch.relu, torch.relu_, nn.ReLU(), nn.ReLU(inplace=True), lambda x: x + 0, lambda x: x.mul_(2), nn.MaxPool2d(1),
     nn.Sequential(nn.ReLU(inplace=True))],
)  # fmt: skip
def test_what_stands_between_separates(between):
    model = Block(between)
    assert tpe.bn_pairs(model, IMAGES) == [(model.last, model.norm)]


@pytest.mark.parametrize("between", [nn.Identity(), nn.Sequential(), lambda x: (x + 1, x)[1]])
def test_what_passes_the_tensor_on_does_not_separate(between):
    model = Block(between)
    assert len(tpe.bn_pairs(model, IMAGES)) == 2


def test_resnet18_has_twenty_pairs():
    models = pytest.importorskip("torchvision.models")
    model = models.resnet18(weights=None)
    pairs = tpe.bn_pairs(model, torch.zeros(1, 3, 32, 32))
    assert len(pairs) == 20
    assert pairs[0] == (model.conv1, model.bn1)
    assert {bn for _, bn in pairs} == {module for module in model.modules() if isinstance(module, nn.BatchNorm2d)}
    for path, module in model.named_modules():
        if path.endswith(("conv1", "conv2")):
            partner = model.get_submodule(path.replace("conv", "bn"))
            assert (module, partner) in pairs
    tpe.global_bn_scaling(pairs, amount=0.5)
    left = [int(conv.weight_mask.amax((1, 2, 3)).sum()) for conv, _ in pairs]
    assert sum(left) == sum(conv.out_channels for conv, _ in pairs) // 2
    assert min(left) >= 1


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("between", [None, lambda x: nn.functional.dropout(x)], ids=["plain", "functional dropout"])
def test_finding_pairs_leaves_the_model_as_it_was(raises, between):
    model = Block(between, raises)
    model.bn.eval()
    model.last.eval()
    model.conv.register_forward_hook(lambda module, args, output: None)
    before, state = Snapshot(model), torch.get_rng_state()
    if raises:
        with pytest.raises(PlantedError):
            tpe.bn_pairs(model, IMAGES)
    else:
        tpe.bn_pairs(model, IMAGES)
    assert before.differences() == []
    assert torch.equal(torch.get_rng_state(), state)


def test_layers_and_batch_norms_of_several_pairs_are_left_out_with_a_warning():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(2, 2, 1) for _ in range(3))
            self.shared, self.d, self.e, self.f = (nn.BatchNorm2d(2) for _ in range(4))

        def forward(self, x):
            twice = self.c(x)
            alone = self.b(x)
            return self.shared(self.a(x)) + self.d(twice) + self.e(twice) + self.f(alone)

    class SharedNorm(Shared):
        def forward(self, x):
            return self.shared(self.a(x)) + self.shared(self.b(x)) + self.d(self.c(x))

    model = Shared()
    with pytest.warns(UserWarning, match=r"Conv2d with BatchNorm2d") as caught:
        assert tpe.bn_pairs(model, IMAGES) == [(model.a, model.shared), (model.b, model.f)]
    assert len(caught) == 1
    assert caught[0].filename == __file__
    model = SharedNorm()
    with pytest.warns(UserWarning, match=r"several pairs"):
        assert tpe.bn_pairs(model, IMAGES) == [(model.c, model.d)]


def test_batch_norms_without_scales_and_pruned_layers():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2), nn.Flatten(),
        nn.Linear(50, 8), nn.BatchNorm1d(8)
    )  # fmt: skip
    expected = [(model[2], model[3]), (model[5], model[6])]
    assert tpe.bn_pairs(model, IMAGES) == expected
    tpe.global_bn_scaling(expected, amount=0.3)
    assert tpe.bn_pairs(model, IMAGES) == expected


def test_a_batch_norm_over_another_axis_is_no_partner():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))  # normalizes the 6 places, not the 6 features
    assert tpe.bn_pairs(model, torch.ones(2, 6, 4)) == []
    assert tpe.bn_pairs(model, torch.ones(3, 4)) == [(model[0], model[1])]


def test_pairs_are_found_in_inference_mode():
    with torch.inference_mode():
        model = Block()
        assert len(tpe.bn_pairs(model, IMAGES)) == 2


def test_only_modules_have_pairs():
    with pytest.raises(TypeError, match=r"model="):
        tpe.bn_pairs(lambda x: x, IMAGES)
