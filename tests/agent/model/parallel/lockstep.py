"""Ranks as threads of one process that take turns, and what every parity test compares: one rank with everything."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from agent.model import V3, V3Config
from agent.model.parallel import ExpertParallel

T = TypeVar("T")
#: A rank that makes one call fewer than the others leaves them waiting; far longer than any case takes.
_PATIENCE_S = 20.0


class Exchange(NamedTuple):
    """One call, as a rank made it; equal on all ranks of a group."""

    hop: str
    dtype: torch.dtype
    width: tuple[int, ...]  # of a row


class Switch:
    """Where the ranks of one hop meet."""

    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world, timeout=_PATIENCE_S)
        self.rows: list[tuple[Tensor, ...]] = [()] * world


class Lockstep:
    """`Transport` of one rank at a switch. ``calls``, ``sent`` and ``received`` keep what it did."""

    def __init__(self, name: str, switch: Switch, index: int, rank: Rank, turn: threading.Lock) -> None:
        self.name, self.switch, self.index, self.rank, self.turn = name, switch, index, rank, turn
        self.world = len(switch.rows)

    def exchange(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        assert rows.is_contiguous()
        assert rows.shape[0] == sum(send)
        assert len(send) == len(receive) == self.world
        self.switch.rows[self.index] = torch.split(rows.clone(), list(send))
        self.turn.release()
        try:
            self.switch.barrier.wait()
            taken = [self.switch.rows[source][self.index] for source in range(self.world)]
            self.switch.barrier.wait()
        finally:
            self.turn.acquire()
        assert [part.shape[0] for part in taken] == list(receive)
        self.rank.calls.append(Exchange(self.name, rows.dtype, tuple(rows.shape[1:])))
        self.rank.sent.append((self.name, rows, [n for d, n in enumerate(send) if d != self.index]))
        self.rank.received.append(torch.cat(taken))
        return self.rank.received[-1]


class Rank:
    """What one rank did."""

    def __init__(self) -> None:
        self.calls: list[Exchange] = []
        self.sent: list[tuple[str, Tensor, list[int]]] = []  # hop, rows, and how many went to each other rank
        self.received: list[Tensor] = []


class Ranks:
    """An expert group of threads. ``order`` gives who claims to be which rank; any but 0, 1, ... is a fault.

    One computes at a time, and the turn changes in exchanges only: emulated FP8 switches a setting of the process.
    """

    def __init__(self, ep: int, local: int, order: Sequence[int] | None = None) -> None:
        self.ep, self.local = ep, local
        self.turn = threading.Lock()
        self.ranks = [Rank() for _ in range(ep)]
        self.members = self.group("", order)

    def group(self, prefix: str, order: Sequence[int] | None = None) -> list[ExpertParallel]:
        """Each rank's place in a set of hops of their own, whose names begin with ``prefix``."""
        nodes = self.ep // self.local
        across, within = [Switch(nodes) for _ in range(self.local)], [Switch(self.local) for _ in range(nodes)]
        return [
            ExpertParallel(
                rank if order is None else order[rank],
                Lockstep(f"{prefix}across", across[rank % self.local], rank // self.local, self.ranks[rank], self.turn),
                Lockstep(f"{prefix}within", within[rank // self.local], rank % self.local, self.ranks[rank], self.turn),
            )
            for rank in range(self.ep)
        ]

    def run(self, work: Callable[[int], T]) -> list[T]:
        """What ``work`` gives on each rank."""

        def in_turn(rank: int) -> T:
            with self.turn:
                return work(rank)

        with ThreadPoolExecutor(self.ep, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(in_turn, range(self.ep)))

    def agree(self) -> None:
        """Every rank made the same calls in the same order."""
        for rank in self.ranks[1:]:
            assert rank.calls == self.ranks[0].calls


class Recorded:
    """A `Transport` that gives back what was received in a run before."""

    def __init__(self, world: int, received: list[Tensor]) -> None:
        self.world, self.received = world, received

    def exchange(self, _rows: Tensor, _send: Sequence[int], receive: Sequence[int]) -> Tensor:
        rows = self.received.pop(0)
        assert rows.shape[0] == sum(receive)
        return rows


def loss_and_gradients(model: V3, tokens: Tensor, documents: Tensor | None = None) -> dict[str, Any]:
    """One backward; an expert that was not called has no gradient."""
    # FP8's gradients need a scaled loss, as the engine has it; a power of two, taken out again.
    scale = 2.0**10 if model.compute_dtype == torch.float8_e4m3fn else 1.0
    result = model.loss(tokens, documents)
    (result.total * scale).backward()  # type: ignore[no-untyped-call]
    return {
        "loss": float(result.total.detach()),
        "gradients": {name: p.grad / scale for name, p in model.named_parameters() if p.grad is not None},
        "counts": result.counts,
        "crossing": result.crossing,
    }


def together(found: Sequence[dict[str, Any]]) -> tuple[float, dict[str, Tensor], Tensor]:
    """Loss, gradients and counts of all ranks as data parallelism reduces them: means over ranks, counts summed.

    The gradient of an expert already holds the tokens of its whole group.
    """
    world = len(found)
    gradients: dict[str, Tensor] = {}
    for one in found:
        for name, gradient in one["gradients"].items():
            gradients[name] = gradients.get(name, 0) + gradient / world
    counts = torch.stack([one["counts"] for one in found]).sum(0)
    return sum(one["loss"] for one in found) / world, gradients, counts


def deviation(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The worst relative L2 difference of any tensor; one that only one side has is measured against zero."""
    worst = 0.0
    for name in found.keys() | wanted.keys():
        one, other = found.get(name, torch.zeros(())), wanted.get(name, torch.zeros(()))
        norm = max(float(one.norm()), float(other.norm()))
        worst = max(worst, float((one - other).norm()) / norm if norm else 0.0)
    return worst


def batch(config: V3Config, sequences: int, time: int, seed: int) -> Tensor:
    """Random samples."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (sequences, time + 1 + config.mtp_depth), generator=generator)
