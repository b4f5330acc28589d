"""Blocks of work on Ray actors: what a lost actor has not finished is given to another, minus what killed it."""

from __future__ import annotations

import logging
import os
import resource
import secrets
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.campaign.kept import append, missing, path_of

#: What a process may map beyond what it has mapped when it begins: a struck count must not fill the machine's memory.
ROOM_BYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class Block:
    """Faults that are tried one after another. place: what they share, e.g. the precision; set up once for all."""

    number: int
    place: str
    indices: tuple[int, ...]


class Worker(Protocol):
    """What does a block's work, in a process of its own."""

    def line(self, block: Block, index: int) -> dict[str, Any]:
        """The record of one fault."""


class _Shard:
    """An actor: makes a worker when the first block comes, then writes one line after another."""

    def __init__(self, make: Callable[[], Worker]) -> None:
        torch.set_num_threads(1)
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (mapped + ROOM_BYTES, mapped + ROOM_BYTES))
        self._worker = make()

    def run(self, block: Block, folder: Path) -> int:
        """Work off what the block lacks; its number."""
        for index in missing(folder, block.number, block.indices):
            append(path_of(folder, block.number), self._worker.line(block, index))
        return block.number


class Pool:
    """So many actors on this machine's Ray, which is started for them and ended after them.

    While it is open, what is printed goes to stderr: Ray reports there what happens to its workers, and stdout belongs
    to the document.
    """

    def __init__(self, shards: int) -> None:
        self._shards = shards
        self._aside = redirect_stdout(sys.stderr)

    def __enter__(self) -> Pool:
        # Ray executes what it is sent: only this process, which starts it, may send. How to authenticate it reads when
        # it is imported.
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32), RAY_USAGE_STATS_ENABLED="0")
        self._ray = import_module("ray")
        self._ray.init(
            address="local",
            num_cpus=self._shards,
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
        )
        self._aside.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()
        self._aside.__exit__(None, None, None)

    def run(
        self,
        make: Callable[[], Worker],
        blocks: Sequence[Block],
        folder: Path,
        lost: Callable[[Block, int], dict[str, Any]],
    ) -> Iterator[Block]:
        """Work all blocks off and yield each when it is done; those that are complete need no actor.

        `lost` makes the record of a fault at which two actors died: one may have been killed from outside.
        """
        deaths: Counter[int] = Counter()
        waiting = deque(block for block in blocks if missing(folder, block.number, block.indices))
        todo = {block.number for block in waiting}
        yield from (block for block in blocks if block.number not in todo)
        running: dict[Any, tuple[Any, Block]] = {}
        for _ in range(min(self._shards, len(waiting))):
            self._give(self._actor(make), waiting.popleft(), folder, running)
        while running:
            (done,), _rest = self._ray.wait(list(running))
            actor, block = running.pop(done)
            try:
                self._ray.get(done)
            except self._ray.exceptions.RayActorError:
                left = missing(folder, block.number, block.indices)
                deaths.update(left[:1])
                if left and deaths[left[0]] == 2:
                    append(path_of(folder, block.number), lost(block, left[0]))
                actor = self._actor(make)
                waiting.appendleft(block)
            else:
                yield block
            if waiting:
                self._give(actor, waiting.popleft(), folder, running)

    def _actor(self, make: Callable[[], Worker]) -> Any:
        return self._ray.remote(num_cpus=1, max_restarts=0)(_Shard).remote(make)

    def _give(self, actor: Any, block: Block, folder: Path, running: dict[Any, tuple[Any, Block]]) -> None:
        running[actor.run.remote(block, folder)] = (actor, block)
