"""The session with the controller: reports go up in batches, orders come down, and a lost connection is made again."""

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, cast

import grpc

from agent import convert
from agent.actions import Action, Controller
from agent.history import History
from agent.outbox import Backlog, Outbox
from agent.spool import Entry
from assay.v1 import agent_pb2 as pb
from assay.v1 import agent_pb2_grpc

log = logging.getLogger(__name__)

#: A batch stays below the controller's message limit of 256 KiB, frame included, and below its limit of entries.
BATCH_BYTES = 200 << 10
BATCH_REPORTS = 500
#: With these answers the controller refuses what was said, not when: saying it again cannot help.
_REFUSED = frozenset({grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION})

_EOF: Any = cast(Any, grpc.aio).EOF
_Stub: Any = agent_pb2_grpc.AgentServiceStub


@dataclass(frozen=True, slots=True)
class Timing:
    """The link's times, in seconds."""

    #: Ordinary reports wait so long for company; step records arrive several a second and need no haste.
    batch: float = 0.2
    #: Decorrelated jitter: a controller is back within 2 s, and 2,000 agents must not all call in one instant.
    backoff_first: float = 0.05
    backoff_cap: float = 2.0
    #: A controller that has not answered a hello by then is stuck. Its start, migrations included, takes less.
    welcome: float = 5.0
    #: A session that lasted so long was a good one: the next begins without a longer wait.
    stable: float = 1.0
    #: What an earlier life left is given up when a reachable controller acknowledges none of it for so long.
    leftover: float = 10.0
    #: Pings find a controller's host that vanished without a word; gRPC servers allow no more than one in 5 s here.
    keepalive: float = 10.0
    keepalive_answer: float = 5.0


class Backoff:
    """Waits before the next attempt: uniform between `first` and three times the last one, at most `cap` (decorrelated
    jitter; M. Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog 2015)."""

    def __init__(self, first: float, cap: float, rng: random.Random) -> None:
        self._first = first
        self._cap = cap
        self._rng = rng
        self._last = first

    def next(self) -> float:
        """The next wait, in seconds."""
        self._last = min(self._cap, self._rng.uniform(self._first, 3 * self._last))
        return self._last

    def reset(self) -> None:
        """Begin with short waits again."""
        self._last = self._first


class SessionEnded(ConnectionError):
    """The session is over; `refused` means that the same session would be refused again."""

    def __init__(self, reason: str, refused: bool = False) -> None:
        super().__init__(reason)
        self.refused = refused


