"""Callbacks in the Trainer of Lightning: each step as the schedule says, resumed runs as uninterrupted ones."""

import copy
import pickle
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe

pytest.importorskip("lightning", reason="the extra lightning is not installed")

import lightning
import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ModelPruning
from lightning.pytorch.plugins.precision import MixedPrecision

from torchprune_ext.integrations.lightning import LotteryTicketCallback, PruningCallback

SCHEDULE = tpe.schedules.cubic(start=1, end=9, every=2, final=0.8)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),  # Lightning's own use of torch
    pytest.mark.filterwarnings("ignore:You.re resuming from a checkpoint that ended before the epoch"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),  # of the resumed runs' ModelCheckpoint
]


class Small(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return (self(batch[0]) - batch[0][:, :3]).square().mean()

    def test_step(self, batch, batch_idx):
        self.log("loss", self(batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.02)


class ByStep(Small):
    """Chooses its data by the step, since Lightning begins a loader anew when it resumes in the middle of an epoch."""

    def training_step(self, batch, batch_idx):
        return super().training_step((torch.cat(batch) + 0.1 * self.global_step,), batch_idx)


class Watch(Callback):
    """Remembers what is logged and what is so after each batch."""

    def __init__(self):
        self.logged, self.counted, self.steps = [], [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step != (self.steps or [0])[-1]:
            self.steps.append(trainer.global_step)
            self.logged.append(float(trainer.callback_metrics["sparsity"]))
            self.counted.append(counted(pl_module))


class Stop(Callback):
    """Raises behind a step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            raise InterruptedError


def counted(model):
    """Return the sparsity from the weights alone."""
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def exact(sparsity, total=16 * 6 + 3 * 16):
    return round(sparsity * total) / total


def loader(batches=4, different=None):
    different = batches if different is None else different
    data = torch.randn(different * 8, 6, generator=torch.Generator().manual_seed(1)).repeat(batches // different, 1)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data), batch_size=8)


def trainer(tmp_path, *callbacks, epochs=3, **options):
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False} | options
    return pl.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        accelerator="cpu",
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **settings,
    )


def saving(tmp_path, when, step):
    """Return what saves a run and what stands in its place when it is resumed."""
    if when == "step" and tuple(map(int, lightning.__version__.split(".")[:2])) < (2, 6):
        pytest.skip("Lightning before 2.6 repeats a batch after a checkpoint in the middle of an epoch")
    often = {"every_n_train_steps": step} if when == "step" else {"every_n_epochs": 1, "save_on_train_epoch_end": True}
    return [ModelCheckpoint(tmp_path / folder, "saved", **often) for folder in "ab"]


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


def unhooked(model):
    return not model._load_state_dict_pre_hooks and not model._load_state_dict_post_hooks


@pytest.mark.parametrize("criterion", ["magnitude", "gradient"])
def test_each_step_has_the_sparsity_of_the_schedule_and_logs_it(tmp_path, criterion):
    model, watch = Small(), Watch()
    callback = PruningCallback(SCHEDULE, criterion=criterion)
    trainer(tmp_path, callback, watch).fit(model, loader())
    assert watch.steps == list(range(1, 13))
    assert watch.counted == [exact(SCHEDULE(step)) for step in range(12)]
    assert watch.logged == pytest.approx(watch.counted)
    assert callback.pruner.steps == 12
    assert unhooked(model)


def test_it_is_the_pruner_of_the_library(tmp_path):
    model, plain = Small(), Small()
    units = {"unit": tpe.Channel(0), "scope": "layer"}
    pairs = lambda module: [(module.net[0], "weight")]  # noqa: E731
    trainer(tmp_path, PruningCallback(SCHEDULE, pairs, "gradient", **units)).fit(model, loader())
    optimizer = plain.configure_optimizers()
    pruner = tpe.GradualPruner(plain, pairs(plain), SCHEDULE, "gradient", **units)
    for _ in range(3):
        for batch in loader():
            optimizer.zero_grad()
            plain.training_step(batch, 0).backward()
            optimizer.step()
            pruner.step()
    same(model, plain)
    assert pruner.sparsity == exact(0.8, 16)


def test_a_step_is_one_of_the_optimizer(tmp_path):
    model, watch, callback = Small(), Watch(), PruningCallback(SCHEDULE)
    trainer(tmp_path, callback, watch, epochs=4, accumulate_grad_batches=2).fit(model, loader(5))
    assert callback.pruner.steps == watch.steps[-1] == 12  # the last one of an epoch is of one batch
    assert watch.counted == [exact(SCHEDULE(step)) for step in range(12)]


def test_a_step_that_the_scaler_skips_is_none(tmp_path):
    class Overflows(Small):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (1e38 if batch_idx == 1 else 1)

    callback = PruningCallback(tpe.schedules.linear(start=0, end=6, final=0.6), criterion="gradient")
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    trainer(tmp_path, callback, epochs=2, plugins=[precision]).fit(Overflows(), loader())
    assert callback.pruner.steps == 6  # of 8
    assert callback.pruner.sparsity == exact(0.5)


@pytest.mark.parametrize(("when", "pruned"), [("epoch", False), ("epoch", True), ("step", False)])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, when, pruned):
    whole, broken = ByStep(), ByStep()
    trainer(tmp_path, PruningCallback(SCHEDULE)).fit(whole, loader(4, 1))
    first, again = saving(tmp_path, when, 6)
    with pytest.raises(InterruptedError):
        trainer(tmp_path, PruningCallback(SCHEDULE), Stop(7), first, enable_checkpointing=True).fit(
            broken, loader(4, 1)
        )
    assert unhooked(broken)
    watch, callback = Watch(), PruningCallback(SCHEDULE)
    resumed = broken if pruned else ByStep()
    run = trainer(tmp_path, callback, watch, again, enable_checkpointing=True)
    if pruned:  # further than the first update says
        with pytest.raises(ValueError, match="less than what is pruned already"):
            run.fit(resumed, loader(4, 1), ckpt_path=tmp_path / "a/saved.ckpt")
        tpe.undo_all(resumed)
    run.fit(resumed, loader(4, 1), ckpt_path=tmp_path / "a/saved.ckpt")
    same(resumed, whole)
    assert watch.counted == [exact(SCHEDULE(step)) for step in range(6 if when == "step" else 4, 12)]


def test_a_test_takes_the_checkpoint(tmp_path):
    model, fresh = Small(), Small()
    fit = trainer(tmp_path, PruningCallback(SCHEDULE))
    fit.fit(model, loader())
    fit.save_checkpoint(tmp_path / "end.ckpt")
    test = trainer(tmp_path, PruningCallback(SCHEDULE))
    test.test(fresh, loader(), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    same(model, fresh)
    other = Small()
    tpe.load_pruned_state_dict(other, torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"])
    same(model, other)


def test_layers_may_be_made_late(tmp_path):
    class Late(Small):
        def setup(self, stage):
            if not hasattr(self, "late"):
                self.late = nn.Linear(3, 3)

        def forward(self, x):
            return self.late(self.net(x))

    fit = trainer(tmp_path, callback := PruningCallback(SCHEDULE))
    fit.fit(model := Late(), loader())
    assert callback.pruner.sparsity == counted(model) == exact(0.8, 16 * 6 + 3 * 16 + 9)
    fit.save_checkpoint(tmp_path / "end.ckpt")
    again = PruningCallback(SCHEDULE)
    trainer(tmp_path, again, epochs=4).fit(fresh := Late(), loader(), ckpt_path=tmp_path / "end.ckpt")
    assert again.pruner.steps == 16
    assert counted(fresh) == counted(model)


def test_another_schedule_is_refused_on_resuming(tmp_path):
    fit = trainer(tmp_path, PruningCallback(SCHEDULE), epochs=1)
    fit.fit(Small(), loader())
    fit.save_checkpoint(tmp_path / "one.ckpt")
    model = Small()
    with pytest.raises(ValueError, match="PruningCallback: state_dict was saved with cubic"):
        trainer(tmp_path, PruningCallback(tpe.schedules.linear(0, 9, final=0.8))).fit(
            model, loader(), ckpt_path=tmp_path / "one.ckpt"
        )
    assert unhooked(model)


def test_copies_of_a_model_in_training_stand_alone(tmp_path):
    class Copies(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 6:
                self.copied = pickle.loads(pickle.dumps(pl_module.net))
                self.deep = tpe.copy_pruned(pl_module.net)

    copies = Copies()
    trainer(tmp_path, PruningCallback(SCHEDULE), copies).fit(Small(), loader())
    assert 0 < counted(copies.copied) == counted(copies.deep) < exact(0.8)


# ------------------------------------------------------------------------------------------------ lottery tickets


class Rounds(Callback):
    """Remembers the state at the begin of each epoch and the weights at its end."""

    def __init__(self):
        self.begins, self.ends, self.empty = [], [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.begins.append(copy.deepcopy(pl_module.state_dict()))
        self.empty.append(not trainer.optimizers[0].state)

    def on_train_epoch_end(self, trainer, pl_module):
        self.ends.append(copy.deepcopy(pl_module.state_dict()))


def test_a_ticket_really_rewinds(tmp_path):
    model, rounds = Small(), Rounds()
    first = copy.deepcopy(model.state_dict())
    callback = LotteryTicketCallback(0.5, every_n_epochs=2)
    trainer(tmp_path, callback, rounds, epochs=6).fit(model, loader())
    total, left = 144, 144
    for epoch, begin in enumerate(rounds.begins):
        number = epoch // 2
        if epoch % 2:
            assert not rounds.empty[epoch]
            continue
        assert rounds.empty[epoch]
        trained = rounds.ends[epoch - 1] if epoch else first
        left -= round(0.5 * left) if epoch else 0
        assert sum(int(begin.get(f"net.{i}.weight_mask", torch.ones(1)).sum()) for i in (0, 3)) == (
            left if epoch else 2
        )
        for key, value in first.items():
            now = begin.get(f"{key}_orig", begin.get(key))
            assert torch.equal(now, value), key
            moved = trained.get(f"{key}_orig", trained.get(key))
            assert not epoch or not torch.equal(moved, value), key
        if epoch:  # the masks are of the trained weights, the smallest of them
            scores, kept = [], []
            for i in (0, 3):
                before = trained.get(f"net.{i}.weight_mask", torch.ones(()))
                weight = trained.get(f"net.{i}.weight_orig", trained.get(f"net.{i}.weight")) * before
                scores.append(weight.abs().flatten())
                kept.append(begin[f"net.{i}.weight_mask"].flatten())
            scores, kept = torch.cat(scores), torch.cat(kept).bool()
            assert scores[kept].min() >= scores[~kept].max()
        assert number == epoch // 2
    assert callback.rounds == 2
    assert callback.ticket.sparsity == counted(model) == 1 - left / total
    assert unhooked(model)


def test_a_ticket_of_a_later_point(tmp_path):
    class Fifth(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 3:
                self.values = {k: v.clone() for k, v in pl_module.state_dict().items()}

    model, rounds, third = Small(), Rounds(), Fifth()
    trainer(tmp_path, LotteryTicketCallback(0.2, rewind_step=3), rounds, third, epochs=2).fit(model, loader())
    for key, value in third.values.items():
        begin = rounds.begins[1]
        assert torch.equal(begin.get(f"{key}_orig", begin.get(key)), value), key
    with pytest.raises(ValueError, match="rewind_step=9 is not reached in the first round, which has 4 steps"):
        trainer(tmp_path, LotteryTicketCallback(0.2, rewind_step=9), epochs=2).fit(Small(), loader())


@pytest.mark.parametrize("when", ["step", "epoch"])
def test_a_resumed_ticket_is_the_uninterrupted_one(tmp_path, when):
    whole, resumed = ByStep(), ByStep()
    trainer(tmp_path, LotteryTicketCallback(0.2, rewind_step=2), epochs=4).fit(whole, loader(4, 1))
    first, again = saving(tmp_path, when, 10)
    callback = LotteryTicketCallback(0.2, rewind_step=2)
    with pytest.raises(InterruptedError):
        trainer(tmp_path, callback, first, Stop(11), epochs=4, enable_checkpointing=True).fit(ByStep(), loader(4, 1))
    callback = LotteryTicketCallback(0.2, rewind_step=2)
    run = trainer(tmp_path, callback, again, epochs=4, enable_checkpointing=True)
    run.fit(resumed, loader(4, 1), ckpt_path=tmp_path / "a/saved.ckpt")
    assert callback.rounds == 3
    same(resumed, whole)


# ------------------------------------------------------------------------------------------------- what is refused


def test_bad_arguments(tmp_path):
    with pytest.raises(TypeError, match=r"schedule=0\.5 is a float"):
        PruningCallback(0.5)
    with pytest.raises(TypeError, match="global_nm_structured"):
        PruningCallback(SCHEDULE, unit=tpe.NM(2, 4))
    with pytest.raises(ValueError, match="amount=1"):
        LotteryTicketCallback(1)
    with pytest.raises(ValueError, match="every_n_epochs=0"):
        LotteryTicketCallback(0.2, 0)
    with pytest.raises(RuntimeError, match="no pruner yet"):
        _ = PruningCallback(SCHEDULE).pruner
    with pytest.raises(RuntimeError, match="no ticket yet"):
        _ = LotteryTicketCallback().ticket
    model = Small()
    with pytest.raises(ValueError, match="is not a part of the model Small"):
        trainer(tmp_path, PruningCallback(SCHEDULE, lambda _: [(nn.Linear(2, 2), "weight")])).fit(model, loader())
    assert unhooked(model)
    assert not prune.is_pruned(model)


def fit_in_process(rank, port, path):
    """Train in one of two processes, as torchrun would start them."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "NODE_RANK": 0}
        for key, value in given.items():
            patch.setenv(key, str(value))
        model = Small()
        made = trainer(path, PruningCallback(SCHEDULE), epochs=5, devices=2, strategy="ddp")
        made.fit(model, loader())
        torch.save(model.state_dict(), path / f"rank{rank}.pt")
        dist.destroy_process_group()


@pytest.mark.skipif(sys.platform != "linux", reason="needs gloo")
def test_two_processes_get_the_same_masks(tmp_path, processes):
    one, other = processes.trained(fit_in_process, tmp_path)
    for key, value in one.items():
        if "running" not in key:  # each process has its own data
            assert torch.equal(value, other[key]), key
    assert sum(int((one[f"net.{i}.weight_mask"] == 0).sum()) for i in (0, 3)) == round(0.8 * 144)


def test_processes_that_would_lose_what_is_pruned_are_refused(tmp_path):
    callback, made = PruningCallback(SCHEDULE), trainer(tmp_path, devices=2, strategy="ddp_spawn")
    sharding = SimpleNamespace(strategy=SimpleNamespace(restore_checkpoint_after_setup=True))
    with pytest.raises(ValueError, match="shards parameters"):
        callback.setup(sharding, Small(), "fit")
    with pytest.raises(ValueError, match="spawned or forked"):
        callback.setup(made, Small(), "fit")


# ------------------------------------------------------------------------------------- Lightning's own ModelPruning


def test_our_unstructured_classes_work_in_lightnings_own_callback(tmp_path):
    model = Small()
    pairs = [(model.net[0], "weight"), (model.net[3], "weight")]
    own = ModelPruning(tpe.EveryOther, pairs, use_lottery_ticket_hypothesis=False, make_pruning_permanent=False)
    trainer(tmp_path, own, epochs=1).fit(model, loader())
    assert counted(model) == 0.5
    # it puts several calls into the host's container, which our lifecycle knows
    assert [path for path, _, _ in tpe.pruned_parameters(model)] == ["net.0", "net.3"]
    tpe.remove_all(model)
    assert counted(model) == 0.5
