"""Parts of a sum over ranks that are not what their source said, and what its ends hold of them afterwards."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from agent.training.collective import Group
from diagnostics.health import Alarm
from diagnostics.verify.between import ADDED, GATHERED, GIVEN, Handed, Summed

__all__ = ["ADDED", "GATHERED", "GIVEN", "Explained", "Said", "Stray", "Witness", "alarm_of", "explained"]

SENSOR = "reduction"
_OPERATIONS = {GIVEN: "reduce_scatter", ADDED: "add", GATHERED: "all_gather"}


class Said(NamedTuple):
    """One end's hash of a piece, in the step and taken again."""

    first: int
    again: int


@dataclass(frozen=True, slots=True)
class Stray:
    """A piece of the sum `name` that `holder` does not have as `source` announced it: GIVEN to be summed, or the
    source's whole part of the sum that was GATHERED; or a sum of the holder's own that is another when ADDED again."""

    name: str
    what: str
    source: int
    holder: int
    number: int
    held: int


@dataclass(frozen=True, slots=True)
class Explained:
    """A stray as all ranks know it: the alarm, and what there is to judge it by."""

    alarm: Alarm
    part: Summed

    @property
    def ends(self) -> tuple[int, int]:
        """The ranks that it may be about."""
        return self.part.piece.source, self.part.piece.holder


class Witness(Protocol):
    """What a rank knows of one sum."""

    def again(self, stray: Stray) -> tuple[Said | None, Said | None]:
        """The rank's word as the stray's source and as its holder."""


def alarm_of(stray: Stray) -> Alarm:
    """What is reported of it. There is no tolerance, so the reading is infinite."""
    where = f"from rank {stray.source} to rank {stray.holder}"
    if stray.what == ADDED:
        where = f"piece {stray.number}, added by rank {stray.holder}"
    elif stray.what == GIVEN:
        where = f"piece {stray.number}, {where}"
    return Alarm(SENSOR, stray.name, _OPERATIONS[stray.what], "step", math.inf, where)


def explained(group: Group, mine: Sequence[Stray], witnesses: Sequence[Witness]) -> tuple[Explained, ...]:
    """All ranks' strays with what both ends say of them; the same on every rank, which all call it. Raises PeerLost."""
    strays: list[Stray] = [stray for told in group.gather_objects(list(mine)) for stray in told]
    words: list[list[tuple[Said | None, Said | None]]] = group.gather_objects([_of_all(witnesses, s) for s in strays])
    found = []
    for number, stray in enumerate(strays):
        source, holder = words[stray.source][number][0], words[stray.holder][number][1]
        # Of what was added there are no hashes: that it came out otherwise is all there is.
        hashes = (*(source or (0, 0)), *(holder or (0, 0)))
        piece = Handed(stray.source, stray.holder, *hashes, alone=False)
        found.append(Explained(alarm_of(stray), Summed(stray.what, piece)))
    return tuple(found)


def _of_all(witnesses: Sequence[Witness], stray: Stray) -> tuple[Said | None, Said | None]:
    """The word of the one that it belongs to."""
    words = [witness.again(stray) for witness in witnesses]
    return next((s for s, _ in words if s), None), next((h for _, h in words if h), None)
