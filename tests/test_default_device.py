"""Every call gives what it gives without it when the user's default device is another than the model's.

The other device is ``meta``, on which a tensor has no values: a helper tensor that lands there cannot go unseen.
"""

import copy
import dataclasses
import io
import types
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stdout

import pytest
import torch
import torch.nn.functional as F
import toys
from contracts import every_method
from contracts import make as layer_for
from globally import every_function, ready
from releases import other_default
from torch import nn

import torchprune_ext as tpe
from torchprune_ext.__main__ import main
from torchprune_ext.calibration import (
    activations,
    fisher,
    gradients,
    grasp,
    hessian_diagonal,
    random,
    snip,
    synflow,
    taylor,
)

pytestmark = [
    *toys.unwarned,
    pytest.mark.usefixtures("no_thread_left"),
    pytest.mark.filterwarnings("ignore:fewer rows of data than the layer has inputs"),
    pytest.mark.filterwarnings("ignore:.*is not calibrated"),
]
QUIET = {"progress": False}
SEEN = []  # the default device wherever code of the user's runs


def see():
    SEEN.append(torch.empty(0).device.type)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.more = nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.hidden, self.head = nn.Linear(32, 16), nn.Linear(16, 3)

    def forward(self, x):
        see()
        x = F.relu(self.more(F.relu(self.norm(self.conv(x)))))
        return self.head(F.relu(self.hidden(x.flatten(1))))


class Data:
    """Two batches with targets, from a loader of the user's."""

    def __init__(self):
        made = torch.Generator().manual_seed(1)
        images = torch.randn(48, 2, 4, 4, generator=made).split(24)
        self.batches = [(x, torch.arange(len(x)) % 3) for x in images]

    def __iter__(self):
        for batch in self.batches:
            see()
            yield batch


def loss(output, targets):
    see()
    return F.cross_entropy(output, targets)


