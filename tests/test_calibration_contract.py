"""Statistics are refused by name, and the model never notices that they were taken."""

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from calibrating import (
    CALLS,
    SIGNED,
    PlantedError,
    activations,
    broken_loader,
    build,
    calibration,
    close,
    every_call,
    pairs,
)
from snapshots import Snapshot
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe

# ----------------------------------------------------------------------------------------------------------- refusals


class Half(nn.Module):
    """Uses only the first of its two layers."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()

    def forward(self, x):
        return self.used(x)


class Detour(Half):
    """Has two outputs, of which the loss sees one."""

    def forward(self, x):
        return self.used(x), self.unused(x)


@every_call
def test_bad_data_and_losses_are_refused_by_name(call):
    model, batches, params = build()
    wrong = {
        "empty": ([], F.cross_entropy, ValueError, "loader gave no batch"),
        "no samples": ([(torch.ones(0, 4).double(), torch.ones(0))], F.cross_entropy, ValueError, "without samples"),
        "no pair": ([torch.ones(2, 4)], F.cross_entropy, TypeError, "prepare="),
        "shape": (batches, functools.partial(F.cross_entropy, reduction="none"), ValueError, "reduction='mean'"),
        "type": (batches, lambda out, t: 1.0, ValueError, "type float"),
        "nan": (batches, lambda out, t: F.cross_entropy(out, t) * math.nan, ValueError, "loss_fn gave nan"),
        "inf": (batches, lambda out, t: F.cross_entropy(out, t) + math.inf, ValueError, "loss_fn gave inf"),
        "nothing": (batches, lambda out, t: torch.tensor(1.0), ValueError, "depends on no parameter|not depend"),
        "detached": (batches, lambda out, t: out.detach().sum(), ValueError, "depends on no parameter|not depend"),
    }
    for loader, loss_fn, error, message in wrong.values():
        before = Snapshot(model)
        with pytest.raises(error, match=message):
            call(model, loss_fn, loader, params)
        assert before.differences() == []
    late = [*batches, (torch.full((2, 4), torch.nan).double(), torch.zeros(2, dtype=torch.long))]
    with pytest.raises(ValueError, match="loss_fn gave nan"):
        call(model, F.cross_entropy, late, params)
    for half, loss_fn in ((Half(), F.cross_entropy), (Detour(), lambda out, t: F.cross_entropy(out[0], t))):
        if isinstance(half, Detour) and call.func is calibration.hessian_diagonal and "method" not in call.keywords:
            continue  # Gauss-Newton takes one output only
        with pytest.raises(ValueError, match=r"unused\.weight.*does not depend on"):
            call(half, loss_fn, batches, pairs(half))
        assert len(call(half, loss_fn, batches, pairs(half)[:2])) == 2


@pytest.mark.parametrize("call", [*CALLS.values(), activations], ids=[*CALLS, "activations"])
def test_bad_arguments_are_refused_by_name(call):
    model, batches, params = build()
    other = nn.Linear(4, 4).double()
    for arguments, options, error, message in (
        ((model, params), {"max_batches": 0}, ValueError, "max_batches=0"),
        ((model, params), {"batches": 2}, TypeError, "unknown arguments.*batches"),
        ((model, [(other, "weight")]), {}, ValueError, "not a part of the model"),
        ((model, []), {}, ValueError, "lists no tensor"),
        (("model", params), {}, TypeError, "Pass a torch.nn.Module"),
    ):
        before = Snapshot(model)
        with pytest.raises(error, match=message):
            call(arguments[0], F.cross_entropy, batches, arguments[1], **options)
        assert before.differences() == []
    if call is not activations:
        with pytest.raises(ValueError, match="'nope' is not a parameter"):
            call(model, F.cross_entropy, batches, [(model[0], "nope")])


def test_bad_choices_are_refused_by_name(monkeypatch):
    model, batches, params = build()
    args = model, F.cross_entropy, batches, params
    with pytest.raises(ValueError, match="per='layer'"):
        calibration.taylor(*args, per="layer")
    with pytest.raises(ValueError, match="method='x' is unknown"):
        calibration.hessian_diagonal(*args, method="x")
    with pytest.raises(ValueError, match="samples=0"):
        calibration.hessian_diagonal(*args, samples=0)
    with pytest.raises(TypeError, match="samples="):
        calibration.hessian_diagonal(*args, samples=1.5)
    with pytest.raises(TypeError, match="grasp reads the data twice"):
        calibration.grasp(model, F.cross_entropy, iter(batches), params)
    monkeypatch.setattr("torchprune_ext.calibration.curvature.EXACT_LIMIT", 42)
    with pytest.raises(ValueError, match="43 weights of 42"):
        CALLS["exact"](*args)


# ----------------------------------------------------------------------------------------- the model does not notice


class Strange(nn.Module):
    """Renews a buffer, writes into another, uses random numbers and keeps what it saw."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))
        self.register_buffer("total", torch.zeros(3, dtype=torch.float64))

    def forward(self, x):
        self.calls = self.calls + 1
        self.total.add_(1)
        return x + 0 * torch.rand_like(x)


