"""What refining refuses, each with a remedy, and without a trace."""

import copy

import pytest
import torch
from snapshots import Snapshot
from test_refining import QUIET, Block, Stack, adam, data, made
from torch import nn

import torchprune_ext as tpe


class Cached(Block):
    """Keeps what it has seen in an object that comes as an argument, as attention does while it generates text."""

    def forward(self, x, *, keep=None):
        keep.seen.append(x)
        return super().forward(torch.stack(keep.seen).sum(0))


class Cache:
    def __init__(self):
        self.seen = []


class WithCache(Stack):
    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x, keep=Cache())[0]
        return self.head(x)


class Twice(Stack):
    def forward(self, x):
        x = self.stem(x)
        for layer in [*self.layers, self.layers[0]]:
            x = layer(x)[0]
        return self.head(x)


class Random(Block):
    def forward(self, x, *, keep=None):
        return (nn.functional.dropout(super().forward(x)[0], 0.5, training=True),)


class Sharing(Stack):
    def __init__(self):
        super().__init__(2)
        self.layers[1].up.weight = self.layers[0].up.weight


def refused(match, model, batches, kind=ValueError, **options):
    before = Snapshot(model)
    with pytest.raises(kind, match=match):
        tpe.refine(model, batches, **{"dense": None, "epochs": 1, **options}, **QUIET)
    assert not before.differences()


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        ({"epochs": 0}, ValueError, "epochs=0"),
        ({"epochs": 1.5}, TypeError, "epochs=1.5"),
        ({"held_out": 0}, ValueError, r"held_out=0 is not in \(0, 1\)"),
        ({"held_out": 1.0}, ValueError, r"held_out=1.0 is not in"),
        ({"held_out": float("nan")}, ValueError, r"held_out=nan is not in"),
        ({"held_out": "some"}, TypeError, "held_out='some'"),
        ({"whole": 1}, TypeError, "whole=1"),
        ({"loss": 3}, TypeError, "loss=3"),
        ({"loss": lambda y, t: y - t, "whole": True}, ValueError, "not a number"),
        ({"optimizer": "adam"}, TypeError, "optimizer is a str"),
        ({"optimizer": lambda parameters: None}, TypeError, "gave a NoneType"),
        ({"optimizer": lambda parameters: torch.optim.SGD([torch.zeros(1)], 1.0)}, ValueError, "other parameters"),
        ({"blocks": "layers.0"}, TypeError, "Pass a list"),
        ({"blocks": 3}, TypeError, "Pass a list"),
        ({"blocks": [3]}, TypeError, r"blocks\[0\]=3"),
        ({"blocks": ["layer.0"]}, ValueError, r"'layer.0' is not in the model; 'layers.0' is"),
        ({"blocks": [nn.Linear(2, 2)]}, ValueError, "Pass modules of this model"),
        ({"blocks": []}, ValueError, r"Pass \[model\]"),
        ({"blocks": ["layers.0", "layers.0.up"]}, ValueError, "layers.0 and layers.0.up, which is a part"),
        ({"blocks": ["layers"]}, ValueError, r"'layers': 0"),
        ({"process_group": 1}, ValueError, "process_group="),
        ({"max_batches": 1}, ValueError, "loader gave 1 batch"),
        ({"foo": 1}, TypeError, "unknown arguments"),
    ],
)
def test_arguments_out_of_range(options, kind, match):
    model, _, _ = made(layers=2)
    refused(match, model, data(), kind, **options)


def test_an_optimizer_of_the_model_s_own_parameters():
    model, _, _ = made(layers=2)
    refused(
        "Pass a function that makes one", model, data(), TypeError, optimizer=torch.optim.SGD(model.parameters(), 1)
    )
    refused("stand in", model, data(), optimizer=lambda _: torch.optim.SGD(model.parameters(), 1))


def test_batches_that_do_not_do():
    model, dense, _ = made(layers=2)
    refused("not an iterable of batches", model, data()[0], TypeError)
    refused("loader gave no batch", model, [])
    refused("NaN or infinity on the batches kept aside", model, [x * float("nan") for x in data()], dense=dense)
    nothing = torch.zeros(8, 4, dtype=torch.bool)
    refused("loader gave 0 batch", model, data(), sample_mask=lambda _: nothing)
    refused("sample_mask gave shape", model, data(), sample_mask=lambda _: nothing[:3])


