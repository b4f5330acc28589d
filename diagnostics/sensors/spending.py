"""What a guard's steps and their checks take, told to its sampler."""

from __future__ import annotations

from typing import NamedTuple

from diagnostics.sensors.outlay import watching
from diagnostics.sensors.sampling import Sampler
from diagnostics.sensors.stopwatch import Stopwatch
from diagnostics.sensors.upkeep import Upkeep

# A step's time counts 0.9 of the one after it in the mean over unwatched steps.
_KEEPS = 0.9
# Of a watched step on a device, what its checks are taken for until an unwatched one has shown it.
_GUESSED = 0.75


class _Step(NamedTuple):
    """One that is over on the host. checks_s, looking_s: the host's time for its checks, and for watching `operators`,
    as far as it was timed."""

    clock: Stopwatch
    watched: bool
    checks_s: float
    looking_s: float
    operators: int


class Spending:
    """Of one guard; without a budget nothing is taken note of.

    While every step is watched the host's clock tells what checks take, and the rest of the step is its own. Where
    steps are drawn a watched one is compared with the others. A device's steps are known when it is through with them,
    and their checks in no other way: there steps are drawn, never calls. The first step is not taken for any other: it
    asks for memory, and on a GPU compiles the kernels of its checks for seconds.
    """

    def __init__(self, sampler: Sampler, upkeep: Upkeep | None) -> None:
        self._sampler = sampler
        self._upkeep = upkeep
        self._over: list[_Step] = []
        self._plain_s: float | None = None  # of an unwatched step
        self._cold = True  # no step was watched yet

    def over(self, clock: Stopwatch, watched: bool, checks_s: float, looking_s: float, operators: int) -> None:
        """A step's forward and backward are over."""
        if self._sampler.budget is None:
            self._aside()
            return
        self._over.append(_Step(clock, watched, checks_s, looking_s, operators))
        self.settle()
        self._sampler.over()

    def settle(self) -> None:
        """Tell of the steps that their device is through with by now."""
        while self._over and self._over[0].clock.through:
            self._tell(self._over.pop(0))

    def _tell(self, step: _Step) -> None:
        on_device = step.clock.launched
        took = step.clock.taken()
        if not step.watched:
            self._plain_s = took if self._plain_s is None else _KEEPS * self._plain_s + (1 - _KEEPS) * took
            return
        checks, looking, aside = step.checks_s, watching(step.looking_s, step.operators), self._aside()
        if self._cold:
            self._cold = False
            return
        if on_device or (self._plain_s is not None and self._sampler.period > 1):
            longer = _GUESSED * took if self._plain_s is None else max(0.0, took - self._plain_s)
            looking = min(looking, longer)
            checks = longer - looking
        self._sampler.spent(checks + aside, took + aside, looking, whole=on_device)

    def _aside(self) -> float:
        """What the optimizer's checks took since this was asked last."""
        return 0.0 if self._upkeep is None else self._upkeep.spent()
