"""What expert parallelism asks of a network: ranks that exchange rows, and where a rank stands among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from agent.model.config import ConfigError, V3Config


class Transport(Protocol):
    """Ranks that exchange rows: one hop of expert parallelism. Every rank makes the same calls in the same order."""

    @property
    def world(self) -> int:
        """Ranks in this hop, this one included."""

    def exchange(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Give each rank its rows and take what each has for this one. Not differentiable.

        Args:
            rows: [sum(send), ...], contiguous, of any dtype, sorted by destination; there may be none.
            send: rows for each rank of the hop.
            receive: rows from each rank of the hop.

        Returns:
            [sum(receive), ...], sorted by source.
        """


@dataclass(frozen=True)
class Echo:
    """A hop without peers, whose rows come back as if received: for a rank that is alone, and to warm kernels up."""

    world: int

    def exchange(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """``rows`` themselves; see `Transport`.

        Raises:
            ValueError: other rows are expected than are sent.
        """
        if list(send) != list(receive):
            raise ValueError(f"receive: an echo gives back what is sent, {list(send)}, not {list(receive)}")
        return rows


def _nobody(_numbers: Tensor) -> None:
    """Nobody wants to know."""


@dataclass(frozen=True)
class ExpertParallel:
    """The place of one rank in a group of ep = nodes * local ranks, which together hold every routed expert once.

    Ranks of a node are adjacent: rank = node * local + index in the node. Each holds equally many experts, in order, so
    that a node holds a run of them, and whole groups of experts where groups divide among the nodes.

    Raises:
        ConfigError: ``rank`` is none of the group.
    """

    rank: int
    across: Transport  # the ranks of equal index on every node; its world is nodes
    within: Transport  # the ranks of this node; its world is local
    # Told, in each layer, which of this rank's experts the rows that came are for: int64 [rows, K], -1: none.
    served: Callable[[Tensor], None] = _nobody

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.ep:
            raise ConfigError("rank", f"{self.rank} is none of the {self.ep} ranks of an expert group")

    @property
    def ep(self) -> int:
        """Ranks among which the experts are divided."""
        return self.across.world * self.within.world

    @property
    def node(self) -> int:
        """The node of this rank, within the group."""
        return self.rank // self.within.world

    def experts(self, config: V3Config) -> range:
        """The experts of each layer that this rank holds.

        Raises:
            ConfigError: they do not divide among the ranks.
        """
        if config.n_routed_experts % self.ep:
            raise ConfigError("ep", f"{config.n_routed_experts} routed experts do not divide among {self.ep} ranks")
        each = config.n_routed_experts // self.ep
        return range(self.rank * each, (self.rank + 1) * each)
