"""The only place of the agent where protobuf becomes our types and ours become protobuf."""

from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import DecodeError, Message

from agent.actions import (
    Action,
    Controller,
    DeliverVote,
    EndJob,
    InjectDrill,
    Noted,
    Placement,
    PrepareStandby,
    Process,
    Replay,
    StartGeneration,
    StopGeneration,
    Unsupported,
)
from agent.spool import Entry
from assay.v1 import agent_pb2 as pb

#: What a report can be about: the names of its bodies on the wire.
REPORT_KINDS = frozenset(field.name for field in pb.Report.DESCRIPTOR.oneofs_by_name["body"].fields)
#: Orders whose work is the controller's own.
_NOTED = frozenset({"quarantine", "release", "drain", "revoke_checkpoints", "promote_checkpoint", "ask_human"})


class ConvertError(ValueError):
    """A message does not have the shape that the wire prescribes; says which part."""


def report(kind: str, body: Mapping[str, Any], time: float, traceparent: str = "") -> bytes:
    """Encode a report about `kind` with `body` in the wire's field names, still without its number.

    NaN and infinities pass as they are. Raises ConvertError for an unknown kind or field, or a value of a wrong type.
    """
    if kind not in REPORT_KINDS:
        raise ConvertError(f"there is no report {kind!r}")
    fields = dict(body)
    try:
        if kind == "digest_disagreement" and "digests" in fields:
            fields["digests"] = {int(rank): digest for rank, digest in fields["digests"].items()}
        known: dict[str, Any] = {kind: fields}
        message = pb.Report(time=time, traceparent=traceparent, **known)
        getattr(message, kind).SetInParent()
        return message.SerializeToString()
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ConvertError(f"{kind}: {error}") from error


def steps(job: str, generation: int, rank: int, record: Mapping[str, Any], time: float) -> bytes:
    """Encode one step's record as a report. Raises ConvertError."""
    return report("steps", {"job": job, "generation": generation, "rank": rank, "records": [record]}, time)


def processes(found: Sequence[Process], time: float) -> bytes:
    """Encode the report of what runs on this node."""
    return pb.Report(time=time, processes=pb.Processes(processes=_processes(found))).SerializeToString()


def batch(entries: Sequence[Entry]) -> pb.AgentMessage:
    """The message that carries `entries`, each under its number."""
    message = pb.AgentMessage()
    for entry in entries:
        try:
            part = pb.Report.FromString(entry.payload)
        except DecodeError as error:
            raise ConvertError(f"report {entry.seq} cannot be read back: {error}") from error
        part.seq = entry.seq
        message.batch.reports.append(part)
    return message


def hello(
    *,
    node: str,
    epoch: int,
    boot_id: str,
    version: str,
    highest_controller_epoch: int,
    fingerprint: str,
    device: tuple[str, str, str],
    processes: Sequence[Process],
    completed: Sequence[str],
    peer_endpoint: str,
    spare: bool,
) -> pb.AgentMessage:
    """The first message of a session; `device` is (uuid, serial, kind)."""
    uuid, serial, kind = device
    return pb.AgentMessage(
        hello=pb.Hello(
            node=node,
            epoch=epoch,
            boot_id=boot_id,
            version=version,
            highest_controller_epoch=highest_controller_epoch,
            fingerprint=fingerprint,
            devices=[pb.Device(uuid=uuid, serial=serial, kind=kind)],
            processes=_processes(processes),
            completed_actions=completed,
            peer_endpoint=peer_endpoint,
            spare=spare,
        )
    )


def controller(welcome: pb.Welcome) -> Controller:
    """Who answered."""
    return Controller(welcome.pid, welcome.host, welcome.controller_epoch)


def action(message: pb.Action) -> Action:
    """Decode an order. One of a kind that this version does not know becomes Unsupported."""
    kind = message.WhichOneof("body") or "nothing known"
    common: dict[str, Any] = {
        "id": message.id,
        "controller_epoch": message.controller_epoch,
        "job": message.job,
        "generation": message.generation,
        "deadline": message.deadline,
        "reason": message.reason,
        "traceparent": message.traceparent,
    }
    match kind:
        case "prepare_standby":
            return PrepareStandby(**common, spec=message.prepare_standby.spec)
        case "stop_generation":
            return StopGeneration(**common)
        case "start_generation":
            return _start(common, message.start_generation)
        case "replay":
            body = message.replay
            return Replay(
                **common,
                spec=body.spec,
                step=body.step,
                rank=body.rank,
                source_rank=body.source_rank,
                source=body.source,
                attempt=body.attempt,
            )
        case "deliver_vote":
            vote = message.deliver_vote
            return DeliverVote(**common, step=vote.step, rank=vote.rank, votes=tuple(map(_document, vote.votes)))
        case "end_job":
            return EndJob(**common, outcome=message.end_job.outcome)
        case "inject_drill":
            return InjectDrill(**common, drill=_drill(message.inject_drill.drill))
        case _:
            return Noted(**common, kind=kind) if kind in _NOTED else Unsupported(**common, kind=kind)


def _start(common: dict[str, Any], body: pb.StartGeneration) -> StartGeneration:
    ranks = tuple(Placement(p.rank, p.node, p.standby, p.device, p.pid) for p in body.ranks)
    drills = tuple(map(_drill, body.drills))
    return StartGeneration(**common, spec=body.spec, ranks=ranks, rendezvous=body.rendezvous, drills=drills)


def _drill(message: pb.Drill) -> dict[str, Any]:
    """A drill as workers read it; MessageToDict would make its 64-bit step a string."""
    return _document(message) | {"step": message.step, "params": dict(message.params)}


def _document(message: Message) -> dict[str, Any]:
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def _processes(found: Sequence[Process]) -> list[pb.Process]:
    return [pb.Process(role=p.role, pid=p.pid, job=p.job, generation=p.generation, rank=p.rank) for p in found]
