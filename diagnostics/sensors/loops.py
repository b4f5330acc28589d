"""Guards steps inside other libraries' training loops: Hugging Face's Trainer and Lightning.

Either way a guarded step begins before the forward of the first micro-batch and ends right before the optimizer's step.
If it is not clean, on any rank of torch.distributed's, its gradients are dropped on all, so that the optimizer, which
passes parameters without a gradient over, commits nothing of it; the loop goes on with the next batch. Unless the state
itself is wrong, on any rank: no dropped step repairs that, so training stops on all, and no checkpoint is written.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch import nn
from torch.optim import Optimizer

from diagnostics.sensors.agreement import agree
from diagnostics.sensors.early_updates import EarlyUpdates, refuse_early_updates
from diagnostics.sensors.guard import Guard
from diagnostics.sensors.guarded_step import GuardedStep
from diagnostics.sensors.upkeep import CORRUPTED

_log = logging.getLogger("assay")

_SEVERAL = "several optimizers: of each batch only what runs before the first one's step is guarded"

_CORRUPTED = (
    "the state itself is corrupted: %s. Dropping steps does not repair it: training stops, and nothing more is saved. "
    "Restore a checkpoint from before the last update, on another device if it happens again. If somebody wrote there "
    "on purpose, call guard.forget() of this callback after each such write"
)
_NOT_SAVED = (
    "not saved: the state itself is corrupted, as logged before. Restore a checkpoint from before the last update; or "
    "call guard.forget() of Assay's callback if somebody wrote to parameters or moments on purpose"
)

OnAlarm = Callable[[GuardedStep], None]


class GuardedLoop:
    """The part that both have in common.

    `guard` is made when training begins, `dropped` counts steps not committed, and `corrupted` says whether the last
    one was so because the state itself was wrong, on any rank.
    """

    def __init__(self, on_alarm: OnAlarm | None, options: dict[str, Any]) -> None:
        self.guard: Guard | None = None
        self.dropped = 0
        self.corrupted = False
        self._on_alarm = on_alarm
        self._options = options
        self._step: GuardedStep | None = None
        self._early: EarlyUpdates | None = None

    def start(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        """Training begins, perhaps anew, after a step that was cut short by an error."""
        self.stop()
        self.corrupted = False
        self.guard = Guard(model, optimizer, **self._options)
        self._early = EarlyUpdates(model) if self.guard.enabled else None

    def begin(self) -> None:
        """A step begins, unless one is under way: the optimizer has not stepped since."""
        if self.guard is not None and self._step is None:
            if self._early is not None:
                self._early.begin()
            self._step = self.guard.step().__enter__()

    def settle(self, optimizer: Optimizer, scaler: Any = None) -> None:
        """The optimizer is about to step: it does so with gradients that are clean on every rank, or with none.

        scaler: the GradScaler that is to make it step, unless it has unscaled the gradients.
        Raises RuntimeError where something has updated parameters before.
        """
        step, self._step = self._step, None
        if step is None:
            return
        step.__exit__(None, None, None)
        if self._early is not None:
            self._early.refuse()
        dirty, corrupted = agree(step)
        self.corrupted = corrupted is not None
        if dirty is None:
            return
        self.dropped += 1
        _drop(optimizer, scaler)
        if corrupted is not None:
            _log.critical(_CORRUPTED, _first_wrong(step) if step.corrupted else f"on rank {corrupted}, not on this one")
        if step.clean:
            _log.warning("step not committed: it alarmed on rank %d, not on this one", dirty)
            return
        _log.warning("step not committed, %d alarms, the first: %s", len(step.alarms), step.alarms[0])
        if self._on_alarm is not None:
            self._on_alarm(step)

    def stop(self) -> None:
        """Training ends, perhaps within a step."""
        step, self._step = self._step, None
        if step is not None:
            step.abandon()
        if self._early is not None:
            self._early.close()


def _drop(optimizer: Optimizer, scaler: Any) -> None:
    """A scaler must have looked for infinities before: where it finds no gradients its step and update raise."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if scaler is not None and parameters:
        with suppress(RuntimeError):  # it has unscaled them before, to clip them
            scaler.unscale_(optimizer)
    for parameter in parameters:
        parameter.grad = None


