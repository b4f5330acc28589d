"""Compares the digests that all ranks reported for a step: equal ones make it final, others are a disagreement.

The commit gate compares them first, inside the gang; this is the second line of defence, outside of it.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass, field

from controller.store.reports import StepRecord

# Final steps that are remembered, to answer when core asks for one that came before its question (a checkpoint's
# capture is reported up to a batch, 5 s, after its step; the fastest preset makes about 10 steps a second).
RECENT = 64
# Steps that may wait for a rank's report. A rank that lags further has lost its reports: the oldest are given up.
PENDING = 4096


@dataclass(frozen=True, slots=True)
class Final:
    """A step that every rank committed with one digest. `loss` is the mean over ranks, NaN if none was finite."""

    job: str
    generation: int
    step: int
    digest: str
    chain: str
    loss: float
    time: float


@dataclass(frozen=True, slots=True)
class Disagreement:
    """A step that ranks committed with different digests, by rank."""

    job: str
    generation: int
    step: int
    digests: dict[int, str]
    time: float


@dataclass(slots=True)
class _Window:
    """One job's newest generation. Invariant: a step is in `pending` or in `recent`, or in neither."""

    generation: int
    pending: OrderedDict[int, dict[int, StepRecord]] = field(default_factory=OrderedDict)
    recent: OrderedDict[int, Final] = field(default_factory=OrderedDict)
    disagreed: set[int] = field(default_factory=set)


class Finals:
    """The windows of all jobs. Reports of older generations than the newest seen are ignored."""

    def __init__(self) -> None:
        """Start empty."""
        self._windows: dict[str, _Window] = {}

    def add(self, job: str, generation: int, world: int, rank: int, record: StepRecord) -> Final | Disagreement | None:
        """Take one rank's record; say whether it made its step final, or showed a disagreement (once a step)."""
        window = self._windows.get(job)
        if window is None or generation > window.generation:
            window = self._windows[job] = _Window(generation)
        if generation < window.generation or record.step in window.recent:
            return None
        ranks = window.pending.setdefault(record.step, {})
        ranks[rank] = record
        if len(window.pending) > PENDING:
            window.pending.popitem(last=False)
        if len({entry.digest for entry in ranks.values()}) > 1:
            return self._disagree(window, job, record.step, ranks)
        if len(ranks) < world:
            return None
        return self._close(window, job, record.step, ranks)

    def recent(self, job: str, generation: int, step: int) -> Final | None:
        """Give a step that became final a short while ago."""
        window = self._windows.get(job)
        return window.recent.get(step) if window is not None and window.generation == generation else None

    def forget(self, job: str) -> None:
        """Drop a job that has ended."""
        self._windows.pop(job, None)

    @staticmethod
    def _disagree(window: _Window, job: str, step: int, ranks: dict[int, StepRecord]) -> Disagreement | None:
        if step in window.disagreed:
            return None
        window.disagreed.add(step)
        digests = {rank: entry.digest for rank, entry in sorted(ranks.items())}
        return Disagreement(job, window.generation, step, digests, max(entry.time for entry in ranks.values()))

    @staticmethod
    def _close(window: _Window, job: str, step: int, ranks: dict[int, StepRecord]) -> Final:
        del window.pending[step]
        window.disagreed.discard(step)
        entries = [ranks[rank] for rank in sorted(ranks)]
        losses = [entry.loss for entry in entries if math.isfinite(entry.loss)]
        final = Final(
            job,
            window.generation,
            step,
            entries[0].digest,
            entries[0].chain,
            sum(losses) / len(losses) if losses else math.nan,
            max(entry.time for entry in entries),
        )
        window.recent[step] = final
        if len(window.recent) > RECENT:
            window.recent.popitem(last=False)
        return final
