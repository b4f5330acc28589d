"""A block of each rank's update, drawn in the step, is made again by the next rank, which has all that it takes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from agent.training.collective import Group
from agent.training.layout import Piece, State
from agent.training.optimizer import Pass, Triple, apply
from agent.training.shards import ShardLayout
from diagnostics.sensors.digest import digest
from diagnostics.sensors.multilinear import MASK
from diagnostics.sensors.optimizer import Block, differing, drawn
from diagnostics.verify.between import Handed, Repeat


@dataclass(frozen=True, slots=True)
class Operands:
    """What a block's update is made of: old parameters and moments, the summed gradient not yet scaled, its decay."""

    sources: Triple
    gradient: Tensor
    decay: bool

    def made(self, change: Pass) -> Triple:
        """The block after the update."""
        first, second, third = (torch.empty_like(source) for source in self.sources)
        apply(self.sources, (first, second, third), self.gradient * change.coefficient, change, self.decay)
        return first, second, third


class CrossCheck:
    """The rank before is the owner of what is repeated here. Every rank makes the same calls, of two ranks or more."""

    def __init__(self, layout: ShardLayout, group: Group) -> None:
        self._layout = layout
        self._group = group
        self.owner = (layout.rank - 1) % layout.mesh.dp
        self._pieces = layout.pieces_of(self.owner)
        self._given = torch.empty(0)
        self._operands: Operands | None = None
        self._made: Triple | None = None
        self._found: Triple | None = None

    def hand(self, gradients: Tensor, key: int) -> Tensor:
        """Give the gradient of this rank's block to the next rank, before it is scaled; returns the owner's."""
        mine = self._layout.rank
        piece, block = _of(self._layout.pieces, key, mine)
        _, other = _of(self._pieces, key, self.owner)
        arrived = torch.empty(other.stop - other.start)
        self._given = gradients[piece.start + block.start : piece.start + block.stop].clone()
        self._group.shift(self._given, arrived)
        return arrived

    def repeat(self, old: State, new: State, gradient: Tensor, change: Pass) -> bool:
        """Whether the owner's block is what this rank makes of it, from its replica of the old state.

        A replica that changed in memory, so that it is not what was committed, has no say.
        """
        assert change.key is not None
        piece, block = _of(self._pieces, change.key, self.owner)
        self._operands = Operands(self._block(old, piece, block), gradient, piece.decay)
        self._found = self._block(new, piece, block)
        self._made = self._operands.made(change)
        if not differing(self._made, self._found):
            return True
        return self._layout.digest_replica(old) != change.replica

    def votes(self, checker: int, change: Pass) -> Repeat | Handed:
        """All ranks make the block that `checker` found otherwise again, of its operands.

        If its gradient is not what the owner gave, there is nothing to vote on: the hand-over was at fault. Every rank
        calls this. Raises PeerLost.
        """
        owner = (checker - 1) % self._layout.mesh.dp
        mine = None
        if self._layout.rank == checker:
            assert self._operands is not None
            assert self._found is not None
            assert self._made is not None
            mine = (self._operands, _hashed(self._found), _hashed(self._made))
        told = self._group.gather_objects((mine, digest(self._given)))
        (operands, wrote, made), given = told[checker][0], told[owner][1]
        if (arrived := digest(operands.gradient)) != given:
            return Handed(owner, checker, given, given, arrived, arrived, alone=False)
        again = tuple(self._group.gather_objects(_hashed(operands.made(change))))
        return Repeat(owner, checker, wrote, made, again)

    def _block(self, state: State, piece: Piece, block: Block) -> Triple:
        """The owner's parameters and moments, from what this rank holds of them."""
        layout = self._layout
        start, stop = piece.start + block.start, piece.start + block.stop
        if piece.start < layout.dense:
            parameters = state.parameters[start:stop]
        else:
            parameters = layout.replica_experts(state)[start - layout.dense : stop - layout.dense]
        moment = slice(piece.moment + block.start, piece.moment + block.stop)
        first, second = layout.replica_moments(state)
        return parameters, first[moment], second[moment]


def _of(pieces: tuple[Piece, ...], key: int, owner: int) -> tuple[Piece, Block]:
    block = drawn(key, owner, [piece.stop - piece.start for piece in pieces])
    return pieces[block.piece], block


def _hashed(block: Triple) -> int:
    return sum(digest(part, place << 32) for place, part in enumerate(block)) & MASK
