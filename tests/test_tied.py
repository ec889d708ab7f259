"""What several modules share is zeroed for none of them that keeps it, whoever makes pruning permanent."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.decoder = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, x):
        return self.decoder(self.embedding(x))


@pytest.mark.parametrize("how", ["native", "ours"])
@pytest.mark.parametrize("optimizer", [False, True])
def test_remove_never_zeroes_a_dense_alias(how, optimizer):
    model = Tied()
    held = torch.optim.Adam(model.parameters()) if optimizer else None
    dense = model.embedding.weight.detach().clone()
    (prune.l1_unstructured if how == "native" else tpe.vector_ln)(model.decoder, "weight", amount=2)
    with pytest.raises(ValueError, match=r"Embedding\.weight are the same parameter") as caught:
        tpe.remove(model.decoder, "weight")
    assert torch.equal(model.embedding.weight, dense)
    assert prune.is_pruned(model.decoder)
    exec(str(caught.value).rpartition(": ")[2].removesuffix("."), {"module": model.decoder, "nn": nn})  # the remedy
    tpe.remove(model.decoder, "weight")
    assert torch.equal(model.embedding.weight, dense)
    assert not model.decoder.weight.all()
    assert held is None or held.param_groups


@pytest.mark.parametrize("optimizer", [False, True])
def test_what_is_shared_under_one_mask_or_with_nobody_is_removed(optimizer):
    model, alone = Tied(), nn.Linear(4, 6)
    held = torch.optim.SGD([*model.parameters(), *alone.parameters()], lr=0.1) if optimizer else None
    names = dict(alone.named_parameters())  # a dictionary that is not a module's
    tpe.global_unstructured([(model.embedding, "weight"), (model.decoder, "weight")], amount=0.5)
    tpe.threshold(alone, "weight", 0.1)
    for module in (model.embedding, model.decoder, alone):
        tpe.remove(module, "weight")
    assert names["weight"] is alone.weight
    assert held is None or held.param_groups
