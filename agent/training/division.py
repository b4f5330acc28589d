"""How the ranks of a generation divide a step's reduction and update among themselves: all do all of it."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from agent.slots import ShardDigests
from agent.training.agreement import Again, Hashes, agree
from agent.training.collective import Group
from agent.training.layout import State, StateLayout
from agent.training.optimizer import Pass, update
from agent.training.reduction import Reduction, squared_norm
from agent.training.strays import Explained, explained
from agent.training.summing import Sum
from diagnostics.sensors.digest import digest
from diagnostics.sensors.multilinear import MASK, signed


class Division(Protocol):
    """What the step needs to know of where gradients are summed and states updated."""

    @property
    def compared(self) -> int:
        """Checks that `advance` makes where it is given a key."""

    def reduce(self, gradients: Tensor, key: int | None) -> Reduction:
        """Sum float32 [flat] over the ranks in place, at least where this rank optimises. Raises PeerLost.

        With a `key` all that is given, added and handed out is compared, bit for bit. If some of it failed on any rank,
        its gate alarms, and the gradients may hold no sum.
        """

    def explain(self, reduction: Reduction) -> tuple[Explained, ...]:
        """What there is to judge the last sum by, of all ranks and the same on each; while the gradients are as it left
        them. Every rank calls it alike. Raises PeerLost.
        """

    def advance(
        self, old: State, new: State, gradients: Tensor, change: Pass, beside: Callable[[], None]
    ) -> tuple[int, ShardDigests | None]:
        """Write the state after the step into `new`; `beside` writes the biases and meta there.

        Returns the 64-bit digest of the job's state, and those of the shard if it is divided. Raises PeerLost, and
        Unlike where what ranks hand each other is not what was written, or what all should make is not the same.
        """

    def settle(self, state: State) -> tuple[int, ShardDigests | None]:
        """Complete a state that was restored: replicas are made, digests taken as `advance` gives them.

        Raises PeerLost.
        """


class Replicated:
    """Every rank updates a whole state of its own, which all compare before any of them commits it."""

    compared = 0

    def __init__(self, layout: StateLayout, group: Group) -> None:
        self._layout = layout
        self._group = group
        self._copy = 0  # hash of the step's sum, the same on all ranks once the gate has passed; 0: unchecked
        self._sum = Sum(group.everybody(), "gradient")

    def reduce(self, gradients: Tensor, key: int | None) -> Reduction:
        """Each rank adds up an equal part, then all receive all parts.

        They tell each other the hashes of their parts, and whether what they added was given to them as it had been
        announced. If not, nothing is handed out: the gradients still hold what was given, to be judged by.
        """
        total, checked = self._sum, key is not None and self._group.world > 1
        total.reduce(gradients, checked)
        rows = self._group.gather([signed(total.said), len(total.strays)]) if checked else []
        if any(failed for _, failed in rows):
            return Reduction(0.0, total.checks, tuple(total.strays))
        total.gather()
        norm, odd = squared_norm([gradients[self._equal_part(gradients.numel())]], self._group.rank, checked)
        self._copy = total.hold([said & MASK for said, _ in rows]) if checked else 0
        return Reduction(norm, total.checks + checked, (*total.strays, *odd), self._copy)

    def explain(self, reduction: Reduction) -> tuple[Explained, ...]:
        """See `Division`."""
        return explained(self._group, reduction.strays, [self._sum])

    def _equal_part(self, elements: int) -> slice:
        """Of whose norm this rank tells the others."""
        part = -(-elements // self._group.world)
        return slice(self._group.rank * part, (self._group.rank + 1) * part)

    def advance(
        self, old: State, new: State, gradients: Tensor, change: Pass, beside: Callable[[], None]
    ) -> tuple[int, None]:
        """One pass over the state, which is hashed while it is written; all ranks must have made the same.

        Raises Unlike, with the pass's `key`, where they have not. Without a key the next gate tells.
        """

        def made(again: bool) -> int:
            beside()
            layout = self._layout
            totals = update(layout, old, new, gradients, change, again)
            return (sum(map(sum, totals)) + digest(new.words[layout.tail :], layout.tail)) & MASK

        def look() -> Again:
            return Again(Hashes(self._layout.digest(old), digest(gradients)), made(again=True))

        first = made(again=False)
        if change.key is not None and self._group.world > 1:
            agree(self._group, first, Hashes(change.state, self._copy), look)
        return first, None

    def settle(self, state: State) -> tuple[int, None]:
        """There is nothing to complete."""
        return self._layout.digest(state), None
