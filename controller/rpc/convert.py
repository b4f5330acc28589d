"""The only place where protobuf becomes our types and back; what an agent or a person sends is checked here."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, TypeVar

from google.protobuf.internal.containers import MessageMap
from google.protobuf.message import DecodeError, Message

from assay.v1 import agent_pb2, operator_pb2
from controller.core import actions, events
from controller.rpc.checks import (
    BATCH_REPORTS,
    LIST_ENTRIES,
    SPEC_CHARACTERS,
    MalformedError,
    check_count,
    check_field,
    check_integer,
    check_name,
    check_number,
    check_text,
    check_time,
)
from controller.store.reports import Fp8Summary, NodeProcesses, Report, ReportsDropped, StepRecord, StepRecords

# Ours on the left where the wire has another name.
_WIRE_NAMES = {"pass_": "pass", "fired_at": "time", "target": "node"}

T = TypeVar("T")
M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True)
class HelloMessage:
    """What an agent says first: the event for the decisions, and the actions that it remembers as completed."""

    event: events.AgentHello
    completed: tuple[str, ...]


# The reports that become events for the decisions, by their name in the wire's `oneof`.
_EVENTS: dict[str, type[events.Event]] = {
    "worker_ready": events.WorkerReady,
    "worker_exited": events.WorkerExited,
    "progress_stalled": events.ProgressStalled,
    "gate_alarm": events.GateAlarm,
    "replay_result": events.ReplayResult,
    "audit_result": events.AuditResult,
    "digest_disagreement": events.DigestDisagreement,
    "resumed": events.Resumed,
    "checkpoint_captured": events.CheckpointCaptured,
    "checkpoint_durable": events.CheckpointDurable,
    "shard_refused": events.ShardRefused,
    "finding_raised": events.FindingRaised,
    "finding_cleared": events.FindingCleared,
    "probe_result": events.ProbeResult,
    "drill_fired": events.DrillFired,
    "action_result": events.ActionResult,
}
_NESTED: dict[str, type[Any]] = {
    "Vote": events.Vote,
    "Alarm": events.Alarm,
    "Device": events.Device,
    "Process": events.Process,
    "Drill": events.Drill,
    "StepRecord": StepRecord,
    "Fp8Summary": Fp8Summary,
}


def parse_agent_message(data: bytes) -> HelloMessage | tuple[Report, ...]:
    """Read what an agent sent: its Hello, or a batch of reports in ascending order.

    Raises MalformedError for anything that an honest agent cannot send.
    """
    message = _parsed(agent_pb2.AgentMessage, data)
    body = message.WhichOneof("body")
    if body == "hello":
        return _hello(message.hello)
    if body == "batch":
        check_count(len(message.batch.reports), BATCH_REPORTS, "reports in a batch")
        reports = tuple(_report(report) for report in message.batch.reports)
        if any(later.seq <= sooner.seq for sooner, later in pairwise(reports)):
            raise MalformedError("seq must ascend within a batch")
        return reports
    raise MalformedError("neither hello nor batch")


def action_message(action: actions.Action, controller_epoch: int) -> agent_pb2.ControllerMessage:
    """Write an action for its agent, stamped with the controller's epoch."""
    base = {field.name for field in fields(actions.Action)}
    body = _to_wire(action, getattr(agent_pb2, type(action).__name__), leave_out=base)
    message = agent_pb2.Action(
        id=action.id,
        controller_epoch=controller_epoch,
        job=action.job,
        generation=action.generation,
        deadline=action.deadline,
        reason=action.reason,
        traceparent=action.traceparent,
    )
    getattr(message, _snake(type(action).__name__)).CopyFrom(body)
    return agent_pb2.ControllerMessage(action=message)


def welcome_message(controller_epoch: int, acknowledged: int, credits: int, host: str) -> agent_pb2.ControllerMessage:
    """Write the answer to a Hello; the pid is this process's."""
    welcome = agent_pb2.Welcome(
        controller_epoch=controller_epoch,
        acknowledged_seq=acknowledged,
        credits=credits,
        pid=os.getpid(),
        host=host,
    )
    return agent_pb2.ControllerMessage(welcome=welcome)


def ack_message(epoch: int, seq: int) -> agent_pb2.ControllerMessage:
    """Write that everything up to `seq` is durable."""
    return agent_pb2.ControllerMessage(ack=agent_pb2.Ack(epoch=epoch, seq=seq))


@dataclass(frozen=True, slots=True)
class Change:
    """Who changes something, why, and the key that makes a repeated call harmless."""

    actor: str
    reason: str
    key: str


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """Which document is wanted."""

    kind: str
    id: str


@dataclass(frozen=True, slots=True)
class SubmitRequest:
    """A job to start or to go on with; `spec` is JSON "assay.job/1"."""

    change: Change
    spec: str
    drills: tuple[events.Drill, ...]


@dataclass(frozen=True, slots=True)
class DrillRequest:
    """A drill for a running job."""

    change: Change
    job: str
    drill: events.Drill


@dataclass(frozen=True, slots=True)
class CancelRequest:
    """A job to end."""

    change: Change
    job: str


def parse_read(data: bytes) -> ReadRequest:
    """Read an operator's question. Raises MalformedError, as do all of these."""
    return _from_wire(_parsed(operator_pb2.ReadRequest, data), ReadRequest)


def parse_submit(data: bytes) -> SubmitRequest:
    """Read a SubmitJobRequest."""
    message = _parsed(operator_pb2.SubmitJobRequest, data)
    check_count(len(message.drills), LIST_ENTRIES, "drills")
    drills = tuple(_from_wire(drill, events.Drill) for drill in message.drills)
    check_count(len(message.spec), SPEC_CHARACTERS, "characters in spec")
    return SubmitRequest(_change(message.change), message.spec, drills)