def test_models_without_anything_to_fit():
    torch.manual_seed(0)
    model = Stack(2)
    refused("nothing in the model is pruned", model, data())
    refused("dense holds", model, data(), dense={**model.state_dict(), "head.bias": torch.zeros(7)})
    frozen, dense, _ = made(layers=2)
    frozen.requires_grad_(False)
    refused("all of it is frozen", frozen, data(), dense=dense)


def test_blocks_that_cannot_be_fitted_by_themselves():
    model, dense, _ = made(lambda layers: WithCache(layers, Cached), layers=2)
    refused("called again with the same arguments, .*use_cache=False", model, data(), dense=dense)
    done = tpe.refine(model, data(), dense=dense, whole=True, epochs=2, optimizer=adam(1e-3), **QUIET)
    assert [row.name for row in done.blocks] == ["layers.0", "layers.1"]
    model, dense, _ = made(lambda layers: Stack(layers, Random), layers=2)
    refused("layers.0 gives another output when the model gets the same batch", model, data(), dense=dense)


def test_blocks_that_are_called_twice_are_refused_if_listed_and_else_part_of_the_model():
    model, dense, _ = made(Twice, layers=2)
    refused(r"'layers.0': 2", model, data(), dense=dense, blocks=["layers.0"])
    done = tpe.refine(model, data(), dense=dense, epochs=1, **QUIET)
    assert not done.blocks
    assert done.model.name == "Twice"
    done = tpe.refine(model, data(), dense=dense, epochs=1, blocks=["layers.1"], **QUIET)
    assert [row.name for row in done.blocks] == ["layers.1"]


def test_tensors_that_blocks_share():
    torch.manual_seed(0)
    model = Sharing()
    dense = copy.deepcopy(model)
    tpe.global_unstructured([(layer.up, "weight") for layer in model.layers], target_sparsity=0.5)
    refused(r"layers.0 and layers.1 share Linear.weight", model, data(), dense=dense)
    done = tpe.refine(model, data(), dense=dense, whole=True, epochs=2, optimizer=adam(1e-2), **QUIET)
    assert done.model.best
    assert model.layers[0].up.weight_orig is model.layers[1].up.weight_orig


def test_one_tensor_under_two_masks():
    torch.manual_seed(0)
    model = Sharing()
    dense = copy.deepcopy(model)
    tpe.nm_structured(model.layers[0].up, "weight", 1, 2)
    refused("tied. under different masks", model, data(), dense=dense, whole=True)


def test_a_mask_of_other_values():
    model, dense, _ = made(layers=2)
    model.layers[0].up.weight_mask.mul_(0.5)
    refused("values besides 0 and 1", model, data(), dense=dense)


def test_batches_that_take_other_ways():
    class Branches(Stack):
        def forward(self, x):
            x = self.stem(x)
            for layer in self.layers if x.shape[0] > 2 else reversed(self.layers):
                x = layer(x)[0]
            return self.head(x)

    model, dense, _ = made(Branches, layers=2)
    refused("different ways", model, [*data(2), *data(2, size=2)], dense=dense)


def test_a_compiled_model():
    model, dense, _ = made(layers=2)
    refused(
        r"Pass what was compiled, which shares its tensors: model._orig_mod", torch.compile(model), data(), dense=dense
    )


def test_a_module_that_was_compiled_in_place_runs_as_it_is_written():
    model, dense, _ = made(layers=2, seed=1)
    calls = []
    model._compiled_call_impl = lambda *args: calls.append(args)
    done = tpe.refine(model, data(), dense=dense, epochs=1, **QUIET)
    assert done.blocks
    assert not calls
    assert model._compiled_call_impl is not None


def test_a_language_model_with_a_cache():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=20, num_key_value_heads=1, tie_word_embeddings=True, **sizes)
    model = transformers.LlamaForCausalLM(config)
    dense = copy.deepcopy(model)
    tpe.global_unstructured(
        [(module, "weight") for module in model.model.modules() if isinstance(module, nn.Linear)], amount=0.6
    )
    batches = [{"input_ids": torch.randint(20, (4, 6))} for _ in range(4)]
    refused("called again with the same arguments", model, batches, dense=dense)
    table = model.lm_head.weight.detach().clone()
    for batch in batches:
        batch["use_cache"] = False
    done = tpe.refine(model, batches, dense=dense, epochs=2, optimizer=adam(1e-3), **QUIET)
    assert [row.name for row in done.blocks] == ["model.layers.0", "model.layers.1"]
    assert done.model.best
    assert torch.equal(model.lm_head.weight, table)
