"""The queue of reports for the controller: survives the agent, never blocks it, and counts what it could not hold."""

import logging
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from agent import spool
from agent.spool import Entry, Spool

log = logging.getLogger(__name__)

#: Unacknowledged bytes in memory and on disk. A rank reports about 0.5 KiB a step, so 16 MiB for ordinary reports hold
#: three hours of a controller's absence at 3 steps a second, and the daemon stays below 120 MiB with all of it.
CAPACITY_BYTES = 24 << 20
#: Of these only urgent reports may have: about 15,000 of them, hundreds of incidents. Ordinary ones are thus always
#: refused first.
RESERVE_BYTES = 8 << 20
#: What an entry costs beside its payload (measured: the object, its integer and its slot in the queue).
ENTRY_BYTES = 256
#: A report must fit into one message with room for its frame; the controller's limit is 256 KiB.
REPORT_BYTES = 192 << 10


class Backlog:
    """Reports of one epoch that wait for their acknowledgement; by itself, what an earlier life of the agent left.

    Invariants: `acknowledged` only grows; every number in (acknowledged, last] is held unless the disk lost it.
    """

    def __init__(self, folder: Path, epoch: int, entries: Iterable[Entry] = ()) -> None:
        self.epoch = epoch
        self.acknowledged = 0
        self._folder = folder / str(epoch)
        self._entries = {entry.seq: entry for entry in entries}
        self._held = sum(map(_cost, self._entries.values()))
        self.last = max(self._entries, default=0)
        self.last_urgent = max((entry.seq for entry in self._entries.values() if entry.urgent), default=0)

    def pending(self, after: int, limit: int, max_bytes: int) -> list[Entry]:
        """The next entries behind number `after`: at most `limit`, and `max_bytes` of payload, but at least one."""
        found: list[Entry] = []
        size = 0
        for seq in range(max(after, self.acknowledged) + 1, self.last + 1):
            entry = self._entries.get(seq)
            if entry is None:
                continue
            size += len(entry.payload)
            if len(found) == limit or (found and size > max_bytes):
                break
            found.append(entry)
        return found

    def acknowledge(self, seq: int) -> None:
        """Forget everything up to `seq`: the controller has it on disk."""
        seq = min(seq, self.last)
        for number in range(self.acknowledged + 1, seq + 1):
            entry = self._entries.pop(number, None)
            if entry is not None:
                self._held -= _cost(entry)
        self.acknowledged = max(self.acknowledged, seq)

    @property
    def empty(self) -> bool:
        """Whether every report is acknowledged."""
        return not self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def discard(self) -> None:
        """Delete the files: nothing in them is needed."""
        shutil.rmtree(self._folder, ignore_errors=True)


class Outbox(Backlog):
    """The backlog of this life, numbered 1, 2, 3, ... without gaps: takes new reports and keeps them on disk too.

    `dropped_notice(count)` makes the encoded report that says so many were refused. Invariant: held bytes never exceed
    the capacity by more than one such notice.
    """

    def __init__(
        self,
        folder: Path,
        epoch: int,
        dropped_notice: Callable[[int], bytes],
        *,
        capacity: int = CAPACITY_BYTES,
        reserve: int = RESERVE_BYTES,
        fsync: Callable[[int], None] = os.fsync,
    ) -> None:
        super().__init__(folder, epoch)
        self.dropped = 0
        self._unsaid = 0
        self._notice = dropped_notice
        self._capacity = capacity
        self._reserve = reserve
        self._spool = Spool(self._folder, fsync)

    def append(self, payload: bytes, *, urgent: bool = False) -> int | None:
        """Queue an encoded report and return its number, or None if it had to be refused (which is counted)."""
        if self._unsaid and self._fits(0, urgent=False):
            count, self._unsaid = self._unsaid, 0
            self._put(self._notice(count), urgent=True)
        if len(payload) > REPORT_BYTES or not self._fits(len(payload), urgent=urgent):
            self.lose(1)
            return None
        return self._put(payload, urgent=urgent)

    def lose(self, count: int) -> None:
        """Count reports that were lost elsewhere, to be said with those refused here."""
        self.dropped += count
        self._unsaid += count

    def acknowledge(self, seq: int) -> None:
        """Forget everything up to `seq`, and give its disk space back by whole segments."""
        super().acknowledge(seq)
        self._spool.trim(self.acknowledged)

    def close(self) -> None:
        """Sync the files, and keep what is not acknowledged for the next life."""
        self._spool.close()
        if self.empty:
            self.discard()

    def _fits(self, size: int, *, urgent: bool) -> bool:
        limit = self._capacity if urgent else self._capacity - self._reserve
        return self._held + size + ENTRY_BYTES <= limit

    def _put(self, payload: bytes, *, urgent: bool) -> int:
        self.last += 1
        entry = Entry(self.last, urgent, payload)
        self._entries[entry.seq] = entry
        self._held += _cost(entry)
        if urgent:
            self.last_urgent = entry.seq
        try:
            self._spool.append(entry)
        except OSError as error:
            log.warning("report %d is held in memory only: %s", entry.seq, error)
        return entry.seq


def leftovers(folder: Path, before: int) -> list[Backlog]:
    """The backlogs of earlier epochs that still hold reports, oldest first; empty ones are cleared away."""
    found = []
    for epoch in sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdecimal()):
        if epoch < before:
            backlog = Backlog(folder, epoch, spool.read(folder / str(epoch)))
            if backlog.empty:
                backlog.discard()
            else:
                found.append(backlog)
    return found


def _cost(entry: Entry) -> int:
    return len(entry.payload) + ENTRY_BYTES
