"""Asks and tells a running controller, with deadlines; every failure becomes one line and the right exit code."""

import getpass
import json
import os
import secrets
from types import TracebackType
from typing import Any, Self

import grpc

from assay.v1 import agent_pb2, operator_pb2, operator_pb2_grpc
from controller.cli.errors import CommandError, ConditionError, DeniedError, UnreachableError, UsageError
from controller.core.events import Drill

#: A controller that died is back within 2 s; twice that and the answer's own time.
DEADLINE_S = 5.0
_OPTIONS = (("grpc.max_receive_message_length", 256 << 20), ("grpc.enable_http_proxy", 0))
_ERRORS: dict[grpc.StatusCode, type[CommandError]] = {
    grpc.StatusCode.UNAVAILABLE: UnreachableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: UnreachableError,
    grpc.StatusCode.PERMISSION_DENIED: DeniedError,
    grpc.StatusCode.UNAUTHENTICATED: DeniedError,
    grpc.StatusCode.INVALID_ARGUMENT: UsageError,
    grpc.StatusCode.FAILED_PRECONDITION: ConditionError,
}


class Operator:
    """A connection to OperatorService at `endpoint` (host:port). Every call raises a CommandError when it fails."""

    def __init__(self, endpoint: str, deadline: float = DEADLINE_S) -> None:
        self._endpoint = endpoint
        self._deadline = deadline
        self._channel = grpc.insecure_channel(endpoint, options=_OPTIONS)
        self._stub: Any = operator_pb2_grpc.OperatorServiceStub(self._channel)  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._channel.close()

    def read(self, kind: str, ident: str = "") -> dict[str, Any]:
        """A document by its kind: status, job, steps, incidents, incident, checkpoints or run."""
        answer = self._call(self._stub.Read, operator_pb2.ReadRequest(kind=kind, id=ident))
        document = json.loads(answer.json)
        return document if isinstance(document, dict) else {}

    def submit(self, spec: str, drills: tuple[Drill, ...], reason: str, deadline: float | None = None) -> str:
        """Start a job; the id that it got."""
        request = operator_pb2.SubmitJobRequest(change=_change(reason), spec=spec, drills=[_wire(d) for d in drills])
        return str(self._call(self._stub.SubmitJob, request, deadline).id)

    def inject(self, job: str, drill: Drill, reason: str) -> str:
        """Arm a drill in a running job; the drill's id."""
        request = operator_pb2.InjectDrillRequest(change=_change(reason), job=job, drill=_wire(drill))
        return str(self._call(self._stub.InjectDrill, request).id)

    def cancel(self, job: str, reason: str) -> None:
        """End a job."""
        self._call(self._stub.CancelJob, operator_pb2.CancelJobRequest(change=_change(reason), job=job))

    def _call(self, method: Any, request: Any, deadline: float | None = None) -> Any:
        # Waiting for a connection makes a restart of the controller invisible; changes carry an idempotency key.
        try:
            return method(request, timeout=deadline or self._deadline, wait_for_ready=True)
        except grpc.RpcError as error:
            code, details = error.code(), error.details() or ""
            kind = _ERRORS.get(code, CommandError)
            if kind is UnreachableError:
                details = f"no controller answers at {self._endpoint} ({code.name.lower()})"
            raise kind(details or code.name) from error


def _change(reason: str) -> operator_pb2.Change:
    try:
        actor = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        actor = f"uid {os.getuid()}"
    return operator_pb2.Change(actor=actor, reason=reason, idempotency_key=secrets.token_hex(16))


def _wire(drill: Drill) -> agent_pb2.Drill:
    return agent_pb2.Drill(
        id=drill.id, kind=drill.kind, step=drill.step, rank=drill.rank, node=drill.node, params=drill.params
    )
