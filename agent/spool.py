"""The files under the outbox: records appended without waiting for the disk, synced in the background, trimmed whole.

A segment is a sequence of records: length, CRC-32, sequence number, flags, payload. What a crash tears off the end is
recognised by its CRC and left out on reading.
"""

import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_HEADER = struct.Struct("<IIQB")  # payload length, CRC-32 of what follows it, seq, flags
_TAIL = struct.Struct("<QB")  # the part of the header that the CRC covers
_URGENT = 1
#: A segment is deleted once all of it is acknowledged: large enough for few files, small enough to give space back.
SEGMENT_BYTES = 1 << 20
#: Ordinary reports may lose so much to a power failure (not to a crash of the agent: what is written survives that).
SYNC_PERIOD_S = 1.0


@dataclass(frozen=True, slots=True)
class Entry:
    """One report in the queue, encoded, with its place in it."""

    seq: int
    urgent: bool
    payload: bytes


@dataclass(slots=True)
class _Segment:
    path: Path
    last: int  # Invariant: grows from segment to segment.


class Spool:
    """Append-only segments in `folder`. Used from one thread; syncing has its own."""

    def __init__(self, folder: Path, fsync: Callable[[int], None] = os.fsync) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._segments: list[_Segment] = []
        self._file: int | None = None
        self._written = 0
        self._syncer = _Syncer(fsync)

    def append(self, entry: Entry) -> None:
        """Hand the record to the system, where a crash of this process cannot lose it. Raises OSError (disk full)."""
        if self._file is None:
            self._rotate(entry.seq)
        assert self._file is not None
        record = encode(entry)
        try:
            complete = os.write(self._file, record) == len(record)
        except OSError:
            self._abandon()
            raise
        if not complete:
            self._abandon()
            raise OSError(f"no room for {len(record)} bytes in {self._folder}")
        self._segments[-1].last = entry.seq
        self._written += len(record)
        self._syncer.dirty(self._file, at_once=entry.urgent)
        if self._written >= SEGMENT_BYTES:
            self._abandon()

    def trim(self, seq: int) -> None:
        """Delete the segments that hold nothing after `seq`; the one being written stays."""
        while self._segments and self._segments[0].last <= seq:
            if len(self._segments) == 1 and self._file is not None:
                break
            self._segments.pop(0).path.unlink(missing_ok=True)

    def close(self) -> None:
        """Sync what is written and stop the syncing thread."""
        self._abandon()
        self._syncer.close()

    def _rotate(self, seq: int) -> None:
        path = self._folder / f"{seq:020d}.log"
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._segments.append(_Segment(path, seq))
        self._written = 0

    def _abandon(self) -> None:
        """Write no more to the current segment: it is full, or ends in a torn record that nothing may follow."""
        if self._file is not None:
            self._syncer.retire(self._file)
            self._file = None


class _Syncer:
    """Calls fsync in a thread of its own: soon for urgent records, within a period for others."""

    def __init__(self, fsync: Callable[[int], None]) -> None:
        self._fsync = fsync
        self._changed = threading.Condition()
        self._dirty: set[int] = set()
        self._retired: list[int] = []
        self._urgent = False
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="outbox-sync", daemon=True)
        self._thread.start()

    def dirty(self, file: int, *, at_once: bool) -> None:
        with self._changed:
            first = not self._dirty
            self._dirty.add(file)
            self._urgent = self._urgent or at_once
            if first or at_once:
                self._changed.notify()

    def retire(self, file: int) -> None:
        """Take over `file`: sync it and close it."""
        with self._changed:
            self._retired.append(file)
            self._dirty.add(file)
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._dirty or self._closing)
                self._changed.wait_for(lambda: self._urgent or self._closing, timeout=SYNC_PERIOD_S)
                files, retired, closing = self._dirty, self._retired, self._closing
                self._dirty, self._retired, self._urgent = set(), [], False
            for file in files:
                self._sync(file)
            for file in retired:
                os.close(file)
            if closing and not self._dirty:
                return

    def _sync(self, file: int) -> None:
        try:
            self._fsync(file)
        except OSError:
            # The report is in memory and on its way to the controller; durability here is the second string.
            return


def encode(entry: Entry) -> bytes:
    """One record as it lies in a segment."""
    tail = _TAIL.pack(entry.seq, _URGENT if entry.urgent else 0)
    crc = zlib.crc32(entry.payload, zlib.crc32(tail))
    return _HEADER.pack(len(entry.payload), crc, entry.seq, tail[-1]) + entry.payload


def decode(data: bytes) -> Iterator[Entry]:
    """The records of a segment, up to the first that is torn, damaged or out of order."""
    at, previous = 0, 0
    while len(data) - at >= _HEADER.size:
        length, crc, seq, flags = _HEADER.unpack_from(data, at)
        start = at + _HEADER.size
        payload = data[start : start + length]
        if len(payload) < length or zlib.crc32(payload, zlib.crc32(_TAIL.pack(seq, flags))) != crc or seq <= previous:
            return
        yield Entry(seq, bool(flags & _URGENT), payload)
        at, previous = start + length, seq


def read(folder: Path) -> list[Entry]:
    """Everything that the segments in `folder` still hold, ascending. Damage costs the rest of its segment only."""
    entries: list[Entry] = []
    for path in sorted(folder.glob("*.log")):
        last = entries[-1].seq if entries else 0
        entries += [entry for entry in decode(path.read_bytes()) if entry.seq > last]
    return entries