def given():
    """Return a model, what is listed of it, and data: the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net().eval()
        small = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    data = Data()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    return types.SimpleNamespace(
        model=model,
        params=tpe.prunable_parameters(model),
        linear=[(model.hidden, "weight"), (model.head, "weight")],
        small=small,
        listed=tpe.prunable_parameters(small),
        rows=[(data.batches[0][0].flatten(1)[:6, :4], torch.arange(6) % 3)],
        data=data,
        x=data.batches[0][0],
        optimizer=optimizer,
        generator=torch.Generator().manual_seed(5),
    )


def values(thing):
    """Return all that two results are compared by."""
    if isinstance(thing, torch.Tensor):
        return thing.device.type, thing.dtype, tuple(thing.shape), repr(thing.detach().to_dense().tolist())  # NaN too
    if isinstance(thing, nn.Module):
        return {name: values(tensor) for name, tensor in thing.state_dict().items()}
    if isinstance(thing, Mapping):
        return [values(value) for value in thing.values()]
    if isinstance(thing, list | tuple):
        return [values(value) for value in thing]
    if dataclasses.is_dataclass(thing):
        return [values(getattr(thing, field.name)) for field in dataclasses.fields(thing)]
    return thing if isinstance(thing, bool | int | float | str | bytes | None) else type(thing)


def halved(g):
    """Prune half of the model."""
    tpe.global_unstructured(g.params, target_sparsity=0.5)
    return g


def units_gone(g):
    """Set units of each kind to zero, with all that would let them speak."""
    for module in (g.model.conv, g.model.norm, g.model.hidden):
        for parameter in module.parameters():
            parameter.data[1::3] = 0
    return g


def compact_file(g, path):
    small = tpe.compact(units_gone(g).model, g.x)
    tpe.save_compact(small, path)
    return small, tpe.load_compact(lambda: copy.deepcopy(g.again), path)


def sparse_file(g, path, sparsity):
    tpe.global_unstructured(g.params, target_sparsity=sparsity)
    tpe.save_sparse(g.model, path)
    loaded = tpe.load_sparse(g.again, path)
    told = io.StringIO()
    with redirect_stdout(told):
        main(["inspect", str(path)])
    return loaded, path.read_bytes(), told.getvalue()


def trained(g, step, batches=4):
    """Train for some steps; ``step`` is called after each."""
    for x, targets in g.data.batches * (batches // 2):
        g.optimizer.zero_grad()
        F.cross_entropy(g.model(x), targets).backward()
        g.optimizer.step()
        step()


def gradual(g, criterion="magnitude"):
    pruner = tpe.GradualPruner(g.model, g.params, tpe.schedules.cubic(start=0, end=3, every=1, final=0.7), criterion)
    trained(g, pruner.step)


def dynamic(g, growth):
    dst = tpe.DynamicSparse(g.model, g.params, 0.6, growth=growth, every=2, end=5, optimizer=g.optimizer)
    trained(g, dst.step)
    return dst.state_dict()["generator"]


def soft(g):
    pruner = tpe.SoftFilterPruner(g.model, g.params[:2], 0.25, every=2)
    trained(g, pruner.step)
    pruner.harden()


def ticket(g):
    found = tpe.LotteryTicket(g.model, g.params)
    trained(g, lambda: None, 2)
    found.prune(0.4)
    found.rewind()
    return found.compare(lambda model: model(g.x).sum().item(), seeds=(0, 1))


def kept_zero(g):
    for module, name in halved(g).params:
        tpe.remove(module, name, keep_zeros=True)
    tpe.keep_zeros(g.model, g.optimizer)
    trained(g, lambda: None)


def served(g):
    halved(g)
    with tpe.frozen(g.model), torch.no_grad():
        return g.model(g.x)


def sparse_layer(g, block):
    layer = g.model.hidden
    layer.weight.data[:, 4:24] = 0
    sparse = tpe.CSRLinear(layer.weight, layer.bias, block=block)
    return sparse(torch.ones_like(layer.weight[:3])), sparse.dense(), copy.deepcopy(sparse).dense()


def wide():
    layer = nn.Linear(512, 512, device="cpu")
    layer.weight.data.zero_()[::9, ::9] = 1.0
    return nn.Sequential(layer)


def two_of_four(g):
    layer = tpe.nm_structured(nn.Linear(64, 64, device="cpu"), "weight", n=2, m=4).half()
    return [row.reason for row in tpe.semi_structured_report(layer).rows]


def swapped(g):
    found = tpe.permute_for_nm(g.model, g.x, [*g.params[1:2], *g.linear])
    return str(found), g.model(g.x)


def sensed(g):
    curve = tpe.allocation.sensitivity(
        g.model, lambda model: model(g.x).square().sum().item(), g.params, (0.3, 0.6), **QUIET
    )
    return tpe.allocation.from_sensitivity(curve, 0.4), str(curve)


def drawn(ax):
    from matplotlib import pyplot

    figure = ax.figure
    figure.set_layout_engine("none")
    figure.canvas.draw()
    found = bytes(figure.canvas.buffer_rgba())
    pyplot.close(figure)
    return found


def refined(g, **options):
    return tpe.refine(halved(g).model, g.data, epochs=2, **options, **QUIET)


def refitted(g, params=None, data=None, **asked):
    fits = tpe.prune_and_compensate(g.model, g.data, g.params if params is None else params, **asked, **QUIET)
    return [(fit.before, fit.after) for fit in fits.values()]


def columns(g):
    return {key: tpe.Channel(dim=1) for key in g.linear[1:]}


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.01)


CALLS = {
    "mask_zeros": lambda g: tpe.mask_zeros(units_gone(g).params),
    "prune_to": lambda g: tpe.prune_to(g.params, 0.5),
    "prune_to, units": lambda g: tpe.prune_to(g.params, 0.4, unit=tpe.Channel(), scope="layer"),
    "plan": lambda g: str(tpe.plan(g.params, 0.5)),
    "allocation.uniform": lambda g: tpe.allocation.uniform(g.params, 0.5),
    "allocation.erk": lambda g: tpe.allocation.erk(g.params, 0.5),
    "allocation.lamp": lambda g: tpe.allocation.lamp(g.params, 0.5),
    "allocation.owl": lambda g: tpe.allocation.owl(g.model, g.data, g.params, 0.5, **QUIET),
    "allocation.by_name": lambda g: tpe.allocation.by_name(g.model, {"*": 0.5}),
    "allocation.sensitivity": sensed,
    "gradients": lambda g: gradients(g.model, loss, g.data, g.params, **QUIET),
    "taylor": lambda g: taylor(g.model, loss, g.data, g.params, **QUIET),
    "fisher": lambda g: fisher(g.model, loss, g.data, g.params, **QUIET),
    "hessian, ggn": lambda g: hessian_diagonal(g.model, loss, g.data, g.params, **QUIET),
    "hessian, ggn, samples": lambda g: hessian_diagonal(g.model, loss, g.data, g.params, samples=2, **QUIET),
    "hessian, hutchinson": lambda g: hessian_diagonal(
        g.small, loss, g.rows, g.listed, method="hutchinson", samples=3, generator=g.generator, **QUIET
    ),
    "hessian, exact": lambda g: hessian_diagonal(g.small, loss, g.rows, g.listed, method="exact", **QUIET),
    "activations": lambda g: activations(g.model, g.data, g.params, **QUIET),
    "random": lambda g: random(g.params),
    "random, seeded": lambda g: random(g.params, generator=g.generator),
    "snip": lambda g: snip(g.model, loss, g.data, g.params, **QUIET),
    "grasp": lambda g: grasp(g.model, loss, g.data, g.params, **QUIET),
    "synflow": lambda g: synflow(g.model, g.x, g.params, target_sparsity=0.5, steps=2),
    "compensate": lambda g: tpe.compensate(halved(g).model, g.data, g.params, **QUIET),
    "compensate, offload": lambda g: tpe.compensate(halved(g).model, g.data, g.params, offload=str(g.path), **QUIET),
    "dense_values": lambda g: tpe.compensate(
        g.model, g.data, halved(g).params, dense=tpe.dense_values(g.again, tpe.prunable_parameters(g.again)), **QUIET
    ),
    "prune_and_compensate": lambda g: refitted(g, target_sparsity=0.5),
    **{
        f"prune_and_compensate, {criterion}": lambda g, criterion=criterion: refitted(
            g, target_sparsity=0.5, criterion=criterion
        )
        for criterion in ("admm", "obs", "wanda", "magnitude")
    },
    "prune_and_compensate, N:M": lambda g: refitted(g, g.params[1:], pattern=tpe.NM(2, 4)),
    "prune_and_compensate, auto": lambda g: refitted(g, target_sparsity=0.5, allocation="auto"),
    "prune_and_compensate, units": lambda g: refitted(g, g.linear, target_sparsity=0.4, unit=columns(g)),
    "prune_and_compensate, MACs": lambda g: refitted(g, target_macs=0.6),
    "prune_and_compensate, parameters": lambda g: refitted(g, target_parameters=0.6, round_to=2),
    "prune_in_rounds": lambda g: tpe.prune_in_rounds(
        g.model, g.data, g.params, lambda model: random(g.params), target_sparsity=0.5, steps=2, **QUIET
    ),
    "sparsegpt": lambda g: tpe.sparsegpt(g.model, g.data, g.params, target_sparsity=0.5, **QUIET),
    "sparsegpt, N:M": lambda g: tpe.sparsegpt(g.model, g.data, g.params[1:], pattern=tpe.NM(2, 4), **QUIET),
    "refine": lambda g: refined(g, optimizer=sgd),
    "refine, whole": lambda g: refined(g, optimizer=sgd, whole=True, held_out=g.data.batches[:1]),
    "refine, loss": lambda g: refined(
        g, optimizer=sgd, loss=lambda output, dense: (see(), F.mse_loss(output, dense))[1]
    ),
    "refine, Adam": lambda g: refined(g),
    "recalibrate_bn": lambda g: tpe.recalibrate_bn(halved(g).model, g.data, **QUIET),
    "permute_for_nm": swapped,
    "compact": lambda g: tpe.compact(units_gone(g).model, g.x),
    "compact, round_to": lambda g: tpe.compact(units_gone(g).model, g.x, round_to=4),
    "dead_units": lambda g: str(tpe.dead_units(units_gone(g).model, g.x)),
    "save_compact": lambda g: compact_file(g, g.path / "small"),
    "save_sparse, mask": lambda g: sparse_file(g, g.path / "half", 0.5),
    "save_sparse, gaps": lambda g: sparse_file(g, g.path / "few", 0.97),
    "CSRLinear": lambda g: sparse_layer(g, 1),
    "CSRLinear, blocks": lambda g: sparse_layer(g, 4),
    "csr_report": lambda g: [row.reason for row in tpe.csr_report(halved(g).model).rows],
    "csr_report, timed": lambda g: [(row.sparsity, row.sparse_ms is None) for row in tpe.csr_report(wide()).rows],
    "semi_structured_report": two_of_four,
    "report": lambda g: tpe.report(halved(g).model).rows,
    "report, inputs": lambda g: tpe.report(g.model, g.x, rounds=2).macs,
    "compare": lambda g: [
        (row.parameters, row.macs) for row in tpe.compare({"it": halved(g).model}, g.x, rounds=2).rows
    ],
    "GradualPruner": gradual,
    "GradualPruner, random": lambda g: gradual(g, lambda model: random(g.params)),
    "DynamicSparse": lambda g: dynamic(g, "gradient"),
    "DynamicSparse, random": lambda g: dynamic(g, "random"),
    "SoftFilterPruner": soft,
    "LotteryTicket": ticket,
    "fine_tune": lambda g: tpe.fine_tune(halved(g).model, g.data, loss, g.optimizer, 1, teacher=g.again, **QUIET),
    "bn_pairs": lambda g: len(tpe.bn_pairs(g.model, g.x)),
    "bn_l1_penalty": lambda g: tpe.bn_l1_penalty(g.model),
    "frozen": served,
    "keep_zeros": kept_zero,
    "copy_pruned": lambda g: tpe.copy_pruned(halved(g).model),
    "dense_state_dict": lambda g: tpe.dense_state_dict(halved(g).model),
    "load_pruned_state_dict": lambda g: tpe.load_pruned_state_dict(g.again, halved(g).model.state_dict()),
    "undo_all": lambda g: tpe.undo_all(halved(g).model),
    "remove_all": lambda g: tpe.remove_all(halved(g).model),
    "plots.mask_image": lambda g: drawn(tpe.plots.mask_image(halved(g).model.head)),
    "plots.weight_histograms": lambda g: drawn(tpe.plots.weight_histograms(halved(g).model)[0]),
    "plots.density_bars": lambda g: drawn(tpe.plots.density_bars(halved(g).model)),
    "plots.mask_cubes": lambda g: drawn(tpe.plots.mask_cubes(halved(g).model.conv)),
}


NEED_A_NEWER_TORCH = {"hessian, ggn", "hessian, ggn, samples", "refine, Adam"}


def same_with_another_default(call):
    """Check that ``call()`` gives the same whatever the default device, and that code of the user's sees that."""
    found = []
    for default in (nullcontext(), torch.device("meta")):
        run = call()
        SEEN.clear()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            with default:
                result = run()
        found.append((set(SEEN), values(result)))
    (plain, expected), (other, result) = found
    assert plain <= {"cpu"}
    assert other <= {"meta"}
    assert bool(plain) == bool(other)
    assert result == expected