def prepared(kind):
    """Return a model in a state that is easily spoilt."""
    model, batches, params = build("residual")
    if kind == "strange":
        model.head = nn.Sequential(model.head, Strange())
        params = pairs(model)
    elif kind != "dense":
        for module in (model.stem, model.conv, model.head):
            if kind == "native":
                prune.random_unstructured(module, "weight", 0.4)
                prune.l1_unstructured(module, "weight", 0.3)
            else:
                tpe.threshold(module, "weight", 0.1)
                tpe.every_other(module, "weight", 3)
        if kind == "ours":
            tpe.bn_scaling(model.conv, "weight", 0.5, model.second)
        params = [(m, n.removesuffix("_orig")) for m, n in params]
    model.train()
    model.down.eval()
    model.head.requires_grad_(False)
    model.conv.register_forward_hook(lambda module, inputs, output: None)
    model.stem.register_forward_pre_hook(lambda module, inputs: None)
    F.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    return model, batches, params


@pytest.mark.parametrize("kind", ["dense", "native", "ours", "strange"])
@pytest.mark.filterwarnings("ignore:torch.func cannot vectorize")
@pytest.mark.parametrize("name", [*CALLS, "activations"])
def test_the_model_is_as_it_was(name, kind):
    call = {**CALLS, "activations": activations}[name]
    model, batches, params = prepared(kind)
    before = Snapshot(model)
    order = [(n, id(p)) for n, p in model.named_parameters()]
    state = torch.get_rng_state()
    found = call(model, F.cross_entropy, batches[:2], params, keep_rng=True)
    assert torch.equal(state, torch.get_rng_state())
    assert before.differences() == []
    for (module, tensor), scores in found.items():
        assert scores.shape == getattr(module, tensor).shape
        assert scores.isfinite().all()
        assert not scores.requires_grad
        assert name in SIGNED or scores.min() >= 0
    with pytest.raises(PlantedError):
        call(model, F.cross_entropy, broken_loader(batches), params, keep_rng=True)
    assert before.differences() == []
    count = itertools.count()

    def broken_loss(output, target):
        if next(count) == 1:
            raise PlantedError
        return F.cross_entropy(output, target)

    if name != "activations":
        with pytest.raises(PlantedError):
            call(model, broken_loss, batches, params, keep_rng=True)
    assert before.differences() == []
    assert torch.equal(state, torch.get_rng_state())
    assert order == [(n, id(p)) for n, p in model.named_parameters()]
    modes = [module.training for module in model.modules()]
    assert True in modes
    assert False in modes
    model(batches[0][0]).sum().backward()  # it still trains


