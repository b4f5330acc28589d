"""The node's workers, warm and promoted: who they are, how they ended, and one report for each end."""

import asyncio
import logging
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from agent.actions import Process
from agent.local import Connection
from agent.monitor import Pidfd

log = logging.getLogger(__name__)

#: A worker whose method returned is ended by its gang in milliseconds; one that lingers is killed.
LINGER_S = 1.0
#: What a dead worker had sent is read in this time; longer only if a child of its own holds the socket open.
LAST_WORDS_S = 0.5


@dataclass(slots=True, eq=False)
class Member:
    """One worker process. A standby until it has a generation; then the rank of it.

    Invariant: `over` is set once, after the process is proven gone and all that it had sent was taken in.
    """

    standby: str
    job: str
    spec: str
    ready: bool = False
    pid: int = 0
    device: str = ""
    rendezvous: str = ""
    generation: int = 0
    rank: int = -1
    cause: str = ""
    detail: str = ""
    last_words: dict[str, Any] = field(default_factory=dict)
    handle: Pidfd | None = None
    client: Connection | None = None
    over: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def promoted(self) -> bool:
        """Whether it holds a rank."""
        return self.generation > 0

    @property
    def gone(self) -> bool:
        """Whether its process is known to have ended."""
        return self.handle is None or self.handle.ended()


class Roster:
    """Members by the standby's name. `on_over` is told of each end, `on_change` whenever the processes changed."""

    def __init__(self, on_over: Callable[[Member], None], on_change: Callable[[], None]) -> None:
        self._members: dict[str, Member] = {}
        self._on_over = on_over
        self._on_change = on_change

    def __iter__(self) -> Iterator[Member]:
        return iter(list(self._members.values()))

    def get(self, standby: str) -> Member | None:
        """The member that began as `standby`."""
        return self._members.get(standby)

    def add(self, standby: str, job: str, spec: str) -> Member:
        """A standby was asked for."""
        self._members[standby] = member = Member(standby, job, spec)
        return member

    def standbys(self, job: str) -> list[Member]:
        """The job's members without a rank, that have not ended."""
        return [m for m in self._members.values() if m.job == job and not m.promoted and not m.cause]

    def workers(self, job: str) -> list[Member]:
        """The job's members with a rank."""
        return [m for m in self._members.values() if m.job == job and m.promoted]

    def promoted(self, member: Member, generation: int, rank: int) -> None:
        """The member takes a seat."""
        member.generation, member.rank = generation, rank
        self._on_change()

    def joined(self, member: Member, client: Connection) -> None:
        """The member's process connected."""
        member.client = client
        self.is_process(member, client.pid)

    def is_process(self, member: Member, pid: int) -> None:
        """The member is process `pid`."""
        if member.pid or not pid:
            return
        member.pid = pid
        try:
            member.handle = Pidfd(pid, lambda: self._ended(member))
        except ProcessLookupError:
            self._ended(member)
        self._on_change()

    def left(self, client: Connection) -> None:
        """A connection ended; all it carried was taken in."""
        for member in list(self._members.values()):
            if member.client is client:
                member.client = None
                if member.pid and member.gone:
                    self._finish(member)

    def says(self, member: Member, cause: str, detail: str, words: dict[str, Any] | None = None) -> None:
        """The member ends, or has ended, for this cause; the first to say so is right. One that lingers is killed."""
        if not member.cause:
            member.cause, member.detail = cause, detail
            member.last_words = words or {}
        if member.pid == 0:
            self._finish(member)
        elif not member.over.is_set():
            asyncio.get_running_loop().call_later(LINGER_S, self._kill, member)

    def end(self, members: Iterable[Member], cause: str, detail: str) -> None:
        """Kill the members' processes."""
        for member in members:
            if not member.gone and not member.cause:
                member.cause, member.detail = cause, detail
            self._kill(member)
            if member.pid == 0:
                self.says(member, cause, detail)

    def processes(self) -> list[Process]:
        """The members' processes, as the controller knows them."""
        return [
            Process("worker" if m.promoted else "standby", m.pid, m.job, m.generation, m.rank)
            for m in self._members.values()
            if m.pid
        ]

    def _kill(self, member: Member) -> None:
        if member.handle is not None:
            member.handle.signal(signal.SIGKILL)

    def _ended(self, member: Member) -> None:
        """Its process is gone. What it had sent may still lie in the socket."""
        if member.client is None:
            self._finish(member)
        else:
            asyncio.get_running_loop().call_later(LAST_WORDS_S, self._finish, member)

    def _finish(self, member: Member) -> None:
        if member.over.is_set():
            return
        if not member.cause:
            member.cause, member.detail = "signal", "the process ended without a word"
        self._members.pop(member.standby, None)
        member.over.set()
        self._on_over(member)
        self._on_change()
