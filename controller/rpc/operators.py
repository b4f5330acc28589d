"""The operators' service: documents to read, and changes that say who made them, why, and under which key."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import grpc

from controller.core import events
from controller.rpc import convert
from controller.rpc.checks import INTEGER_LIMIT, MalformedError, check_name
from controller.rpc.convert import Change
from controller.store.errors import StoreError, UnknownIdError
from controller.store.queries import Queries

SERVICE = "assay.v1.OperatorService"
JOB_SCHEMA = "assay.job/1"
# More ranks than a job of one controller has had; a slip of the keyboard must not make a million placements.
WORLD_LIMIT = 100_000

Context = grpc.aio.ServicerContext[bytes, bytes]
Method = Callable[[bytes], Awaitable[bytes]]


class ConflictError(Exception):
    """The change cannot be made as things stand; says why."""


class Operations(Protocol):
    """What the service needs of the controller. Raises ConflictError, UnknownIdError or StoreError."""

    def now(self) -> float:
        """Give the time in seconds since 1970."""

    def job_active(self, job: str) -> bool | None:
        """Say whether the job runs or waits; None if it is unknown."""

    async def change(self, kind: str, request: str, change: Change, event: events.Event, reply: str) -> str:
        """Record and decide a change, once per key; give the reply once it is durable."""


class OperatorService:
    """Serves Read, SubmitJob, InjectDrill and CancelJob; requests arrive as bytes (see AgentService)."""

    def __init__(self, operations: Operations, queries: Queries) -> None:
        """Change through `operations`, read through `queries`."""
        self._operations = operations
        self._queries = queries

    def handler(self) -> "grpc.GenericRpcHandler[Any, Any]":
        """Make the handler to add to a server."""
        methods: dict[str, Method] = {
            "Read": self.read,
            "SubmitJob": self.submit,
            "InjectDrill": self.inject,
            "CancelJob": self.cancel,
        }
        made = {name: grpc.unary_unary_rpc_method_handler(_answering(method)) for name, method in methods.items()}
        return grpc.method_handlers_generic_handler(SERVICE, made)

    async def read(self, data: bytes) -> bytes:
        """Answer with a document; the database is read on another thread."""
        request = convert.parse_read(data)
        document = await asyncio.to_thread(self._queries.read, request.kind, request.id)
        return convert.document_bytes(document["schema"], json.dumps(document))

    async def submit(self, data: bytes) -> bytes:
        """Start a job, or go on with one that has ended."""
        request = convert.parse_submit(data)
        spec = _spec(request.spec)
        job = spec["job"]
        event = events.JobSubmitted(
            time=self._operations.now(),
            job=job,
            spec=request.spec,
            steps=spec["steps"],
            world=spec["world"],
            drills=_named(job, request.drills, request.change.key),
            actor=request.change.actor,
            reason=request.change.reason,
        )
        return convert.reply_bytes(await self._change("submit", data, request.change, event, job))

    async def inject(self, data: bytes) -> bytes:
        """Put a drill into a running job."""
        request = convert.parse_drill(data)
        drill = _named(request.job, (request.drill,), request.change.key)[0]
        event = events.DrillRequested(
            time=self._operations.now(),
            job=request.job,
            drill=drill,
            actor=request.change.actor,
            reason=request.change.reason,
        )
        self._check_active(request.job)
        return convert.reply_bytes(await self._change("drill", data, request.change, event, drill.id))

    async def cancel(self, data: bytes) -> bytes:
        """End a job."""
        request = convert.parse_cancel(data)
        event = events.JobCancelled(
            time=self._operations.now(),
            job=request.job,
            actor=request.change.actor,
            reason=request.change.reason,
        )
        self._check_active(request.job)
        return convert.reply_bytes(await self._change("cancel", data, request.change, event, request.job))

    async def _change(self, kind: str, data: bytes, change: Change, event: events.Event, reply: str) -> str:
        return await self._operations.change(kind, data.hex(), change, event, reply)

    def _check_active(self, job: str) -> None:
        active = self._operations.job_active(job)
        if active is None:
            raise UnknownIdError(f"there is no job {job!r}")
        if not active:
            raise ConflictError(f"job {job} has ended")


def _answering(method: Method) -> Callable[[bytes, Context], Awaitable[bytes]]:
    """Wrap a method so that its errors become the status codes that tell a client what to do."""

    async def answer(data: bytes, context: Context) -> bytes:
        try:
            return await method(data)
        except MalformedError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except UnknownIdError as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, str(error))
        except ConflictError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except StoreError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        raise AssertionError("abort always raises")

    return answer


def _spec(text: str) -> dict[str, Any]:
    """Read a job's specification as far as the controller needs it."""
    try:
        spec = json.loads(text)
    except ValueError as error:
        raise MalformedError(f"spec is not JSON: {error}") from error
    if not isinstance(spec, dict) or spec.get("schema") != JOB_SCHEMA:
        raise MalformedError(f"spec must be an object of schema {JOB_SCHEMA!r}")
    for name, limit in (("steps", INTEGER_LIMIT), ("world", WORLD_LIMIT)):
        if type(spec.get(name)) is not int or not 0 < spec[name] < limit:
            raise MalformedError(f"{name} must be a whole number above 0, not {spec.get(name)!r}")
    check_name(str(spec.get("job", "")), "job")
    return spec


def _named(job: str, drills: tuple[events.Drill, ...], key: str) -> tuple[events.Drill, ...]:
    """Name the drills that came without an id, by what they do, in which request, and where they stand in it."""
    made = []
    for number, drill in enumerate(drills, start=1):
        name = drill.id or f"{job}/{drill.kind}@{drill.step}/{key[:8] or 'drill'}-{number}"
        made.append(events.Drill(name, drill.kind, drill.step, drill.rank, drill.node, drill.params))
    return tuple(made)
