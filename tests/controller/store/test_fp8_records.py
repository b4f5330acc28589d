"""FP8 statistics of a step on their way from an agent's report into the store and out again; old records too."""

import math
import zlib

import pytest
from making import record, steps, summary

from agent import convert as agent_convert
from assay.v1 import agent_pb2 as pb
from controller.rpc.convert import parse_agent_message
from controller.store import segments
from controller.store.history import _record
from controller.store.reports import StepRecords

BODY = {
    "tensor": "activation",
    "pass": "fprop",
    "amax": 3.0,
    "amax_module": "layers.0.ffn.down",
    "saturation": 0.01,
    "saturation_module": "head",
    "underflow": 0.25,
    "underflow_module": "layers.1.moe.experts.0.up",
}


def received(record_body: dict[str, object]) -> StepRecords:
    """What the controller makes of one record that a worker reports."""
    payload = agent_convert.steps("main", 1, 0, record_body, 1.0)
    report = pb.Report.FromString(payload)
    report.seq = 1
    message = pb.AgentMessage(batch=pb.ReportBatch(reports=[report]))
    (taken,) = parse_agent_message(message.SerializeToString())  # type: ignore[misc]
    assert isinstance(taken.body, StepRecords), taken.body
    return taken.body


def test_a_report_brings_it() -> None:
    (found,) = received({"step": 1, "fp8": [BODY]}).records
    assert found.fp8 == (summary(),)


def test_an_agent_that_knows_of_none_brings_none() -> None:
    (found,) = received({"step": 1}).records
    assert found.fp8 == ()


@pytest.mark.parametrize("amax", [3.0, math.nan])
def test_a_segment_keeps_it(amax: float) -> None:
    row = segments.pack("n0", 1, 1, steps(0, [record(1, fp8=(summary(amax),)), record(2)]))
    first, second = (_record(entry) for entry in segments.unpack(row["payload"]))
    assert second.fp8 == ()
    assert repr(first.fp8) == repr((summary(amax),))


def test_segments_of_before_are_read() -> None:
    row = segments.pack("n0", 1, 1, steps(0, [record(1)]))
    payload = zlib.decompress(row["payload"]).replace(b',"fp8":[]', b"")
    assert b"fp8" not in payload
    (entry,) = segments.unpack(zlib.compress(payload))
    assert _record(entry) == record(1)
