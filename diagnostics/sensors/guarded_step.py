"""One step under a guard: puts the modes on for its forward and backward, and keeps what the sensors saw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from diagnostics.health import Alarm
from diagnostics.sensors.account import MUTED
from diagnostics.sensors.aside import standing
from diagnostics.sensors.checks.operation import Checked
from diagnostics.sensors.checks.rows import PER_DIFFERENCE
from diagnostics.sensors.checks.unjudged import SENSOR as FINITE
from diagnostics.sensors.checks.unjudged import parameter_readings, strays
from diagnostics.sensors.compiler import has_compiled
from diagnostics.sensors.coverage import NothingToCheck
from diagnostics.sensors.given import check_scalar, check_scalars, check_tensor
from diagnostics.sensors.inspection import Inspection
from diagnostics.sensors.observed import Observed
from diagnostics.sensors.places import UNNAMED, Place
from diagnostics.sensors.quiet import quiet
from diagnostics.sensors.regions import follow
from diagnostics.sensors.sampling import NOT_DRAWN
from diagnostics.sensors.saved import Saved
from diagnostics.sensors.statistics import Comparison, Statistic
from diagnostics.sensors.stopwatch import Stopwatch
from diagnostics.sensors.upkeep import CORRUPTED, Upkeep
from diagnostics.sensors.watch import Eyes, Keeper

if TYPE_CHECKING:
    from diagnostics.sensors.guard import Guard

KEPT = "kept"
COMPILED = "fused by torch.compile: only kernels that are called through aten, products among them, are seen"
HOOKLESS = "the model, or a part of it, is compiled: hooks for what autograd keeps would compile it anew"
ELSEWHERE = "it ran in a thread other than the one that entered the step, and was not seen"


class Seen(NamedTuple):
    """What a step's readings come to."""

    worst: float
    alarms: list[Alarm]
    evidence: Comparison
    checks: int


