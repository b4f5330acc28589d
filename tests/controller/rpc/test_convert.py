"""The wire's edge: what an honest agent says comes through whole, and nothing else hurts."""

import math
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.v1 import agent_pb2 as pb
from controller.core import actions, codec, events
from controller.rpc import convert
from controller.rpc.checks import BATCH_REPORTS, LIST_ENTRIES, STRING_CHARACTERS, MalformedError
from controller.rpc.convert import HelloMessage
from controller.store.reports import NodeProcesses, Report, ReportsDropped, StepRecords


def parse(*reports: pb.Report) -> tuple[Report, ...]:
    message = pb.AgentMessage(batch=pb.ReportBatch(reports=reports))
    found = convert.parse_agent_message(message.SerializeToString())
    assert isinstance(found, tuple)
    return found


def refusal(report: pb.Report) -> str:
    [found] = parse(report)
    assert isinstance(found.body, ReportsDropped)
    assert found.body.count == 1
    return found.body.reason


def test_every_report_of_the_wire_is_read() -> None:
    """Each kind of the `oneof` becomes an event or rows; none falls through."""
    for field in pb.Report.DESCRIPTOR.oneofs_by_name["body"].fields:
        report = pb.Report(seq=1, time=5.0, traceparent="t")
        getattr(report, field.name).SetInParent()
        if field.name == "steps":
            report.steps.job = "j"
            report.steps.records.add(step=1)
        [found] = parse(report)
        if isinstance(found.body, events.Event):
            assert found.body.traceparent == "t"
            assert found.body.time == 5.0
            assert codec.decode(codec.encode(found.body)) == found.body
        else:
            assert isinstance(found.body, (StepRecords, NodeProcesses, ReportsDropped))
            assert "refused" not in getattr(found.body, "reason", "")


def test_every_field_of_an_alarm_comes_through() -> None:
    report = pb.Report(seq=3, time=1.0)
    report.gate_alarm.CopyFrom(
        pb.GateAlarm(
            job="j", generation=2, step=9, rank=1, device="d", attempt=2, needs_third=True, evidence="e", reason="r"
        )
    )
    setattr(alarm := report.gate_alarm.alarms.add(sensor="gemm", reading=math.inf), "pass", "dgrad")
    assert alarm.sensor == "gemm"
    report.gate_alarm.votes.add(role="peer", node="n1", device="d1", pid=5, digest="x", alarm=True)
    [found] = parse(report)
    assert found.body == events.GateAlarm(
        time=1.0,
        job="j",
        generation=2,
        step=9,
        rank=1,
        device="d",
        attempt=2,
        alarms=(events.Alarm("gemm", "", "", "dgrad", math.inf, ""),),
        votes=(events.Vote("peer", "n1", "d1", 5, "x", True),),
        needs_third=True,
        evidence="e",
        reason="r",
    )


def test_a_fired_drill_keeps_its_own_time_and_node() -> None:
    report = pb.Report(seq=1, time=7.0)
    report.drill_fired.CopyFrom(pb.DrillFired(drill="x", job="j", kind="kill", step=3, rank=0, node="n1", time=6.5))
    [found] = parse(report)
    assert isinstance(found.body, events.DrillFired)
    assert (found.body.time, found.body.fired_at, found.body.node) == (7.0, 6.5, "n1")


def every_action() -> list[type[actions.Action]]:
    return [kind for kind in codec.TYPES.values() if issubclass(kind, actions.Action)]


SAMPLES: dict[object, object] = {
    int: 7,
    str: "text",
    tuple[actions.Placement, ...]: (actions.Placement(0, "n0", "s", "d", 5),),
    tuple[events.Drill, ...]: (events.Drill("x", "sdc", 3, 1, "", {"op": "fprop"}),),
    tuple[events.Vote, ...]: (events.Vote("third", "n2", "d2", 9, "y", False),),
    events.Drill: events.Drill("x", "sdc", 3),
}


