"""Attaches the sensors to a torch module: every operator of a step is looked at, and no number is changed."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from itertools import islice
from types import TracebackType

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from diagnostics.health import Alarm
from diagnostics.sensors.aside import standing
from diagnostics.sensors.coverage import Coverage, CoverageRow
from diagnostics.sensors.inspection import Inspection
from diagnostics.sensors.outlay import seconds_an_operator
from diagnostics.sensors.places import Places
from diagnostics.sensors.quiet import quiet
from diagnostics.sensors.readings import ReadingLog, Site
from diagnostics.sensors.regions import follow
from diagnostics.sensors.rows import PER_DIFFERENCE
from diagnostics.sensors.sampling import NOT_DRAWN, Sampler
from diagnostics.sensors.saved import Saved
from diagnostics.sensors.statistics import Comparison, Histories, Statistic
from diagnostics.sensors.tolerance import ToleranceTable, Widening, shipped_table
from diagnostics.sensors.upkeep import Upkeep
from diagnostics.sensors.watch import CompiledEyes, Eyes, Keeper, has_compiled

FINITE, KEPT = "finite", "kept"
_COMPILED = "fused by torch.compile: only kernels that are called through aten, products among them, are seen"


class NothingToCheck(RuntimeError):
    """A guarded step ran no operator that any check covers; the message says what ran and why it was not checked."""


class Guard:
    """Guards an ordinary torch module, its forward and its backward, whatever functions they are written with.

    The native kernels run untouched, and a dispatch mode looks at what each was given and what it gave: guarded and
    unguarded steps are bit-equal, under autocast and either kind of activation checkpointing as well. Kernels that no
    mode can see are guarded when they are announced. One step at a time; the step before is settled when the next
    begins.

    Args:
        model: the module.
        optimizer: what updates it. With it one parameter's update a step is repeated and compared, and parameters and
            moments must be, when the next guarded step begins, what the update left: else that step has an alarm.
        budget: the checks' share of a step's other time, e.g. 0.01, those of the optimizer and the watching of every
            operator included; calls, updates and tensors at rest are sampled to keep it. None: no limit.
        again: share of the calls of operators without an identity (element-wise work, moves) that are run once more,
            and of the tensors kept for the backward that are hashed.
        tolerance_scale: what every shipped tolerance is multiplied by; what is compared bit for bit has none.
        enabled: False makes every step a plain one.
        table: tolerances in place of the shipped ones.
        fingerprints: whether what activation checkpointing makes again is compared with what the forward made.

    Raises:
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
        if not 0 <= again <= 1:
            raise ValueError(f"again is {again}, must be a share in 0..1")
        self.enabled = enabled
        self.again = again
        self.fingerprints = fingerprints
        self.places = Places(model)
        self.compiled = any(_is_compiled(module) for module in model.modules())
        self.table = table or shipped_table()
        self.widening = Widening(tolerance_scale)
        self.sampler = Sampler(budget)
        self.upkeep = Upkeep(model, optimizer, self.sampler) if optimizer is not None and enabled else None
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.log = ReadingLog(self.device)
        self.histories = Histories()
        self.current: GuardedStep | None = None
        self.account = Coverage()
        self._failures = 0  # of the checks of all steps but the current one
        self._steps = 0
        if self.compiled:
            self.account.note("<compiled>", "fused kernels", _COMPILED)

    def step(self, key: int | None = None) -> GuardedStep:
        """One step's forward and backward, as a context manager. The same key draws the same signs.

        Without a key steps are numbered. The context raises NothingToCheck at its end when no operator of any step so
        far was covered by a check.
        """
        if self.current is not None:
            self.current.settle()
            self._failures += self.current.failures
        self.log.clear()
        self._steps += 1
        self.current = GuardedStep(self, self._steps if key is None else key)
        return self.current

    @property
    def failures(self) -> int:
        """Checks that failed themselves, in all steps so far: their calls are not covered, and training goes on."""
        current = 0 if self.current is None else self.current.failures
        return self._failures + current + (0 if self.upkeep is None else self.upkeep.failures)

    def coverage(self) -> list[CoverageRow]:
        """What was checked in all steps so far, by place, operator and pass, and why the rest was not."""
        return self.account.rows()

    def forget(self) -> None:
        """Parameters were changed on purpose outside the optimizer: what was known of the state at rest is dropped.

        Loading a state dict into the model or the optimizer does this by itself.
        """
        if self.upkeep is not None:
            self.upkeep.forget()

    def check_finite(self, name: str, tensor: Tensor) -> None:
        """Alarm in the current step if any element is not finite. One pass, no host sync; no step, no check."""
        if self.current is not None:
            self.current.check_finite(name, tensor)

    def check_equal(self, name: str, tensor: Tensor, value: float) -> None:
        """Alarm in the current step if any element is not `value`. No host sync; no step, no check."""
        if self.current is not None:
            self.current.check_equal(name, tensor, value)

    def recalibrate(self, alarms: Iterable[Alarm]) -> int:
        """Widen what raised these false alarms to twice the reading, at most WIDEST times the shipped tolerance.

        All sites of the same sensor and pass are widened. Returns how many tolerances changed (`widening.count` sums
        them). Alarms that are exact or not finite widen nothing: no tolerance could have admitted them.
        """
        worst: dict[tuple[str, str], float] = {}
        for alarm in alarms:
            key = (alarm.sensor, alarm.pass_)
            if math.isfinite(alarm.reading) and not alarm.exact:
                worst[key] = max(worst.get(key, 0.0), alarm.reading)
        return sum(self.widening.widen(sensor, pass_, reading) for (sensor, pass_), reading in sorted(worst.items()))


