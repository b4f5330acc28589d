"""ZeRO-1 on a mesh: each rank optimises a dp-th of the state and keeps a replica of its neighbour's shard."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from agent.slots import ShardDigests
from agent.training.collective import Group
from agent.training.crosscheck import CrossCheck
from agent.training.handed import Told, Unlike, evidence, wrong_in
from agent.training.layout import State
from agent.training.optimizer import Pass, update
from agent.training.reduction import Reduction, squared_norm
from agent.training.shards import ShardLayout
from agent.training.strays import Explained, explained
from agent.training.summing import Sum
from diagnostics.sensors.multilinear import MASK


class Zero1:
    """Reduce-scatter of gradients, update of the rank's slices, all-gather of parameters (arXiv 1910.02054, section 5).

    Dense parameters are exchanged among all ranks, an expert's among the dp / ep ranks that hold it. Every rank of the
    generation makes one, and then calls the same methods in the same order.
    """

    def __init__(self, layout: ShardLayout, group: Group) -> None:
        mesh = layout.mesh
        self._layout = layout
        self._group = group
        self._mesh = mesh
        peers = [group.among(range(e, mesh.dp, mesh.ep)) for e in range(mesh.ep)]
        self._holders = peers[group.rank % mesh.ep]
        self._all = group.everybody()
        self._sums = (Sum(self._all, "dense"), Sum(self._holders, "experts"))
        self._cross = CrossCheck(layout, group) if mesh.dp > 1 else None

    def reduce(self, gradients: Tensor, key: int | None) -> Reduction:
        """Sum the rank's own slices in place; the other elements keep what this rank gave."""
        parts = gradients[: self._layout.dense], gradients[self._layout.dense :]
        for total, part in zip(self._sums, parts, strict=True):
            total.reduce(part, checked=key is not None)
            total.place()
        own = gradients[self._layout.dense_slice], gradients[self._layout.expert_slice]
        norm, odd = squared_norm(own, self._group.rank, checked=key is not None)
        if key is not None:
            for total in self._sums:
                total.hold()
        strays = tuple(stray for total in self._sums for stray in total.strays)
        return Reduction(norm, sum(total.checks for total in self._sums) + (key is not None), strays + odd)

    def explain(self, reduction: Reduction) -> tuple[Explained, ...]:
        """See `Division`."""
        return explained(self._group, reduction.strays, self._sums)

    @property
    def compared(self) -> int:
        """Checks of each checked `advance`: dense, experts and replica that arrived, a block of the update, the sum."""
        return 5 if self._mesh.dp > 1 else 0

    def advance(
        self, old: State, new: State, gradients: Tensor, change: Pass, beside: Callable[[], None]
    ) -> tuple[int, ShardDigests]:
        """Update the slices, gather everybody's, pass the shard to the neighbour, and agree on the whole's digest.

        With the pass's `key`, what arrived is compared with what its owners wrote, and the neighbour repeats a block.
        Raises Unlike, on every rank, if that shows a fault.
        """
        beside()
        layout, cross = self._layout, self._cross
        checked = change.key is not None and cross is not None
        given = cross.hand(gradients, change.key) if cross is not None and change.key is not None else None
        written = _written(layout, update(layout, old, new, gradients, change))
        with self._group.waiting():
            self._all.all_gather(new.parameters[: layout.dense], new.parameters[layout.dense_slice])
            self._holders.all_gather(new.parameters[layout.dense :], new.parameters[layout.expert_slice])
            self._replicate(new)
        repeats = cross.repeat(old, new, given, change) if cross is not None and given is not None else True
        told = self._told(new, written, checked, repeats)
        if checked:  # after the update: what it was made of
            added, used = (sum(hashes) & MASK for hashes in zip(*((s.said, s.held()) for s in self._sums), strict=True))
            told = replace(told, added=added, used=used)
        rows = self._exchanged(told)
        if checked and cross is not None and (wrong := wrong_in(rows, self._mesh)):
            raise Unlike(evidence(wrong, rows, layout, new, self._group, cross, change))
        return self._agreed(rows)

    def settle(self, state: State) -> tuple[int, ShardDigests]:
        """Pass the shard to the neighbour, and agree on the whole's digest."""
        self._replicate(state)
        moments = self._layout.own_moments(state)
        return self._agreed(self._exchanged(self._told(state, (0, 0, moments), checked=False, repeats=True)))

    def _replicate(self, state: State) -> None:
        """Give the neighbour a replica of what no other rank has, and take one."""
        if self._mesh.dp > 1:
            self._group.shift(state.words[self._layout.unique], state.replica)

    def _told(self, state: State, written: tuple[int, int, int], checked: bool, repeats: bool) -> Told:
        """What this rank says of its state. The replica is hashed for the check alone."""
        layout = self._layout
        return Told(
            dense_written=written[0],
            experts_written=written[1],
            moments=written[2],
            dense=layout.dense_digest(state),
            experts=layout.own_experts(state),
            tail=layout.tail_digest(state),
            replica=layout.digest_replica(state) if checked else 0,
            repeats=repeats,
        )

    def _exchanged(self, told: Told) -> list[Told]:
        with self._group.waiting():
            return [Told.unpack(row) for row in self._group.gather(told.pack())]

    def _agreed(self, rows: Sequence[Told]) -> tuple[int, ShardDigests]:
        """Digest of the job's state, from those of all ranks' parts, and this rank's own.

        Ranks that hold other bits than the rest get another digest of the whole, which the next gate will see.
        """
        mine, mesh = rows[self._layout.rank], self._mesh
        first = {rank % mesh.ep: rows[rank].experts for rank in reversed(range(mesh.dp))}
        first[self._layout.rank % mesh.ep] = mine.experts
        common = mine.dense + mine.tail
        whole = common + sum(first.values()) + sum(row.moments for row in rows)
        # What the replica must hash to is the owner's word, not what arrived here.
        before = rows[(self._layout.rank - 1) % mesh.dp]
        replica = (before.experts + before.moments) & MASK if mesh.dp > 1 else 0
        return whole & MASK, ShardDigests((common + mine.experts + mine.moments) & MASK, replica)


def _written(layout: ShardLayout, hashed: Sequence[tuple[int, int, int]]) -> tuple[int, int, int]:
    """Digests of what this rank wrote: of the dense parameters, of its experts, and both moments together."""
    sums = [0, 0, 0]
    for piece, (parameters, first, second) in zip(layout.pieces, hashed, strict=True):
        sums[piece.start >= layout.dense] += parameters
        sums[2] += first + second
    return sums[0] & MASK, sums[1] & MASK, sums[2] & MASK
