"""Several processes get the statistics that one gets."""

import datetime
import itertools
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from calibrating import (
    CALLS,
    PlantedError,
    activations,
    broken_loader,
    build,
    calibration,
)
from snapshots import Snapshot
from torch import nn


def share(batches, rank):
    """Return the batches of a rank: 5 samples and 3, in several batches and in one."""
    return batches[:2] if rank else batches[2:]


def half_of_the_data_each_is_all_of_it(rank, group):
    for net in ("relu", "residual"):
        model, batches, params = build(net, sizes=(2, 1, 3, 2), dtype=torch.float32)
        for name, call in {**CALLS, "activations": activations}.items():
            if name in ("hutchinson", "ggn, sampled"):
                continue
            alone = call(model, F.cross_entropy, batches, params)
            before = Snapshot(model)
            found = call(model, F.cross_entropy, share(batches, rank), params, process_group=group)
            assert before.differences() == [], name
            for key in alone:
                size = float(alone[key].abs().max())
                torch.testing.assert_close(found[key], alone[key], rtol=1e-6, atol=2e-6 * size, msg=name)


def random_probes_of_all_ranks(rank, group):
    model, batches, params = build(sizes=(4, 4))
    exact = CALLS["exact"](model, F.cross_entropy, batches, params)
    found = calibration.hessian_diagonal(
        model, F.cross_entropy, batches[rank : rank + 1], params, method="hutchinson", samples=200, progress=False,
        process_group=group,
    )  # fmt: skip
    square = torch.cat([
        ((found[key] - exact[key]) / found.standard_error[key])[found.standard_error[key] > 1e-9].square().reshape(-1)
        for key in params
    ])  # fmt: skip
    assert 0.3 < float(square.mean()) < 2.5
    same = [torch.zeros_like(t) for t in found.values()]
    for mine, values in zip(same, found.values(), strict=True):
        mine.copy_(values)
        dist.broadcast(mine, 0, group=group)
        assert torch.equal(mine, values)


def an_error_on_one_rank_stops_all(rank, group):
    for bad, (name, call) in itertools.product((0, 1), {**CALLS, "activations": activations}.items()):
        model, batches, params = build()
        before = Snapshot(model)
        loader = broken_loader(batches) if rank == bad else batches
        with pytest.raises(PlantedError if rank == bad else RuntimeError):
            call(model, F.cross_entropy, loader, params, process_group=group)
        with pytest.raises(ValueError if rank == bad else RuntimeError):
            call(model, F.cross_entropy, [] if rank == bad else batches, params, process_group=group)
        with pytest.raises(ValueError if rank == bad else RuntimeError):
            call(model, F.cross_entropy, batches, [] if rank == bad else params, process_group=group)
        wrong = [(nn.Linear(4, 4), "weight")]
        with pytest.raises(ValueError if rank == bad else RuntimeError):
            call(model, F.cross_entropy, batches, wrong if rank == bad else params, process_group=group)
        assert before.differences() == [], name


def an_argument_that_is_wrong_on_one_rank_stops_all(rank, group):
    model, batches, params = build()
    before = Snapshot(model)
    for bad, (function, wrong, error) in itertools.product(
        (0, 1),
        (
            (calibration.taylor, {"per": "weight"}, ValueError),
            (calibration.hessian_diagonal, {"method": "gnn"}, ValueError),
            (calibration.hessian_diagonal, {"samples": 0}, ValueError),
            (calibration.fisher, {"max_batches": 0}, ValueError),
        ),
    ):
        with pytest.raises(error if rank == bad else RuntimeError):
            function(
                model, F.cross_entropy, batches, params, progress=False, process_group=group,
                **(wrong if rank == bad else {}),
            )  # fmt: skip
        loader = iter(batches) if rank == bad else batches
        with pytest.raises(TypeError if rank == bad else RuntimeError, match=r"iterator|ranks"):
            calibration.grasp(model, F.cross_entropy, loader, params, progress=False, process_group=group)
    assert before.differences() == []


def run(rank, init):
    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=30)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=2, timeout=patience)
    for scenario in (
        half_of_the_data_each_is_all_of_it,
        random_probes_of_all_ranks,
        an_error_on_one_rank_stops_all,
        an_argument_that_is_wrong_on_one_rank_stops_all,
    ):
        try:
            scenario(rank, dist.group.WORLD)
        except BaseException as error:
            raise AssertionError(f"{scenario.__name__} failed on rank {rank}: {error!r}") from error
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()) or sys.platform == "win32", reason="needs gloo"
)
def test_two_processes_get_what_one_gets(tmp_path, processes):
    processes.spawn(run, (f"file://{tmp_path}/init",), 2)
