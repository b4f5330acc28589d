"""Where the parts of one rank's shard lie in its slot: experts and moments are divided, the other parameters whole."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from agent.training.layout import ALIGN, Piece, Region, State, StateLayout, arranged, digest_of, is_expert, readable
from agent.training.spec import Mesh
from diagnostics.sensors.digest import digest


class ShardLayout(StateLayout):
    """The state of one rank of a mesh.

    Its words are: all parameters but routed experts (dense), its own experts, a dp-th of both moments, router biases,
    meta. Behind them lies a replica of the experts and moments of the rank before it, so that any one rank can be lost.
    The job's whole state, by whose places digests count, is: dense, each rank's experts once, moments of all
    ranks, biases, meta. Each rank optimises a dp-th of the dense parameters and, of its experts, its share among the
    dp / ep ranks that hold the same: its moments belong to these two pieces, in this order.

    Invariant: `nbytes` is the same for every rank.
    """

    def __init__(self, model: nn.Module, mesh: Mesh, rank: int, moments: torch.dtype = torch.float32) -> None:
        named = list(model.named_parameters())
        ordered = sorted((n for n in named if not is_expert(n[0])), key=lambda item: item[1].dim() < 2)
        dense, end = arranged(ordered)
        self.mesh = mesh
        self.rank = rank
        self.dense = _padded(end, mesh.dp)
        experts, end = arranged([n for n in named if is_expert(n[0])], self.dense)
        self.expert = _padded(end - self.dense, mesh.replicas)
        self.spans, self.flat = dense + experts, self.dense + self.expert
        self._decayed = next((s.start for s in dense if not s.decay), self.dense)
        self.dense_slice, self.expert_slice = self._slices(rank)
        self._divide(model, moments, self.pieces_of(rank), self.flat_share)
        self.regions = (Region(0, self.dense, 0), *self._own(rank, 0), Region(self.tail, self.words, self._tail_place))
        #: Words of the rank's experts and moments: what its neighbour keeps a replica of.
        self.unique = slice(self.dense, self.tail)
        self.replica = self.tail - self.dense if mesh.dp > 1 else 0
        before = (rank - 1) % mesh.dp
        self.replica_regions = self._own(before, -self.dense) if mesh.dp > 1 else ()

    @property
    def flat_share(self) -> int:
        """Elements that this rank optimises: a dp-th of all."""
        return self.dense // self.mesh.dp + self.expert // self.mesh.replicas

    def dense_digest(self, state: State) -> int:
        """Digest of the parameters that every rank holds alike."""
        return digest_of(state.words, self.regions[:1])

    def tail_digest(self, state: State) -> int:
        """Digest of router biases and meta, which every rank holds alike."""
        return digest_of(state.words, self.regions[-1:])

    def dense_slices(self, state: State) -> list[int]:
        """Digests of what each rank optimises of the dense parameters."""
        size = self.dense // self.mesh.dp
        return [digest(state.words[i * size : (i + 1) * size], i * size) for i in range(self.mesh.dp)]

    def expert_slices(self, state: State) -> list[int]:
        """Digests of what each rank that holds these experts optimises of them."""
        size = self.expert // self.mesh.replicas
        starts = (self.dense + i * size for i in range(self.mesh.replicas))
        return [digest(state.words[start : start + size], self.place(start)) for start in starts]

    def own_experts(self, state: State) -> int:
        """Digest of the experts, which all ranks with the same hold alike."""
        return digest_of(state.words, self.regions[1:2])

    def own_moments(self, state: State) -> int:
        """Digest of the moments, which are this rank's alone."""
        return digest_of(state.words, self.regions[2:4])

    def digest_replica(self, state: State) -> int:
        """Digest of the replica: what the neighbour's `own_experts` and `own_moments` add up to, if it is one."""
        return digest_of(state.replica, self.replica_regions)

    def replica_moments(self, state: State) -> tuple[Tensor, Tensor]:
        """The neighbour's moments, each [region] in their type."""
        borders = (self.expert, self.expert + self.region, self.expert + 2 * self.region)
        first, second = (state.replica[a:b].view(self.moments) for a, b in pairwise(borders))
        return first, second

    def replica_experts(self, state: State) -> Tensor:
        """The neighbour's experts, float32 [expert]."""
        return state.replica[: self.expert].view(torch.float32)

    def writes(self, name: str) -> bool:
        """Moments by their owner, experts by their first rank, the rest divided among the ranks by turns."""
        if name.startswith("exp_avg"):
            return True
        kind, _, parameter = name.partition(".")
        if kind != "master":
            return self.rank == 0
        if is_expert(parameter):
            return self.rank < self.mesh.ep
        index = next(i for i, span in enumerate(self.spans) if span.name == parameter)
        return index % self.mesh.dp == self.rank

    def _moments(self, state: State) -> list[tuple[str, int, Tensor]]:
        return [
            (f"exp_avg.rank-{self.rank:04d}", self.word(1, 0), readable(state.exp_avg)),
            (f"exp_avg_sq.rank-{self.rank:04d}", self.word(2, 0), readable(state.exp_avg_sq)),
        ]

    def pieces_of(self, rank: int) -> tuple[Piece, ...]:
        """What a rank optimises: of dense parameters, then of its experts."""
        dense, expert = self._slices(rank)
        border = min(max(self._decayed, dense.start), dense.stop)
        pieces = (
            Piece(dense.start, border, 0, True),
            Piece(border, dense.stop, border - dense.start, False),
            Piece(expert.start, expert.stop, dense.stop - dense.start, True),
        )
        return tuple(piece for piece in pieces if piece.stop > piece.start)

    def _slices(self, rank: int) -> tuple[slice, slice]:
        return (
            _slice(0, self.dense, rank, self.mesh.dp),
            _slice(self.dense, self.expert, rank // self.mesh.ep, self.mesh.replicas),
        )

    def _own(self, rank: int, shift: int) -> tuple[Region, ...]:
        """Experts and moments of `rank`, which begin `shift` words from where they lie in a slot."""
        start = self.dense + shift
        borders = (start, start + self.expert, start + self.expert + self.region, start + self.expert + 2 * self.region)
        moments = self.dense + self.mesh.ep * self.expert
        places = (
            self.dense + rank % self.mesh.ep * self.expert,
            moments + rank * self.region,
            moments + (self.mesh.dp + rank) * self.region,
        )
        return tuple(Region(a, b, place) for a, b, place in zip(borders, borders[1:], places, strict=False))

    @property
    def _tail_place(self) -> int:
        return self.dense + self.mesh.ep * self.expert + 2 * self.mesh.dp * self.region


def _padded(elements: int, parts: int) -> int:
    """Rounded up so that it divides into `parts` aligned slices."""
    return -(-elements // (parts * ALIGN)) * parts * ALIGN


def _slice(start: int, length: int, index: int, parts: int) -> slice:
    size = length // parts
    return slice(start + index * size, start + (index + 1) * size)