def _first_wrong(step: GuardedStep) -> str:
    wrong = [alarm for alarm in step.alarms if alarm.sensor in CORRUPTED]
    return f"{wrong[0].module} first ({wrong[0].sensor}), {len(wrong)} in all"


class TrainerCallback(GuardedLoop):
    """For Hugging Face's Trainer: `Trainer(..., callbacks=[assay.TrainerCallback()])`.

    Args:
        on_alarm: called with the step where it alarmed, after its gradients were dropped; not on other ranks.
        options: of the guard, e.g. budget=0.01; a wrong one raises when training begins, and so do DeepSpeed and
            optimizers that update within the backward; others of the kind raise in the first step that they do so.
    """

    def __init__(self, on_alarm: OnAlarm | None = None, **options: Any) -> None:
        super().__init__(on_alarm, options)

    def __getattr__(self, name: str) -> Any:
        """Events that mean nothing to the guard: the library calls all of them, and adds some in each version."""
        if name.startswith("on_"):
            return lambda *_, **__: None
        raise AttributeError(name)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The optimizer comes wrapped by accelerate. Raises RuntimeError where it steps before this could drop it."""
        optimizer = given.get("optimizer")
        refuse_early_updates(given["model"], optimizer)
        self.start(given["model"], _unwrapped(optimizer))

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Before the first micro-batch of a step."""
        self.begin()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """After the gradients of all micro-batches were added up and clipped."""
        optimizer = given["optimizer"]
        self.settle(_unwrapped(optimizer), getattr(optimizer, "scaler", None))
        if self.corrupted:
            control.should_training_stop = True

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The library's own callback has decided whether to save; nothing is saved of a state that is wrong."""
        if self.corrupted:
            control.should_save = control.should_evaluate = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The same where it saves by epochs."""
        self.on_step_end(args, state, control, **given)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The last step may have been cut short."""
        self.stop()


def _unwrapped(optimizer: Any) -> Any:
    """The optimizer that accelerate's wrapper makes step, by a scaler where there is one."""
    return getattr(optimizer, "optimizer", optimizer)


def lightning_callback(on_alarm: OnAlarm | None = None, **options: Any) -> Any:
    """For Lightning: `Trainer(callbacks=[assay.lightning_callback()])`; arguments as of `TrainerCallback`.

    Its updates run forward and backward as a closure, so `optimizer` checks are left out; the state at rest is watched.
    With several optimizers (manual optimization) only what a batch runs before the first of them steps is guarded,
    which coverage says, and nothing is watched at rest. Saving a state that was found wrong, but for its weights alone,
    raises RuntimeError.
    Raises ModuleNotFoundError when neither `lightning` nor `pytorch_lightning` is installed.
    """
    loop = GuardedLoop(on_alarm, options)

    class Callback(_lightning().Callback):  # type: ignore[misc]  # the library is the user's
        """Lightning wants a subclass of its own."""

        @property
        def guard(self) -> Guard | None:
            return loop.guard

        @property
        def dropped(self) -> int:
            return loop.dropped

        @property
        def corrupted(self) -> bool:
            return loop.corrupted

        def on_train_start(self, trainer: Any, module: Any) -> None:
            refuse_early_updates(module, trainer.strategy, *trainer.optimizers)
            loop.start(module, trainer.optimizers[0] if len(trainer.optimizers) == 1 else None)
            if loop.guard is not None and len(trainer.optimizers) > 1:
                loop.guard.account.note("<optimizer>", "step", _SEVERAL)

        def on_train_batch_start(self, *_: Any) -> None:
            loop.begin()

        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            fused = getattr(optimizer, "_step_supports_amp_scaling", False)  # the others are unscaled by now
            loop.settle(optimizer, getattr(trainer.precision_plugin, "scaler", None) if fused else None)
            if loop.corrupted:
                trainer.should_stop = True

        def on_save_checkpoint(self, *_: Any) -> None:
            if loop.corrupted:
                raise RuntimeError(_NOT_SAVED)

        def on_train_end(self, *_: Any) -> None:
            loop.stop()

    return Callback()


def _lightning() -> Any:
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise ModuleNotFoundError("lightning_callback needs Lightning: pip install lightning")
