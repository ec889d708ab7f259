"""Callbacks for the ``Trainer`` of Lightning; needs ``lightning``."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from torchprune_ext._checks import check_sparsity, check_whole, errors_about
from torchprune_ext.deploy.checkpoint import accept_pruned
from torchprune_ext.integrations.pruning import Found, Pruning, params_of
from torchprune_ext.patterns import Unit
from torchprune_ext.workflow.targets import Criterion, Scope, check_unit
from torchprune_ext.workflow.tickets import LotteryTicket

try:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import Callback
except ImportError as error:
    raise ImportError(
        "torchprune_ext.integrations.lightning needs lightning: pip install torchprune-ext[lightning]"
    ) from error

__all__ = ["LotteryTicketCallback", "PruningCallback"]


class _Callback(Callback):
    """Takes checkpoints of pruned models.

    Lightning calls ``setup`` of callbacks, ``setup`` and ``configure_model`` of the module, which may make its layers,
    then loads the values of a checkpoint, then the states of the callbacks; ``on_fit_start`` comes behind all that.
    What is about the model is made at the latest moment: when values are loaded, else in ``on_fit_start``.
    """

    _accepting: ExitStack | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the module take the checkpoint of a pruned one."""
        strategy = trainer.strategy
        if strategy.restore_checkpoint_after_setup:
            raise ValueError(
                f"strategy={type(strategy).__name__} shards parameters, so masks cannot be installed while it trains. "
                "Pass strategy='ddp' or one device to the Trainer; or prune before, and leave the callback out."
            )
        if getattr(strategy.launcher, "_start_method", None) is not None:
            raise ValueError(
                "strategy: processes that are spawned or forked hand the trained values to a model of the main process "
                "that is not pruned, which drops those of pruned tensors without an error. Pass strategy='ddp' to the "
                "Trainer, in a script."
            )
        self._release()
        fits = stage == "fit"
        self._accepting = accept_pruned(pl_module, (lambda: self._make(pl_module)) if fits else None)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make what needs the model, unless loading a checkpoint has done so."""
        self._make(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as any other."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the module as any other."""
        self._release()

    def _release(self) -> None:
        if self._accepting is not None:
            self._accepting.close()
            self._accepting = None

    def _make(self, model: nn.Module) -> None:
        raise NotImplementedError


