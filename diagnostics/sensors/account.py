"""What a step's checks found and covered, by place: readings, coverage, calls that no check could judge, failures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diagnostics.sensors.checks.operation import Checked
from diagnostics.sensors.coverage import Coverage, broken
from diagnostics.sensors.places import FPROP, UNNAMED, Place
from diagnostics.sensors.readings import ReadingLog, Site
from diagnostics.sensors.tolerance import Widening

MUTED = "muted: its exact check alarms on every device alike"


class Account:
    """Of one step; log, coverage and widening are its guard's."""

    def __init__(self, log: ReadingLog, coverage: Coverage, widening: Widening) -> None:
        self.coverage = coverage
        self.skipped: dict[str, int] = {}  # calls that their check could not judge, by reason
        self.failures = 0  # checks that failed themselves
        self.asked = 0  # readings that are no check's: whether what none judges is finite
        self._log = log
        self._widening = widening

    def tried(self, operation: str, work: Callable[[], Any], place: Place | None = None, failed: Any = None) -> Any:
        """A sensor's own fault, whatever it is, must not stop the training: it is counted, and its call not covered.

        place: of the call; None if it has none. failed: what comes back then.
        """
        try:
            return work()
        except Exception as error:  # noqa: BLE001 - see above
            self.failures += 1
            self.skip(place or Place(UNNAMED, FPROP), operation, broken(error))
            return failed

    def keep(self, place: Place, operation: str, one: Checked) -> bool:
        """Readings, over what a false alarm has widened their tolerance to. False if the check is muted."""
        what = operation if one.result == "out" else f"{operation}.{one.result}"
        if one.exact and self._widening.is_muted(one.sensor, place.module, what, place.pass_):
            return False
        factor = 1.0 if one.exact else self._widening.factor(one.sensor, place.pass_)
        readings = one.readings if factor == 1.0 else one.readings / factor
        self._log.append(Site(one.sensor, place.module, what, place.pass_, one.shape, one.exact), readings)
        return True

    def judged(self, place: Place, operation: str, one: Checked) -> None:
        """A check has judged one call, by these readings alone; it is lost coverage where the check is muted."""
        if self.keep(place, operation, one):
            self.covered(place, operation)
        else:
            self.skip(place, operation, MUTED)

    def covered(self, place: Place, operation: str) -> None:
        """A check has judged one call."""
        self.coverage.count(place.module, operation, place.pass_, True)

    def passed(self, place: Place, operation: str, reason: str) -> None:
        """No check has looked at one call."""
        self.coverage.count(place.module, operation, place.pass_, False, reason)

    def skip(self, place: Place, operation: str, reason: str) -> None:
        """A check has looked at one call, and could not judge it."""
        self.skip_count(reason)
        self.passed(place, operation, reason)

    def skip_count(self, reason: str) -> None:
        """The same of a call that is counted elsewhere."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1

    def credit(self, place: Place, operation: str) -> None:
        """A call that was passed has been judged after all."""
        self.coverage.credit(place.module, operation, place.pass_)
