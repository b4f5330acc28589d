"""The active controller: takes what agents and operators say, has it decided and stored, and then carries it out."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace

from controller import lease as leasing
from controller.core import events, machine
from controller.core.actions import Action
from controller.core.state import ACTIVE
from controller.executor import Executor
from controller.recorder import Recorder
from controller.rpc.agents import Sessions
from controller.rpc.convert import Change, HelloMessage
from controller.rpc.operators import ConflictError
from controller.store.history import find_change
from controller.store.opening import Store
from controller.store.reports import Report
from controller.store.writer import Unit, Writer
from controller.telemetry import Metrics

log = logging.getLogger(__name__)

# A Tick that is due again at once would spin; core's shortest wait is a second.
TICK_FLOOR_S = 0.02


class ActiveController:
    """Runs on one event loop. Decisions are made between awaits, so they are serial; commits follow in their order.

    Invariant: an action reaches the executor, and a report its acknowledgement, only after their commit.
    """

    def __init__(
        self, store: Store, lease: leasing.Lease, writer: Writer, recorder: Recorder, metrics: Metrics
    ) -> None:
        """Take over with a lease; `start` begins."""
        self.sessions = Sessions(lease.epoch)
        self.executor = Executor(self.sessions, _local)
        self.changed = asyncio.Event()
        self._store = store
        self._lease = lease
        self._writer = writer
        self._recorder = recorder
        self._metrics = metrics
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._committing: asyncio.Queue[tuple[Future[None], list[Action], list[str]]] = asyncio.Queue()
        self._due = asyncio.Event()
        self._changing = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        self._closing = False

    async def start(self) -> None:
        """Tell the decisions that a controller is here, and begin to carry out what was left."""
        outstanding = list(self._recorder.state.outstanding.values())
        await self.executor.submit(outstanding)
        self._run(self._publish())
        self._run(self._tick())
        self._run(self._heartbeat())
        taken = events.LeaseAcquired(
            time=self._recorder.now(),
            epoch=self._lease.epoch,
            unclean=self._lease.unclean,
            last_seen=self._lease.last_seen,
        )
        await self._decided(taken)
        log.info("epoch %d, %d actions outstanding", self._lease.epoch, len(outstanding))

    async def failed(self) -> None:
        """Wait for the failure after which nothing can be stored; raises it."""
        await asyncio.shield(self._failed)

    def closing(self) -> None:
        """Expect streams to break: it is us who end them."""
        self._closing = True

    async def close(self) -> None:
        """Stop deciding. The writer still commits what was decided."""
        self.closing()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # What the agents' service needs (rpc.agents.Gateway).

    def epoch(self) -> int:
        """Give the lease's epoch."""
        return self._lease.epoch

    def host(self) -> str:
        """Name this host."""
        return socket.gethostname()

    async def hello(self, hello: HelloMessage) -> int:
        """Take note of an agent; its event is durable before it is welcomed."""
        node, epoch = hello.event.node, hello.event.epoch
        known = self._recorder.state.nodes.get(node)
        if known is None or epoch >= known.epoch:
            await self._decided(replace(hello.event, time=self._recorder.now()))
        return self._recorder.ingest.mark(node, epoch)

    def linked(self, hello: HelloMessage) -> None:
        """Send the node what it has not answered."""
        self._metrics.nodes.set(len(self.sessions))
        self._run(self.executor.on_hello(hello.event.node, hello.completed))

    def reports(self, node: str, epoch: int, reports: Sequence[Report]) -> Awaitable[None]:
        """Take reports: rows and decisions go into one unit, whose commit is the acknowledgement."""
        unit = Unit()
        with self._whole():
            ordered = self._recorder.reports(unit, node, epoch, reports)
        answered = [report.body.action_id for report in reports if isinstance(report.body, events.ActionResult)]
        return self._commit(unit, ordered, answered)

    def lost(self, node: str, epoch: int) -> None:
        """Note a broken link, unless we broke it ourselves."""
        self._metrics.nodes.set(len(self.sessions))
        if not self._closing:
            self._decided(events.LinkLost(time=self._recorder.now(), node=node, epoch=epoch))

    # What the operators' service needs (rpc.operators.Operations).

    def now(self) -> float:
        """Give the time of the next decision."""
        return self._recorder.now()

    def job_active(self, job: str) -> bool | None:
        """Say whether the job runs or waits; None if it is unknown."""
        known = self._recorder.state.jobs.get(job)
        return None if known is None else known.status in ACTIVE

    async def change(self, kind: str, request: str, change: Change, event: events.Event, reply: str) -> str:
        """Record and decide an operator's change, once per key."""
        async with self._changing:
            return await self._change_once(kind, request, change, event, reply)

    async def _change_once(self, kind: str, request: str, change: Change, event: events.Event, reply: str) -> str:
        if change.key:
            done = await asyncio.to_thread(find_change, self._store, change.key)
            if done is not None and done[0] != request:
                raise ConflictError(f"the key {change.key!r} was used for another request")
            if done is not None:
                return done[1]
        unit = Unit()
        with self._whole():
            ordered = self._recorder.decide(unit, event)
        unit.add(
            "change",
            key=change.key or f"{kind}/{self._recorder.seq}",
            kind=kind,
            actor=change.actor,
            reason=change.reason,
            time=event.time,
            request=request,
            reply=reply,
        )
        await self._commit(unit, ordered, [])
        return reply

    # Inside.

    def _decided(self, event: events.Event) -> asyncio.Future[None]:
        unit = Unit()
        with self._whole():
            ordered = self._recorder.decide(unit, event)
        return self._commit(unit, ordered, [])

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """End the controller if a decision was made and not written down: it must not go on from a state of its own."""
        try:
            yield
        except BaseException as error:
            self._fail(error)
            raise

    def _commit(self, unit: Unit, ordered: list[Action], answered: list[str]) -> asyncio.Future[None]:
        """Queue a unit for the writer and its actions for the executor; the result is done when it is durable."""
        stored = self._writer.submit(unit)
        self._committing.put_nowait((stored, ordered, answered))
        self._due.set()
        return asyncio.wrap_future(stored)

    async def _publish(self) -> None:
        """Carry out what has been committed, in the order of the decisions."""
        while True:
            stored, ordered, answered = await self._committing.get()
            await asyncio.wrap_future(stored)
            for action_id in answered:
                self.executor.on_result(action_id)
            await self.executor.submit(ordered)
            self.changed.set()

    async def _tick(self) -> None:
        """Wake the decisions when something is due, and give up actions whose time is over."""
        while True:
            self._due.clear()
            times = [machine.next_deadline(self._recorder.state), self.executor.next_deadline()]
            due = min((time for time in times if time is not None), default=None)
            if due is None or due > self._recorder.now():
                with contextlib.suppress(TimeoutError):
                    wait = None if due is None else max(TICK_FLOOR_S, due - self._recorder.now())
                    async with asyncio.timeout(wait):
                        await self._due.wait()
                continue
            for result in self.executor.expire(self._recorder.now()):
                self._decided(result)
            self._decided(events.Tick(time=self._recorder.now()))
            await asyncio.sleep(TICK_FLOOR_S)

    async def _heartbeat(self) -> None:
        """Keep the lease: every commit renews it, and an empty one does when nothing happens."""
        while True:
            await asyncio.sleep(leasing.HEARTBEAT_S)
            await asyncio.wrap_future(self._writer.submit(Unit()))

    def _run(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.append(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Forget a finished task; a failed one ends the controller."""
        self._tasks.remove(task)
        if not task.cancelled():
            error = task.exception()
            if error is not None:
                self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if not self._failed.done():
            self._failed.set_exception(error)


async def _local(action: Action) -> None:
    """Note what the controller has already done itself, in the transaction that stored the action."""
    log.info("%s: %s", action.id, action.reason)
