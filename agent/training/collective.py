"""The ranks of one generation as a process group: fenced rendezvous, exchanges in rank order, large and small."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # bound from C++

#: Longer than any hold at the gate: progress deadlines outside the process find a hang, not this.
PATIENCE = timedelta(minutes=30)
#: A generation whose ranks do not all arrive is started again, so waiting for them is bounded more tightly.
RENDEZVOUS = timedelta(seconds=60)

Result = TypeVar("Result")


class PeerLost(RuntimeError):
    """A collective failed because another rank is gone."""


class Group:
    """A gloo (CPU) or NCCL (GPU) group of `world` ranks, keyed by job and generation."""

    def __init__(self, endpoint: str, prefix: str, rank: int, world: int) -> None:
        host, port = endpoint.rsplit(":", 1)
        self.rank = rank
        self.world = world
        #: Surrounds the exchanges of a mesh, in which this rank depends on others' progress.
        self.waiting: Callable[[], AbstractContextManager[None]] = nullcontext
        try:
            store = TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=RENDEZVOUS)
            dist.init_process_group(
                "gloo", store=PrefixStore(prefix, store), rank=rank, world_size=world, timeout=PATIENCE
            )
            dist.barrier()
        except (RuntimeError, dist.DistError) as error:
            raise PeerLost(f"rendezvous {prefix} at {endpoint}: {error}") from error

    def gather(self, row: Sequence[int]) -> list[list[int]]:
        """All ranks' rows of int64, in rank order; every rank gives the same length."""
        mine = torch.tensor(row, dtype=torch.int64)
        parts = [torch.empty_like(mine) for _ in range(self.world)]
        self._run(dist.all_gather, parts, mine)
        return [part.tolist() for part in parts]

    def gather_objects(self, value: Any) -> list[Any]:
        """All ranks' values (plain data), in rank order. Not for the step's path."""
        values: list[Any] = [None] * self.world
        self._run(dist.all_gather_object, values, value)
        return values

    def send(self, tensor: Tensor, to: int) -> None:
        """Send to one rank, which calls `receive`."""
        self._run(dist.send, tensor, to)

    def receive(self, tensor: Tensor, source: int) -> None:
        """Receive into `tensor`."""
        self._run(dist.recv, tensor, source)

    def among(self, ranks: Sequence[int]) -> "Subgroup":
        """The process group of these ranks; every rank of the generation calls this, members or not."""
        return Subgroup(run(dist.new_group, list(ranks), PATIENCE), tuple(ranks), self.rank)

    def everybody(self) -> "Subgroup":
        """All ranks of the generation."""
        return Subgroup(None, tuple(range(self.world)), self.rank)

    def shift(self, mine: Tensor, before: Tensor) -> None:
        """Send `mine` to the next rank and receive the previous one's into `before`, around the ring."""
        to, source = (self.rank + 1) % self.world, (self.rank - 1) % self.world
        self._run(_together, [dist.P2POp(dist.isend, mine, to), dist.P2POp(dist.irecv, before, source)])

    def barrier(self) -> None:
        """Wait for every rank."""
        self._run(dist.barrier)

    def close(self) -> None:
        """Leave the group."""
        dist.destroy_process_group()

    @staticmethod
    def _run(operation: Any, *arguments: Any) -> None:
        run(operation, *arguments)


class Subgroup:
    """Some ranks of a generation, for what they alone hold; `None` stands for all of them.

    `members` are their numbers in the generation, in rank order, `rank` is this one's.
    """

    def __init__(self, handle: Any, members: tuple[int, ...], rank: int) -> None:
        self.handle = handle
        self.members = members
        self.rank = rank
        self.world = len(members)

    def trade(self, give: Sequence[Tensor], take: Sequence[Tensor]) -> None:
        """Send give[i] to the i-th member and receive take[i] from it, all at once; nothing empty, none to itself.

        Both are contiguous; what a member gives has the shape of what the other takes.
        """
        pairs = []
        for peer, mine, theirs in zip(self.members, give, take, strict=True):
            if peer != self.rank:
                pairs += [dist.P2POp(dist.isend, mine, peer, self.handle)] if mine.numel() else []
                pairs += [dist.P2POp(dist.irecv, theirs, peer, self.handle)] if theirs.numel() else []
        if pairs:
            run(_together, pairs)

    def all_gather(self, whole: Tensor, own: Tensor) -> None:
        """Put every rank's `own` into `whole`, in their order; `own` is a part of `whole`."""
        if self.world > 1 and whole.numel():
            run(dist.all_gather_single, whole, own.clone(), self.handle)

    def transpose(self, rows: Tensor) -> Tensor:
        """Give row i of `rows` [world, ...] to rank i; returns what each has for this one, in their order."""
        if self.world == 1:
            return rows
        arrived = torch.empty_like(rows)
        run(dist.all_to_all_single, arrived, rows.contiguous(), None, None, self.handle)
        return arrived


def run(operation: Callable[..., Result], *arguments: Any) -> Result:
    """A collective whose failure means that a rank is gone. Raises PeerLost."""
    try:
        return operation(*arguments)
    except (RuntimeError, dist.DistError) as error:
        raise PeerLost(f"{operation.__name__}: {error}") from error


def _together(pairs: list[dist.P2POp]) -> None:
    """Messages to and from others, all under way before the first is waited for."""
    for work in dist.batch_isend_irecv(pairs):
        work.wait()


def serve_rendezvous(host: str) -> tuple[TCPStore, str]:
    """Open a store on a free port of `host` for the generation this worker may become rank 0 of; keep the object.

    The store lives in the worker, not in the torch-free daemon: a generation ends with any of its ranks, so a store
    that ends with rank 0 loses nothing.
    """
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=RENDEZVOUS)
    return store, f"{host}:{store.port}"
