"""Nonsense on the wire gets a clear refusal, costs little, and disturbs nobody else."""

import sqlite3
from collections.abc import Callable

import grpc
import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running import Controller, Wire, batch, hello, step_reports

from assay.v1 import agent_pb2 as pb
from controller.rpc.agents import CREDITS
from controller.rpc.checks import MESSAGE_BYTES

Connect = Callable[[Controller], Wire]
INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("first", "says"),
    [
        (b"\xff\xff\xff\xff", "cannot be read as AgentMessage"),
        (hello().SerializeToString()[:-3], "cannot be read as AgentMessage"),
        (b"\x0a\x04\x0a\x02\xff\xfe", "cannot be read as AgentMessage"),  # a node's name that is not UTF-8
        (batch(step_reports(1, 1)).SerializeToString(), "hello"),
        (b"", "hello"),
        (hello("../etc").SerializeToString(), "node must be"),
        (hello(epoch=2**60).SerializeToString(), "epoch is out of range"),
    ],
)
def test_a_bad_first_message(shared: Controller, connect: Connect, first: bytes, says: str) -> None:
    wire = connect(shared)
    wire.say(first)
    code, details = wire.refused()
    assert code is INVALID
    assert says in details


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(noise=st.binary(min_size=1, max_size=200))
def test_random_bytes_after_a_hello(shared: Controller, connect: Connect, noise: bytes) -> None:
    wire = connect(shared)
    wire.hello("noisy")
    wire.say(noise)
    try:
        pb.AgentMessage.FromString(noise)
    except DecodeError:
        assert wire.refused()[0] is INVALID
    wire.close()


def test_two_hellos(shared: Controller, connect: Connect) -> None:
    wire = connect(shared)
    wire.hello("twice")
    wire.say(hello("twice"))
    assert wire.refused() == (INVALID, "only the first message may be a hello")


def test_a_message_that_is_too_large(shared: Controller, connect: Connect) -> None:
    wire = connect(shared)
    wire.hello("large")
    wire.say(pb.AgentMessage(hello=pb.Hello(node="x" * (MESSAGE_BYTES + 1))))
    assert wire.refused()[0] is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_bomb_of_empty_submessages(shared: Controller, connect: Connect) -> None:
    """A message of 250 KiB that would become 125,000 objects is refused before that."""
    before = shared.peak_mib()
    wire = connect(shared)
    wire.hello("bomb")
    wire.say(pb.AgentMessage(batch=pb.ReportBatch(reports=[pb.Report()] * 125_000)).SerializeToString())
    assert wire.refused()[0] is INVALID
    assert shared.peak_mib() - before < 100


def test_a_sequence_that_cannot_be(shared: Controller, connect: Connect) -> None:
    wire = connect(shared)
    wire.hello("huge")
    report = step_reports(1, 1)[0]
    report.seq = 2**63
    wire.say(batch([report]))
    assert wire.refused()[0] is INVALID


def test_more_than_the_granted_credits(shared: Controller, connect: Connect) -> None:
    """While the database is busy nothing is acknowledged, and who goes on sending is cut off."""
    wire = connect(shared)
    assert wire.hello("greedy").credits == CREDITS
    with sqlite3.connect(shared.directory / "assay.db", isolation_level=None) as busy:
        busy.execute("BEGIN IMMEDIATE")
        for first in range(1, CREDITS + 1, 500):
            wire.say(batch(step_reports(first, first + 499)))
        wire.say(batch(step_reports(CREDITS + 1, CREDITS + 1)))
        assert wire.refused() == (INVALID, f"more than {CREDITS} reports in flight")
        busy.execute("ROLLBACK")


def test_as_many_as_granted_are_taken(shared: Controller, connect: Connect) -> None:
    """The control."""
    wire = connect(shared)
    wire.hello("modest")
    with sqlite3.connect(shared.directory / "assay.db", isolation_level=None) as busy:
        busy.execute("BEGIN IMMEDIATE")
        for first in range(1, CREDITS + 1, 500):
            wire.say(batch(step_reports(first, first + 499)))
        busy.execute("ROLLBACK")
    assert [wire.hear().ack.seq for _ in range(0, CREDITS, 500)] == [500, 1000, 1500, 2000]


def test_an_older_life_of_an_agent_does_not_displace_the_newer_one(shared: Controller, connect: Connect) -> None:
    newer, older = connect(shared), connect(shared)
    newer.hello("n8", epoch=7)
    older.hello("n8", epoch=6)
    older.say(batch(step_reports(1, 2)))
    assert older.hear().ack.epoch == 6
    newer.say(batch(step_reports(1, 1)))
    assert newer.hear().ack.epoch == 7


def test_a_newer_stream_ends_the_older_one(shared: Controller, connect: Connect) -> None:
    """The control: of two streams of one life, the newest stays, and the older one is told."""
    older, newer = connect(shared), connect(shared)
    older.hello("n9", epoch=7)
    newer.hello("n9", epoch=7)
    assert older.refused() == (grpc.StatusCode.ABORTED, "a newer stream of this node took its place")
    newer.say(batch(step_reports(1, 1)))
    assert newer.hear().ack.seq == 1
