"""The small loop: what it trains, what it keeps, what it refuses."""

import copy
import itertools
import json
import types

import pytest
import torch
import torch.nn.functional as F
import toys
from snapshots import Snapshot
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe

pytestmark = toys.unwarned


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Dropout(0.2), nn.ReLU(), nn.Linear(12, 3))


torch.manual_seed(9)
LOADER = [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(5)]


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01)


def tune(model, optimizer=None, loader=LOADER, loss_fn=F.cross_entropy, epochs=3, **options):
    return tpe.fine_tune(model, loader, loss_fn, optimizer or sgd(model), epochs, progress=False, **options)


def values(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("taught", [False, True])
def test_it_is_the_loop_that_one_would_write(taught):
    model, other, teacher = network(), network(), network(1)
    for each in (model, other):
        prune.l1_unstructured(each[0], "weight", 0.5)
    optimizer = sgd(other)
    torch.manual_seed(3)
    losses = []
    teacher.eval()
    for _ in range(3):
        other.train()
        for x, y in LOADER:
            optimizer.zero_grad()
            output = other(x)
            loss = F.cross_entropy(output, y)
            if taught:
                p, q = (teacher(x).detach() / 3).softmax(1), (output / 3).softmax(1)
                loss = 0.75 * loss + 0.25 * 9 * (p * (p / q).log()).sum(1).mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    torch.manual_seed(3)
    teacher.train()
    torch.manual_seed(3)
    done = tune(model, **({"teacher": teacher, "temperature": 3.0, "distill": 0.25} if taught else {}))
    for key, value in values(other).items():
        torch.testing.assert_close(values(model)[key], value)
    assert [row.loss for row in done.rows] == pytest.approx([sum(losses[i : i + 5]) / 5 for i in (0, 5, 10)])
    assert [(row.epoch, row.sparsity, row.metric) for row in done.rows] == [(i, 0.5, None) for i in (1, 2, 3)]
    assert done.best == 3
    assert teacher.training
    assert all(p.grad is None for p in teacher.parameters())
    assert not model[0].weight[model[0].weight_mask == 0].any()


def test_modes_are_given_back():
    model = network()
    model[1].eval()
    before = [module.training for module in model.modules()]
    seen = []

    def evaluate(model):
        seen.append((model.training, torch.is_grad_enabled()))
        model.train()
        return 0.0

    def loss(output, targets):
        seen.append(all(module.training for module in model.modules()))
        if len(seen) == 14:
            raise ZeroDivisionError
        return F.cross_entropy(output, targets)

    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        tune(model, loss_fn=loss, evaluate=evaluate)
    assert seen == [True] * 5 + [(False, False)] + [True] * 5 + [(False, False)] + [True] * 2
    assert [module.training for module in model.modules()] == before


def test_the_best_epoch_is_kept():
    model = network()
    tpe.prune_to(tpe.prunable_parameters(model), 0.5)
    metrics, states = iter([-3.0, -1.0, -1.0, -2.0]), []

    def evaluate(model):
        states.append(values(model))
        return torch.tensor(next(metrics))

    done = tune(model, epochs=4, evaluate=evaluate)
    assert (done.best, [row.metric for row in done.rows]) == (2, [-3.0, -1.0, -1.0, -2.0])
    assert same(values(model), states[1])
    assert torch.equal(model[0].weight, model[0].weight_orig * model[0].weight_mask)
    assert json.loads(json.dumps(done.to_dict())) == done.to_dict()
    assert str(done).splitlines()[2].split() == ["2", "*", f"{done.rows[1].loss:.4g}", "50.0", "%", "-1"]
    with pytest.raises(AttributeError):
        done.best = 3


def test_only_epochs_with_the_final_sparsity_compete():
    model = network()
    params = tpe.prunable_parameters(model)
    schedule = tpe.schedules.linear(0, 12, final=0.75)  # ends in the third epoch of five
    pruner = tpe.GradualPruner(model, params, schedule)
    metrics, states = iter([9.0, 8.0, 1.0, 2.0, 1.5]), []

    def evaluate(model):
        states.append(values(model))
        return next(metrics)

    done = tune(model, epochs=5, pruner=pruner, evaluate=evaluate)
    assert done.best == 4
    assert same(values(model), states[3])
    assert [row.sparsity for row in done.rows][2:] == [round(0.75 * 108) / 108] * 3
    assert done.rows[0].sparsity == round(schedule(4) * 108) / 108
    assert pruner.finished
    assert pruner.steps == 25


def test_a_pruner_that_moves_masks_at_one_sparsity_gets_the_masks_of_the_best_epoch():
    model = nn.Sequential(nn.Linear(6, 3))
    prune.custom_from_mask(model[0], "weight", torch.tensor([[1.0] * 3 + [0.0] * 3] * 3))
    steps = itertools.count(1)

    def step():
        if next(steps) % 5 == 0:
            model[0].weight_mask.copy_(model[0].weight_mask.flip(1))

    metrics, masks = iter([2.0, 1.0]), []

    def evaluate(model):
        masks.append(model[0].weight_mask.clone())
        return next(metrics)

    done = tune(model, epochs=2, pruner=types.SimpleNamespace(step=step), evaluate=evaluate)
    assert done.best == 1
    assert not torch.equal(*masks)
    assert torch.equal(model[0].weight_mask, masks[0])


def test_kept_zeros_stay_or_are_missed():
    model = network()
    tpe.prune_to(tpe.prunable_parameters(model), 0.5)
    optimizer = sgd(model)
    model(LOADER[0][0]).sum().backward()
    optimizer.step()
    tpe.remove_all(model, keep_zeros=True)
    other = copy.deepcopy(model)
    with tpe.keep_zeros(model, optimizer):
        done = tune(model, optimizer)
    assert [row.sparsity for row in done.rows] == [0.5] * 3
    with pytest.raises(RuntimeError, match=r"have come back in training. Call keep_zeros\(model, optimizer\)"):
        tune(other)


def test_masks_that_others_change_are_missed():
    for change, words in (
        (lambda module: module.register_buffer("weight_mask", torch.ones(3, 12)), "is another one now"),
        (lambda module: tpe.undo(module, "weight"), "is gone now"),
    ):
        model = network()
        tpe.prune_to(tpe.prunable_parameters(model), 0.5)
        calls = itertools.count()

        def loss(output, targets, model=model, change=change, calls=calls):
            if next(calls) == 6:
                change(model[4])
            return F.cross_entropy(output, targets)

        with pytest.raises(RuntimeError, match=words):
            tune(model, loss_fn=loss)


def test_zeros_without_masks_are_warned_of():
    model = network()
    tpe.prune_to(tpe.prunable_parameters(model), 0.5)
    tpe.remove_all(model)
    with pytest.warns(UserWarning, match=r"Zeros without a mask.*0.weight.*call mask_zeros"):
        tune(model)


def test_dictionaries_are_keywords():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 3)

        def forward(self, x, y):
            return types.SimpleNamespace(logits=self.head(x)[:, None].expand(-1, 4, -1), y=y)

    model, teacher = Model(), Model()
    loader = [{"x": x, "y": y} for x, y in LOADER]

    def loss(output, batch):
        return F.cross_entropy(output.logits[:, 0], batch["y"])

    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    done = tune(model, optimizer, loader, loss, epochs=60, teacher=teacher, distill=1.0)
    assert done.rows[-1].loss < 0.01 < done.rows[0].loss  # it has become its teacher


