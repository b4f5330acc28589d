"""ZeRO-1 on a mesh: each rank optimises a dp-th of the state and keeps a replica of its neighbour's shard."""

from torch import Tensor

from agent.slots import ShardDigests
from agent.training.collective import Group
from agent.training.division import squared
from agent.training.layout import State
from agent.training.optimizer import Pass, update
from agent.training.shards import ShardLayout

_MASK = (1 << 64) - 1


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

    def reduce(self, gradients: Tensor) -> None:
        """Sum the rank's own slices in place; the other elements keep what this rank added."""
        layout = self._layout
        self._all.reduce_scatter(gradients[: layout.dense], gradients[layout.dense_slice])
        self._holders.reduce_scatter(gradients[layout.dense :], gradients[layout.expert_slice])

    def squared_norm(self, gradients: Tensor) -> float:
        """Of the rank's own slices: no element belongs to two ranks."""
        return squared(gradients[self._layout.dense_slice]) + squared(gradients[self._layout.expert_slice])

    def advance(self, old: State, new: State, gradients: Tensor, change: Pass) -> tuple[int, ShardDigests]:
        """Update the slices, gather everybody's, pass the shard to the neighbour, and agree on the whole's digest."""
        layout = self._layout
        hashed = update(layout, old, new, gradients, change)
        with self._group.waiting():
            self._all.all_gather(new.parameters[: layout.dense], new.parameters[layout.dense_slice])
            self._holders.all_gather(new.parameters[layout.dense :], new.parameters[layout.expert_slice])
            self._replicate(new)
        return self._agree(new, (hashed[1] + hashed[2]) & _MASK)

    def settle(self, state: State) -> tuple[int, ShardDigests]:
        """Pass the shard to the neighbour, and agree on the whole's digest."""
        self._replicate(state)
        return self._agree(state, self._layout.own_moments(state))

    def _replicate(self, state: State) -> None:
        """Give the neighbour a replica of what no other rank has, and take one."""
        if self._mesh.dp > 1:
            self._group.shift(state.words[self._layout.unique], state.replica)

    def _agree(self, state: State, moments: int) -> tuple[int, ShardDigests]:
        """Digest of the job's state, from those of all ranks' parts, and this rank's own.

        Ranks that hold other bits than the rest get another digest of the whole, which the next gate will see.
        """
        layout = self._layout
        common, experts = layout.common(state), layout.own_experts(state)
        with self._group.waiting():
            parts = self._group.gather([_signed(part) for part in (experts, moments)])
        shards = [[part & _MASK for part in row] for row in parts]
        first = {rank % self._mesh.ep: shards[rank][0] for rank in reversed(range(self._mesh.dp))}
        first[layout.rank % self._mesh.ep] = experts
        whole = common + sum(first.values()) + sum(row[1] for row in shards)
        # What the replica must hash to is the owner's word, not what arrived here.
        replica = sum(shards[(layout.rank - 1) % self._mesh.dp]) & _MASK if self._mesh.dp > 1 else 0
        return whole & _MASK, ShardDigests((common + experts + moments) & _MASK, replica)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
