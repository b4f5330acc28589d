"""Shared-memory state that outlives its worker: two slots, a commit word that says which holds, and a progress word.

The optimizer reads one slot and writes the other. A slot's record (generation, step, digest, chain) is written after
its contents; a commit is then one aligned 8-byte store of the slot's number. A worker killed at any instruction leaves
either the old step committed or the new one, never a mixture. The previous step stays intact until the next gate has
passed, so two ranks, at most one step apart, always hold a step in common.
"""

import mmap
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path

MAGIC = b"ASSAYSL2"
#: One page: records and words stay clear of the state, and the state starts page-aligned.
HEADER = 4096
_FIXED = struct.Struct("<8sQ")  # magic, bytes of one slot
_RECORD = struct.Struct("<QQQQQQQ")  # generation, step, digest, chain, own, replica, check
_COMMIT = struct.Struct("@Q")  # native: one 8-byte store, where "<Q" would store byte by byte
_PROGRESS = struct.Struct("<QQQQQ")  # generation, step, phase, monotonic ns, pid
_RECORD_AT = (64, 128)  # a cache line each
_COMMIT_AT = 192
_PROGRESS_AT = 256
_NONE = 0xFFFFFFFFFFFFFFFF

#: In the order of a step; the progress word holds the index.
PHASES = (
    "idle",
    "load",
    "rendezvous",
    "restore",
    "forward",
    "reduce",
    "gate",
    "replay",
    "verdict",
    "commit",
    "capture",
    "exchange",
)
#: Phases in which a rank waits for others: a rank that stalls here is a victim, not the cause. On a mesh forward and
#: commit exchange with other ranks, and are "exchange" meanwhile.
WAITING = frozenset({"rendezvous", "restore", "reduce", "gate", "verdict", "exchange"})


class SlotsError(ValueError):
    """The file is not a slots file, or not the one that was expected."""


@dataclass(frozen=True, slots=True)
class ShardDigests:
    """64-bit hashes of the parts of a slot that holds a shard: the rank's own, and the replica of its neighbour's."""

    own: int
    replica: int


@dataclass(frozen=True, slots=True)
class SlotRecord:
    """What a slot holds: the state committed at `step` (0: the initial one) of `generation`, with its 64-bit hashes.

    `digest` is of the job's whole state. A slot that holds a shard of it says in `shard` what its own bits hash to.
    """

    generation: int
    step: int
    digest: int
    chain: int
    shard: ShardDigests | None = None

    @property
    def own(self) -> int:
        """What this slot's state hashes to."""
        return self.digest if self.shard is None else self.shard.own


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a worker is: `monotonic_ns` is CLOCK_MONOTONIC when it entered `phase`."""

    generation: int
    step: int
    phase: str
    monotonic_ns: int
    pid: int


class Slots:
    """One rank's slots file, mapped. Create it with `create`, map an existing one with `open`."""

    def __init__(self, path: Path, nbytes: int, mapping: mmap.mmap) -> None:
        self.path = path
        self.nbytes = nbytes
        self._map = mapping

    @classmethod
    def create(cls, path: Path, nbytes: int) -> "Slots":
        """Make an empty file for two states of `nbytes` bytes, replacing any file of that name."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        with temporary.open("wb") as file:
            file.truncate(_size(nbytes))
            file.write(_FIXED.pack(MAGIC, nbytes))
            file.seek(_COMMIT_AT)
            file.write(_COMMIT.pack(_NONE))
        temporary.rename(path)
        return cls.open(path)

    @classmethod
    def open(cls, path: Path, readonly: bool = False) -> "Slots":
        """Map an existing file. Raises SlotsError if it is not one, FileNotFoundError if there is none."""
        with path.open("rb" if readonly else "r+b") as file:
            length = os.fstat(file.fileno()).st_size
            if length < HEADER:
                raise SlotsError(f"{path} is {length} bytes long, shorter than a slots header")
            access = mmap.ACCESS_READ if readonly else mmap.ACCESS_WRITE
            mapping = mmap.mmap(file.fileno(), length, access=access)
        magic, nbytes = _FIXED.unpack_from(mapping, 0)
        if magic != MAGIC or length != _size(nbytes):
            mapping.close()
            raise SlotsError(f"{path} is not a slots file of this version")
        return cls(path, nbytes, mapping)

    def close(self) -> None:
        """Unmap. Fails with BufferError while a view of `state` is alive."""
        self._map.close()

    def state(self, slot: int) -> memoryview:
        """The bytes of a slot's state, page-aligned, `nbytes` long."""
        start = _state_at(slot, self.nbytes)
        return memoryview(self._map)[start : start + self.nbytes]

    def record(self, slot: int) -> SlotRecord | None:
        """What the slot holds, or None when it is empty or was being written."""
        *fields, check = _RECORD.unpack_from(self._map, _RECORD_AT[slot])
        if check != _check(*fields):
            return None
        generation, step, digest, chain, own, replica = fields
        shard = ShardDigests(own, replica) if own or replica else None
        return SlotRecord(generation, step, digest, chain, shard)

    def invalidate(self, slot: int) -> None:
        """Say that the slot's contents are about to change."""
        _RECORD.pack_into(self._map, _RECORD_AT[slot], 0, 0, 0, 0, 0, 0, 0)

    def write_record(self, slot: int, record: SlotRecord) -> None:
        """Say what the slot holds, after its contents are complete."""
        parts = (0, 0) if record.shard is None else (record.shard.own, record.shard.replica)
        fields = (record.generation, record.step, record.digest, record.chain, *parts)
        _RECORD.pack_into(self._map, _RECORD_AT[slot], *fields, _check(*fields))

    def commit(self, slot: int) -> None:
        """Make `slot` the committed one: a single aligned 8-byte store."""
        _COMMIT.pack_into(self._map, _COMMIT_AT, slot)

    @property
    def committed(self) -> int | None:
        """The slot that holds the committed state, or None before the first commit."""
        (slot,) = _COMMIT.unpack_from(self._map, _COMMIT_AT)
        return slot if slot in (0, 1) and self.record(slot) is not None else None

    def enter(self, generation: int, step: int, phase: str) -> None:
        """Note that this process entered `phase` of `step`."""
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        _PROGRESS.pack_into(self._map, _PROGRESS_AT, generation, step, PHASES.index(phase), now, os.getpid())

    def progress(self) -> Progress:
        """Where the worker is now. Torn reads are possible and harmless: a stall is one that lasts."""
        generation, step, phase, when, pid = _PROGRESS.unpack_from(self._map, _PROGRESS_AT)
        return Progress(generation, step, PHASES[phase] if phase < len(PHASES) else "idle", when, pid)


def _size(nbytes: int) -> int:
    return HEADER + 2 * _aligned(nbytes)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // HEADER) * HEADER


def _state_at(slot: int, nbytes: int) -> int:
    return HEADER + slot * _aligned(nbytes)


def _check(generation: int, step: int, digest: int, chain: int, own: int, replica: int) -> int:
    """A mix of the fields that an all-zero or torn record does not satisfy."""
    mixed = generation * 0x9E3779B97F4A7C15 + step * 0xC2B2AE3D27D4EB4F + digest * 0x165667B19E3779F9 + chain
    mixed += own * 0x94D049BB133111EB + replica * 0xBF58476D1CE4E5B9
    return (mixed & _NONE ^ 0x27D4EB2F165667C5) or 1
