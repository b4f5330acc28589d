"""What follows when ranks committed different states: back by one step, and afterwards whose state was wrong."""

from collections import Counter
from collections.abc import Sequence

from agent.slots import SlotRecord
from agent.training.collective import Group
from agent.training.gate import Row
from agent.training.recovery import Recovery
from agent.training.replay import Daemon


class Doubt:
    """A step whose states differed, until its redo has shown which of them was wrong."""

    def __init__(self, job: str, generation: int, group: Group, recovery: Recovery, daemon: Daemon) -> None:
        self._job = job
        self._generation = generation
        self._group = group
        self._recovery = recovery
        self._daemon = daemon
        self._open: tuple[int, list[int], int, str] | None = None
        self._times: Counter[int] = Counter()

    @property
    def trace(self) -> str | None:
        """The trace that the redo belongs to; None when nothing is in doubt."""
        return self._open[3] if self._open else None

    def times(self, step: int) -> int:
        """How often the states of `step` have differed, this time included once `roll_back` was called."""
        return self._times[step]

    def roll_back(self, step: int, rows: Sequence[Row], own: int, trace: str) -> None:
        """Go back one step, on bits that still hash to their record; `own` is the digest of this rank's doubtful words.

        Raises StateLost, PeerLost.
        """
        self._times[step] += 1
        with self._daemon.span("roll_back", trace, step=step):
            self._recovery.roll_back()
        self._open = (step, [row.digest for row in rows], own, trace)

    def settle(self, record: SlotRecord) -> None:
        """After the redo it is plain whose words were other ones: a rank that was right reports it. Raises PeerLost."""
        if self._open is None or self._open[0] != record.step:
            return
        step, digests, own, _ = self._open
        self._open = None
        flags = self._group.gather([int(own != record.own)])
        wrong = [rank for rank, (differs,) in enumerate(flags) if differs]
        if self._group.rank != next((r for r in range(self._group.world) if r not in wrong), 0):
            return
        self._daemon.report(
            "digest_disagreement",
            {
                "job": self._job,
                "generation": self._generation,
                "step": step,
                "digests": {rank: f"{value:016x}" for rank, value in enumerate(digests)},
                "blamed_rank": wrong[0] if len(wrong) == 1 else -1,
                "reason": f"step {step} was redone from step {step - 1}; the redo gave {record.digest:016x}",
                "times": self._times[step],
            },
            urgent=True,
        )
