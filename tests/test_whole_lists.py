"""A function for one tensor that gets a model's list says how to loop; the loop works when it is followed literally."""

import re

import pytest
from cases import CASES
from contracts import every_method
from torch import nn

import torchprune_ext as tpe


def model():
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))


LISTS = {
    "prunable_parameters": tpe.prunable_parameters,
    "pruned_parameters": tpe.pruned_parameters,
    "tuple": lambda model: tuple((layer, "weight") for layer in model),
    "generator": lambda model: ((layer, "weight") for layer in model),
    "dictionary": lambda model: dict(model.named_modules()),
    "pair": lambda model: (model[0], "weight"),
    "empty": lambda model: [],
}


@every_method
@pytest.mark.parametrize("listed", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("named", [(), ("weight",), ("weight", 0.5)], ids=str)
def test_a_list_is_refused_with_the_loop(case, listed, named):
    words = rf"module is a \w+, but {case.id} prunes one tensor.*\n *for module, name in params:\n *tpe\.{case.id}\(mod"
    with pytest.raises(TypeError, match=words):
        case.function(listed(model()), *named)
    with pytest.raises(TypeError, match=words):
        case.function(module=listed(model()), amount=0.5)


def test_the_loop_works_as_it_is_shown():
    pruned = model()
    with pytest.raises(TypeError) as caught:
        tpe.nm_structured(tpe.prunable_parameters(pruned), n=1, m=2)
    loop = re.search(r"for module.*", str(caught.value), re.DOTALL).group().replace("...", "n=1, m=2")
    exec(loop, {"tpe": tpe, "params": tpe.prunable_parameters(pruned)})
    assert [float(layer.weight_mask.mean()) for layer in (pruned[0], pruned[2])] == [0.5, 0.5]


def test_all_functions_for_one_tensor_are_tried():
    from torchprune_ext import functional

    ours = {n for n, v in vars(functional).items() if getattr(v, "__module__", "") == functional.__name__}
    assert {n for n in ours if not n.startswith("_")} == {case.id for case in CASES}
