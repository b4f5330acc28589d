"""What a rank's sensors lost, on its way from a report to what people read; nothing of it where nothing was lost."""

import logging

import pytest
from making import hello, ready, record, recorder, report, steps, submitted
from populated import fill
from sqlalchemy import inspect, text

from agent import convert as agent_convert
from assay.v1 import agent_pb2 as pb
from controller.cli.status import lost
from controller.recorder import Recorder
from controller.rpc.convert import parse_agent_message
from controller.store import migrate, segments
from controller.store.history import _record
from controller.store.leases import take_lease
from controller.store.opening import Store, make_engine
from controller.store.queries import Queries
from controller.store.reports import StepRecords
from controller.store.writer import Unit, Writer

WHY = "the check itself failed: ValueError: no\x00thing"


def job(unit: Unit) -> Recorder:
    """A job of two ranks that has begun."""
    told = recorder()
    told.decide(unit, submitted(steps=9, world=2))
    for node in ("n0", "n1"):
        told.decide(unit, hello(node))
        told.reports(unit, node, 1, [report(1, ready(node, f"{node}-a"))])
    return told


def stored(store: Store, unit: Unit) -> Queries:
    epoch = take_lease(store, "controller", "tests", None)
    assert epoch is not None
    writer = Writer(store, "controller", epoch, lambda *_: None)
    writer.submit(unit).result(10)
    writer.close()
    return Queries(store)


def test_a_report_brings_it_and_a_segment_keeps_it() -> None:
    body = {"step": 1, "checks": 7, "failed_checks": 3, "unjudged": 2, "lost_because": [WHY]}
    one = pb.Report.FromString(agent_convert.steps("main", 1, 0, body, 1.0))
    one.seq = 1
    message = pb.AgentMessage(batch=pb.ReportBatch(reports=[one]))
    (taken,) = parse_agent_message(message.SerializeToString())  # type: ignore[misc]
    assert isinstance(taken.body, StepRecords), taken.body
    (found,) = taken.body.records
    assert (found.failed_checks, found.unjudged, found.lost_because) == (3, 2, (WHY.replace("\x00", "\ufffd"),))
    row = segments.pack("n0", 1, 1, taken.body)
    assert (row["checks"], row["failed_checks"], row["unjudged"]) == (7, 3, 2)
    assert [_record(entry) for entry in segments.unpack(row["payload"])] == [found]


def test_an_agent_that_knows_of_none_loses_none() -> None:
    row = segments.pack("n0", 1, 1, steps(0, [record(1)]))
    (entry,) = segments.unpack(row["payload"])
    for name in ("failed_checks", "unjudged", "lost_because"):
        del entry[name]
    assert _record(entry) == record(1)


def test_people_are_told_which_device_lost_how_much_and_why(any_store: Store, caplog: pytest.LogCaptureFixture) -> None:
    unit = Unit()
    told = job(unit)
    ill = [
        record(1),
        record(2, lost=(40, 0, "broken")),
        record(3, lost=(41, 1, "refused")),
        record(4, lost=(41, 0, "")),
    ]
    told.reports(unit, "n0", 1, [report(2, steps(0, [record(step) for step in range(1, 5)]))])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):  # a batch that comes again counts once
            told.reports(unit, "n1", 1, [report(2, steps(1, ill))])
    assert [line for line in caplog.messages if "lose coverage" in line] == [
        "job main: sensors of rank 1 on n1 lose coverage in step 2: 'broken'",
        "job main: sensors of rank 1 on n1 lose coverage in step 3: 'refused'",
    ]
    metrics = told._metrics.text().decode()
    assert 'assay_checks_failed_total{node="n1"} 122.0' in metrics
    assert 'assay_calls_unjudged_total{node="n1"} 1.0' in metrics
    assert 'assay_checks_failed_total{node="n0"} 0.0' in metrics
    assert 'assay_checks_total{node="n1"} 40.0' in metrics

    queries = stored(any_store, unit)
    for document in (queries.status()["job"], queries.job(), queries.run()):
        (entry,) = document["lost_coverage"]
        assert (entry["rank"], entry["node"], entry["device"]) == (1, "n1", "dev-n1")
        assert (entry["checks"], entry["failed_checks"], entry["unjudged"]) == (40, 122, 1)
        assert (entry["first_step"], entry["last_step"], entry["reasons"]) == (1, 4, ["broken", "refused"])
        says = (
            "sensors of dev-n1 on n1 (rank 1) fail: 122 checks failed themselves and 1 call could not be judged "
            "between steps 1 and 4, beside 40 checks made: broken; refused"
        )
        assert [*lost(document)] == [("lost coverage", says)]
    listed = {
        (s["rank"], s["step"]): (s["checks"], s["failed_checks"], s["unjudged"]) for s in queries.steps()["steps"]
    }
    assert listed[0, 3] == (10, 0, 0)
    assert listed[1, 3] == (10, 41, 1)


def test_nothing_is_said_while_all_is_well(any_store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """The control."""
    unit = Unit()
    told = job(unit)
    with caplog.at_level(logging.WARNING):
        for rank in (0, 1):
            told.reports(unit, f"n{rank}", 1, [report(2, steps(rank, [record(1), record(2)]))])
    assert not caplog.messages
    assert 'assay_checks_failed_total{node="n1"} 0.0' in told._metrics.text().decode()
    queries = stored(any_store, unit)
    for document in (queries.status()["job"], queries.job(), queries.run()):
        assert (document["lost_coverage"], [*lost(document)]) == ([], [])


def test_a_database_of_before_gets_the_counts(any_store: Store) -> None:
    fill(any_store.engine)
    engine = make_engine(any_store.url, writes=True, foreign_keys=False)
    migrate.downgrade(engine, "0001")
    with engine.connect() as connection:
        assert "failed_checks" not in {column["name"] for column in inspect(connection).get_columns("segments")}
    migrate.upgrade(engine)
    with engine.connect() as connection:
        kept = connection.execute(text("SELECT last_step, checks, failed_checks, unjudged FROM segments")).all()
    engine.dispose()
    assert [tuple(row) for row in kept] == [(2, 0, 0, 0)]
