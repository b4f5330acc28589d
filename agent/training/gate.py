"""The commit gate's decision: what the rows of all ranks mean for a step. Pure, and the same on every rank."""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from diagnostics.sensors.multilinear import MASK, signed

#: int64 fields of a row before its expert counts.
FIELDS = 14


class GateError(RuntimeError):
    """Rows that cannot belong together: a rank of another generation or step reached this gate."""


class Decision(Enum):
    """What the ranks do next."""

    COMMIT = "commit"
    REPLAY = "replay"
    ROLL_BACK = "roll back"


@dataclass(frozen=True, slots=True)
class Row:
    """What one rank brings to the gate of `step`.

    `reading` is its worst reading; `alarm` is `not (reading <= 1)`, taken before any reduction so that NaN counts.
    `squared_norm` is that of its slice of the reduced gradient; `digest` is of the state committed at `previous`.
    `intact` is false if the rank's memory holds other bits than it committed, where it looks: on a mesh, at every gate.
    `copy` is a hash of the summed gradient where all ranks hold the same, else 0. `astray` is a hash of the tokens that
    came to the rank's experts less that of those it sent: over ranks that exchange tokens they add up to 0.
    `clock` counts the exchanges of expert parallelism before its first alarm, 0 without any. `written` is the newest
    step of which its shard of a checkpoint lies on storage. `counts` are the routed tokens of its own batch per (MoE
    layer, expert).
    """

    generation: int
    step: int
    attempt: int
    alarm: bool
    reading: float
    squared_norm: float
    previous: int
    digest: int
    loss: float
    counts: tuple[int, ...]
    clock: int = 0
    written: int = 0
    intact: bool = True
    copy: int = 0
    astray: int = 0

    def pack(self) -> list[int]:
        """The row as FIELDS + len(counts) signed 64-bit integers; floats by their bits."""
        return [
            self.generation,
            self.step,
            self.attempt,
            int(self.alarm),
            _bits(self.reading),
            _bits(self.squared_norm),
            self.previous,
            signed(self.digest),
            _bits(self.loss),
            self.clock,
            self.written,
            int(self.intact),
            signed(self.copy),
            signed(self.astray),
            *self.counts,
        ]

    @classmethod
    def unpack(cls, values: Sequence[int]) -> "Row":
        """The inverse of `pack`."""
        return cls(
            generation=values[0],
            step=values[1],
            attempt=values[2],
            alarm=bool(values[3]),
            reading=_float(values[4]),
            squared_norm=_float(values[5]),
            previous=values[6],
            digest=values[7] & MASK,
            loss=_float(values[8]),
            clock=values[9],
            written=values[10],
            intact=bool(values[11]),
            copy=values[12] & MASK,
            astray=values[13] & MASK,
            counts=tuple(values[FIELDS:]),
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """The decision with its reason; `norm` is the summed gradient's, `suspects` are ranks in rank order.

    `astray` says that nothing alarmed at them, but tokens did not come to the experts that were chosen; `overflowed`,
    that nothing alarmed, but the sum of their gradients is not finite.
    """

    decision: Decision
    reason: str
    norm: float = 0.0
    suspects: tuple[int, ...] = ()
    astray: bool = False
    overflowed: bool = False


def decide(rows: Sequence[Row], ep: int = 1) -> Outcome:
    """Judge the rows, given in rank order; every `ep` adjacent ranks exchanged tokens in the step.

    A disagreement about the previous commit comes first: nothing computed from a doubtful state counts. Then alarms,
    tokens that went astray, and copies of one sum that are not the same. The norm is summed in rank order, so that
    every rank gets the same bits. Raises GateError on rows of another generation, step or attempt.
    """
    head = rows[0]
    for rank, row in enumerate(rows):
        if (row.generation, row.step, row.attempt, row.previous) != (
            head.generation,
            head.step,
            head.attempt,
            head.previous,
        ):
            raise GateError(
                f"rank {rank} is at generation {row.generation} step {row.step} attempt {row.attempt}, rank 0 at "
                f"generation {head.generation} step {head.step} attempt {head.attempt}"
            )
    if len({row.digest for row in rows}) > 1:
        listed = ", ".join(f"rank {rank} {row.digest:016x}" for rank, row in enumerate(rows))
        return Outcome(Decision.ROLL_BACK, f"states of step {head.previous} differ: {listed}")
    if changed := [rank for rank, row in enumerate(rows) if not row.intact]:
        return Outcome(Decision.ROLL_BACK, f"step {head.previous} changed in memory: ranks {changed}")
    suspects = _suspects(rows, ep)
    if suspects:
        return Outcome(Decision.REPLAY, "sensor alarm", suspects=suspects)
    if lost := _astray(rows, ep):
        return Outcome(Decision.REPLAY, f"tokens went astray among ranks {list(lost)}", suspects=lost, astray=True)
    if len({row.copy for row in rows}) > 1:
        return Outcome(Decision.REPLAY, "copies of the summed gradient differ", suspects=tuple(range(len(rows))))
    squared = 0.0
    for row in rows:
        squared += row.squared_norm
    if not math.isfinite(squared):
        everybody = tuple(range(len(rows)))
        return Outcome(Decision.REPLAY, "reduced gradient is not finite", suspects=everybody, overflowed=True)
    return Outcome(Decision.COMMIT, "clean", norm=math.sqrt(squared))


def _astray(rows: Sequence[Row], ep: int) -> tuple[int, ...]:
    """The first group whose experts did not get the tokens that its routers sent them."""
    for start in range(0, len(rows), ep):
        group = range(start, min(start + ep, len(rows)))
        if sum(rows[rank].astray for rank in group) & MASK:
            return tuple(group)
    return ()


def _suspects(rows: Sequence[Row], ep: int) -> tuple[int, ...]:
    """Alarmed ranks, but those that may only have received what another of their group sent.

    Exchanges are the group's common clock: a corruption on one rank can reach another in a later exchange only, so of a
    group the ranks that alarmed first are asked. If another was at fault too, it alarms again when the step is redone.
    """
    alarmed = [rank for rank, row in enumerate(rows) if row.alarm]
    first = {rank // ep: min(rows[r].clock for r in alarmed if r // ep == rank // ep) for rank in alarmed}
    return tuple(rank for rank in alarmed if rows[rank].clock == first[rank // ep])


def _bits(value: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def _float(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])