class GuardedStep:
    """What the sensors saw in one step. Reading any of clean, worst, alarms or evidence waits for the device once.

    Within its block they tell what was seen so far; afterwards the step is settled by the first that is asked, and
    giving it anything more raises RuntimeError, as does asking one whose block was never entered.
    """

    def __init__(self, guard: Guard, key: int) -> None:
        self._guard = guard
        self._key = key
        self._modes = ExitStack()
        self._eyes: Eyes | None = None
        self._clock = Stopwatch()
        self._watched = guard.enabled and guard.sampler.watches
        self._entered = self._left = False
        self._observed = Observed()
        self._settled: Seen | None = None
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
        if self._entered:
            raise RuntimeError("a step is entered once: make one for each, `with guard.step() as step:`")
        if guard.current is not self:
            raise RuntimeError("a later step of this guard was made: enter that one, `with guard.step() as step:`")
        self._entered = True
        if guard.enabled and guard.upkeep is not None:
            self._look_back(guard.upkeep)
        if self._watched:
            if self._inspection.all_seen:
                with quiet():
                    self._inspection.tried("parameters", self._ask_parameters)
            compiled = guard.compiled or has_compiled()
            guard.places.begin(self._modes, follow=not guard.compiled)
            self._eyes = self._modes.enter_context(Eyes(self._inspection))
            if guard.fingerprints:
                follow(self._modes)
            if not compiled:
                keeper = self._modes.enter_context(Keeper(self._eyes))
                keeper.follow(self._modes)
            if not guard.compiled:
                self._modes.enter_context(standing(Saved(self._inspection, self._eyes.formulas)))
            else:
                guard.account.note(UNNAMED, "saved tensors", HOOKLESS)
        if guard.sampler.budget is not None:
            self._clock.begin(guard.device)
        return self

    @property
    def under_way(self) -> bool:
        """Whether the step's block has been entered and not left."""
        return self._entered and not self._left

    @property
    def watched(self) -> bool:
        """Whether its operators are looked at; a budget may let the step run as if there were no guard."""
        return self._watched

    @property
    def device(self) -> torch.device:
        """Where the readings are kept: where the model is."""
        return self._guard.device

    def _ask_parameters(self) -> None:
        """One that is not finite was wrong before the step, and what it is read with would be excused by it."""
        readings = parameter_readings(self._guard.parameters(), self._guard.device)
        if not readings.is_cuda and not bool(readings.isnan().any()):
            return
        one = Checked(FINITE, "out", readings, tuple(readings.shape))
        self._inspection.account.asked += len(readings) > 0 and self._keep("<parameters>", "value", one)

    def _look_back(self, upkeep: Upkeep) -> None:
        """Where the optimizer was wrong, or the state is not what it wrote; also what earlier steps said of both."""
        for wrong in upkeep.found():
            one = Checked(wrong.sensor, "out", torch.full((1,), math.inf), wrong.shape, exact=True)
            self._keep(wrong.name, wrong.what, one)
        for operation, checked, reason in upkeep.looked():
            self._guard.account.count("<optimizer>", operation, "step", checked, reason)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        guard = self._guard
        self._clock.end()
        self.abandon()
        if not guard.enabled:
            return
        guard.account.step(self._watched)
        guard.spending.over(self._clock, self._watched, self.seconds, self.looking, self.operators)
        if not self._watched:
            return
        if has_compiled():
            guard.account.note("<compiled>", "fused kernels", COMPILED)
        for module in guard.places.elsewhere:
            guard.account.note(module, "forward", ELSEWHERE)
        if kind is None and not guard.account.checked and not self._heard() and not guard.failures:
            rows = guard.coverage()
            if all(NOT_DRAWN not in row.reason for row in rows):
                raise NothingToCheck.of(rows)

    def _heard(self) -> int:
        """Readings of checks, also those of what was given to `check_finite` and its like."""
        return len(self._guard.log) - self._inspection.account.asked

    def abandon(self) -> None:
        """Leave the step's context without an account: it was cut short."""
        self._left = True
        self._modes.close()
        self._inspection.end()

    @property
    def seconds(self) -> float:
        """What the step's checks took, the host's time."""
        return self._inspection.seconds

    @property
    def looking(self) -> float:
        """What it took beside to look at the operators, as far as it was timed (`outlay.watching`)."""
        return self._inspection.looking

    @property
    def operators(self) -> int:
        """How many operators were looked at, drawn or not."""
        return self._inspection.operators

    @property
    def skipped(self) -> dict[str, int]:
        """Calls that their check could not judge, by reason."""
        return self._inspection.account.skipped

    @property
    def failures(self) -> int:
        """Checks that failed themselves in this step; their calls are among those in `skipped`."""
        return self._inspection.account.failures

    @property
    def clean(self) -> bool:
        """True when no reading is `not (reading <= 1)`; with the guard disabled there are none."""
        return self.worst <= 1.0

    @property
    def worst(self) -> float:
        """The largest reading; NaN when one is NaN; 0.0 when there is none."""
        return self._seen().worst

    @property
    def alarms(self) -> list[Alarm]:
        """Every alarm, in the order the checks were made."""
        return self._seen().alarms

    @property
    def corrupted(self) -> bool:
        """Whether parameters or moments were wrong before the step began: dropping it does not help.

        Every later step says so until they are put right, see `Guard.forget`.
        """
        return any(alarm.sensor in CORRUPTED for alarm in self.alarms)

    @property
    def evidence(self) -> list[Statistic]:
        """What was observed, with its robust z: beside an alarm it is evidence, alone it is nothing."""
        return self._seen().evidence.all()

    def unusual(self, count: int) -> list[Statistic]:
        """The `count` scalars of `evidence` that are least like the steps before."""
        return self._seen().evidence.largest(count)

    @property
    def first_alarm(self) -> int | None:
        """The number, from 0, of the first check that alarmed; None when clean, and once the next step has begun."""
        current = self._guard.current is self
        return None if self.clean or not current else self._guard.log.first_alarm()

    @property
    def checks(self) -> int:
        """How many checks were made."""
        return self._settled.checks if self._settled is not None else self._heard()

    def observe(self, name: str, value: Tensor | float, remember: bool = True) -> None:
        """Remember a scalar (loss, gradient norm) for the statistics; alarm if it is not finite.

        Raises TypeError or ValueError when it is not one real number, RuntimeError after the step was asked.
        """
        check_scalar(name, value)
        self._open(name)
        tensor = torch.as_tensor(value, dtype=torch.float32, device=self._guard.device).detach().reshape(())
        if remember:
            self._observed.add((name,), tensor.reshape(1))
        self.check_finite(name, tensor)

    def observe_all(self, names: Sequence[str], values: Tensor | Sequence[float], least: float = 0.0) -> None:
        """Remember scalars [names] for the statistics alone: whatever they are, nothing alarms. No host sync.

        `least` is the smallest spread that they are measured by: what changes by less is not unusual. Raises
        ValueError unless there are as many values, in a row, as names; RuntimeError after the step was asked.
        """
        check_scalars(names, values)
        self._open(", ".join(names))
        self._observed.add(names, values, least)

    def _open(self, name: str) -> None:
        """What is given to a step after its verdict would not be part of it."""
        if self._settled is not None:
            raise RuntimeError(
                f"{name} comes after this step was asked whether it is clean, and would not be checked: give it to the "
                f"step before `step.clean`, `worst`, `alarms` or `evidence` is read"
            )

    def check_finite(self, name: str, tensor: Tensor) -> None:
        """Alarm if any element is not finite, of a complex one either part. One pass, no host sync on a GPU.

        Raises TypeError when it is no tensor, RuntimeError after the step was asked.
        """
        check_tensor(name, tensor)
        self._open(name)
        if not self._guard.enabled or tensor.numel() == 0:
            return

        def read() -> None:
            values = tensor.detach()
            self._keep(name, "value", Checked(FINITE, "out", strays(values), tuple(tensor.shape)))

        with quiet():
            self._inspection.tried(FINITE, read)

    def check_equal(self, name: str, tensor: Tensor, value: float) -> None:
        """Alarm if any element is not `value`: of what is kept beside the graph and must not change. No host sync.

        Raises TypeError when it is no tensor, RuntimeError after the step was asked.
        """
        check_tensor(name, tensor)
        self._open(name)
        if not self._guard.enabled:
            return

        def read() -> None:
            reading = (tensor.detach() != value).any().float().mul_(PER_DIFFERENCE)
            self._keep(name, "value", Checked(KEPT, "out", reading.reshape(1), tuple(tensor.shape), exact=True))

        with quiet():
            self._inspection.tried(KEPT, read)

    def _keep(self, name: str, what: str, one: Checked) -> bool:
        """A reading of something that no operator of the step made. False if its check is muted."""
        kept = self._inspection.account.keep(Place(name, "step"), what, one)
        if not kept:
            self._inspection.account.skip_count(MUTED)
        return kept

    def settle(self) -> Seen:
        """Read the device and keep what was seen; nothing more can be given to this step."""
        if self._settled is None:
            if self._eyes is not None:
                self._eyes.open = False
            self._settled = self._read()
        return self._settled

    def _seen(self) -> Seen:
        if not self._entered:
            raise RuntimeError(
                "this step was never entered, so nothing was checked: forward and backward belong inside "
                "`with guard.step() as step:`"
            )
        return self.settle() if self._left else self._read()

    def _read(self) -> Seen:
        log = self._guard.log
        with quiet():
            worst = log.worst()
            alarms = [] if worst <= 1.0 else log.alarms()
            evidence = self._observed.compared(self._guard.histories, self._key, self._guard.device)
            return Seen(worst, alarms, evidence, self._heard())
