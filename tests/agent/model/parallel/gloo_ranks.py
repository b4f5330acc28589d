"""Four real processes joined by gloo that work through a list of cases; started once for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gloo_start import join, start
from lockstep import batch, loss_and_gradients

from agent.model import V3, V3Config
from agent.model.parallel.process_group import ProcessGroup, groups

WORLD = 4


@dataclass(frozen=True)
class Case:
    """One backward on every rank, in expert groups of ep ranks with nodes of local ones."""

    name: str
    config: V3Config
    dtype: torch.dtype
    ep: int
    local: int
    seed: int
    sequences: int = 4  # of all ranks together
    time: int = 16
    bias: tuple[float, ...] = ()  # of every router

    def model(self, parallel: Any = None) -> V3:
        """The model of a rank, or the whole one."""
        model = V3(self.config, self.dtype, parallel)
        model.initialise(self.seed)
        for router in model.routers():
            if self.bias:
                router.router_bias.copy_(torch.tensor(self.bias))
        return model

    def tokens(self) -> torch.Tensor:
        """The samples of all ranks."""
        return batch(self.config, self.sequences, self.time, self.seed)


def run(cases: list[Case], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What each rank found for each case, by name."""
    start(_rank, WORLD, cases, folder, preload="agent.model")
    return {c.name: [torch.load(folder / f"{c.name}-{r}.pt", weights_only=False) for r in range(WORLD)] for c in cases}


def _rank(rank: int, cases: list[Case], folder: Path) -> None:
    join(rank, WORLD, folder)
    places = {key: groups(rank, WORLD, *key) for key in sorted({(case.ep, case.local) for case in cases})}
    for case in cases:
        model = case.model(places[case.ep, case.local])
        found = loss_and_gradients(model, case.tokens().chunk(WORLD)[rank])
        torch.save(found, folder / f"{case.name}-{rank}.pt")
    torch.save(raw_exchanges(rank), folder / f"raw-{rank}.pt")
    (folder / f"lost-{rank}").write_text(lost_peer(rank))
    dist.destroy_process_group()


def lost_peer(rank: int) -> str:
    """What the others' exchange raises when the last rank leaves instead of taking part; nothing if it does not."""
    if rank == WORLD - 1:
        return ""
    try:
        ProcessGroup(dist.group.WORLD).exchange(torch.zeros(WORLD, 3), [1] * WORLD, [1] * WORLD)
    except RuntimeError as error:
        return str(error)
    return ""


def raw_exchanges(rank: int) -> dict[str, torch.Tensor]:
    """Rank r sends r + d rows to rank d, all of value 10 r + d, in every dtype that travels."""
    hop = ProcessGroup(dist.group.WORLD)
    send = [rank + d if (rank, d) != (0, 0) else 0 for d in range(WORLD)]
    receive = [source + rank for source in range(WORLD)]
    values = torch.tensor([10 * rank + d for d in range(WORLD) for _ in range(send[d])])
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.uint8, torch.int64):
        found[str(dtype)] = hop.exchange(values.to(dtype).unsqueeze(1).repeat(1, 3), send, receive)
    nothing = hop.exchange(torch.zeros(0, 3), [0] * WORLD, [0] * WORLD)
    return {**found, "nothing": nothing}
