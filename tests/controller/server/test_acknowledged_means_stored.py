"""What an agent was told is stored survives kill -9, and what it was not told is stored once when it says it again."""

import itertools
from collections.abc import Callable

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from running import Controller, NotStartedError, Wire, batch, step_reports, until
from sqlalchemy import func, select

from controller.store.opening import open_store
from controller.store.schema import segments

Start = Callable[[str], Controller]
Connect = Callable[[Controller], Wire]


def stored_rows(database: str) -> int:
    """Rows of step records in the database itself: a report that was taken twice would have two."""
    store = open_store(database, create=False)
    try:
        with store.engine.connect() as connection:
            return int(connection.execute(select(func.count()).select_from(segments)).scalar() or 0)
    finally:
        store.close()


def test_killed_between_commit_and_acknowledgement(empty_url: str, start: Start, connect: Connect) -> None:
    controller = start(empty_url)
    controller.submit()
    wire = connect(controller)
    assert wire.hello(epoch=5).acknowledged_seq == 0
    wire.say(batch(step_reports(1, 20)))
    # The acknowledgement may be on its way, but nobody has read it: to the agent it never came.
    until((stored_rows(empty_url) > 0 for _ in itertools.count()), "the batch to be committed")
    controller.kill()
    rows = stored_rows(empty_url)

    controller.start()
    again = connect(controller)
    assert again.hello(epoch=5).acknowledged_seq == 20
    again.say(batch(step_reports(1, 25)))
    assert again.hear().ack.seq == 25
    assert controller.steps() == [(0, step) for step in range(1, 26)]
    assert stored_rows(empty_url) == rows + 1  # only what was new

    # The control: under another epoch the same reports are other ones.
    other = connect(controller)
    assert other.hello(epoch=6).acknowledged_seq == 0
    other.say(batch(step_reports(1, 25)))
    assert other.hear().ack.seq == 25
    assert stored_rows(empty_url) == rows + 2


def test_acknowledged_reports_survive_each_of_three_kills(empty_url: str, start: Start, connect: Connect) -> None:
    controller = start(empty_url)
    controller.submit()
    for round_ in range(3):
        wire = connect(controller)
        done = wire.hello(epoch=9).acknowledged_seq
        assert done == 10 * round_
        wire.say(batch(step_reports(done + 1, done + 10)))
        assert wire.hear().ack.seq == done + 10
        controller.kill()
        controller.start()
    assert controller.steps() == [(0, step) for step in range(1, 31)]


def test_repeated_and_overlapping_batches_are_taken_once(shared: Controller, connect: Connect) -> None:
    shared.submit()
    wire = connect(shared)
    wire.hello("n7", epoch=1)
    for first, last in ((1, 3), (1, 3), (2, 6)):
        wire.say(batch(step_reports(first, last, rank=1)))
        assert wire.hear().ack.seq == last
    assert [entry for entry in shared.steps() if entry[0] == 1] == [(1, step) for step in range(1, 7)]


def test_a_second_controller_on_one_database_is_refused(start: Start, tmp_path_factory: pytest.TempPathFactory) -> None:
    database = f"sqlite:///{tmp_path_factory.mktemp('one')}/assay.db"
    first = start(database)
    with pytest.raises(NotStartedError, match="another controller is active"):
        start(database)
    assert first.stop() == 0
    assert start(database).process.poll() is None  # the lease was resigned, so the next one need not wait


def test_health(shared: Controller) -> None:
    with grpc.insecure_channel(shared.address) as channel:
        for service in ("", "assay.v1.AgentService", "assay.v1.OperatorService"):
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=service), timeout=10
            )
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
