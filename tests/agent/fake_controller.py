"""A controller for the agent's tests: real gRPC, no decisions; it hears, and orders what a test wants."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from assay.v1 import agent_pb2 as pb
from assay.v1 import agent_pb2_grpc

DEADLINE_S = 20.0


class FakeController(agent_pb2_grpc.AgentServiceServicer):
    """Answers agents; `until` waits for a condition on what it has heard."""

    def __init__(self, epoch: int = 1, credits: int = 10_000, acknowledges: bool = True) -> None:
        self.epoch = epoch
        self.credits = credits
        self.acknowledges = acknowledges
        self.welcome: dict[str, Any] = {}
        self.refuse_epochs: set[int] = set()
        self.malformed = ""
        self.hellos: list[pb.Hello] = []
        self.batches: list[list[pb.Report]] = []
        self.reports: list[tuple[int, pb.Report]] = []
        self.port = 0
        self._heard = asyncio.Condition()
        self._down: list[asyncio.Queue[pb.ControllerMessage]] = []
        self._server: grpc.aio.Server | None = None

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self, port: int = 0) -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        add: Any = agent_pb2_grpc.add_AgentServiceServicer_to_server
        add(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds; it is looked at whenever something was heard."""
        async with asyncio.timeout(DEADLINE_S), self._heard:
            await self._heard.wait_for(condition)

    async def order(self, action: pb.Action) -> None:
        """Send an action on the newest stream."""
        await self._down[-1].put(pb.ControllerMessage(action=action))

    async def acknowledge(self, epoch: int, seq: int) -> None:
        await self._down[-1].put(pb.ControllerMessage(ack=pb.Ack(epoch=epoch, seq=seq)))

    def found(self, kind: str) -> list[Any]:
        """The bodies of that kind, in the order of arrival, each report once."""
        seen: dict[tuple[int, int], pb.Report] = {(epoch, r.seq): r for epoch, r in self.reports}
        return [getattr(r, kind) for r in seen.values() if r.WhichOneof("body") == kind]

    async def result(self, action_id: str) -> pb.ActionResult:
        """Wait for the result of an action."""
        await self.until(lambda: any(r.action_id == action_id for r in self.found("action_result")))
        result: pb.ActionResult = next(r for r in self.found("action_result") if r.action_id == action_id)
        return result

    async def Connect(
        self, request_iterator: AsyncIterator[pb.AgentMessage], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.ControllerMessage]:
        hello = (await anext(aiter(request_iterator))).hello
        await self._note(lambda: self.hellos.append(hello))
        if hello.epoch in self.refuse_epochs:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "that life is over")
        down: asyncio.Queue[pb.ControllerMessage] = asyncio.Queue()
        self._down.append(down)
        fields = {"controller_epoch": self.epoch, "credits": self.credits, **self.welcome}
        yield pb.ControllerMessage(welcome=pb.Welcome(**fields))
        listener = asyncio.create_task(self._listen(hello.epoch, request_iterator, down))
        try:
            while (message := await down.get()).WhichOneof("body") is not None:
                yield message
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a report cannot be read")
        finally:
            listener.cancel()

    async def _listen(self, epoch: int, messages: AsyncIterator[pb.AgentMessage], down: Any) -> None:
        async for message in messages:
            reports = list(message.batch.reports)
            if self.malformed and any(self.malformed in str(report) for report in reports):
                await down.put(pb.ControllerMessage())
                return
            await self._note(lambda reports=reports: self._store(epoch, reports))  # type: ignore[misc]
            if self.acknowledges:
                await down.put(pb.ControllerMessage(ack=pb.Ack(epoch=epoch, seq=reports[-1].seq)))

    def _store(self, epoch: int, reports: list[pb.Report]) -> None:
        self.batches.append(reports)
        self.reports += [(epoch, report) for report in reports]

    async def _note(self, change: Callable[[], None]) -> None:
        async with self._heard:
            change()
            self._heard.notify_all()
