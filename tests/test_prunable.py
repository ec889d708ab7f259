"""What prunable_parameters finds in models of other libraries' layers, and what it says of the rest."""

import pytest
import torch
from globally import Tied, weights
from test_refusals import Masked, scripted
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrizations

import torchprune_ext as tpe


class Conv1D(nn.Module):
    """As in transformers: multiplies as Linear, with (inputs, outputs)."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


class GPT2(nn.Module):
    """Embeddings, blocks of Conv1D, and a head tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.wte, self.wpe, self.ln = nn.Embedding(20, 8), nn.Embedding(4, 8), nn.LayerNorm((4, 8))
        self.h = nn.ModuleList(nn.ModuleDict({"c_attn": Conv1D(24, 8), "mlp": Conv1D(32, 8)}) for _ in range(2))
        self.lm_head = nn.Linear(8, 20, bias=False)
        self.lm_head.weight = self.wte.weight


class Experts(nn.Module):
    """All experts in one tensor."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.ones(4, 16, 8)), nn.Parameter(torch.ones(4, 8, 8))


class RotaryEmbed(nn.Module):
    """An embedding of somebody's own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(50, 8))


def conv1ds(model):
    return [(module, "weight") for module in model.modules() if isinstance(module, Conv1D)]


def test_gpt2_is_found():
    model = GPT2()
    head = weights(model.wte, model.lm_head)
    assert tpe.prunable_parameters(model) == [*head, *conv1ds(model)]
    assert tpe.prunable_parameters(model, tied=False) == conv1ds(model)
    assert tpe.prunable_parameters(model, exclude=model.lm_head) == conv1ds(model)
    assert tpe.prunable_parameters(model, types=(nn.Linear,)) == head
    tpe.global_unstructured(tpe.prunable_parameters(model, tied=False), amount=0.5)
    assert tpe.prunable_parameters(model) == [*head, *conv1ds(model)]  # pruned or not


def test_what_is_tied_under_another_name_is_found_too():
    class Head(nn.Module):
        def __init__(self, table):
            super().__init__()
            self.table = table

    linear = nn.Linear(4, 6)
    model = nn.Sequential(linear, Head(linear.weight), nn.Linear(6, 4))
    params = [(linear, "weight"), (model[1], "table"), (model[2], "weight")]
    assert tpe.prunable_parameters(model) == params
    assert tpe.prunable_parameters(model, tied=False) == params[2:]
    assert tpe.prunable_parameters(model, exclude="1") == params[2:]
    tpe.global_unstructured(params, amount=0.5)
    assert torch.equal(linear.weight_mask, model[1].table_mask)
    assert tpe.prunable_parameters(model) == params


def mixtral():
    return nn.Sequential(nn.Linear(8, 8), Experts(), RotaryEmbed())


def recurrent():
    return nn.Sequential(nn.LSTM(8, 16), nn.Linear(8, 4))


def parametrized():
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 16)), nn.Linear(8, 4))


def attention():
    return nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 4))


def own_masks():
    return nn.Sequential(Masked(), Masked(), nn.Linear(4, 4))


def with_script():
    return nn.Sequential(scripted(), scripted(), nn.Linear(4, 4))


LEFT = {
    mixtral: (
        "Experts",
        "gate_up_proj",
        ["finds 5%", r"Experts\.gate_up_proj \(4\d%\)", "Experts.down_proj", "RotaryEmbed"],
    ),
    recurrent: ("LSTM", "weight_hh_l0", ["LSTM.weight_ih_l0", "LSTM.weight_hh_l0"]),
    parametrized: ("ParametrizationList", "original1", [r"ParametrizationList\.original1"]),
    attention: ("MultiheadAttention", "in_proj_weight", ["NonDynamicallyQuantizableLinear.weight"]),
    own_masks: ("Masked", "weight_orig", [r"Masked\.weight_orig \(80%\)"]),
}


