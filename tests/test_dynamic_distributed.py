"""Dynamic sparse training in several processes: one mask, that of the whole batch; two are started once for all."""

import datetime
import sys

import pytest
import torch
import torch.distributed as dist
import toys
from growing import alike, masks, network
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


def whole(number, seed=0):
    """Return batches of small whole numbers, so that sums are exact in whatever order, at double precision."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(-2, 3, (8, 12), generator=generator).float() for _ in range(number)]


def linear():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8, bias=False), nn.Linear(8, 4, bias=False)).double()
    for parameter in model.parameters():
        parameter.data.mul_(8).trunc_().add_(0.5)
    return model


def start(model, group=None, growth="gradient", **options):
    options = {"every": 2, "optimizer": torch.optim.SGD(model.parameters(), 2.0**-7, momentum=0.5), **options}
    sparse = tpe.DynamicSparse(model, tpe.prunable_parameters(model), 0.7, growth, process_group=group, **options)
    return options["optimizer"], sparse


def one_iteration(run, optimizer, dst, x):
    run(x).sum().mul(1 / len(x)).backward()
    optimizer.step()
    done = dst.step()
    optimizer.zero_grad()
    return done


def of_all_ranks(model):
    """Return the masks of each rank."""
    flat = torch.cat([mask.flatten() for mask in masks(model).values()])
    found = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(found, flat)
    return found


def the_mask_is_that_of_the_whole_batch(rank, world, alone):
    for group in (None, dist.group.WORLD):
        one, many = linear(), linear()
        its_optimizer, its = start(one, alone)
        optimizer, dst = start(many, group)
        replica, done = DistributedDataParallel(many), []
        first = masks(many)
        for x in map(torch.Tensor.double, whole(6)):
            assert one_iteration(one, its_optimizer, its, x) == one_iteration(
                replica, optimizer, dst, x.chunk(world)[rank]
            )
            assert alike(one.state_dict(), many.state_dict())
            done.append(not alike(first, masks(many)))
        assert done == [False, True, True, True, True, True]


def random_growth_needs_no_data(rank, world, alone):
    model = network()
    optimizer, dst = start(model, growth="random", alpha=1.0)
    first, replica = masks(model), DistributedDataParallel(model)
    for x in whole(4, seed=rank):
        one_iteration(replica, optimizer, dst, x)
        one, *others = of_all_ranks(model)
        assert all(torch.equal(one, other) for other in others)
    assert not alike(first, masks(model))


def what_reached_one_rank_counts(rank, world, alone):
    model = network()
    _, dst = start(model, every=1, alpha=1.0)
    first = masks(model)
    x = whole(1)[0]
    (model(x) if rank else model[4](torch.ones(1, 8))).sum().backward()
    assert dst.step()
    one, *others = of_all_ranks(model)
    assert all(torch.equal(one, other) for other in others)
    assert not any(torch.equal(first[key], mask) for key, mask in masks(model).items())
    snapshot = Snapshot(model)
    with pytest.raises(RuntimeError, match="no gradient has reached any of the 3 tensors"):
        dst.step()
    assert snapshot.differences() == []


def infinity_on_one_rank_puts_the_update_off_on_all(rank, world, alone):
    model = network()
    optimizer, dst = start(model, every=1, alpha=1.0)
    first, x = masks(model), whole(1)[0]
    (model(x).sum() * (float("inf") if rank else 1.0)).backward()
    assert not dst.step()
    assert alike(first, masks(model))
    model.zero_grad()
    assert one_iteration(model, optimizer, dst, x)
    assert not alike(first, masks(model))


def replicas_that_differ_are_refused(rank, world, alone):
    model = network()
    _, dst = start(model, every=1, alpha=0.5)
    if rank:
        model[2].weight_orig.data = model[2].weight_orig.data.flip(0)
    model(whole(1)[0]).sum().backward()
    snapshot, state = Snapshot(model), str(dst.state_dict())
    with pytest.raises(RuntimeError, match=r"masks would differ between ranks.*Nothing is changed"):
        dst.step()
    assert snapshot.differences() == []
    assert str(dst.state_dict()) == state


def an_error_on_one_rank_stops_all(rank, world, alone):
    model = network()
    _, dst = start(model, every=1)
    model(whole(1)[0]).sum().backward()
    if rank:
        model[0].weight_orig.data[0, 0] = float("nan")
    snapshot = Snapshot(model)
    kind, message = (ValueError, "NaN") if rank else (RuntimeError, r"ranks \[1\] refused")
    with pytest.raises(kind, match=message):
        dst.step()
    assert snapshot.differences() == []
    fresh = network()
    snapshot = Snapshot(fresh)
    with pytest.raises(RuntimeError if rank else ValueError, match=r"ranks \[0\] refused" if rank else "alpha=2"):
        start(fresh, alpha=0.5 if rank else 2)
    with pytest.raises(RuntimeError, match="the arguments differ between ranks"):
        start(fresh, alpha=0.5 if rank else 0.25)
    with pytest.raises(RuntimeError, match="the masks would differ"):
        start(fresh, seed=0) if not rank else tpe.DynamicSparse(
            fresh, tpe.prunable_parameters(fresh), 0.6, every=2, optimizer=torch.optim.SGD(fresh.parameters(), 0.1)
        )
    assert snapshot.differences() == []


SCENARIOS = (
    the_mask_is_that_of_the_whole_batch,
    random_growth_needs_no_data,
    what_reached_one_rank_counts,
    infinity_on_one_rank_puts_the_update_off_on_all,
    replicas_that_differ_are_refused,
    an_error_on_one_rank_stops_all,
)


def run(rank, world, init):
    """Go through the scenarios in one process; a call that waits for ever fails after a while."""
    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=20)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world, timeout=patience)
    alone = [dist.new_group([each]) for each in range(world)][rank]
    for scenario in SCENARIOS:
        try:
            scenario(rank, world, alone)
        except BaseException as error:
            raise AssertionError(f"{scenario.__name__} failed on rank {rank} of {world}: {error!r}") from error
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_do_what_one_does_with_the_whole_batch(tmp_path, processes):
    processes.spawn(run, (2, f"file://{tmp_path}/init"), 2)
