"""Gradual pruning in several processes: all get one mask, or none; two are started once for all."""

import datetime
import sys

import pytest
import torch
import torch.distributed as dist
import toys
from snapshots import Snapshot
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import torchprune_ext as tpe

pytestmark = [
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()) or sys.platform == "win32", reason="needs gloo"
    ),
    *toys.unwarned,
]
SCHEDULE = tpe.schedules.cubic(start=0, end=4, every=2, final=0.75)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))


def data(rank, number=6):
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(8, 12, generator=generator) for _ in range(number)]


def start(model, criterion="gradient", **options):
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    return optimizer, tpe.GradualPruner(model, tpe.prunable_parameters(model), SCHEDULE, criterion, **options)


def train(model, replica, optimizer, pruner, batches, each=1):
    reached = []
    for start in range(0, len(batches), each):
        for x in batches[start : start + each]:
            replica(x).square().mean().backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
        reached.append(pruner.sparsity)
    return reached


def same_everywhere(model):
    flat = torch.cat([tensor.flatten().float() for tensor in model.state_dict().values()])
    found = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(found, flat)
    return all(torch.equal(found[0], other) for other in found)


def sparsities():
    total = 12 * 8 + 8 * 4
    return [round(SCHEDULE(step) * total) / total for step in range(6)]


def replicas_get_one_mask(rank, broadcast, each):
    model = network()
    optimizer, pruner = start(model)
    replica = DistributedDataParallel(model, broadcast_buffers=broadcast)
    assert train(model, replica, optimizer, pruner, data(rank, 6 * each), each) == sparsities()
    assert same_everywhere(model)


def resumed_in_the_middle_it_ends_where_it_would_have(rank):
    whole = network()
    optimizer, pruner = start(whole)
    train(whole, DistributedDataParallel(whole), optimizer, pruner, data(rank))
    model = network()
    optimizer, pruner = start(model)
    train(model, DistributedDataParallel(model), optimizer, pruner, data(rank)[:3])
    kept = model.state_dict(), optimizer.state_dict(), pruner.state_dict()
    model = network()
    optimizer, pruner = start(model)
    tpe.load_pruned_state_dict(model, kept[0])
    optimizer.load_state_dict(kept[1])
    pruner.load_state_dict(kept[2])
    train(model, DistributedDataParallel(model), optimizer, pruner, data(rank)[3:])
    for key, value in whole.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def scores_of_a_rank_s_own_data_are_refused(rank, group):
    def taylor(model):
        batches = [(x, torch.zeros(8, 4)) for x in data(rank, 2)]
        params = tpe.prunable_parameters(model)
        return tpe.calibration.taylor(
            model, nn.functional.mse_loss, batches, params, progress=False, process_group=group
        )

    model = network()
    _, pruner = start(model, taylor)
    pruner.step()  # to 0
    pruner.step()
    if group is not None:
        pruner.step()
        assert pruner.sparsity == sparsities()[2]
        assert same_everywhere(model)
        return
    snapshot, before = Snapshot(model), pruner.state_dict()
    with pytest.raises(RuntimeError, match=r"masks would differ between ranks.*Nothing is pruned"):
        pruner.step()
    assert snapshot.differences() == []
    assert pruner.state_dict() == before


def an_error_on_one_rank_stops_all(rank):
    model = network()
    _, pruner = start(model, "magnitude")
    pruner.step()
    pruner.step()
    if rank:
        model[0].weight.data[0, 0] = float("nan")
    snapshot = Snapshot(model)
    kind, message = (ValueError, "NaN") if rank else (RuntimeError, r"ranks \[1\] refused")
    with pytest.raises(kind, match=message):
        pruner.step()
    assert snapshot.differences() == []
    assert pruner.steps == 2


def earlier_masks_that_differ_are_refused(rank):
    model = network()
    _, pruner = start(model, "magnitude")
    for _ in range(2):
        pruner.step()
    if rank:  # what the next update would reach, so that nothing would be left to do here
        tpe.prune_to(tpe.prunable_parameters(model), sparsities()[2])
    snapshot, state = Snapshot(model), pruner.state_dict()
    with pytest.raises(RuntimeError, match=r"masks would differ between ranks.*Nothing is pruned"):
        pruner.step()
    assert snapshot.differences() == []
    assert pruner.state_dict() == state


def a_group_of_its_own_needs_no_others(rank, alone):
    model = network()
    if rank:
        model[0].weight.data.neg_().add_(1)
    _, pruner = start(model, "magnitude", process_group=alone)
    for _ in range(6 if rank else 3):
        pruner.step()
    assert pruner.sparsity == sparsities()[5 if rank else 2]


def run(rank, world, init):
    """Go through the scenarios in one process; a call that waits for ever fails after a while."""
    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=20)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world, timeout=patience)
    alone = [dist.new_group([each]) for each in range(world)][rank]
    replicas_get_one_mask(rank, broadcast=True, each=1)
    replicas_get_one_mask(rank, broadcast=False, each=2)
    resumed_in_the_middle_it_ends_where_it_would_have(rank)
    scores_of_a_rank_s_own_data_are_refused(rank, None)
    scores_of_a_rank_s_own_data_are_refused(rank, dist.group.WORLD)
    an_error_on_one_rank_stops_all(rank)
    earlier_masks_that_differ_are_refused(rank)
    a_group_of_its_own_needs_no_others(rank, alone)
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_get_one_mask(tmp_path, processes):
    processes.spawn(run, (2, f"file://{tmp_path}/init"), 2)