@pytest.mark.parametrize(("make", "told"), LEFT.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_what_is_mostly_left_out_is_named_with_a_remedy_that_works(make, told):
    kind, name, words = told
    model = make()
    with pytest.warns(UserWarning, match=rf"types={kind}, name='{name}'") as caught:
        found = tpe.prunable_parameters(model)
    assert all(isinstance(module, nn.Linear) for module, _ in found)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    for each in words:
        with pytest.warns(UserWarning, match=each):
            tpe.prunable_parameters(model)
    types = {type(module).__name__: type(module) for module in model.modules()}
    more = tpe.prunable_parameters(model, types=types[kind], name=name)
    assert more
    tpe.global_unstructured([*found, *more], amount=0.1)


def test_scripted_modules_are_named():
    with pytest.warns(UserWarning, match=r"RecursiveScriptModule\.weight \(67%\)"):
        tpe.prunable_parameters(with_script())


def test_what_is_chosen_is_not_warned_of():
    model = mixtral()
    assert tpe.prunable_parameters(model, exclude=["1", "2"]) == weights(model[0])
    assert tpe.prunable_parameters(model, types=nn.Linear) == weights(model[0])
    assert tpe.prunable_parameters(model, name="bias") == [(model[0], "bias")]
    assert tpe.prunable_parameters(recurrent(), name="weight_hh_l0")[0][1] == "weight_hh_l0"


def test_the_output_projection_of_attention_is_left_out():
    model = nn.TransformerEncoderLayer(8, 2, 16)
    assert tpe.prunable_parameters(model) == weights(model.linear1, model.linear2)
    assert tpe.prunable_parameters(model, types=nn.Linear) == weights(model.linear1, model.linear2)
    own = tpe.prunable_parameters(model, types=NonDynamicallyQuantizableLinear)
    assert own == weights(model.self_attn.out_proj)
    params = tpe.prunable_parameters(model)
    tpe.global_unstructured(params, amount=0.5)
    for _ in range(2):
        model(torch.ones(3, 2, 8)).sum().backward()


def adapted():
    model = nn.Module()
    model.layer = nn.ModuleDict({"base_layer": nn.Linear(8, 8), "lora_A": nn.Linear(8, 2), "lora_B": nn.Linear(2, 8)})
    model.classifier = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    return model


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ("*lora_*", ["layer.base_layer", "classifier.0", "classifier.1"]),
        ("*lora_?", ["layer.base_layer", "classifier.0", "classifier.1"]),
        (["*lora_A", "classifier"], ["layer.base_layer", "layer.lora_B"]),
        (("layer", "*.1"), ["classifier.0"]),
        (lambda model: model.classifier, ["layer.base_layer", "layer.lora_A", "layer.lora_B"]),
        (lambda model: [model.layer, "classifier.0"], ["classifier.1"]),
        (lambda model: (path for path in ["lay*"]), ["classifier.0", "classifier.1"]),
    ],
)
def test_what_is_excluded(exclude, left):
    model = adapted()
    exclude = exclude(model) if callable(exclude) else exclude
    assert tpe.prunable_parameters(model, exclude=exclude) == weights(*map(model.get_submodule, left))


def test_a_module_is_excluded_by_any_of_its_paths():
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": layer, "second": layer, "other": nn.Linear(4, 4)})
    assert tpe.prunable_parameters(model, exclude="second") == weights(model["other"])


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"exclude": "clasifier"}, ValueError, r"exclude='clasifier'.*\['classifier'"),
        ({"exclude": "layer.lora_C"}, ValueError, r"'layer\.lora_"),
        ({"exclude": "*adapter*"}, ValueError, r"exclude='\*adapter\*' matches no module.*pattern"),
        ({"exclude": nn.Linear(2, 2)}, ValueError, r"exclude=Linear.*matches no module"),
        ({"exclude": 3}, TypeError, r"exclude=3"),
        ({"exclude": [3]}, TypeError, r"exclude holds 3"),
        ({"exclude": [nn.Linear]}, TypeError, r"exclude holds"),
        ({"types": "Linear"}, TypeError, r"types='Linear'"),
        ({"types": [nn.Linear]}, TypeError, r"types=\["),
        ({"exclude": "*"}, ValueError, r"exclude='\*'.*leave no 'weight'"),
        ({"name": "nothing"}, ValueError, r"'nothing'"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        tpe.prunable_parameters(adapted(), **arguments)


def test_a_model_of_tied_tensors_only_leaves_nothing():
    model = Tied()
    with pytest.raises(ValueError, match=r"tied=False leave no 'weight'"):
        tpe.prunable_parameters(model, exclude="layer", tied=False)


def test_lazy_layers_are_listed_as_before():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    assert tpe.prunable_parameters(model) == weights(*model)
