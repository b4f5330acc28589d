"""Keeps one warm worker for each job the controller wants one for, without disturbing a generation that starts."""

import asyncio
import logging
from collections.abc import Callable

from agent.local import Connection
from agent.roster import Member, Roster

log = logging.getLogger(__name__)

#: A standby that cannot be made is tried again after this, doubled each time: importing torch costs 1.4 s of a core.
RETRY_FIRST_S = 0.2
RETRY_CAP_S = 30.0


class Standbys:
    """Asks the gang for what is missing. `name()` gives each standby its own name."""

    def __init__(self, roster: Roster, name: Callable[[], str]) -> None:
        self._roster = roster
        self._name = name
        self._gang: Connection | None = None
        self._wanted: dict[str, str] = {}
        self._starting: set[str] = set()
        self._failures: dict[str, int] = {}

    @property
    def gang(self) -> Connection | None:
        """The gang's connection, if one is there."""
        return self._gang

    def gang_joined(self, gang: Connection) -> None:
        """A gang is there to make standbys."""
        self._gang = gang
        self._fill()

    def gang_left(self) -> None:
        """The gang is gone; what it owned goes with it."""
        self._gang = None

    def want(self, job: str, spec: str) -> None:
        """Keep a standby for `job`; one made for another version of its specification is replaced."""
        self._wanted[job] = spec
        self._failures.pop(job, None)
        for member in self._roster.standbys(job):
            if member.spec != spec:
                self.discard(member)
        self._fill()

    def forget(self, job: str) -> None:
        """Keep none for `job`, and let go of those there are."""
        self._wanted.pop(job, None)
        self._starting.discard(job)
        self._failures.pop(job, None)
        for member in self._roster.standbys(job):
            self.discard(member)

    def starting(self, job: str) -> None:
        """A generation of `job` starts here: make the next standby only once it trains, or ended."""
        self._starting.add(job)

    def trains(self, job: str) -> None:
        """The generation has done its first step, or ended before."""
        if job in self._starting:
            self._starting.discard(job)
            self._fill()

    def ready(self, member: Member) -> None:
        """A standby is warm."""
        self._failures.pop(member.job, None)

    def over(self, member: Member) -> None:
        """A member ended: replace it, at once if it had been warm, else after a while."""
        if member.promoted:
            self.trains(member.job)
        elif member.ready:
            self._fill()
        elif member.job in self._wanted:
            failures = self._failures[member.job] = self._failures.get(member.job, 0) + 1
            wait = min(RETRY_FIRST_S * 2 ** min(failures - 1, 10), RETRY_CAP_S)
            asyncio.get_running_loop().call_later(wait, self._fill)

    def discard(self, member: Member) -> None:
        """Let go of a standby: its gang is asked to, and its process is ended."""
        if self._gang is not None:
            self._gang.send({"t": "discard", "standby": member.standby})
        self._roster.end([member], "stopped", "no longer wanted")

    def _fill(self) -> None:
        if self._gang is None:
            return
        for job, spec in self._wanted.items():
            if job not in self._starting and not self._roster.standbys(job):
                member = self._roster.add(self._name(), job, spec)
                self._gang.send({"t": "prepare", "standby": member.standby, "spec": spec})
