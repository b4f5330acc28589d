"""What ranks of a mesh say of a state they have just made, and who holds something else than its owner wrote."""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from agent.training.collective import Group
from agent.training.crosscheck import CrossCheck
from agent.training.layout import State
from agent.training.optimizer import Pass
from agent.training.seals import SENSOR
from agent.training.shards import ShardLayout
from agent.training.spec import Mesh
from diagnostics.health import Alarm
from diagnostics.sensors.multilinear import MASK, signed
from diagnostics.verify.between import Changed, Handed, Repeat


@dataclass(frozen=True, slots=True)
class Told:
    """64-bit digests by one rank: of the slices it wrote and of its moments, then of what it holds after all exchanges;
    whether the block that it repeated of the rank before was the same; and of its slices of the sum, when they were
    added up and when they had been used."""

    dense_written: int
    experts_written: int
    moments: int
    dense: int
    experts: int
    tail: int
    replica: int
    repeats: bool
    added: int = 0
    used: int = 0

    def pack(self) -> list[int]:
        """As signed 64-bit integers."""
        return [signed(int(value)) for value in astuple(self)]

    @classmethod
    def unpack(cls, values: Sequence[int]) -> "Told":
        """The inverse of `pack`."""
        dense_written, experts_written, moments, *held, repeats, added, used = (v & MASK for v in values)
        dense, experts, tail, replica = held
        return cls(dense_written, experts_written, moments, dense, experts, tail, replica, bool(repeats), added, used)


@dataclass(frozen=True, slots=True)
class Wrong:
    """Rank `holder` does not hold what was written: its "dense", "experts" or "replica"; or it used another "sum" than
    it had added up; or it repeated another "update" than the rank before it made."""

    what: str
    holder: int


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that must not be committed: the alarm, the rank it is about, and what there is to judge it by."""

    suspect: int
    alarm: Alarm
    evidence: Handed | Repeat | Changed


class Unlike(Exception):
    """A state that was about to be committed is not what its owners wrote, or not the same on all ranks.

    Every rank raises it.
    """

    def __init__(self, findings: tuple[Finding, ...]) -> None:
        super().__init__("; ".join(f"{f.alarm.module} {f.alarm.location}" for f in findings))
        self.findings = findings


def wrong_in(rows: Sequence[Told], mesh: Mesh) -> list[Wrong]:
    """Compare what ranks hold with what was written, rows in rank order: sums, dense, experts, replicas, updates.

    A sum comes first, since the update of another one is another.
    """
    dense = sum(row.dense_written for row in rows) & MASK
    found = [Wrong("sum", rank) for rank, row in enumerate(rows) if row.used != row.added]
    found += [Wrong("dense", rank) for rank, row in enumerate(rows) if row.dense != dense]
    for rank, row in enumerate(rows):
        if row.experts != sum(other.experts_written for other in rows[rank % mesh.ep :: mesh.ep]) & MASK:
            found.append(Wrong("experts", rank))
        before = rows[rank - 1]
        if row.replica != (before.experts + before.moments) & MASK:
            found.append(Wrong("replica", rank))
    return found + [Wrong("update", rank) for rank, row in enumerate(rows) if not row.repeats]


@dataclass(frozen=True, slots=True)
class _Again:
    """Digests that a rank takes again of what it holds of a state that is in doubt."""

    dense: list[int]
    experts: list[int]
    unique: int
    replica: int

    @classmethod
    def of(cls, layout: ShardLayout, state: State) -> "_Again":
        unique = (layout.own_experts(state) + layout.own_moments(state)) & MASK
        return cls(layout.dense_slices(state), layout.expert_slices(state), unique, layout.digest_replica(state))


def evidence(
    wrong: Sequence[Wrong],
    rows: Sequence[Told],
    layout: ShardLayout,
    state: State,
    group: Group,
    cross: CrossCheck,
    change: Pass,
) -> tuple[Finding, ...]:
    """What there is to judge each fault by; one for a rank. Every rank calls it alike. Raises PeerLost."""
    again: list[_Again] = group.gather_objects(_Again.of(layout, state))
    alone = len(rows) > 2 and sum(one.what == "dense" for one in wrong) == 1
    found: dict[int, Finding] = {}
    for one in wrong:
        if one.what == "update":
            finding = _of_update(one, cross.votes(one.holder, change))
        elif one.what == "sum":
            finding = _of_sum(one.holder, rows[one.holder])
        else:
            handed = _handed(one, rows, again, layout.mesh, alone)
            finding = Finding(one.holder, _arrived(one, handed), handed)
        found.setdefault(finding.suspect, finding)
    return tuple(found.values())


def _handed(one: Wrong, rows: Sequence[Told], again: Sequence[_Again], mesh: Mesh, alone: bool) -> Handed:
    row, now = rows[one.holder], again[one.holder]
    if one.what == "replica":
        source = (one.holder - 1) % mesh.dp
        written = (rows[source].experts + rows[source].moments) & MASK
        return Handed(source, one.holder, written, again[source].unique, row.replica, now.replica, alone=False)
    dense = one.what == "dense"
    sources = range(mesh.dp) if dense else range(one.holder % mesh.ep, mesh.dp, mesh.ep)
    said = [rows[rank].dense_written if dense else rows[rank].experts_written for rank in sources]
    slices = now.dense if dense else now.experts
    # If none differs now, the digest did not reproduce, and whose slice is named does not matter.
    at = next((i for i, (wrote, holds) in enumerate(zip(said, slices, strict=True)) if wrote != holds), 0)
    kept = again[sources[at]].dense if dense else again[sources[at]].experts
    held = row.dense if dense else row.experts
    return Handed(sources[at], one.holder, said[at], kept[at], held, sum(slices) & MASK, dense and alone)


def _arrived(one: Wrong, handed: Handed) -> Alarm:
    """There is no tolerance, so the reading is infinite."""
    operation = "send" if one.what in ("replica", "gradient") else "all_gather"
    where = f"from rank {handed.source} to rank {handed.holder}"
    return Alarm(SENSOR, one.what, operation, "step", math.inf, where)


def _of_sum(rank: int, row: Told) -> Finding:
    alarm = Alarm("reduction", "sum", "digest", "step", math.inf, f"in the memory of rank {rank}")
    return Finding(rank, alarm, Changed(rank, "sum", row.added, row.used))


def _of_update(one: Wrong, found: Repeat | Handed) -> Finding:
    if isinstance(found, Handed):
        return Finding(one.holder, _arrived(Wrong("gradient", one.holder), found), found)
    where = f"of rank {found.owner}, repeated by rank {found.checker}"
    return Finding(found.owner, Alarm("optimizer", "update", "adamw", "step", math.inf, where), found)