class GuardedStep:
    """What the sensors saw in one step. Reading any of clean, worst, alarms or evidence waits for the device once."""

    def __init__(self, guard: Guard, key: int) -> None:
        self._guard = guard
        self._key = key
        self._modes = ExitStack()
        self._eyes: Eyes | None = None
        self._begun = 0.0
        self._scalars: list[tuple[Sequence[str], Tensor | Sequence[float], float]] = []
        self._settled: tuple[float, list[Alarm], Comparison, int] | None = None
        self._inspection = Inspection(
            key,
            guard.places,
            guard.log,
            guard.account,
            guard.sampler,
            guard.table,
            guard.widening,
            guard.device,
            guard.again,
            guard.fingerprints,
        )

    def __enter__(self) -> GuardedStep:
        guard = self._guard
        if guard.enabled:
            if guard.upkeep is not None:
                self._look_back(guard.upkeep)
            guard.places.begin(self._modes, follow=not guard.compiled)
            kind = CompiledEyes if guard.compiled or has_compiled() else Eyes
            self._eyes = self._modes.enter_context(kind(self._inspection))
            if guard.fingerprints:
                follow(self._modes)
            if not guard.compiled:
                self._modes.enter_context(Keeper(self._eyes))
                self._modes.enter_context(standing(Saved(self._inspection)))
            self._begun = time.perf_counter()
        return self

    def _look_back(self, upkeep: Upkeep) -> None:
        """What the optimizer did since the last step, and whether the state is still what it wrote."""
        for site in upkeep.found():
            self._guard.log.append(site, torch.full((1,), math.inf))
        for operation, checked, reason in upkeep.looked():
            self._guard.account.count("<optimizer>", operation, "step", checked, reason)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        took = time.perf_counter() - self._begun
        self._modes.close()
        self._inspection.end()
        guard = self._guard
        if not guard.enabled:
            return
        self._account_for(took)
        if kind is None and not guard.account.checked and not len(guard.log) and not guard.failures:
            rows = guard.coverage()
            if all(row.reason != NOT_DRAWN for row in rows):
                raise NothingToCheck(_nothing(rows))

    def _account_for(self, took: float) -> None:
        """Tell the sampler what forward and backward took, and the checks in them and since the step before."""
        guard, eyes = self._guard, self._eyes
        if guard.sampler.budget is None or eyes is None:
            return
        aside = 0.0 if guard.upkeep is None else guard.upkeep.spent()
        watching = self._inspection.operators * seconds_an_operator(isinstance(eyes, CompiledEyes))
        guard.sampler.spent(self._inspection.seconds + aside, took + aside, watching)

    def abandon(self) -> None:
        """Leave the step's context without an account: it was cut short."""
        self._modes.close()
        self._inspection.end()

    @property
    def seconds(self) -> float:
        """What the step's checks took, the host's time."""
        return self._inspection.seconds

    @property
    def operators(self) -> int:
        """How many operators were looked at, drawn or not."""
        return self._inspection.operators

    @property
    def skipped(self) -> dict[str, int]:
        """Calls that their check could not judge, by reason."""
        return self._inspection.skipped

    @property
    def failures(self) -> int:
        """Checks that failed themselves in this step; their calls are among those in `skipped`."""
        return self._inspection.failures

    @property
    def clean(self) -> bool:
        """True when no reading is `not (reading <= 1)`; with the guard disabled there are none."""
        return self.worst <= 1.0

    @property
    def worst(self) -> float:
        """The largest reading; NaN when one is NaN; 0.0 when there is none."""
        return self.settle()[0]

    @property
    def alarms(self) -> list[Alarm]:
        """Every alarm, in the order the checks were made."""
        return self.settle()[1]

    @property
    def evidence(self) -> list[Statistic]:
        """What was observed, with its robust z: beside an alarm it is evidence, alone it is nothing."""
        return self.settle()[2].all()

    def unusual(self, count: int) -> list[Statistic]:
        """The `count` scalars of `evidence` that are least like the steps before."""
        return self.settle()[2].largest(count)

    @property
    def first_alarm(self) -> int | None:
        """The number, from 0, of the first check that alarmed; None when clean, and once the next step has begun."""
        current = self._guard.current is self
        return None if self.clean or not current else self._guard.log.first_alarm()

    @property
    def checks(self) -> int:
        """How many checks were made."""
        return self._settled[3] if self._settled is not None else len(self._guard.log)

    def observe(self, name: str, value: Tensor | float, remember: bool = True) -> None:
        """Remember a scalar (loss, gradient norm) for the statistics; alarm if it is not finite."""
        tensor = torch.as_tensor(value, dtype=torch.float32, device=self._guard.device).detach()
        if remember:
            self._scalars.append(((name,), tensor.reshape(1), 0.0))
        self.check_finite(name, tensor)

    def observe_all(self, names: Sequence[str], values: Tensor | Sequence[float], least: float = 0.0) -> None:
        """Remember scalars [names] for the statistics alone: whatever they are, nothing alarms. No host sync.

        `least` is the smallest spread that they are measured by: what changes by less is not unusual.
        """
        self._scalars.append((names, values, least))

    def check_finite(self, name: str, tensor: Tensor) -> None:
        """Alarm if any element is not finite. One pass over the tensor, no host sync."""
        if not self._guard.enabled or self._settled is not None or tensor.numel() == 0:
            return

        def read() -> None:
            low, high = torch.aminmax(tensor.detach())
            reading = (low * 0 + high * 0).float()  # 0 if finite, NaN if not: inf * 0 and NaN * 0 are NaN
            site = Site(FINITE, name, "value", "step", tuple(tensor.shape))
            self._guard.log.append(site, reading.reshape(1))

        with quiet():
            self._inspection.tried(FINITE, read)

    def check_equal(self, name: str, tensor: Tensor, value: float) -> None:
        """Alarm if any element is not `value`: of what is kept beside the graph and must not change. No host sync."""
        if not self._guard.enabled or self._settled is not None:
            return

        def read() -> None:
            reading = (tensor.detach() != value).any().float().mul_(PER_DIFFERENCE)
            site = Site(KEPT, name, "value", "step", tuple(tensor.shape), exact=True)
            self._guard.log.append(site, reading.reshape(1))

        with quiet():
            self._inspection.tried(KEPT, read)

    def settle(self) -> tuple[float, list[Alarm], Comparison, int]:
        """Read the device and keep what was seen; later readings of this step are ignored."""
        if self._settled is None:
            log = self._guard.log
            if self._eyes is not None:
                self._eyes.open = False
            worst = log.worst()
            alarms = [] if worst <= 1.0 else log.alarms()
            self._settled = (worst, alarms, self._statistics(), len(log))
        return self._settled

    def _statistics(self) -> Comparison:
        """All scalars that lie on the device come over in one tensor."""
        there = [
            value.detach().float().to(self._guard.device) for _, value, _ in self._scalars if isinstance(value, Tensor)
        ]
        over = iter(torch.cat(there).tolist() if there else ())
        found: dict[str, tuple[float, float]] = {}
        for names, value, least in self._scalars:
            values = islice(over, len(names)) if isinstance(value, Tensor) else value
            found.update((name, (one, least)) for name, one in zip(names, values, strict=True))
        table = np.array([*found.values()]).reshape(-1, 2)
        return self._guard.histories.add(self._key, tuple(found), table[:, 0], table[:, 1])


def _is_compiled(module: nn.Module) -> bool:
    """Without importing the compiler, which takes seconds."""
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None


def _nothing(rows: list[CoverageRow]) -> str:
    if not rows:
        return "the guarded step ran no operator: forward and backward belong inside `with guard.step()`"
    reasons = "; ".join(sorted({f"{row.operation}: {row.reason}" for row in rows}))
    return f"nothing in the guarded step can be checked: {reasons}"
