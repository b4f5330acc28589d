"""The agents' service: one stream for each node, reports up and acknowledged once they are durable, actions down."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import grpc

from assay.v1 import agent_pb2
from controller.core.actions import Action
from controller.rpc import convert
from controller.rpc.checks import MalformedError
from controller.rpc.convert import HelloMessage
from controller.store.errors import StoreError
from controller.store.reports import Report

log = logging.getLogger(__name__)

SERVICE = "assay.v1.AgentService"
# Reports that a node may have in flight without acknowledgement: four full batches, at most 1 MiB of messages.
CREDITS = 2000
# An agent says hello at once; who has not within this many seconds is not one.
HELLO_S = 10.0
# Messages that wait for a slow node. Actions are few and acknowledgements are one for a batch, so a node this far
# behind is not reading; it is dropped and reconciles when it comes back.
QUEUE_MESSAGES = 1024

Context = grpc.aio.ServicerContext[bytes, agent_pb2.ControllerMessage]
# What is sent once the future is done; without one, at once.
Outgoing = tuple[Awaitable[None] | None, agent_pb2.ControllerMessage]


class Gateway(Protocol):
    """What the service needs of the controller. All futures carry StoreError when nothing more can be stored."""

    def epoch(self) -> int:
        """Give the controller's own epoch."""

    def host(self) -> str:
        """Name the controller's host."""

    async def hello(self, hello: HelloMessage) -> int:
        """Take note of an agent; once that is durable, give the seq up to which its reports already are."""

    def linked(self, hello: HelloMessage) -> None:
        """The agent was welcomed: actions may be sent."""

    def reports(self, node: str, epoch: int, reports: Sequence[Report]) -> Awaitable[None]:
        """Take reports; the result is done when they are durable."""

    def lost(self, node: str, epoch: int) -> None:
        """The stream of the node broke."""


class EndedError(Exception):
    """We end a stream; says why."""


@dataclass(slots=True)
class Session:
    """One node's open stream. Invariant: `in_flight` counts the reports taken and not acknowledged yet."""

    node: str
    epoch: int
    ended: asyncio.Future[str] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    outgoing: asyncio.Queue[Outgoing] = field(default_factory=lambda: asyncio.Queue(QUEUE_MESSAGES))
    in_flight: int = 0
    welcomed: bool = False

    def put(self, message: agent_pb2.ControllerMessage, after: Awaitable[None] | None = None) -> bool:
        """Queue a message; False, and the stream ends, if the node does not read."""
        try:
            self.outgoing.put_nowait((after, message))
        except asyncio.QueueFull:
            self.end(f"{self.node} does not read what it is sent")
            return False
        return True

    def end(self, why: str) -> None:
        """End the stream. The handler says so to the node: a cancelled one would leave it waiting for ever."""
        if not self.ended.done():
            log.warning("the stream of %s is ended: %s", self.node, why)
            self.ended.set_result(why)


class Sessions:
    """The open streams by node: at most one each, the newest."""

    def __init__(self, controller_epoch: int) -> None:
        """Start without any; actions are stamped with `controller_epoch`."""
        self._epoch = controller_epoch
        self._open: dict[str, Session] = {}

    async def send(self, node: str, action: Action) -> bool:
        """Send an action; False if the node has no stream."""
        session = self._open.get(node)
        return session is not None and session.welcomed and session.put(convert.action_message(action, self._epoch))

    def add(self, session: Session) -> None:
        """Make this the node's stream and end an older one."""
        older = self._open.get(session.node)
        self._open[session.node] = session
        if older is not None:
            older.end("a newer stream of this node took its place")

    def remove(self, session: Session) -> bool:
        """Forget a stream; False if a newer one has taken its place."""
        if self._open.get(session.node) is not session:
            return False
        del self._open[session.node]
        return True

    def known_epoch(self, node: str) -> int:
        """Give the epoch of the node's open stream; 0 if it has none."""
        session = self._open.get(node)
        return 0 if session is None else session.epoch

    def __len__(self) -> int:
        """Count the linked nodes."""
        return len(self._open)


