"""Starts processes joined by gloo, and waits for them."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def start(rank: Callable[..., None], world: int, *given: Any, preload: str, seconds: float = 60) -> None:
    """`rank(number, *given)` in each of `world` processes, all of which must end well in time.

    Processes forked from a server that has torch loaded, and the module `preload`, start in a tenth of the time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", preload])
    ranks = [context.Process(target=rank, args=(number, *given)) for number in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
    assert [process.exitcode for process in ranks] == [0] * world


def join(rank: int, world: int, folder: Path) -> None:
    """Within such a process: it becomes a rank of the default group, on one thread."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
