"""Several processes, each with its share of the data, fit what one process fits to all of it."""

import copy
import datetime
import functools
import itertools
import sys

import compensating as c
import pytest
import torch
import torch.distributed as dist
from calibrating import PlantedError, broken_loader
from snapshots import Snapshot
from torch import nn

import torchprune_ext as tpe
from torchprune_ext import _fingerprints
from torchprune_ext._fingerprints import checksum
from torchprune_ext._ranks import Ranks
from torchprune_ext.compensation import solvers

CALLS = {
    "compensate": lambda model, data, **more: (
        tpe.global_unstructured(c.pairs(model), target_sparsity=0.5),
        tpe.compensate(model, data, c.pairs(model), **more),
    )[1],
    **{
        f"{name}, {what}": lambda model, data, criterion=name, asked=asked, **more: tpe.prune_and_compensate(
            model, data, c.pairs(model), criterion=criterion, **asked, **more
        )
        for name in ("admm", "obs", "wanda", "magnitude")
        for what, asked in {
            "share": {"target_sparsity": 0.5},
            "pattern": {"pattern": tpe.NM(1, 2, pad=True)},
            "units": {"target_sparsity": 0.4, "unit": tpe.Channel(dim=1)},
        }.items()
    },
    **{
        target: lambda model, data, target=target, **more: tpe.prune_and_compensate(
            model, data, c.pairs(model), **{target: 0.7}, **more
        )
        for target in ("target_macs", "target_parameters")
    },
    "sparsegpt": lambda model, data, **more: tpe.sparsegpt(
        model, data, c.pairs(model), target_sparsity=0.5, **more
    ),
    "rounds": lambda model, data, **more: tpe.prune_in_rounds(
        model, data, c.pairs(model), c.magnitude, target_sparsity=0.6, steps=2, **more
    ),
}  # fmt: skip
QUICK = ("compensate", "admm, share", "target_macs", "sparsegpt", "rounds")
MODELS = {
    "tokens": (c.Tokens, [(5, 4), (2, 4), (5, 4), (1, 4)]),  # of other shapes on each rank
    "residual": (c.Residual, [(2, 5, 5)] * 4),
}


def shares(name, size):
    """Return the batches of each rank: of unequal number, size and shape, and far from 0."""
    shapes, shares = MODELS[name][1][:size], []
    for rank, shape in enumerate(shapes):
        sizes = [(7, 9), (24,), (3, 4, 5), (11, 6)][rank]
        shares.append([(x + 100 if name == "tokens" else x, None) for x, _ in c.data(shape, sizes, seed=rank)])
    return shares


