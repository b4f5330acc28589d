"""Ranks as threads of one process, and what every parity test compares: one rank with everything."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from agent.model import V3, V3Config
from agent.model.parallel import ExpertParallel

T = TypeVar("T")
#: A rank that makes one call fewer than the others would leave them waiting; far longer than any case takes.
_PATIENCE_S = 20.0


@dataclass
class Exchange:
    """One call, as a rank made it."""

    hop: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass
class Switch:
    """Where the ranks of one hop meet."""

    world: int
    barrier: threading.Barrier = field(init=False)
    rows: list[tuple[Tensor, ...]] = field(init=False)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.world, timeout=_PATIENCE_S)
        self.rows = [()] * self.world


class Lockstep:
    """`Transport` of one rank at a switch. ``misrouted`` swaps what goes to the first two ranks: a negative control."""

    def __init__(self, name: str, switch: Switch, index: int, log: list[Exchange], misrouted: bool = False) -> None:
        self.name, self.switch, self.index, self.log, self.misrouted = name, switch, index, log, misrouted
        self.world = switch.world

    def exchange(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        assert rows.is_contiguous()
        assert rows.shape[0] == sum(send)
        assert len(send) == len(receive) == self.world
        self.log.append(Exchange(self.name, rows.dtype, tuple(rows.shape[1:])))
        parts = list(torch.split(rows.clone(), list(send)))
        if self.misrouted and rows.dim() > 1 and parts[0].shape == parts[1].shape:
            parts[0], parts[1] = parts[1], parts[0]
        self.switch.rows[self.index] = tuple(parts)
        self.switch.barrier.wait()
        taken = [self.switch.rows[source][self.index] for source in range(self.world)]
        self.switch.barrier.wait()
        assert [part.shape[0] for part in taken] == list(receive)
        return torch.cat(taken)


class Ranks:
    """An expert group of threads."""

    def __init__(self, ep: int, local: int, misrouted: bool = False) -> None:
        self.ep = ep
        self.logs: list[list[Exchange]] = [[] for _ in range(ep)]
        nodes = ep // local
        across, within = [Switch(nodes) for _ in range(local)], [Switch(local) for _ in range(nodes)]
        self.members = [
            ExpertParallel(
                rank,
                Lockstep("across", across[rank % local], rank // local, self.logs[rank], misrouted),
                Lockstep("within", within[rank // local], rank % local, self.logs[rank], misrouted),
            )
            for rank in range(ep)
        ]

    def run(self, work: Callable[[ExpertParallel], T]) -> list[T]:
        """What ``work`` gives on each rank."""
        with ThreadPoolExecutor(self.ep) as pool:
            return list(pool.map(work, self.members))


def loss_and_gradients(model: V3, tokens: Tensor) -> dict[str, Any]:
    """One backward; an expert that was not called has no gradient."""
    # FP8's gradients need a scaled loss, as the engine has it; a power of two, taken out again.
    scale = 2.0**10 if model.compute_dtype == torch.float8_e4m3fn else 1.0
    result = model.loss(tokens)
    (result.total * scale).backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad / scale for name, p in model.named_parameters() if p.grad is not None}
    return {
        "loss": float(result.total.detach()),
        "gradients": gradients,
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
    """The worst relative L2 difference of any gradient; one that only one side has is measured against zero."""
    worst = 0.0
    for name in found.keys() | wanted.keys():
        one = found.get(name, torch.zeros(()))
        other = wanted.get(name, torch.zeros(()))
        norm = max(float(one.norm()), float(other.norm()))
        worst = max(worst, float((one - other).norm()) / norm if norm else 0.0)
    return worst


def batch(config: V3Config, sequences: int, time: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (sequences, time + 1 + config.mtp_depth), generator=generator)
