"""Shows a step's checkpointed regions to the fingerprints: what is drawn there, and what that covers."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

from diagnostics.sensors import fingerprints
from diagnostics.sensors.account import MUTED, Account
from diagnostics.sensors.announced import inside_announced
from diagnostics.sensors.checks.operation import Call, Checked
from diagnostics.sensors.checks.registry import Plan
from diagnostics.sensors.fingerprints import UNMATCHED, Fingerprints
from diagnostics.sensors.places import Place
from diagnostics.sensors.quiet import quiet
from diagnostics.sensors.regions import inside
from diagnostics.sensors.sampling import Sampler


class Recomputation:
    """Of one step. again: the share of operators without an identity that are run again anyway."""

    def __init__(self, key: int, account: Account, sampler: Sampler, again: float) -> None:
        self.seconds = 0.0  # that it took
        self._key = key
        self._account = account
        self._sampler = sampler
        self._again = again
        self._prints: Fingerprints | None = Fingerprints()

    def saw(self, plan: Plan | None, call: Call, number: int, place: Place, covered: bool) -> None:
        """In a checkpointed region, keep what the operator made, or compare it; outside, hear of what it wrote to.

        plan: None of what no check wants. number: of the call. covered: whether a check has judged it.
        """
        if not inside() or (plan is None and inside_announced()):
            self._tried(lambda prints: prints.changed(call))
        elif plan is None:
            self._tried(lambda prints: prints.appeared(call))
        else:
            self._tried(lambda prints: self._look(prints, plan, call, number, place, covered))

    def announced(self, out: Tensor) -> None:
        """A kernel that nobody sees has made this."""
        if self._prints is not None and inside():
            self._tried(lambda prints: prints.given(out))

    def end(self) -> None:
        """The step is over: let go of its tensors."""
        if self._prints is not None:
            self._prints.clear()

    def _tried(self, work: Callable[[Fingerprints], None]) -> None:
        """Once the fingerprints have failed they are out of step with what ran, and of no use until the next step."""
        begin, prints, self._prints = time.perf_counter(), self._prints, None

        def kept_on() -> None:
            assert prints is not None
            work(prints)
            self._prints = prints

        if prints is not None:
            with quiet():
                self._account.tried(fingerprints.SENSOR, kept_on)
        self.seconds += time.perf_counter() - begin

    def _look(self, prints: Fingerprints, plan: Plan, call: Call, number: int, place: Place, covered: bool) -> None:
        """What is run again anyway, every time, needs no fingerprint."""
        whole = self._sampler.share >= 1
        twice = plan.again and plan.check is not None and whole and self._again >= 1

        def drawn() -> bool:
            return not twice and self._sampler.draws(self._key, number)

        found = prints.look(call, place, covered, drawn, whole)
        if found is None:
            return
        record, compared = found
        if record is None:
            self._account.skip_count(UNMATCHED)
            return
        heard = 0
        for one in compared:
            checked = Checked(fingerprints.SENSOR, one.result, one.reading, one.shape, exact=True)
            heard += self._account.keep(record.place, plan.name, checked)
        if compared and not heard:
            self._account.skip_count(MUTED)
            return
        if compared and not record.covered:
            record.covered = True
            self._account.credit(record.place, plan.name)
        if compared and not covered:
            self._account.credit(place, plan.name)
