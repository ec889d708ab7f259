"""Several processes choose the N of each tensor as one process would."""

import math
import re
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from snapshots import Snapshot
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()) or sys.platform == "win32", reason="needs gloo"
)
SHAPES = ((3, 8), (5, 4), (2, 12), (7, 4), (4, 8))


def layers(dtype=torch.float32, dead=False):
    """Return layers of few levels, so that ties are the rule; the same in every process."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number, shape in enumerate(SHAPES):
        layer = nn.Linear(1, 1, bias=False)
        layer.weight = nn.Parameter((torch.randint(-3, 4, shape, generator=generator) / 2).to(dtype))
        if dead and number % 2:
            mask = torch.rand(shape, generator=generator) < 0.7
            prune.custom_from_mask(layer, "weight", mask)
        made.append(layer)
    return made


def weights(modules):
    return [(module, "weight") for module in modules]


def share(modules, rank, world):
    """Return the consecutive share of this rank; the last has none where there are three."""
    cuts = [0, 2, len(modules)] if world == 2 else [0, 3, len(modules), len(modules)]
    return modules[cuts[rank] : cuts[rank + 1]]


def the_masks_are_those_of_one_process(rank, world, group):
    budgets = (
        {"amount": 0.5},
        {"amount": 11},
        {"target_sparsity": 0.6},
        {"amount": 0.9, "min_keep": 0},
        {"amount": 0.25, "choices": [1, 3], "importance_scores": True},
        {"amount": 0.99},  # nobody can do that
    )
    for budget in budgets:
        for dtype, dead in ((torch.float32, False), (torch.bfloat16, True), (torch.float64, True)):
            alone, every = layers(dtype, dead), layers(dtype, dead)
            mine, expected = share(every, rank, world), share(alone, rank, world)

            def scores(modules, budget=budget):
                if "importance_scores" not in budget:
                    return budget
                given = {(m, "weight"): torch.arange(m.weight.numel()).view(m.weight.shape) % 5.0 for m in modules}
                return {**budget, "importance_scores": given}

            before = Snapshot(*mine)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # what min_keep=0 lets be emptied
                try:
                    tpe.global_nm_structured(weights(alone), m=4, **scores(alone))
                except ValueError as refused:
                    with pytest.raises(ValueError, match=f"^{re.escape(str(refused))}$"):
                        tpe.global_nm_structured(weights(mine), m=4, process_group=group, **scores(mine))
                    assert before.differences() == []
                    continue
                tpe.global_nm_structured(weights(mine), m=4, process_group=group, **scores(mine))
            for layer, twin in zip(mine, expected, strict=True):
                assert torch.equal(layer.weight_mask, twin.weight_mask), budget


def an_error_on_one_rank_stops_all(rank, world, group):
    for args, error in (
        ({"m": "x"}, TypeError),
        ({"m": 3}, ValueError),
        ({"amount": -1}, ValueError),
        ({"choices": [9]}, ValueError),
        ({"dim": 0.5}, TypeError),
    ):
        modules, here = layers(), {"amount": 0.5, "m": 4, **(args if rank == 0 else {})}
        before = Snapshot(*modules)
        with pytest.raises(error if rank == 0 else RuntimeError):
            tpe.global_nm_structured(weights(modules), process_group=group, **here)
        assert before.differences() == []
    modules = layers()
    modules[-1].weight.data[0, 0] = math.nan if rank == world - 1 else 1.0
    before = Snapshot(*modules)
    with pytest.raises(ValueError if rank == world - 1 else RuntimeError):
        tpe.global_nm_structured(weights(modules), amount=0.5, m=4, process_group=group)
    assert before.differences() == []


def arguments_that_differ_are_refused_by_all(rank, world, group):
    for args in ({"m": 2}, {"choices": [1, 2]}, {"dim": 1}, {"amount": 0.25}, {"pad": True}):
        modules, here = layers(), {"amount": 0.5, "m": 4, **(args if rank == 0 else {})}
        before = Snapshot(*modules)
        with pytest.raises(RuntimeError, match="differ between ranks"):
            tpe.global_nm_structured(weights(modules), process_group=group, **here)
        assert before.differences() == []


def an_error_while_installing_on_one_rank_stops_all(rank, world, group):
    modules = layers()
    before = Snapshot(*modules)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if rank == 0:

            def planted(*args, **kwargs):
                raise KeyError("planted")

            monkeypatch.setattr(prune.BasePruningMethod, "apply_mask", planted)
        with pytest.raises(KeyError if rank == 0 else RuntimeError):
            tpe.global_nm_structured(weights(modules), amount=0.5, m=4, process_group=group)
    assert before.differences() == []


SCENARIOS = (
    the_masks_are_those_of_one_process,
    an_error_on_one_rank_stops_all,
    arguments_that_differ_are_refused_by_all,
    an_error_while_installing_on_one_rank_stops_all,
)


def run(rank, world, init):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world)
    for scenario in SCENARIOS:
        try:
            scenario(rank, world, dist.group.WORLD)
        except BaseException as error:
            raise AssertionError(f"{scenario.__name__} failed on rank {rank} of {world}: {error!r}") from error
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_choose_as_one(world, tmp_path, processes):
    processes.spawn(run, (world, f"file://{tmp_path}/init"), world)
