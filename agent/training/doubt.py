"""What follows when ranks committed different states: back by one step, and afterwards whose state was wrong."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from agent.slots import SlotRecord
from agent.training.collective import Group
from agent.training.gate import Row
from agent.training.held import Member
from agent.training.recovery import Recovery
from agent.training.replay import Daemon
from agent.training.transaction import Altered
from diagnostics.verify.between import Changed, changed_ruling


@dataclass(frozen=True, slots=True)
class _Open:
    """A step in doubt: its digests by rank, what this rank's words hashed to, and which ranks are blamed already.

    `altered` are the slots of each rank that had the step before and no longer hash to it.
    """

    step: int
    digests: list[int]
    own: int
    trace: str
    blamed: tuple[int, ...]
    altered: tuple[Sequence[Altered], ...] = ()


class Doubt:
    """A step whose states differed, until its redo has shown which of them was wrong."""

    def __init__(
        self, job: str, generation: int, group: Group, members: Sequence[Member], recovery: Recovery, daemon: Daemon
    ) -> None:
        self._job = job
        self._generation = generation
        self._group = group
        self._members = [(member.node, member.device) for member in members]
        self._recovery = recovery
        self._daemon = daemon
        self._open: _Open | None = None
        self._times: Counter[int] = Counter()

    @property
    def trace(self) -> str | None:
        """The trace that the redo belongs to; None when nothing is in doubt."""
        return self._open.trace if self._open else None

    def times(self, step: int) -> int:
        """How often the states of `step` have differed, this time included once `roll_back` was called."""
        return self._times[step]

    def roll_back(self, record: SlotRecord, rows: Sequence[Row], own: int, trace: str) -> None:
        """Go back one step, on bits that still hash to their record; `own` is the digest of this rank's doubtful words.

        Whose memory changed is plain before, and is said before: there may be nothing to go back to. Raises StateLost,
        PeerLost.
        """
        step = record.step
        self._times[step] += 1
        opened = _Open(step, [row.digest for row in rows], own, trace, _changed(rows))
        with self._daemon.span("roll_back", trace, step=step):
            if opened.blamed:
                hashes = self._group.gather_objects((record.own, own))
                for rank in opened.blamed:
                    ruling = changed_ruling(Changed(rank, "state", *hashes[rank]), self._members)
                    self._report(step, dict(enumerate(opened.digests)), opened.blamed, rank, ruling.reason)
            altered: list[Sequence[Altered]] = []
            self._recovery.roll_back(altered.extend)
        self._open = replace(opened, altered=tuple(altered))

    def altered(self, found: Sequence[Sequence[Altered]]) -> None:
        """Report each rank whose memory changed since it committed; every rank calls it.

        Of the slots of one rank it is the newest: what changed both was one fault.
        """
        newest = {rank: max(slots, key=lambda one: one.record.step) for rank, slots in enumerate(found) if slots}
        for step in {one.record.step for one in newest.values()}:
            self._times[step] += 1
        for rank, one in newest.items():
            ruling = changed_ruling(Changed(rank, "state", one.record.own, one.now), self._members)
            reason = f"{ruling.reason}, when a state was looked for to go on from"
            self._report(one.record.step, {rank: one.record.digest}, list(newest), rank, reason)

    def settle(self, record: SlotRecord) -> None:
        """After the redo it is plain whose words were other ones: a rank that was right reports it. Raises PeerLost.

        What they were made of may have changed in memory: of a rank whose words were right that is told beside.
        """
        if self._open is None or self._open.step != record.step:
            return
        opened, self._open = self._open, None
        flags = self._group.gather([int(opened.own != record.own)])
        wrong = [rank for rank, (differs,) in enumerate(flags) if differs]
        self.altered([[] if rank in wrong else slots for rank, slots in enumerate(opened.altered)])
        news = [rank for rank in wrong if rank not in opened.blamed]
        if opened.blamed and not news:
            return
        reason = f"step {opened.step} was redone from step {opened.step - 1}; the redo gave {record.digest:016x}"
        self._report(opened.step, dict(enumerate(opened.digests)), wrong, news[0] if len(news) == 1 else -1, reason)

    def _report(self, step: int, digests: Mapping[int, int], wrong: Sequence[int], blamed: int, reason: str) -> None:
        """One rank speaks, which is none of the `wrong` ones if there is another."""
        if self._group.rank != next((r for r in range(self._group.world) if r not in wrong), 0):
            return
        self._daemon.report(
            "digest_disagreement",
            {
                "job": self._job,
                "generation": self._generation,
                "step": step,
                "digests": {rank: f"{value:016x}" for rank, value in digests.items()},
                "blamed_rank": blamed,
                "reason": reason,
                "times": self._times[step],
            },
            urgent=True,
        )


def _changed(rows: Sequence[Row]) -> tuple[int, ...]:
    return tuple(rank for rank, row in enumerate(rows) if not row.intact)
