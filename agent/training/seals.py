"""A hash of every piece that ranks exchange in a step, taken where it leaves and where it arrives, compared at its end.

One small exchange for each hop carries all hashes of the step, 8 bytes a piece. It comes before the gate, so no step
with a piece that changed on its way is committed. It lies below the journal: a replay neither makes nor sees it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agent.model.parallel import ExpertParallel, Transport
from agent.training.collective import run
from agent.training.spec import Mesh
from diagnostics.health import Alarm
from diagnostics.sensors.collectives import piece_hash
from diagnostics.sensors.multilinear import signed
from diagnostics.sensors.quiet import quiet

SENSOR = "exchange"
_WORD = 1 << 64


@dataclass(frozen=True, slots=True)
class Garbled:
    """A piece of exchange `number` of the step that did not arrive as its source says it was sent."""

    number: int
    source: int
    destination: int
    announced: int
    arrived: int


@dataclass(frozen=True, slots=True)
class _Pieces:
    """One side of an exchange: what was sent to, or received from, each rank of a hop, with its hash."""

    pieces: tuple[Tensor, ...]
    hashes: tuple[int, ...]

    @classmethod
    def of(cls, rows: Tensor, sizes: Sequence[int]) -> "_Pieces":
        with quiet():
            pieces = torch.split(rows, list(sizes))
            return cls(pieces, tuple(piece_hash(piece) for piece in pieces))


@dataclass(frozen=True, slots=True)
class _Passage:
    number: int
    sent: _Pieces
    received: _Pieces


class Seals:
    """The hashes of a step's exchanges on one rank, which keep the rows alive until the next step."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._hops: list[Sealed] = []
        self._made = 0

    def around(self, live: ExpertParallel, mesh: Mesh) -> ExpertParallel:
        """The same place among the experts, whose exchanges are sealed."""
        group, place = self._rank - live.rank, live.rank
        across = tuple(range(group + place % mesh.local, group + mesh.ep, mesh.local))
        within = tuple(range(self._rank - place % mesh.local, self._rank - place % mesh.local + mesh.local))
        self._hops = [Sealed(self, live.across, across), Sealed(self, live.within, within)]
        return ExpertParallel(live.rank, self._hops[0], self._hops[1])

    def begin(self) -> None:
        """Forget the last step."""
        self._made = 0
        for hop in self._hops:
            hop.passages.clear()

    def next(self) -> int:
        """The number of the exchange that begins, from 0; the same on every rank of the group."""
        self._made += 1
        return self._made - 1

    def compare(self) -> list[Garbled]:
        """Learn what was sent to this rank; the pieces that came otherwise, the earliest first. Raises PeerLost."""
        return sorted((g for hop in self._hops for g in hop.compare(self._rank)), key=lambda g: (g.number, g.source))

    @property
    def count(self) -> int:
        """Pieces whose hashes were compared in the step."""
        return sum(len(hop.passages) * hop.world for hop in self._hops)

    def again(self, garbled: Garbled) -> int | None:
        """Hash of this rank's side of a garbled piece as it is kept now; None if it is neither source nor destination.

        Where it is both, of what arrived.
        """
        for hop in self._hops:
            for passage in hop.passages:
                if passage.number == garbled.number and {garbled.source, garbled.destination} <= set(hop.peers):
                    if self._rank == garbled.destination:
                        return piece_hash(passage.received.pieces[hop.peers.index(garbled.source)])
                    if self._rank == garbled.source:
                        return piece_hash(passage.sent.pieces[hop.peers.index(garbled.destination)])
        return None


class Sealed:
    """A `Transport` whose pieces are hashed on both sides; `peers` are its ranks' numbers in the job."""

    def __init__(self, seals: Seals, live: Transport, peers: tuple[int, ...]) -> None:
        self.world = live.world
        self.peers = peers
        self.passages: list[_Passage] = []
        self._seals = seals
        self._live = live

    def exchange(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """See `Transport`."""
        number = self._seals.next()
        sent = _Pieces.of(rows, send)
        arrived = self._live.exchange(rows, send, receive)
        self.passages.append(_Passage(number, sent, _Pieces.of(arrived, receive)))
        return arrived

    def compare(self, rank: int) -> list[Garbled]:
        """Tell every peer what was sent to it: int64 [peers, passages], row i to peer i."""
        if not self.passages:
            return []
        mine = torch.tensor([[signed(p.sent.hashes[i]) for p in self.passages] for i in range(self.world)])
        ones = [1] * self.world
        told = run(self._live.exchange, mine, ones, ones).tolist()
        return [
            Garbled(passage.number, source, rank, announced % _WORD, passage.received.hashes[i])
            for i, source in enumerate(self.peers)
            for passage, announced in zip(self.passages, told[i], strict=True)
            if announced % _WORD != passage.received.hashes[i]
        ]


def alarm_of(garbled: Garbled) -> Alarm:
    """What is reported of it. There is no tolerance, so the reading is infinite."""
    where = f"from rank {garbled.source} to rank {garbled.destination}"
    return Alarm(SENSOR, f"exchange {garbled.number}", "all_to_all", "step", math.inf, where)
