"""Carries out the controller's orders on this node, each once, and reports what became of it."""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.actions import (
    Action,
    DeliverVote,
    EndJob,
    InjectDrill,
    Noted,
    Outcome,
    PrepareStandby,
    Replay,
    StartGeneration,
    StopGeneration,
    Unsupported,
)
from agent.history import History
from agent.local import Message
from agent.monitor import Monitor, Watched
from agent.peers import PeerError, fetch_slot, slots_path
from agent.reports import Reports
from agent.roster import Member, Roster
from agent.standbys import Standbys
from agent.telemetry import Telemetry, traceparent

log = logging.getLogger(__name__)

#: For an order without a deadline: longer than any of them takes, so that none is held for ever.
LONGEST_S = 120.0


class OrderFailed(RuntimeError):
    """An order cannot be carried out; the message says why."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What orders work on. `fetch` reads a peer's slot; `controller_pid` is 0 unless it runs on this host."""

    node: str
    runtime: Path
    slots: Path
    roster: Roster
    standbys: Standbys
    monitor: Monitor
    reports: Reports
    history: History
    telemetry: Telemetry
    controller_pid: Callable[[], int]
    fetch: Callable[..., Awaitable[Any]] = fetch_slot


class Orders:
    """Takes orders. Invariant: no worker of a generation is promoted once that generation was stopped here."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._running: dict[str, asyncio.Task[None]] = {}
        self._stopped: dict[str, int] = {}
        self._replays: dict[str, asyncio.Future[Message]] = {}
        self._handlers: dict[type[Action], Callable[[Any, str], Awaitable[None]]] = {
            PrepareStandby: self._prepare,
            StopGeneration: self._stop,
            StartGeneration: self._start,
            Replay: self._replay,
            DeliverVote: self._deliver,
            InjectDrill: self._inject,
            EndJob: self._end,
            Noted: self._note,
            Unsupported: self._refuse,
        }

    def receive(self, action: Action) -> None:
        """Begin an order, or answer one that is done already; one that is under way answers by itself."""
        outcome = self._around.history.outcome(action.id)
        if outcome is not None:
            self._answer(action, outcome, action.traceparent)
        elif action.id not in self._running:
            self._running[action.id] = task = asyncio.create_task(self._carry_out(action))
            task.add_done_callback(lambda task: self._ended(action, task))

    def replayed(self, message: Message) -> None:
        """A standby answered a replay."""
        waiting = self._replays.get(str(message["action_id"]))
        if waiting is not None and not waiting.done():
            waiting.set_result(message)

    async def close(self) -> None:
        """Drop what is under way."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, action: Action, task: asyncio.Task[None]) -> None:
        self._running.pop(action.id, None)
        if not task.cancelled() and task.exception() is not None:
            log.error("order %s broke off", action.id, exc_info=task.exception())

    async def _carry_out(self, action: Action) -> None:
        name = _snake(type(action).__name__)
        with self._around.telemetry.span(
            name, action.traceparent, action=action.id, job=action.job, generation=action.generation
        ) as span:
            trace = traceparent(span)
            outcome = await self._outcome(action, trace)
            span.set_attribute("assay.outcome", outcome.outcome)
        self._around.history.complete(action.id, outcome)
        self._answer(action, outcome, trace)

    async def _outcome(self, action: Action, trace: str) -> Outcome:
        left = action.deadline - time.time() if action.deadline else LONGEST_S
        if left <= 0:
            return Outcome("failed", "it came after its deadline")
        try:
            async with asyncio.timeout(left):
                await self._handlers[type(action)](action, trace)
        except TimeoutError:
            return Outcome("failed", "it was not done by its deadline")
        except (OrderFailed, PeerError, OSError) as error:
            return Outcome("failed", str(error))
        return Outcome("done")

    def _answer(self, action: Action, outcome: Outcome, trace: str) -> None:
        body = {"action_id": action.id, "outcome": outcome.outcome, "detail": outcome.detail}
        self._around.reports.say("action_result", body, traceparent=trace)

    async def _prepare(self, action: PrepareStandby, _trace: str) -> None:
        self._around.standbys.want(action.job or _job(action.spec), action.spec)

    async def _stop(self, action: StopGeneration, _trace: str) -> None:
        self._stopped[action.job] = max(action.generation, self._stopped.get(action.job, 0))
        await self._finish(action.job, action.generation, f"generation {action.generation} was stopped")

    async def _start(self, action: StartGeneration, trace: str) -> None:
        self._fence(action)
        await self._finish(action.job, action.generation - 1, f"generation {action.generation} starts")
        self._fence(action)
        chosen = [(p.rank, self._standby(p.standby)) for p in action.ranks if p.node == self._around.node]
        if not chosen:
            raise OrderFailed("no rank of the generation is placed on this node")
        self._around.standbys.starting(action.job)
        for rank, member in chosen:
            self._promote(action, rank, member, trace)

    def _fence(self, action: Action) -> None:
        newest = max((m.generation for m in self._around.roster.workers(action.job)), default=0)
        if action.generation <= self._stopped.get(action.job, 0):
            raise OrderFailed(f"generation {action.generation} was stopped already")
        if action.generation <= newest:
            raise OrderFailed(f"generation {newest} runs here already")

    def _standby(self, standby: str) -> Member:
        member = self._around.roster.get(standby)
        if member is None or not member.ready or member.promoted or member.cause or member.gone:
            raise OrderFailed(f"standby {standby} is gone")
        return member

    def _promote(self, action: StartGeneration, rank: int, member: Member, trace: str) -> None:
        """Hand the seat to a standby; from here on it is a worker."""
        around = self._around
        slots = slots_path(around.slots, action.job, rank)
        assignment = {
            "job": action.job,
            "generation": action.generation,
            "rank": rank,
            "world": _world(action.spec),
            "spec": action.spec,
            "rendezvous": action.rendezvous,
            "slots": str(slots),
            "drills": list(action.drills),
            "traceparent": trace,
            "controller_pid": around.controller_pid(),
            "action_id": action.id,
        }
        gang = around.standbys.gang
        if gang is None or not gang.send({"t": "promote", "standby": member.standby, "assignment": assignment}):
            raise OrderFailed("the gang is gone")
        around.roster.promoted(member, action.generation, rank)
        around.monitor.watch(Watched(action.job, action.generation, rank, member.pid, slots))

    async def _finish(self, job: str, generation: int, detail: str) -> None:
        """End the job's workers up to `generation`, and wait until each is proven gone."""
        members = [m for m in self._around.roster.workers(job) if m.generation <= generation]
        self._around.roster.end(members, "stopped", detail)
        await asyncio.gather(*(member.over.wait() for member in members))

    async def _replay(self, action: Replay, _trace: str) -> None:
        ready = [m for m in self._around.roster.standbys(action.job) if m.ready]
        if not ready:
            raise OrderFailed("no standby is ready")
        state = self._around.runtime / "replay" / f"{len(self._replays)}-{action.step}-{action.rank}.state"
        state.parent.mkdir(exist_ok=True)
        try:
            # The step's gradients follow from the state committed before it.
            record = await self._around.fetch(action.source, action.job, action.source_rank, action.step - 1, state)
            message = await self._ask(action, ready[0], state, record)
        finally:
            state.unlink(missing_ok=True)
        if message.get("body") is None:
            raise OrderFailed(f"the standby could not replay: {message.get('error') or 'no reason given'}")
        known = {"job": action.job, "generation": action.generation, "step": action.step, "rank": action.rank}
        self._around.reports.say(
            "replay_result", {**known, **message["body"], "action_id": action.id}, traceparent=action.traceparent
        )

    async def _ask(self, action: Replay, member: Member, state: Path, record: Any) -> Message:
        """Have a standby recompute; it stays a standby."""
        request = {
            "spec": action.spec,
            "step": action.step,
            "rank": action.rank,
            "attempt": action.attempt,
            "state": str(state),
            "digest": f"{record.digest:016x}",
            "action_id": action.id,
        }
        gang = self._around.standbys.gang
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        if gang is None or not gang.send({"t": "replay", "standby": member.standby, "request": request}):
            raise OrderFailed("the gang is gone")
        ended = asyncio.ensure_future(member.over.wait())
        self._replays[action.id] = answer
        waited: set[asyncio.Future[Any]] = {answer, ended}
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise OrderFailed("the standby ended during the replay")
            return answer.result()
        finally:
            ended.cancel()
            del self._replays[action.id]

    async def _deliver(self, action: DeliverVote, _trace: str) -> None:
        vote = {"t": "vote", "step": action.step, "rank": action.rank, "votes": list(action.votes)}
        self._tell_workers(action, vote)

    async def _inject(self, action: InjectDrill, _trace: str) -> None:
        self._tell_workers(action, {"t": "drill", "drill": action.drill})

    def _tell_workers(self, action: Action, message: Message) -> None:
        clients = [m.client for m in self._around.roster.workers(action.job) if m.client is not None]
        told = [client.send(message) for client in clients]
        if not any(told):
            raise OrderFailed(f"no worker of job {action.job} runs here")

    async def _end(self, action: EndJob, _trace: str) -> None:
        around = self._around
        around.standbys.forget(action.job)
        newest = max((m.generation for m in around.roster.workers(action.job)), default=action.generation)
        self._stopped[action.job] = max(newest, action.generation, self._stopped.get(action.job, 0))
        await self._finish(action.job, newest, f"the job is {action.outcome}")
        around.monitor.forget_job(action.job)
        remove_slots(around.slots, action.job, keep=())

    async def _note(self, _action: Noted, _trace: str) -> None:
        """The controller's own work, which an agent only takes note of."""

    async def _refuse(self, action: Unsupported, _trace: str) -> None:
        raise OrderFailed(f"this agent cannot carry out {action.kind}")


def remove_slots(folder: Path, job: str, keep: Sequence[int]) -> None:
    """Delete the job's slots, except those of the ranks to `keep`. Who has them mapped keeps them until it unmaps."""
    kept = {slots_path(folder, job, rank) for rank in keep}
    for path in folder.glob("*.slots"):
        if path.name.rpartition("-")[0] == job and path not in kept:
            path.unlink(missing_ok=True)


def _job(spec: str) -> str:
    """The job that a specification names. Raises OrderFailed."""
    try:
        return str(json.loads(spec)["job"])
    except (ValueError, KeyError, TypeError) as error:
        raise OrderFailed(f"the specification names no job: {error!r}") from error


def _world(spec: str) -> int:
    """How many ranks a specification asks for. Raises OrderFailed."""
    try:
        return int(json.loads(spec)["world"])
    except (ValueError, KeyError, TypeError) as error:
        raise OrderFailed(f"the specification has no world: {error!r}") from error


def _snake(name: str) -> str:
    """StartGeneration -> start_generation."""
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")