def parse_drill(data: bytes) -> DrillRequest:
    """Read an InjectDrillRequest."""
    message = _parsed(operator_pb2.InjectDrillRequest, data)
    drill = _from_wire(message.drill, events.Drill)
    return DrillRequest(_change(message.change), check_name(message.job, "job"), drill)


def parse_cancel(data: bytes) -> CancelRequest:
    """Read a CancelJobRequest."""
    message = _parsed(operator_pb2.CancelJobRequest, data)
    return CancelRequest(_change(message.change), check_name(message.job, "job"))


def document_bytes(schema: str, text: str) -> bytes:
    """Write a Document."""
    return operator_pb2.Document(schema=schema, json=text).SerializeToString()


def reply_bytes(changed: str) -> bytes:
    """Write the ChangeReply that names what was changed."""
    return operator_pb2.ChangeReply(id=changed).SerializeToString()


def _change(message: operator_pb2.Change) -> Change:
    if not message.actor:
        raise MalformedError("a change needs an actor")
    return Change(
        check_text(message.actor, "actor"),
        check_field(message.reason, "reason"),
        check_text(message.idempotency_key, "idempotency_key"),
    )


def _parsed(kind: type[M], data: bytes) -> M:
    message = kind()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise MalformedError(f"this cannot be read as {kind.__name__}: {error}") from error
    return message


def _hello(message: agent_pb2.Hello) -> HelloMessage:
    check_name(message.node, "node")
    if message.epoch == 0:
        raise MalformedError("a hello needs an epoch above 0")
    check_count(len(message.completed_actions), LIST_ENTRIES, "completed actions")
    event = _from_wire(message, events.AgentHello, time=0.0, traceparent="")
    return HelloMessage(event, tuple(check_text(action, "completed_actions") for action in message.completed_actions))


def _report(message: agent_pb2.Report) -> Report:
    seq = check_integer(message.seq, "seq")
    if seq < 1:
        raise MalformedError("seq starts at 1")
    at = check_time(message.time, "time")
    traceparent = check_text(message.traceparent, "traceparent")
    try:
        return Report(seq, at, traceparent, _body(message, at, traceparent))
    except MalformedError as error:
        # One bad report must not hold back the others of its node for ever: it is refused, counted and acknowledged.
        return Report(seq, at, traceparent, ReportsDropped(1, f"refused: {message.WhichOneof('body')}: {error}"))


def _body(
    message: agent_pb2.Report, at: float, traceparent: str
) -> events.Event | StepRecords | NodeProcesses | ReportsDropped:
    kind = message.WhichOneof("body")
    if kind == "steps":
        return _steps(message.steps)
    if kind == "processes":
        check_count(len(message.processes.processes), LIST_ENTRIES, "processes")
        return NodeProcesses(tuple(_from_wire(process, events.Process) for process in message.processes.processes))
    if kind == "reports_dropped":
        return _from_wire(message.reports_dropped, ReportsDropped)
    if kind is None:
        # A kind of report that this version does not know: a newer agent's. It counts as stored, so that it is not
        # sent for ever.
        return ReportsDropped(0, "unknown kind of report")
    body = getattr(message, kind)
    given: dict[str, Any] = {"time": at, "traceparent": traceparent, "node": ""}
    if kind == "drill_fired":
        given["node"] = check_text(body.node, "node")
    return _from_wire(body, _EVENTS[kind], **given)


def _steps(message: agent_pb2.StepRecords) -> StepRecords:
    check_name(message.job, "job")
    check_count(len(message.records), LIST_ENTRIES, "records")
    records = tuple(_from_wire(record, StepRecord) for record in message.records)
    if not records or any(later.step <= sooner.step for sooner, later in pairwise(records)):
        raise MalformedError("records must be in ascending steps, and at least one")
    return StepRecords(message.job, check_integer(message.generation, "generation"), message.rank, records)


def _from_wire(message: Message, target: type[T], **given: Any) -> T:
    """Make a `target` from the fields of `message` that have its fields' names, each checked."""
    values = dict(given)
    for field in fields(target):  # type: ignore[arg-type]
        if field.name not in values:
            values[field.name] = _value(getattr(message, _WIRE_NAMES.get(field.name, field.name)), field.name)
    return target(**values)


def _value(value: Any, name: str) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return check_field(value, name)
    if isinstance(value, int):
        return check_integer(value, name)
    if isinstance(value, float):
        return check_number(value, name)
    check_count(len(value), LIST_ENTRIES, name)
    if isinstance(value, (Mapping, MessageMap)):
        return {_value(key, name): _value(entry, name) for key, entry in value.items()}
    return tuple(_entry(entry, name) for entry in value)


def _entry(entry: Any, name: str) -> Any:
    return _from_wire(entry, _NESTED[type(entry).__name__]) if isinstance(entry, Message) else _value(entry, name)


def _to_wire(value: Any, kind: type[Message], leave_out: set[str] | None = None) -> Message:
    """Make a message of `kind` from the fields of a dataclass that have its fields' names."""
    made: dict[str, Any] = {}
    for field in fields(value):
        if leave_out is None or field.name not in leave_out:
            made[_WIRE_NAMES.get(field.name, field.name)] = _wire_value(getattr(value, field.name))
    return kind(**made)


def _wire_value(value: Any) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_wire_value(entry) for entry in value]
    name = type(value).__name__
    if name == "Placement" or name in _NESTED:
        return _to_wire(value, getattr(agent_pb2, name))
    return value


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