@pytest.mark.parametrize("kind", every_action())
def test_every_action_has_its_message(kind: type[actions.Action]) -> None:
    base = {"id": "a", "node": "n0", "job": "j", "generation": 2, "deadline": 5.0, "reason": "r", "traceparent": "t"}
    names = {field.name for field in fields(actions.Action)}
    own = [field for field in fields(kind) if field.name not in names]
    body = {field.name: SAMPLES[field.type] for field in own}
    action = kind(**base, **body)  # type: ignore[arg-type]
    message = pb.ControllerMessage.FromString(convert.action_message(action, 4).SerializeToString()).action
    assert (message.id, message.controller_epoch, message.generation, message.reason) == ("a", 4, 2, "r")
    sent = getattr(message, message.WhichOneof("body"))
    assert type(sent).__name__ == kind.__name__
    for name, value in body.items():
        found = getattr(sent, {"target": "node"}.get(name, name))
        assert found == value if isinstance(value, (int, str)) else found


@pytest.mark.parametrize(
    "message",
    [
        b"\xff\xff\xff",
        b"",
        pb.AgentMessage(hello=pb.Hello(node="", epoch=1)).SerializeToString(),
        pb.AgentMessage(hello=pb.Hello(node="n/../x", epoch=1)).SerializeToString(),
        pb.AgentMessage(hello=pb.Hello(node="<script>", epoch=1)).SerializeToString(),
        pb.AgentMessage(hello=pb.Hello(node="n0", epoch=0)).SerializeToString(),
        pb.AgentMessage(hello=pb.Hello(node="n0", epoch=2**60)).SerializeToString(),
        pb.AgentMessage(batch=pb.ReportBatch(reports=[pb.Report()] * (BATCH_REPORTS + 1))).SerializeToString(),
        pb.AgentMessage(batch=pb.ReportBatch(reports=[pb.Report(seq=2), pb.Report(seq=1)])).SerializeToString(),
        pb.AgentMessage(batch=pb.ReportBatch(reports=[pb.Report(seq=1), pb.Report(seq=1)])).SerializeToString(),
        pb.AgentMessage(batch=pb.ReportBatch(reports=[pb.Report(seq=0)])).SerializeToString(),
        pb.AgentMessage(batch=pb.ReportBatch(reports=[pb.Report(seq=2**63)])).SerializeToString(),
        pb.AgentMessage(batch=pb.ReportBatch(reports=[pb.Report(seq=1, time=math.nan)])).SerializeToString(),
        pb.AgentMessage(batch=pb.ReportBatch(reports=[pb.Report(seq=1, time=1e300)])).SerializeToString(),
        pb.AgentMessage(batch=pb.ReportBatch(reports=[pb.Report(seq=1)])).SerializeToString().replace(b"\x08", b"\x0a"),
    ],
)
def test_malformed_messages(message: bytes) -> None:
    with pytest.raises(MalformedError):
        convert.parse_agent_message(message)


def test_a_bad_body_is_refused_alone() -> None:
    bad = pb.Report(seq=1, time=1.0)
    bad.progress_stalled.CopyFrom(pb.ProgressStalled(job="j", stalled_s=math.nan))
    assert "stalled_s" in refusal(bad)
    bad = pb.Report(seq=1, time=1.0)
    bad.worker_ready.CopyFrom(pb.WorkerReady(job="j", standby="a\0b"))
    assert "NUL" in refusal(bad)
    bad = pb.Report(seq=1, time=1.0)
    bad.steps.CopyFrom(pb.StepRecords(job="j", records=[pb.StepRecord(step=2), pb.StepRecord(step=1)]))
    assert "ascending" in refusal(bad)
    bad = pb.Report(seq=1, time=1.0)
    bad.processes.processes.extend([pb.Process()] * (LIST_ENTRIES + 1))
    assert "at most" in refusal(bad)


def test_quoted_texts_are_cut_and_cleaned() -> None:
    report = pb.Report(seq=1, time=1.0)
    report.worker_exited.CopyFrom(pb.WorkerExited(job="j", detail="\0" + "x" * 10**5))
    [found] = parse(report)
    assert isinstance(found.body, events.WorkerExited)
    assert len(found.body.detail) == STRING_CHARACTERS
    assert "\0" not in found.body.detail


@given(st.binary(max_size=200))
def test_random_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        found = convert.parse_agent_message(data)
    except MalformedError:
        return
    assert isinstance(found, (HelloMessage, tuple))


@given(st.binary(max_size=100), st.sampled_from([convert.parse_submit, convert.parse_drill, convert.parse_cancel]))
def test_random_requests_are_read_or_refused(data: bytes, parse_request: object) -> None:
    try:
        parse_request(data)  # type: ignore[operator]
    except MalformedError:
        return
