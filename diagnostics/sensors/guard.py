"""Attaches the sensors to a torch module: every operator of a step is looked at, and no number is changed."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from diagnostics.health import Alarm
from diagnostics.sensors.compiler import is_compiled
from diagnostics.sensors.coverage import Coverage, CoverageRow
from diagnostics.sensors.given import alarms_of, check_guard, key_of
from diagnostics.sensors.guarded_step import GuardedStep
from diagnostics.sensors.places import Places
from diagnostics.sensors.readings import ReadingLog
from diagnostics.sensors.sampling import Sampler
from diagnostics.sensors.spending import Spending
from diagnostics.sensors.statistics import Histories
from diagnostics.sensors.tolerance import ToleranceTable, Widening, shipped_table
from diagnostics.sensors.upkeep import Upkeep


class Guard:
    """Guards an ordinary torch module, its forward and its backward, whatever functions they are written with.

    The native kernels run untouched, and a dispatch mode looks at what each was given and what it gave: guarded and
    unguarded steps are bit-equal, under autocast and either kind of activation checkpointing as well. Kernels that no
    mode can see are guarded when they are announced. One step at a time; the step before is settled when the next
    begins.

    Args:
        model: the module.
        optimizer: what updates it. With it one parameter's update a step is repeated and compared, and parameters and
            moments must be, when the next guarded step begins, what the update left: else that step has an alarm, and
            so has every later one until the state is put right (see `forget`).
        budget: the checks' share of a step's other time, e.g. 0.01, those of the optimizer and the watching of every
            operator included; calls, updates and tensors at rest are sampled to keep it, or whole steps where watching
            alone takes half of it, and on GPUs. None: no limit.
        again: share of the calls of operators without an identity (element-wise work, moves), and of thin ones beside
            theirs, that are run once more, and of the tensors kept for the backward that are hashed.
        tolerance_scale: what every shipped tolerance is multiplied by; what is compared bit for bit has none.
        enabled: False makes every step a plain one.
        table: tolerances in place of the shipped ones.
        fingerprints: whether what activation checkpointing makes again is compared with what the forward made.

    Raises:
        TypeError: an argument is of another type than it must be.
        ValueError: tolerance_scale or budget is not a positive finite number, or `again` not in 0..1.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        budget: float | None = None,
        again: float = 1.0,
        tolerance_scale: float = 1.0,
        enabled: bool = True,
        table: ToleranceTable | None = None,
        fingerprints: bool = True,
    ) -> None:
        numbers = {"again": again, "tolerance_scale": tolerance_scale}
        check_guard(model, optimizer, table, numbers if budget is None else numbers | {"budget": budget})
        if not 0 <= again <= 1:
            raise ValueError(f"again is {again}, must be a share in 0..1")
        self.enabled = enabled
        self.again = again
        self.fingerprints = fingerprints
        self.places = Places(model)
        self.compiled = any(is_compiled(module) for module in model.modules())
        self.table = table or shipped_table()
        self.widening = Widening(tolerance_scale)
        self.sampler = Sampler(budget)
        self.upkeep = Upkeep(model, optimizer, self.sampler) if optimizer is not None and enabled else None
        self.spending = Spending(self.sampler, self.upkeep)
        self.device = _device(model)
        self.log = ReadingLog(self.device)
        self.histories = Histories()
        self._model = model
        self.current: GuardedStep | None = None
        self.account = Coverage()
        self._failures = 0  # of the checks of all steps but the current one
        self._steps = 0

    def step(self, key: int | None = None) -> GuardedStep:
        """One step's forward and backward, as a context manager. The same key draws the same signs.

        Without a key steps are numbered. The context is entered once, and raises NothingToCheck at its end when no
        operator of any step so far was covered by a check. Raises TypeError for a key that is no integer, and
        RuntimeError while another step of this guard is under way or when the model has no memory yet.
        """
        key = self._steps + 1 if key is None else key_of(key)
        if self.current is not None:
            if self.current.under_way:
                raise RuntimeError("a step of this guard is under way: leave its `with` block before the next begins")
            self.current.settle()
            self._failures += self.current.failures
            self.spending.settle()
        self.log.clear()
        device = _device(self._model)
        if self.enabled and device.type == "meta":
            raise RuntimeError("the model is on the meta device, where nothing is computed: give it memory first")
        if device != self.device:
            self.device, self.log = device, ReadingLog(device)
        self._steps += 1
        self.current = GuardedStep(self, key)
        return self.current

    @property
    def failures(self) -> int:
        """Checks that failed themselves, in all steps so far: their calls are not covered, and training goes on."""
        current = 0 if self.current is None else self.current.failures
        return self._failures + current + (0 if self.upkeep is None else self.upkeep.failures)

    def parameters(self) -> Iterable[nn.Parameter]:
        """Those of the model, as they are now."""
        return self._model.parameters()

    def coverage(self) -> list[CoverageRow]:
        """What was checked in all steps so far, by place, operator and pass, and why the rest was not."""
        return self.account.rows()

    def forget(self) -> None:
        """The state is as it should be: parameters were changed on purpose outside the optimizer, or put right.

        What was known of it at rest is dropped, and so are the alarms "at rest" and "optimizer" of the steps so far,
        which every step repeats until then. Loading a state dict does this by itself: into the model for parameters,
        into the optimizer for moments; after a wrong update it takes both.
        """
        if self.upkeep is not None:
            self.upkeep.forget()

    def check_finite(self, name: str, tensor: Tensor) -> None:
        """Alarm in the current step if any element is not finite. One pass; no step, no check.

        Raises TypeError when it is no tensor, RuntimeError when the step was asked for its verdict.
        """
        if self.current is not None:
            self.current.check_finite(name, tensor)

    def check_equal(self, name: str, tensor: Tensor, value: float) -> None:
        """Alarm in the current step if any element is not `value`. No host sync; no step, no check.

        Raises TypeError when it is no tensor, RuntimeError when the step was asked for its verdict.
        """
        if self.current is not None:
            self.current.check_equal(name, tensor, value)

    def recalibrate(self, alarms: Iterable[Alarm]) -> int:
        """Widen what raised these false alarms to twice the reading, at most WIDEST times the shipped tolerance.

        All sites of the same sensor and pass are widened. Returns how many tolerances changed (`widening.count` sums
        them). Alarms that are exact or not finite widen nothing: no tolerance could have admitted them.
        Raises TypeError when these are no alarms.
        """
        worst: dict[tuple[str, str], float] = {}
        for alarm in alarms_of(alarms):
            key = (alarm.sensor, alarm.pass_)
            if math.isfinite(alarm.reading) and not alarm.exact:
                worst[key] = max(worst.get(key, 0.0), alarm.reading)
        return sum(self.widening.widen(sensor, pass_, reading) for (sensor, pass_), reading in sorted(worst.items()))

    def mute(self, alarms: Iterable[Alarm]) -> int:
        """Hear no more of the exact checks that raised these, which every device raises: they are lost coverage.

        Returns how many were heard until now (`widening.count` sums them too). Raises TypeError when these are no
        alarms.
        """
        return sum(
            self.widening.mute(alarm.sensor, alarm.module, alarm.operation, alarm.pass_)
            for alarm in alarms_of(alarms)
            if alarm.exact
        )


def _device(model: nn.Module) -> torch.device:
    """Where the model computes; a guard may be made of one on the meta device, before it gets its memory."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))