class PruningCallback(Pruning, _Callback):
    """Prunes while Lightning's ``Trainer`` trains, such that each step has the sparsity of a schedule, exactly.

    A :class:`.GradualPruner` in a callback. A step is a batch in which an optimizer has stepped, so that batches which
    only accumulate gradients are none, and neither are those that ``GradScaler`` skips. The callback logs ``sparsity``.

    Checkpoints of Lightning hold the masks and the state of the schedule. ``trainer.fit(model, ckpt_path=...)`` goes on
    from there, into a model that is pruned or not; ``validate``, ``test`` and ``predict`` take them too while the
    callback is in the ``Trainer``. Without it, use ``tpe.load_pruned_state_dict(model, checkpoint["state_dict"])``. A
    checkpoint that was chosen by a metric may be from before the end of the schedule, and less sparse.

    The module stays pruned in the end; :func:`.remove_all` makes that permanent. A second ``fit`` with the same
    callback goes on in the schedule.

    Args:
        schedule: which sparsity each step shall have, of :mod:`torchprune_ext.schedules`.
        params: ``(module, name)`` pairs, or a function of the ``LightningModule`` that returns them, such as one
            that calls :func:`.prunable_parameters`, which is the default.
        criterion: what is ranked, as for :class:`.GradualPruner`, and so are the other arguments.
        unit: what lives or dies together.
        scope: where a sparsity of all units is taken from.
        min_keep: how much of each tensor stays at least.

    Raises:
        TypeError: ``schedule`` is not a schedule, or ``unit`` not a unit.
        ValueError: when training begins: a strategy that shards parameters, or that trains in spawned or forked
            processes, or as :class:`.GradualPruner`.

    Example:
        >>> import torchprune_ext as tpe
        >>> from torchprune_ext.integrations.lightning import PruningCallback
        >>> PruningCallback(tpe.schedules.cubic(start=0, end=100, every=10, final=0.9), unit=tpe.Block(4))
        PruningCallback(cubic(start=0, end=100, every=10, initial=0.0, final=0.9))
    """

    _seen = 0
    _scale: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember how many steps there were."""
        self._seen, self._scale = trainer.global_step, _scale_of(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Go on by one step, if an optimizer has stepped."""
        if trainer.global_step != self._seen:
            scale = _scale_of(trainer)
            skipped = scale is not None and self._scale is not None and scale < self._scale
            self._seen, self._scale = trainer.global_step, scale
            if not skipped:
                self._step()
        if not trainer.barebones:
            pl_module.log("sparsity", self.sparsity, on_step=True, on_epoch=False)

    def state_dict(self) -> dict[str, Any]:
        """Return where the schedule is."""
        return {} if self._pruner is None else self._pruner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there; the masks are in the state of the module."""
        if self._pruner is not None:  # a test needs none
            self._resume(state_dict)

    def __repr__(self) -> str:
        """Return the schedule."""
        return f"PruningCallback({self.schedule!r})"


class LotteryTicketCallback(_Callback):
    """Lottery tickets in Lightning: after some epochs, prune what training made small, rewind, and train again.

    A :class:`.LotteryTicket` of the whole ``LightningModule`` in a callback. Each round has ``every_n_epochs`` epochs.
    Before the first epoch of the next one, a fraction of what is left is pruned by the trained weights; then all
    parameters and buffers are put back to what they were at the rewind point, masks aside, and the state of all
    optimizers is cleared. So the last round ends with trained weights, checkpoints at the end of an epoch hold trained
    weights, and ``max_epochs = (rounds + 1) * every_n_epochs`` prunes ``rounds`` times. The callback logs ``sparsity``
    for each epoch.

    Learning rate schedulers are not rewound: use one that begins again with each round, such as
    ``CosineAnnealingWarmRestarts(optimizer, T_0=every_n_epochs)`` by epochs.

    Checkpoints hold masks, the remembered values and the number of rounds; they resume as with
    :class:`PruningCallback`. Make one callback for each training.

    Args:
        amount: fraction of the units left that each round prunes, in [0, 1); 0.2 is the authors' rate.
        every_n_epochs: epochs of a round.
        params: as for :class:`PruningCallback`.
        criterion: as for :meth:`.LotteryTicket.prune`, and so are the others.
        unit: what lives or dies together.
        rewind_step: after how many steps of the optimizer values are remembered; 0 is before the first.
        scope: ``"global"``, ``"layer"``, or in which proportion.
        min_keep: how much of each tensor stays at least.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range; or when training begins, as :class:`PruningCallback`; or the first round
            ends before ``rewind_step``.

    Source: see :class:`.LotteryTicket`.
    """

    def __init__(
        self,
        amount: float = 0.2,
        every_n_epochs: int = 1,
        params: Found = None,
        criterion: Criterion = "magnitude",
        unit: Unit | None = None,
        *,
        rewind_step: int = 0,
        scope: Scope = "global",
        min_keep: float = 1,
    ) -> None:
        check_sparsity("amount", amount)
        check_whole("every_n_epochs", every_n_epochs, 1)
        check_whole("rewind_step", rewind_step, 0)
        check_unit(unit)
        self.amount, self.every_n_epochs, self.rewind_step = amount, every_n_epochs, rewind_step
        self._params, self._criterion, self._unit = params, criterion, unit
        self._scope, self._min_keep = scope, min_keep
        self._ticket: LotteryTicket | None = None
        self._rounds = 0
        self._remembered = rewind_step == 0

    @property
    def ticket(self) -> LotteryTicket:
        """The ticket.

        Raises:
            RuntimeError: no training has begun.
        """
        if self._ticket is None:
            raise RuntimeError("There is no ticket yet: it is made when the trainer begins to train the module.")
        return self._ticket

    @property
    def rounds(self) -> int:
        """How many times it has pruned and rewound."""
        return self._rounds

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune and rewind, if a round has ended."""
        if trainer.current_epoch // self.every_n_epochs > self._rounds:
            if not self._remembered:
                raise ValueError(
                    f"rewind_step={self.rewind_step} is not reached in the first round, which has "
                    f"{trainer.global_step} steps. Pass a smaller one, or a larger every_n_epochs."
                )
            self.ticket.prune(self.amount, self._criterion, self._unit, scope=self._scope, min_keep=self._min_keep)
            for optimizer in trainer.optimizers or [None]:
                self.ticket.rewind(optimizer)
            self._rounds += 1
        if not trainer.barebones:
            pl_module.log("sparsity", self.ticket.sparsity, on_step=False, on_epoch=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember the values, at the rewind point."""
        if not self._remembered and trainer.global_step >= self.rewind_step:
            self.ticket.rewind_point()
            self._remembered = True

    def state_dict(self) -> dict[str, Any]:
        """Return the remembered values and the number of rounds."""
        if self._ticket is None:
            return {}
        return {"rounds": self._rounds, "remembered": self._remembered, "values": self._ticket.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from there; the masks are in the state of the module."""
        if self._ticket is None:  # a test needs none
            return
        values: Mapping[str, Tensor] = state_dict["values"]
        with errors_about("LotteryTicketCallback"):
            self._ticket.load_state_dict(values)
        self._rounds, self._remembered = state_dict["rounds"], state_dict["remembered"]

    def _make(self, model: nn.Module) -> None:
        if self._ticket is None or self._ticket.model is not model:
            self._ticket = LotteryTicket(model, params_of(self._params, model))


def _scale_of(trainer: Trainer) -> float | None:
    """Return the scale of the loss, which gets smaller if a step is skipped; None without a scaler."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return None if scaler is None else float(scaler.get_scale())
