"""The ranks of one generation as a process group: fenced rendezvous, fixed buckets, small exchanges in rank order."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # bound from C++

#: Elements of a gradient bucket (4 MiB): a fixed layout, because gloo's bits depend on it.
BUCKET = 1 << 20
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

    def reduce(self, flat: Tensor) -> None:
        """Sum `flat` over all ranks in place, bucket by bucket in a fixed order."""
        if self.world == 1:
            return
        for bucket in buckets(flat):
            self._run(dist.all_reduce, bucket)

    def gather_tensor(self, mine: Tensor) -> Tensor:
        """All ranks' tensors of one shape and dtype, in rank order: [world, ...]."""
        whole = mine.new_empty(self.world * mine.numel())
        self._run(dist.all_gather_single, whole, mine.reshape(-1))
        return whole.view(self.world, *mine.shape)

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
        return Subgroup(run(dist.new_group, list(ranks), PATIENCE), len(ranks))

    def everybody(self) -> "Subgroup":
        """All ranks of the generation."""
        return Subgroup(None, self.world)

    def shift(self, mine: Tensor, before: Tensor) -> None:
        """Send `mine` to the next rank and receive the previous one's into `before`, around the ring."""
        to, source = (self.rank + 1) % self.world, (self.rank - 1) % self.world
        self._run(_exchange, mine, to, before, source)

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
    """Some ranks of a generation, for what they alone hold; `None` stands for all of them."""

    def __init__(self, handle: Any, world: int) -> None:
        self.handle = handle
        self.world = world

    def reduce_scatter(self, whole: Tensor, own: Tensor) -> None:
        """Sum `whole` over the ranks; each gets its equal part, in their order, in `own`, which lies in `whole`."""
        if self.world > 1 and whole.numel():
            summed = torch.empty_like(own)
            run(dist.reduce_scatter_single, summed, whole, dist.ReduceOp.SUM, self.handle)
            own.copy_(summed)

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


def buckets(flat: Tensor) -> list[Tensor]:
    """The parts of a flat gradient that are summed at once, sharing its memory."""
    return list(torch.split(flat, BUCKET)) if flat.numel() else []


def run(operation: Callable[..., Result], *arguments: Any) -> Result:
    """A collective whose failure means that a rank is gone. Raises PeerLost."""
    try:
        return operation(*arguments)
    except (RuntimeError, dist.DistError) as error:
        raise PeerLost(f"{operation.__name__}: {error}") from error


def _exchange(mine: Tensor, to: int, other: Tensor, source: int) -> None:
    """Send to one rank and receive from another at once."""
    pair = [dist.P2POp(dist.isend, mine, to), dist.P2POp(dist.irecv, other, source)]
    for work in dist.batch_isend_irecv(pair):
        work.wait()


def serve_rendezvous(host: str) -> tuple[TCPStore, str]:
    """Open a store on a free port of `host` for the generation this worker may become rank 0 of; keep the object.

    The store lives in the worker, not in the torch-free daemon: a generation ends with any of its ranks, so a store
    that ends with rank 0 loses nothing.
    """
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=RENDEZVOUS)
    return store, f"{host}:{store.port}"