@every_method
def test_methods(case):
    def call():
        module = layer_for(case.hosts[0])
        arguments = case.arguments(module)
        return lambda: case.function(module, "weight", **arguments)

    same_with_another_default(call)


@every_function
def test_global_functions(function):
    def call():
        layers, arguments = ready(function)
        return lambda: (function(**arguments), layers)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = torch.get_rng_state()

        def seeded():
            torch.set_rng_state(state)
            return call()

        same_with_another_default(seeded)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[other_default] * (name in NEED_A_NEWER_TORCH)) for name in CALLS]
)
def test_calls(name, tmp_path):
    def call():
        g = given()
        g.again, g.path = given().model, tmp_path
        return lambda: (CALLS[name](g), g.model)

    same_with_another_default(call)


@pytest.mark.parametrize("generator", [0, "cpu", torch.Generator], ids=["seed", "device", "class"])
def test_what_is_not_a_generator_is_refused(generator):
    g = given()
    with pytest.raises(TypeError, match=r"generator=.* is a \w+\. Pass e\.g\. torch\.Generator\(\)"):
        random(g.params, generator=generator)
    with pytest.raises(TypeError, match=r"generator=.* is a \w+\. Pass e\.g\. torch\.Generator\(\)"):
        hessian_diagonal(g.model, loss, g.data, g.params, generator=generator, **QUIET)
