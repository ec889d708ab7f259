"""The callback in the Trainer of transformers: each step as the schedule says, resumed runs as uninterrupted ones."""

import json
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe

tf = pytest.importorskip("transformers", reason="the extra transformers is not installed")
pytest.importorskip("accelerate", reason="the extra transformers is not installed")

from torchprune_ext.integrations.transformers import PruningCallback  # noqa: E402

SCHEDULE = tpe.schedules.cubic(start=1, end=9, every=2, final=0.7)

pytestmark = [pytest.mark.filterwarnings("ignore:.*pin_memory.*"), pytest.mark.filterwarnings("ignore::FutureWarning")]


def made(seed=0):
    torch.manual_seed(seed)
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=24,
            max_position_embeddings=16,
        )
    )


def data(count=16):
    tokens = torch.randint(0, 24, (count, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


def trainer(tmp_path, model, *callbacks, epochs=3, eval_dataset=None, **options):
    args = tf.TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=epochs,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **({"save_strategy": "no"} | options),
    )
    result = tf.Trainer(
        model=model, args=args, train_dataset=data(), eval_dataset=eval_dataset, callbacks=list(callbacks)
    )
    result.remove_callback(tf.PrinterCallback)
    return result


class Watch(tf.TrainerCallback):
    """Remembers what is so after each step, and what is logged."""

    def __init__(self):
        self.steps, self.counted, self.logged = [], [], []

    def on_step_end(self, args, state, control, model=None, **_):
        self.steps.append(state.global_step)
        self.counted.append(counted(model))

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs:
            self.logged.append(logs["sparsity"])


class Stop(tf.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise InterruptedError


def counted(model):
    weights = [module.weight for module, _ in linears_of(model)]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def linears_of(model):
    return [(module, "weight") for module in model.model.modules() if isinstance(module, nn.Linear)]


TOTAL = 4 * 16 * 16 + 3 * 16 * 32


def exact(sparsity):
    return round(sparsity * TOTAL) / TOTAL


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


@pytest.mark.filterwarnings("ignore:.*min_keep=1 is all that is left")  # gradients differ much between tensors
@pytest.mark.parametrize("criterion", ["magnitude", "gradient"])
def test_each_step_has_the_sparsity_of_the_schedule_and_logs_it(tmp_path, criterion):
    watch, callback = Watch(), PruningCallback(SCHEDULE, linears_of, criterion)
    run = trainer(tmp_path, made(), callback, watch)
    run.train()
    assert watch.steps == list(range(1, 13))
    assert watch.counted == watch.logged == [exact(SCHEDULE(step)) for step in range(12)]
    assert [row["sparsity"] for row in run.state.log_history if "loss" in row] == watch.counted
    assert callback.pruner.steps == 12


def test_a_step_is_one_of_the_optimizer(tmp_path):
    watch, callback = Watch(), PruningCallback(SCHEDULE, linears_of, "gradient", scope="layer")
    trainer(tmp_path, made(), callback, watch, epochs=6, gradient_accumulation_steps=2).train()
    assert watch.steps == list(range(1, 13))
    assert callback.pruner.steps == 12
    assert watch.counted[-1] == callback.sparsity
    assert callback.sparsity == pytest.approx(0.7, abs=0.01)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole, resumed = made(), made(seed=5)
    trainer(tmp_path / "whole", whole, PruningCallback(SCHEDULE, linears_of)).train()
    saving = {"save_strategy": "steps", "save_steps": 6}
    with pytest.raises(InterruptedError):
        trainer(tmp_path, made(), PruningCallback(SCHEDULE, linears_of), Stop(7), **saving).train()
    watch = Watch()
    run = trainer(tmp_path, resumed, PruningCallback(SCHEDULE, linears_of), watch, **saving)
    run.train(resume_from_checkpoint=True)
    same(resumed, whole)
    assert watch.counted == [exact(SCHEDULE(step)) for step in range(6, 12)]
    state = json.loads((tmp_path / "checkpoint-12/trainer_state.json").read_text())
    assert state["stateful_callbacks"]["PruningCallback"]["attributes"]["steps"] == 12


def test_a_head_that_is_tied_to_the_embedding_is_resumed_as_one(tmp_path):
    def tied():
        torch.manual_seed(0)
        sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 24, "n_positions": 16}
        return tf.GPT2LMHeadModel(tf.GPT2Config(**sizes, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0))

    whole, resumed = tied(), tied()
    once = {"schedule": tpe.schedules.linear(1, 9, 2, final=0.5), "scope": "layer"}
    trainer(tmp_path, whole, PruningCallback(**once), save_strategy="epoch").train()
    run = trainer(tmp_path, resumed, PruningCallback(**once))
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    same(resumed, whole)
    assert resumed.lm_head.weight_orig is resumed.transformer.wte.weight_orig
    assert int((resumed.lm_head.weight == 0).sum()) == 16 * 24 // 2


def test_a_checkpoint_is_resumed_with_the_callback_or_not_at_all(tmp_path):
    trainer(tmp_path, made(), PruningCallback(SCHEDULE, linears_of), save_strategy="epoch").train()
    last = str(tmp_path / "checkpoint-8")
    late = trainer(tmp_path, made())
    late.add_callback(PruningCallback(SCHEDULE, linears_of))
    with pytest.raises(ValueError, match="did not take its masks"):
        late.train(resume_from_checkpoint=last)
    other = PruningCallback(tpe.schedules.linear(1, 9, final=0.7), linears_of)
    with pytest.raises(ValueError, match="PruningCallback: state_dict was saved with cubic"):
        trainer(tmp_path, made(), other).train(resume_from_checkpoint=last)


def test_what_is_saved_for_use(tmp_path):
    model = made()
    run = trainer(tmp_path, model, PruningCallback(SCHEDULE, linears_of))
    run.train()
    model.save_pretrained(tmp_path / "dense", state_dict=tpe.dense_state_dict(model))
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        logits = model.eval()(tokens).logits
        one = tf.LlamaForCausalLM.from_pretrained(tmp_path / "dense").eval()
        assert torch.equal(one(tokens).logits, logits)
        tpe.remove_all(model)
        run.save_model(str(tmp_path / "removed"))
        two = tf.LlamaForCausalLM.from_pretrained(tmp_path / "removed").eval()
        assert torch.equal(two(tokens).logits, logits)
    assert counted(two) == exact(0.7)


def test_reporters_see_the_sparsity_behind_the_callback(tmp_path):
    watch, callback = Watch(), PruningCallback(SCHEDULE, linears_of)
    run = trainer(tmp_path, made(), watch, callback, epochs=1)
    run.callback_handler.callbacks.sort(key=lambda other: other is not callback)
    run.train()
    assert watch.logged == [exact(SCHEDULE(step)) for step in range(4)]


def test_training_twice_goes_on(tmp_path):
    callback = PruningCallback(SCHEDULE, linears_of)
    run = trainer(tmp_path, made(), callback, epochs=1)
    run.train()
    run.train()
    assert callback.pruner.steps == 8
    assert callback.sparsity == exact(SCHEDULE(7))


def test_a_best_model_of_another_sparsity_is_refused(tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}
    model = made()
    with pytest.raises(ValueError, match="load_best_model_at_end=True would compare"):
        trainer(tmp_path, model, PruningCallback(SCHEDULE, linears_of), eval_dataset=data(4), **best).train()
    assert not prune.is_pruned(model)
    once = PruningCallback(tpe.schedules.one_shot(0, 0.5), linears_of)
    run = trainer(tmp_path, model, once, eval_dataset=data(4), epochs=2, **best)
    run.train()
    assert counted(model) == exact(0.5)


def test_bad_arguments(tmp_path):
    with pytest.raises(TypeError, match=r"schedule=0\.5 is a float"):
        PruningCallback(0.5)
    with pytest.raises(TypeError, match="global_nm_structured"):
        PruningCallback(SCHEDULE, unit=tpe.NM(2, 4))
    with pytest.raises(RuntimeError, match="no pruner yet"):
        _ = PruningCallback(SCHEDULE).pruner
    callback = PruningCallback(SCHEDULE)
    with pytest.raises(ValueError, match="restore_callback_states_from_checkpoint=True makes callbacks anew"):
        trainer(tmp_path, made(), callback, restore_callback_states_from_checkpoint=True)
    for name in ("deepspeed", "fsdp"):
        sharding = SimpleNamespace(**({"deepspeed": None, "fsdp": ""} | {name: "yes"}))
        with pytest.raises(ValueError, match=f"{name} of TrainingArguments shards parameters"):
            callback.on_train_begin(sharding, tf.TrainerState(), None, model=made())
    two = [PruningCallback(SCHEDULE, linears_of), PruningCallback(SCHEDULE, linears_of)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = trainer(tmp_path, model := made(), *two)
    with pytest.raises(ValueError, match="has 2 PruningCallbacks"):
        run.train()
    assert not prune.is_pruned(model)


def train_in_process(rank, port, path):
    """Train in one of two processes, as torchrun would start them."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        for key, value in {**given, "RANK": rank, "LOCAL_RANK": rank}.items():
            patch.setenv(key, str(value))
        model, watch = made(), Watch()
        options = {"ddp_backend": "gloo", "gradient_accumulation_steps": 2, "max_steps": 12}
        trainer(path, model, PruningCallback(SCHEDULE, linears_of, criterion="gradient"), watch, **options).train()
        torch.save({"model": model.state_dict(), "counted": watch.counted}, path / f"rank{rank}.pt")
        dist.destroy_process_group()


@pytest.mark.skipif(sys.platform != "linux", reason="needs gloo")
def test_two_processes_get_the_same_masks(tmp_path, processes):
    one, other = processes.trained(train_in_process, tmp_path)
    for key, value in one["model"].items():
        assert torch.equal(value, other["model"][key]), key
    total = sum(module.weight.numel() for module, _ in linears_of(made()))
    assert one["counted"] == other["counted"] == [round(SCHEDULE(step) * total) / total for step in range(12)]
