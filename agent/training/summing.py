"""The sum of a gradient over ranks: each adds up one part, in rank order, and what it is made of is hashed on its way.

Reduce-scatter as an exchange of pieces with local fp32 sums, then an all-gather: the bytes of a ring, and a fixed order
of additions, so the bits are the same whoever carries the messages.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agent.training.collective import Subgroup
from agent.training.layout import ALIGN
from agent.training.strays import ADDED, GATHERED, GIVEN, Said, Stray
from diagnostics.sensors.collectives import add_up, adds_up
from diagnostics.sensors.digest import digest
from diagnostics.sensors.multilinear import BLOCK_WORDS, MASK, signed

#: Elements of all pieces that are added up at once (4 MiB): what a sum takes of memory beside its result.
BUCKET = 1 << 20


@dataclass(frozen=True, slots=True)
class Cut:
    """How a gradient is divided: rank i adds up elements i * part ..., in pieces, of which the last may be short.

    Parts begin at whole cache lines, pieces also at whole blocks of the hash from there.
    """

    elements: int
    part: int
    piece: int

    @classmethod
    def of(cls, elements: int, ranks: int) -> "Cut":
        """Among so many ranks."""
        part = -(-elements // (ranks * ALIGN)) * ALIGN
        return cls(elements, part, max(BUCKET // ranks // BLOCK_WORDS, 1) * BLOCK_WORDS)

    @property
    def pieces(self) -> int:
        """Of the longest part."""
        return -(-self.part // self.piece)

    def whole(self, owner: int) -> slice:
        """The part that the `owner`-th rank adds up."""
        return slice(min(owner * self.part, self.elements), min((owner + 1) * self.part, self.elements))

    def of_part(self, owner: int, number: int) -> slice:
        """Piece `number` of it; empty where the part is shorter."""
        part = self.whole(owner)
        start = min(part.start + number * self.piece, part.stop)
        return slice(start, min(start + self.piece, part.stop))


class Sum:
    """One gradient, float32 [n], summed over some ranks, all of which make the same calls. `name` is for alarms.

    Invariants: until `place` or `gather`, the gradient holds what was given. `own` is this rank's part of the sum.
    `strays` are what did not compare; of what each source gave, the first.
    """

    def __init__(self, ranks: Subgroup, name: str) -> None:
        self.name = name
        self.own = torch.empty(0)
        self.said = 0
        self.strays: list[Stray] = []
        self.checks = 0
        self._ranks = ranks
        self._whole = self.own
        self._cut = Cut.of(0, 1)
        self._announced: list[list[int]] = []
        self._kept: dict[int, Tensor] = {}
        self._buffers = torch.empty(0)

    @property
    def trivial(self) -> bool:
        """Whether there is nothing to add: one rank, or no elements."""
        return self._ranks.world == 1 or not self._whole.numel()

    def reduce(self, whole: Tensor, checked: bool) -> None:
        """Add up this rank's part of `whole` over the ranks, into `own`. Raises PeerLost.

        If `checked`, each piece is hashed before anything is sent and again when it was added, and each sum is made
        twice; in the order that leaves no time between a check and what it vouches for.
        """
        self.strays, self.checks, self.said, self._kept = [], 0, 0, {}
        self._whole, self._cut = whole, Cut.of(whole.numel(), self._ranks.world)
        if self.trivial:
            return
        part = self._cut.whole(self._place)
        if self.own.numel() != part.stop - part.start:
            self.own = whole.new_empty(part.stop - part.start)
        told = self._announce() if checked else []
        for number, (pieces, total) in enumerate(self._arriving()):
            add_up(pieces, total)
            if checked:
                self._check(number, pieces, total, [said[number] for said in told])

    def place(self) -> None:
        """Write `own` to its place in the gradient."""
        if not self.trivial:
            self._whole[self._cut.whole(self._place)].copy_(self.own)

    def gather(self) -> None:
        """Write all ranks' parts of the sum to their places. Raises PeerLost."""
        if not self.trivial:
            self.place()
            parts = [self._whole[self._cut.whole(owner)] for owner in range(self._ranks.world)]
            self._ranks.trade([self.own] * self._ranks.world, parts)

    def hold(self, said: Sequence[int] | None = None) -> int:
        """Hash what lies in the gradient of the sum now, and compare it with what its owners say; all of it, added.

        `said` are all ranks' words; without them only the own part is looked at.
        """
        if self.trivial:
            return 0
        owners = {self._place: self.said} if said is None else dict(enumerate(said))
        held = {owner: self._hash(self._cut.whole(owner)) for owner in owners}
        self.checks += len(held)
        for owner, hashed in held.items():
            if hashed != owners[owner]:
                self._found(GATHERED, owner, 0, hashed)
        return sum(held.values()) & MASK

    def held(self) -> int:
        """Hash of this rank's part as it lies in the gradient: `said`, where that is known, unless it changed."""
        return self._hash(self._cut.whole(self._place)) if self.said else 0

    def again(self, stray: Stray) -> tuple[Said | None, Said | None]:
        """This rank's word on a stray as its source and as its holder; None where it is not."""
        rank, cut = self._ranks.rank, self._cut
        source = holder = None
        if stray.name == self.name and stray.what == GIVEN:
            if rank == stray.source:
                at = self._ranks.members.index(stray.holder)
                source = Said(self._announced[at][stray.number], self._hash(cut.of_part(at, stray.number)))
            if rank == stray.holder:
                kept = self._kept[stray.source]
                at = cut.of_part(self._place, stray.number).start
                holder = Said(stray.held, digest(kept, at))
        elif stray.name == self.name and stray.what == GATHERED:
            if rank == stray.source:
                source = Said(self.said, digest(self.own, cut.whole(self._place).start))
            if rank == stray.holder:
                holder = Said(stray.held, self._hash(cut.whole(self._ranks.members.index(stray.source))))
        return source, holder

    @property
    def _place(self) -> int:
        return self._ranks.members.index(self._ranks.rank)

    def _announce(self) -> list[list[int]]:
        """Tell each rank the hashes of the pieces it will get; what each said of its own, by rank and piece."""
        cut = self._cut
        mine = [[self._hash(cut.of_part(to, k)) for k in range(cut.pieces)] for to in range(self._ranks.world)]
        self._announced = mine
        told = self._ranks.transpose(torch.tensor([[signed(said) for said in row] for row in mine]))
        return [[said & MASK for said in row] for row in told.tolist()]

    def _arriving(self) -> Iterator[tuple[list[Tensor], Tensor]]:
        """By piece: all ranks' pieces of this rank's part, the own one in the gradient, and where their sum goes."""
        whole, cut, place = self._whole, self._cut, self._place
        if self._buffers.shape[1:] != (cut.piece,):
            self._buffers = whole.new_empty(self._ranks.world, cut.piece)
        done = 0
        for number in range(cut.pieces):
            give = [whole[cut.of_part(to, number)] for to in range(self._ranks.world)]
            size = give[place].numel()
            take = [buffer[:size] for buffer in self._buffers]
            take[place] = give[place]
            self._ranks.trade(give, take)
            if size:
                yield take, self.own[done : done + size]
            done += size

    def _check(self, number: int, pieces: Sequence[Tensor], total: Tensor, told: Sequence[int]) -> None:
        start = self._cut.of_part(self._place, number).start
        for source, piece in enumerate(pieces):
            held = digest(piece, start)
            if held != told[source] and self._ranks.members[source] not in self._kept:
                self._kept[self._ranks.members[source]] = piece.clone()
                self._found(GIVEN, source, number, held)
        self.said = (self.said + digest(total, start)) & MASK
        self.checks += len(pieces) + 1
        # No rank's piece comes into this rank's own buffer.
        if not adds_up(pieces, total, self._buffers[self._place, : total.numel()]):
            self._found(ADDED, self._place, number, 0)

    def _found(self, what: str, source: int, number: int, held: int) -> None:
        self.strays.append(Stray(self.name, what, self._ranks.members[source], self._ranks.rank, number, held))

    def _hash(self, part: slice) -> int:
        return digest(self._whole[part], part.start)