def test_a_graph_made_before_can_be_run_backward_after():
    model, batches, params = build("residual")
    model.eval()
    loss = F.cross_entropy(model(batches[0][0]), batches[0][1])
    for call in CALLS.values():
        call(model, F.cross_entropy, batches[:1], params)
    loss.backward()
    assert model.stem.weight.grad.any()


# ------------------------------------------------------------------------------------------------------ pruned models


@pytest.mark.parametrize("name", [*CALLS, "activations"])
@pytest.mark.parametrize("kind", ["native", "ours"])
def test_pruned_models_have_the_dense_statistics_of_their_effective_weights(name, kind):
    call = {**CALLS, "activations": activations}[name]
    model, batches, params = prepared(kind)
    with torch.no_grad():  # what an optimizer does to dead entries; the attribute `weight` is stale from now on
        for module in (model.stem, model.conv, model.head):
            module.weight_orig += 0.1
    dense, _, plain = build("residual")
    with torch.no_grad():
        twins = sorted_pairs(plain, dense)
        for (module, tensor), (twin, other) in zip(sorted_pairs(params, model), twins, strict=True):
            value = module._parameters.get(tensor)
            value = getattr(module, f"{tensor}_orig") * getattr(module, f"{tensor}_mask") if value is None else value
            getattr(twin, other).copy_(value)
        for module, twin in zip(model.modules(), dense.modules(), strict=True):
            if isinstance(module, nn.BatchNorm2d):
                twin.running_mean.copy_(module.running_mean)
                twin.running_var.copy_(module.running_var)
    args = F.cross_entropy, batches
    found = call(model, *args, sorted_pairs(params, model))
    expected = call(dense, *args, sorted_pairs(plain, dense))
    assert len(found) == len(expected)
    for scores, wanted in zip(found.values(), expected.values(), strict=True):
        close(scores, wanted, atol=1e-13)
    if name in ("gradients", "fisher", "ggn", "exact"):
        assert found[model.conv, "weight"][model.conv.weight_mask == 0].any()


def sorted_pairs(params, model):
    """Return the pairs in an order that does not depend on what is pruned."""
    places = {id(module): place for place, module in enumerate(model.modules())}
    return sorted(params, key=lambda pair: (places[id(pair[0])], pair[1]))


def test_scores_go_where_scores_are_taken():
    for name, call in CALLS.items():
        if name in SIGNED:
            continue
        model, batches, _ = build("relu")
        params = [(model[0], "weight"), (model[4], "weight")]
        scores = call(model, F.cross_entropy, batches, params)
        prune.global_unstructured(params, prune.L1Unstructured, importance_scores=scores, amount=0.5)
        twin, _, _ = build("relu")
        others = [(twin[0], "weight"), (twin[4], "weight")]
        given = dict(zip(others, scores.values(), strict=True))
        tpe.global_unstructured(others, amount=0.5, importance_scores=given, min_keep=0)
        for (module, _), (other, _) in zip(params, others, strict=True):
            if not (torch.cat([s.reshape(-1) for s in scores.values()]).unique().numel() < 42):  # else ties
                assert torch.equal(module.weight_mask, other.weight_mask)
        tpe.nm_structured(twin[4], "weight", 1, 4, importance_scores=scores[model[4], "weight"])
        assert twin[4].weight_mask.view(-1, 4).sum(1).max() == 1
    for method in ("ggn", "exact", "hutchinson"):
        model, batches, _ = build("relu")
        params = [(model[0], "weight"), (model[4], "weight")]
        h = calibration.hessian_diagonal(model, F.cross_entropy, batches, params, method=method, progress=False)
        tpe.global_obd_saliency(params, amount=0.5, hessian_diag=h)
        tpe.obd_saliency(model[4], "weight", 0.1, hessian_diag=h[model[4], "weight"])
    assert int(sum(m.weight_mask.sum() for m, _ in params)) < 21