class AgentService:
    """Serves `Connect`. Messages arrive as bytes, so that what cannot be parsed is answered as INVALID_ARGUMENT."""

    def __init__(self, gateway: Gateway, sessions: Sessions) -> None:
        """Serve streams into `gateway` and keep them in `sessions`."""
        self._gateway = gateway
        self._sessions = sessions

    def handler(self) -> "grpc.GenericRpcHandler[Any, Any]":
        """Make the handler to add to a server."""
        connect = grpc.stream_stream_rpc_method_handler(
            self.connect,
            request_deserializer=None,
            response_serializer=agent_pb2.ControllerMessage.SerializeToString,
        )
        return grpc.method_handlers_generic_handler(SERVICE, {"Connect": connect})

    async def connect(self, requests: AsyncIterator[bytes], context: Context) -> None:
        """Serve one stream until it ends."""
        try:
            hello = await self._hello(requests)
            await self._serve(hello, requests, context)
        except MalformedError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"no hello within {HELLO_S:.0f} s")
        except StoreError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        except EndedError as error:
            await context.abort(grpc.StatusCode.ABORTED, str(error))

    async def _hello(self, requests: AsyncIterator[bytes]) -> HelloMessage:
        try:
            async with asyncio.timeout(HELLO_S):
                data = await anext(requests)
        except StopAsyncIteration as error:
            raise MalformedError("the stream ended without a hello") from error
        hello = convert.parse_agent_message(data)
        if not isinstance(hello, HelloMessage):
            raise MalformedError("the first message must be a hello")
        return hello

    async def _serve(self, hello: HelloMessage, requests: AsyncIterator[bytes], context: Context) -> None:
        """Welcome the node and take its reports."""
        session = Session(hello.event.node, hello.event.epoch)
        # An earlier life of the node's agent may still deliver what it left; it gets no actions.
        current = session.epoch >= self._sessions.known_epoch(session.node)
        if current:
            # Before the hello is decided on: the end of an older stream must not be taken for a loss of this one.
            self._sessions.add(session)
        sender = asyncio.create_task(_send(session, context))
        sender.add_done_callback(partial(_sender_ended, session))
        try:
            durable = await self._gateway.hello(hello)
            session.put(convert.welcome_message(self._gateway.epoch(), durable, CREDITS, self._gateway.host()))
            if current:
                session.welcomed = True
                self._gateway.linked(hello)
            await _unless_ended(session, self._receive(session, requests))
        finally:
            sender.cancel()
            if current and self._sessions.remove(session):
                self._gateway.lost(session.node, session.epoch)

    async def _receive(self, session: Session, requests: AsyncIterator[bytes]) -> None:
        async for data in requests:
            batch = convert.parse_agent_message(data)
            if isinstance(batch, HelloMessage):
                raise MalformedError("only the first message may be a hello")
            session.in_flight += len(batch)
            if session.in_flight > CREDITS:
                raise MalformedError(f"more than {CREDITS} reports in flight")
            if batch:
                durable = asyncio.ensure_future(self._gateway.reports(session.node, session.epoch, batch))
                durable.add_done_callback(partial(_landed, session, len(batch)))
                session.put(convert.ack_message(session.epoch, batch[-1].seq), durable)


async def _unless_ended(session: Session, receiving: Coroutine[Any, Any, None]) -> None:
    """Receive until the node breaks off, or we end its stream; raises EndedError for the latter."""
    task = asyncio.create_task(receiving)
    try:
        either: set[asyncio.Future[Any]] = {task, session.ended}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise EndedError(session.ended.result())
        task.result()
    finally:
        task.cancel()


async def _send(session: Session, context: Context) -> None:
    """Write what is queued, each message once its future is done."""
    while True:
        after, message = await session.outgoing.get()
        if after is not None:
            await after
        await context.write(message)


def _sender_ended(session: Session, sender: asyncio.Task[None]) -> None:
    """End the stream if nothing can be sent any more: the node is gone, or the store is broken."""
    if not sender.cancelled() and sender.exception() is not None:
        session.end(f"nothing can be sent or stored: {sender.exception()}")


def _landed(session: Session, count: int, durable: asyncio.Future[None]) -> None:
    """Count a batch as acknowledged, or as never to be; the sender says which."""
    session.in_flight -= count
    if not durable.cancelled():
        durable.exception()