class Link:
    """Keeps a session with the controller at `endpoint` and empties `outbox` through it.

    `hello(epoch)` makes the first message; `on_action` takes each order of a controller that may command. What earlier
    lives left goes first, each under its own epoch, so that the controller can tell repetitions.
    """

    def __init__(
        self,
        endpoint: str,
        outbox: Outbox,
        history: History,
        hello: Callable[[int], pb.AgentMessage],
        on_action: Callable[[Action], None],
        *,
        leftovers: Sequence[Backlog] = (),
        timing: Timing | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.controller = Controller()
        self.connected = False
        self._endpoint = endpoint
        self._outbox = outbox
        self._history = history
        self._hello = hello
        self._on_action = on_action
        self._leftovers = list(leftovers)
        self._timing = timing or Timing()
        self._backoff = Backoff(self._timing.backoff_first, self._timing.backoff_cap, rng or random.Random())
        self._work = asyncio.Event()
        self._progress = asyncio.Event()
        self._careful_until = 0

    def wake(self) -> None:
        """Say that the outbox has something new."""
        self._work.set()

    async def run(self) -> None:
        """Keep a session until cancelled."""
        while True:
            backlog = self._leftovers[0] if self._leftovers else self._outbox
            try:
                await self._attempt(backlog)
            except SessionEnded as ended:
                log.info("no session with %s: %s", self._endpoint, ended)
                if backlog is not self._outbox and ended.refused:
                    self._give_up(backlog)
                    continue
            if backlog is not self._outbox and backlog.empty:
                self._finished(backlog)
                continue
            await asyncio.sleep(self._backoff.next())

    async def drained(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds, while there is a session, until every report is acknowledged."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self.connected and not self._outbox.empty:
                    self._progress.clear()
                    await self._progress.wait()
        return self._outbox.empty

    async def _attempt(self, backlog: Backlog) -> None:
        """One session, from connecting to its end. Raises SessionEnded, unless a leftover is all acknowledged."""
        session: _Session | None = None
        try:
            async with grpc.aio.insecure_channel(self._endpoint, options=self._options()) as channel:
                session = _Session(_Stub(channel).Connect(), backlog, self._timing, self._work, self._careful_until)
                await self._session(session)
        except grpc.aio.AioRpcError as error:
            reason = f"{error.code().name}: {error.details()}"
            refused = error.code() in _REFUSED
            if session is not None and session.in_flight and error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                self._suspect(session, reason)
                refused = False
            raise SessionEnded(reason, refused) from error
        except (asyncio.InvalidStateError, TimeoutError) as error:  # written to after its end; nothing heard
            raise SessionEnded(f"{type(error).__name__} {error}") from error

    def _suspect(self, session: "_Session", reason: str) -> None:
        """The controller cannot take a report that is in flight: find it by sending one at a time, and leave it out."""
        if len(session.in_flight) == 1:
            (entry,) = session.in_flight
            log.error("report %d is left out: %s", entry.seq, reason)
            session.backlog.acknowledge(entry.seq)
            self._outbox.lose(1)
        else:
            self._careful_until = session.in_flight[-1].seq

    async def _session(self, session: "_Session") -> None:
        call = session.call
        started = asyncio.get_running_loop().time()
        try:
            await call.write(self._hello(session.backlog.epoch))
            welcome = await self._welcome(call)
            session.open(welcome)
            self.connected = session.backlog is self._outbox
            await _first(self._listen(session), session.send())
        finally:
            self.connected = False
            self._progress.set()
            call.cancel()
            if asyncio.get_running_loop().time() - started > self._timing.stable:
                self._backoff.reset()

    async def _welcome(self, call: Any) -> pb.Welcome:
        async with asyncio.timeout(self._timing.welcome):
            message = await call.read()
        if message is _EOF or message.WhichOneof("body") != "welcome":
            raise SessionEnded("the controller did not answer with a welcome")
        welcome: pb.Welcome = message.welcome
        if not self._history.accept(welcome.controller_epoch):
            raise SessionEnded(f"controller epoch {welcome.controller_epoch} was deposed")
        self.controller = convert.controller(welcome)
        return welcome

    async def _listen(self, session: "_Session") -> None:
        """Take acknowledgements and orders until the stream ends, or a leftover is done."""
        leftover = session.backlog is not self._outbox
        while not (leftover and session.backlog.empty):
            read = session.call.read()
            message = await (self._in_time(read) if leftover else read)
            if message is _EOF:
                raise SessionEnded("the controller ended the stream")
            if message.HasField("ack"):
                session.acknowledged(message.ack)
                self._progress.set()
            elif message.HasField("action") and not leftover:  # a leftover's session speaks for a life that is over
                self._take(convert.action(message.action))

    async def _in_time(self, read: Any) -> Any:
        """What the controller says about a leftover, unless it says nothing for too long."""
        try:
            async with asyncio.timeout(self._timing.leftover):
                return await read
        except TimeoutError as error:
            raise SessionEnded("the controller acknowledges nothing", refused=True) from error

    def _take(self, action: Action) -> None:
        if self._history.accept(action.controller_epoch):
            self._on_action(action)
        else:
            log.warning("order %s of the deposed controller epoch %d is ignored", action.id, action.controller_epoch)

    def _give_up(self, backlog: Backlog) -> None:
        log.warning("%d reports of epoch %d are refused and given up", len(backlog), backlog.epoch)
        self._outbox.lose(len(backlog))
        self._finished(backlog)

    def _finished(self, leftover: Backlog) -> None:
        leftover.discard()
        self._leftovers.remove(leftover)
        self._careful_until = 0

    def _options(self) -> list[tuple[str, int]]:
        return [
            ("grpc.keepalive_time_ms", int(self._timing.keepalive * 1000)),
            ("grpc.keepalive_timeout_ms", int(self._timing.keepalive_answer * 1000)),
            ("grpc.http2.ping_timeout_ms", int(self._timing.keepalive_answer * 1000)),
            ("grpc.http2.max_pings_without_data", 0),
            # Each attempt starts from nothing: otherwise gRPC's own back-off, up to 2 minutes, hides behind ours.
            ("grpc.use_local_subchannel_pool", 1),
        ]


class _Session:
    """One stream's sending side. Invariant: acknowledged <= sent, and at most `credits` reports between them."""

    def __init__(
        self, call: Any, backlog: Backlog, timing: Timing, work: asyncio.Event, careful_until: int = 0
    ) -> None:
        self.call = call
        self.backlog = backlog
        self._timing = timing
        self._work = work
        self._sent = 0
        self._credits = 0
        self._careful_until = careful_until

    def open(self, welcome: pb.Welcome) -> None:
        self.backlog.acknowledge(welcome.acknowledged_seq)
        self._sent = self.backlog.acknowledged
        self._credits = max(1, welcome.credits)

    def acknowledged(self, ack: pb.Ack) -> None:
        if ack.epoch == self.backlog.epoch:
            self.backlog.acknowledge(min(ack.seq, self._sent))
            self._work.set()

    @property
    def in_flight(self) -> list[Entry]:
        """What was sent and is not acknowledged."""
        sent = self.backlog.pending(self.backlog.acknowledged, self._credits, self._credits * BATCH_BYTES)
        return [entry for entry in sent if entry.seq <= self._sent]

    async def send(self) -> None:
        """Write batches as they fall due, until cancelled or the stream breaks."""
        while True:
            await self._due()
            room = min(BATCH_REPORTS, self._room())
            entries = self.backlog.pending(self._sent, room, BATCH_BYTES)
            self._sent = entries[-1].seq
            await self.call.write(convert.batch(entries))

    async def _due(self) -> None:
        """Wait until something is there to send, the controller has room, and it is urgent or waited long enough."""
        loop = asyncio.get_running_loop()
        due: float | None = None
        while True:
            self._work.clear()
            if self.backlog.last > self._sent and self._room() > 0:
                due = loop.time() + self._timing.batch if due is None else due
                if self._pressing() or loop.time() >= due:
                    return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    await self._work.wait()

    def _room(self) -> int:
        credits = 1 if self.backlog.acknowledged < self._careful_until else self._credits
        return credits - (self._sent - self.backlog.acknowledged)

    def _pressing(self) -> bool:
        return self.backlog.last_urgent > self._sent or self.backlog.last - self._sent >= BATCH_REPORTS


async def _first(*works: Coroutine[Any, Any, None]) -> None:
    """Run `works` until the first of them ends, in whatever way; then end the others."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()