def values(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def the_same_on_all(model, group):
    """Check that all ranks of a group hold the same, bit for bit."""
    ranks = Ranks(group)
    for name, tensor in values(model).items():
        assert len(set(ranks.counts(checksum(tensor)))) == 1, name


def find_what_one_finds(rank, group, calls=CALLS):
    size = dist.get_world_size(group)
    for name, call in [*itertools.product(["tokens"], calls), ("residual", "admm, share")]:
        each = shares(name, size)
        model = c.build(MODELS[name][0])
        found = CALLS[call](model, each[rank], progress=False, process_group=group)
        the_same_on_all(model, group)
        if rank:
            continue  # the first looks for all
        alone = c.build(MODELS[name][0])
        wanted = CALLS[call](alone, [batch for share in each for batch in share], progress=False)
        for key, tensor in values(alone).items():
            # Sums in another order, times the condition of the least squares, which the ridge bounds.
            torch.testing.assert_close(values(model)[key], tensor, rtol=1e-6, atol=1e-8, msg=f"{name}, {call}, {key}")
        for one, other in zip(found.values(), wanted.values(), strict=True):
            torch.testing.assert_close([one.before, one.after], [other.before, other.after], rtol=1e-6, atol=1e-9)
            assert one.rows == other.rows


def masks_and_references_are_taken_as_they_are_for_one(rank, group):
    """A rank whose mask leaves out all of its rows, a reference model, scores by the data of all ranks."""
    each = shares("tokens", 2)
    for hidden in (0, 1):

        def keep(batch, hidden=hidden):
            return torch.full((len(batch[0]),), batch[0].shape[1] != (5, 2)[hidden])

        alone, model = (c.pruned("deep tokens")[0] for _ in range(2))
        c.compensate(alone, each[1 - hidden], c.pairs(alone))
        c.compensate(model, each[rank], c.pairs(model), sample_mask=keep, process_group=group)
        the_same_on_all(model, group)
        torch.testing.assert_close(values(model), values(alone), rtol=1e-6, atol=1e-8)
    dense = c.build(c.Tokens)
    alone, model = (copy.deepcopy(dense) for _ in range(2))
    for one, data, more in ((alone, each[0] + each[1], {}), (model, each[rank], {"process_group": group})):
        labelled = [(x, x.sum((1, 2))) for x, _ in data]

        def fisher(net, labelled=labelled, more=more):
            loss = lambda output, target: (output.sum((1, 2)) - target).square().mean()  # noqa: E731
            return tpe.calibration.taylor(net, loss, labelled, c.pairs(net), progress=False, **more)

        c.prune_in_rounds(one, labelled, c.pairs(one), fisher, target_sparsity=0.5, steps=2, dense=dense, **more)
    the_same_on_all(model, group)
    torch.testing.assert_close(values(model), values(alone), rtol=1e-6, atol=1e-8)


def different_machines_get_the_same(rank, group):
    """What one rank solves is rounded in another way, as on another processor."""
    for call in ("admm, share", "target_macs"):
        before = tpe.compensation.fitting.Task._posed

        def posed(self, *args, before=before):
            problem, weight, alive = before(self, *args)
            return problem, weight * (1 + 1e-9 * rank), alive

        tpe.compensation.fitting.Task._posed = posed
        try:
            model = c.build(c.Tokens)
            CALLS[call](model, shares("tokens", 2)[rank], progress=False, process_group=group)
        finally:
            tpe.compensation.fitting.Task._posed = before
        the_same_on_all(model, group)


def interrupted(batches):
    for batch in batches:
        yield batch
        raise KeyboardInterrupt


class Hook:
    """Raises in a later layer on one rank, as Ctrl-C does."""

    def __init__(self, error):
        self.error = error

    def __call__(self, *_):
        raise self.error


def wrong(how, model, data):
    """Return what a rank passes that does something wrong: its batches and other arguments."""
    if how == "loader":
        return broken_loader(data), {}
    if how == "empty":
        return [], {}
    if how == "nan":
        return [(x * float("nan"), y) for x, y in data], {}
    if how == "interrupted":
        return interrupted(data), {}
    if how == "forward":
        c.pairs(model)[-1][0].register_forward_pre_hook(Hook(KeyboardInterrupt()))
    elif how == "unknown":
        return data, {"unknown": 1}
    elif how == "shape":
        return [(x[..., :2], y) for x, y in data], {}
    elif how == "values":
        with torch.no_grad():
            model.up.weight[0, 0] += 1e-15
    elif how == "bias":
        model.down.bias = None
    return data, {}


WRONG = {  # the errors on the rank and on the other, and what the latter says
    "loader": (PlantedError, RuntimeError, r"ranks \[0\]|ranks \[1\]"),
    "empty": (ValueError, RuntimeError, r"ranks \[0\]|ranks \[1\]"),
    "nan": (ValueError, ValueError, "NaN or infinity"),
    "interrupted": (KeyboardInterrupt, RuntimeError, "ranks"),
    "forward": (KeyboardInterrupt, RuntimeError, "ranks"),
    "unknown": (TypeError, RuntimeError, "ranks"),
    "shape": (RuntimeError, RuntimeError, "ranks"),
    "values": (RuntimeError, RuntimeError, r"values of the model differ between ranks: up\.weight.*broadcast"),
    "bias": (RuntimeError, RuntimeError, "calls differ between ranks"),
}


def an_error_on_one_rank_stops_all(rank, group):
    for number, (call, how) in enumerate(itertools.product(QUICK, WRONG)):
        bad = number % 2
        if how in ("loader", "unknown", "shape") and call not in ("compensate", "rounds"):
            continue  # they share the code
        if call == "sparsegpt" and how == "bias":
            continue  # which does not touch it; its absence is seen by the values
        model, data, more = c.build(c.Tokens), shares("tokens", 2)[rank], {}
        if rank == bad:
            data, more = wrong(how, model, data)
        hooks = [list(module._forward_pre_hooks.values()) for module, _ in c.pairs(model)]
        before = Snapshot(model)
        here, there, words = WRONG[how]
        with pytest.raises(here if rank == bad else there, match=None if rank == bad else words):
            CALLS[call](model, data, progress=False, process_group=group, **more)
        left = [str(line) for line in before.differences()]
        if call != "compensate":  # which is pruned here, before
            assert left == [], (call, how, left)
        assert call == "compensate" or hooks == [
            list(module._forward_pre_hooks.values()) for module, _ in c.pairs(model)
        ]
        assert Ranks(group).counts(rank) == [0, 1]  # nobody waits, or is one call ahead


def all_must_call_alike(rank, group):
    model = c.build(c.Tokens)
    before, data = Snapshot(model), shares("tokens", 2)[rank]
    prune = functools.partial(tpe.prune_and_compensate, model, data, progress=False, process_group=group)
    params = c.pairs(model)
    for call in (
        lambda: prune(params, target_sparsity=0.5 + rank / 10),
        lambda: prune(params, target_sparsity={params[0]: 0.5, params[1]: 0.3 + rank / 10}),
        lambda: prune(params[: 1 + rank], target_sparsity=0.5),
        lambda: prune(params, pattern=tpe.NM(1, 2 + rank, pad=True)),
        lambda: prune(params, target_macs=0.5 + rank / 10),
        lambda: prune(params, target_sparsity=0.5, criterion=("obs", "wanda")[rank]),
        lambda: prune(params, target_sparsity=0.5, create_bias=False, dense=(None, model)[rank]),
        lambda: c.sparsegpt(model, data, params, target_sparsity=0.5 + rank / 10, process_group=group),
        lambda: c.prune_in_rounds(
            model, data, params, c.magnitude, target_sparsity=0.5, steps=1 + rank, process_group=group
        ),
    ):
        with pytest.raises(RuntimeError, match="the calls differ between ranks"):
            call()
    dense = copy.deepcopy(model)
    dense.up.weight.data += rank
    with pytest.raises(RuntimeError, match="the tensors of dense= differ"):
        prune(params, target_sparsity=0.5, dense=dense)

    def own(net):
        return {key: scores + rank for key, scores in c.magnitude(net).items()}

    with pytest.raises(RuntimeError, match=r"scores of criterion\(model\) differ.*process_group="):
        c.prune_in_rounds(model, data, params, own, target_sparsity=0.5, process_group=group)

    def fails(net):
        if rank:
            raise PlantedError
        return c.magnitude(net)

    with pytest.raises(PlantedError if rank else RuntimeError):
        c.prune_in_rounds(model, data, params, fails, target_sparsity=0.5, process_group=group)
    other = c.build(c.OtherOrder)
    with pytest.raises(RuntimeError, match="layers that data reaches differ"):
        tpe.prune_and_compensate(
            other, c.data((4,), (2 + rank,)), c.pairs(other), target_sparsity=0.5, process_group=group, progress=False
        )
    assert before.differences() == []


def recalibration_wants_equal_models(rank, group):
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    torch.manual_seed(0)
    for tensor in net.parameters():
        nn.init.normal_(tensor)
    net[1].running_mean += rank  # as after training in processes, and estimated anew
    samples = torch.randn(8, 3, generator=torch.Generator().manual_seed(rank))
    tpe.recalibrate_bn(net, [samples], progress=False, process_group=group)
    the_same_on_all(net, group)
    with torch.no_grad():
        net[2].bias += rank
    before = Snapshot(net)
    with pytest.raises(RuntimeError, match=r"values of the model differ between ranks: 2\.bias"):
        tpe.recalibrate_bn(net, [samples], progress=False, process_group=group)
    assert before.differences() == []


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int64, torch.bfloat16, torch.float32, torch.float64, torch.complex128]
)
def test_a_checksum_tells_any_change_and_leaves_the_tensor_alone(dtype, monkeypatch):
    monkeypatch.setattr(_fingerprints, "WORDS", 7)
    _fingerprints._factors.cache_clear()
    tensor = (torch.randn(3, 8, dtype=torch.float64).t() * 4).to(dtype)
    before, found = tensor.clone(), checksum(tensor)
    assert checksum(tensor.contiguous()) == found
    assert torch.equal(tensor, before)
    for place in itertools.product(range(8), range(3)):
        other = tensor.clone()
        other[place] = ~other[place] if dtype is torch.bool else other[place] + 1
        assert checksum(other) != found
        other[place] = tensor[place]
        assert checksum(other) == found
    assert checksum(tensor.flip(0)) != found or torch.equal(tensor, tensor.flip(0))
    assert checksum(torch.zeros(2)) != checksum(torch.zeros(3)) != checksum(torch.zeros(0))
    _fingerprints._factors.cache_clear()


def run(rank, init):
    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=300)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=4, timeout=patience)
    pair = dist.new_group([0, 1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solvers, "TOLERANCE", 0.0)  # whether a step gains enough may hang by the last digit of a sum
        for scenario in (
            find_what_one_finds,
            masks_and_references_are_taken_as_they_are_for_one,
            different_machines_get_the_same,
            an_error_on_one_rank_stops_all,
            all_must_call_alike,
            recalibration_wants_equal_models,
        ):
            try:
                if rank < 2:
                    scenario(rank, pair)
            except BaseException as error:
                raise AssertionError(f"{scenario.__name__} failed on rank {rank}: {error!r}") from error
        if rank > 1:
            with pytest.raises(TypeError, match=r"process_group=.* is not a group that this process is in"):
                tpe.compensate(nn.Linear(2, 2), [], [], process_group=pair)
        dist.barrier()
        find_what_one_finds(rank, dist.group.WORLD, ["admm, share"])
    dist.destroy_process_group()


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()) or sys.platform == "win32", reason="needs gloo"
)
def test_processes_find_what_one_finds_and_fail_together(tmp_path, processes):
    processes.spawn(run, (f"file://{tmp_path}/init",), 4)
