"""A callback for the ``Trainer`` of transformers; needs ``transformers`` and ``accelerate``."""

from contextlib import ExitStack
from typing import Any

from torch import nn

from torchprune_ext.deploy.checkpoint import accept_pruned
from torchprune_ext.integrations.pruning import Pruning

try:
    import accelerate  # noqa: F401  # the Trainer needs it
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState
except ImportError as error:
    raise ImportError(
        "torchprune_ext.integrations.transformers needs transformers and accelerate: "
        "pip install torchprune-ext[transformers]"
    ) from error

__all__ = ["PruningCallback"]


class PruningCallback(Pruning, TrainerCallback, ExportableState):
    """Prunes while the ``Trainer`` of transformers trains, such that each step has the sparsity of a schedule, exactly.

    A :class:`.GradualPruner` in a callback. A step is one of the optimizer: batches that only accumulate gradients are
    none, and neither are steps that mixed precision skips. Whatever the ``Trainer`` logs has ``sparsity`` too, also in
    ``state.log_history``. Reporters, such as TensorBoard, stand before the callbacks you pass and do not see it, unless
    you put it in front::

        callback = PruningCallback(schedule)
        trainer = Trainer(model=model, callbacks=[callback], ...)
        trainer.callback_handler.callbacks.sort(key=lambda other: other is not callback)

    Checkpoints of the ``Trainer`` hold the masks and the state of the schedule, and
    ``trainer.train(resume_from_checkpoint=...)`` goes on from there. For that, the callback must be passed to
    ``Trainer(model=..., callbacks=[...])``: it lets the model take masks.

    ``from_pretrained`` knows nothing of masks: from such a checkpoint, it gives pruned tensors random values. Save what
    you want to use with ``tpe.remove_all(model)`` before ``trainer.save_model()``, or with
    ``model.save_pretrained(path, state_dict=tpe.dense_state_dict(model))``.

    Args:
        schedule: which sparsity each step shall have, of :mod:`torchprune_ext.schedules`.
        params: ``(module, name)`` pairs, or a function of the model that returns them, such as one that calls
            :func:`.prunable_parameters`, which is the default. It prunes a head that is tied to the embedding as one
            with it, unless called with ``tied=False``.
        criterion: what is ranked, as for :class:`.GradualPruner`, and so are the other arguments. ``"gradient"`` reads
            the gradients of the step, all accumulated and clipped.
        unit: what lives or dies together.
        scope: where a sparsity of all units is taken from.
        min_keep: how much of each tensor stays at least.

    Raises:
        TypeError: ``schedule`` is not a schedule, or ``unit`` not a unit.
        ValueError: when training begins: DeepSpeed or FSDP; ``restore_callback_states_from_checkpoint``, which would
            make the callback anew; ``load_best_model_at_end`` with a schedule that is not at its end; a checkpoint
            whose masks were not loaded; or as :class:`.GradualPruner`.

    Example:
        >>> import torchprune_ext as tpe
        >>> from torchprune_ext.integrations.transformers import PruningCallback
        >>> PruningCallback(tpe.schedules.linear(start=0, end=100, every=10, final=0.5), criterion="gradient")
        PruningCallback(linear(start=0, end=100, every=10, initial=0.0, final=0.5))
    """

    _accepting: ExitStack | None = None
    _accepts: nn.Module | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Let the model take the checkpoint of a pruned one."""
        if args.restore_callback_states_from_checkpoint:
            raise ValueError(
                "restore_callback_states_from_checkpoint=True makes callbacks anew from numbers, without schedule and "
                "params. Pass False to TrainingArguments: PruningCallback resumes without it."
            )
        if kwargs.get("model") is not None:
            self._accept(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the pruner, or resume it."""
        if args.deepspeed or args.fsdp:
            raise ValueError(
                f"{'deepspeed' if args.deepspeed else 'fsdp'} of TrainingArguments shards parameters, so masks cannot "
                "be installed while it trains. Leave it out; or prune before, and leave the callback out."
            )
        model = kwargs["model"]
        saved: Any = state.stateful_callbacks.get(type(self).__name__)
        if isinstance(saved, list):
            raise ValueError(
                f"The Trainer has {len(saved)} PruningCallbacks, whose states a checkpoint does not tell apart. Pass "
                "one, with all params, and amounts per tensor as scope."
            )
        saved = saved["attributes"] if saved and state.global_step else None
        if saved and self._accepts is not model:
            raise ValueError(
                "The checkpoint was loaded into a model that did not take its masks. Make the trainer with "
                "Trainer(model=model, callbacks=[PruningCallback(...)]), not with add_callback() or model_init."
            )
        self._make(model)
        if saved:
            self._resume(saved)
        if args.load_best_model_at_end and self.schedule.end > self.pruner.steps:
            raise ValueError(
                "load_best_model_at_end=True would compare models of different sparsity and may bring back one that "
                f"is not pruned as {self.schedule!r} says. Pass False to TrainingArguments."
            )
        self._accept(model)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on by one step; gradients are still there."""
        if not getattr(kwargs.get("optimizer"), "step_was_skipped", False):
            self._step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the sparsity to what is logged."""
        if self._pruner is not None:
            for told in (logs, state.log_history[-1] if state.log_history else None):
                if told is not None:
                    told["sparsity"] = self.sparsity

    def state(self) -> dict[str, Any]:
        """Return where the schedule is, for the file ``trainer_state.json``."""
        return {"args": {}, "attributes": {} if self._pruner is None else self._pruner.state_dict()}

    def __repr__(self) -> str:
        """Return the schedule."""
        return f"PruningCallback({self.schedule!r})"

    def _accept(self, model: nn.Module) -> None:
        if self._accepts is model:
            return
        if self._accepting is not None:
            self._accepting.close()
        self._accepting, self._accepts = accept_pruned(model, lambda: self._make(model)), model