def test_what_interrupts_leaves_the_model_as_trained_so_far():
    model, other = network(), network()

    class Loader:
        def __iter__(self):
            yield from LOADER[:2]
            raise OSError("disk")

    torch.manual_seed(0)
    with pytest.raises(OSError, match="disk"):
        tune(model, loader=Loader(), evaluate=lambda model: 1.0)
    torch.manual_seed(0)
    tune(other, loader=LOADER[:2], epochs=1)
    assert same(values(model), values(other))


def bad_output(model):
    return nn.Sequential(model, nn.Unflatten(1, (1, 3)))


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        ({"model": 3}, TypeError, "model=3"),
        ({"loader": (batch for batch in LOADER)}, TypeError, "loader is a generator, which gives its batches once"),
        ({"loader": iter(LOADER)}, TypeError, "loader is a list_iterator"),
        ({"loader": LOADER[0]}, TypeError, "not an iterable of batches"),
        ({"loader": []}, ValueError, "loader gave no batch"),
        ({"loader": [x for x, _ in LOADER]}, (TypeError, ValueError), "targets"),
        ({"loss_fn": None}, TypeError, "loss_fn=None"),
        ({"loss_fn": lambda output, y: output.sum() * float("nan")}, ValueError, "loss_fn gave nan"),
        ({"loss_fn": lambda output, y: output}, ValueError, "not a number"),
        ({"loss_fn": lambda output, y: torch.tensor(1.0)}, ValueError, "depends on no parameter"),
        ({"optimizer": "sgd"}, TypeError, "optimizer is a str"),
        ({"optimizer": sgd(network())}, ValueError, "optimizer holds no parameter of Sequential"),
        ({"epochs": 0}, ValueError, "epochs=0"),
        ({"epochs": 1.5}, TypeError, "epochs=1.5"),
        ({"pruner": 0.9}, TypeError, r"pruner=0.9 has no step\(\)"),
        ({"teacher": "dense"}, TypeError, "teacher='dense'"),
        ({"teacher": bad_output(network(1))}, ValueError, r"teacher gave an output of shape \(8, 1, 3\)"),
        ({"teacher": nn.Linear(6, 4)}, ValueError, r"\(8, 3\), but teacher of shape \(8, 4\)"),
        ({"evaluate": 3}, TypeError, "evaluate=3"),
        ({"evaluate": lambda model: None}, TypeError, r"evaluate\(model\) after epoch 1 gave a NoneType"),
        ({"temperature": 0.0}, ValueError, "temperature=0.0"),
        ({"distill": 1.5}, ValueError, "distill=1.5"),
    ],
)
def test_bad_arguments_are_named(bad, error, words):
    model = network()
    picture = Snapshot(model)
    arguments = {"model": model, "loader": LOADER, "loss_fn": F.cross_entropy, "optimizer": sgd(model), "epochs": 2}
    with pytest.raises(error, match=words):
        tpe.fine_tune(**{**arguments, **bad}, progress=False)
    if next(iter(bad)) not in ("evaluate", "teacher", "loss_fn", "loader") or "an iterable" in words:
        assert picture.differences() == []


def test_a_teacher_that_is_the_model_is_refused_and_one_epoch_takes_a_generator():
    model = network()
    with pytest.raises(ValueError, match="teacher is the model itself"):
        tune(model, teacher=model)
    assert len(tune(model, loader=(batch for batch in LOADER), epochs=1).rows) == 1
