"""Reports are taken exactly once, however they are cut, repeated or interrupted."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from making import hello, record, recorder, report, steps, submitted
from sqlalchemy import func, select

from controller.core import events
from controller.loading import load_ingest, load_state
from controller.recorder import Recorder
from controller.store import segments
from controller.store.finals import Finals
from controller.store.history import load_marks
from controller.store.ingest import Ingest
from controller.store.leases import take_lease
from controller.store.opening import Store
from controller.store.queries import Queries
from controller.store.reports import NodeProcesses, Report, ReportsDropped
from controller.store.schema import marks
from controller.store.schema import segments as rows
from controller.store.writer import Unit, Writer


@pytest.fixture
def writer(any_store: Store) -> Iterator[Writer]:
    epoch = take_lease(any_store, "controller", "tests", None)
    assert epoch == 1
    writing = Writer(any_store, "controller", epoch, lambda *_: None)
    yield writing
    writing.close()


def take(recording: Recorder, node: str, reports: list[Report], epoch: int = 1) -> Unit:
    unit = Unit()
    recording.reports(unit, node, epoch, reports)
    return unit


@given(st.lists(st.integers(0, 12), max_size=12))
def test_each_report_once_however_batches_overlap(starts: list[int]) -> None:
    """An agent sends again from wherever it believes it was acknowledged; no record is stored twice."""
    recording = recorder()
    everything = [report(seq, steps(0, [record(seq)])) for seq in range(1, 21)]
    kept: list[int] = []
    for start in [*starts, 0]:
        already = recording.ingest.mark("n0", 1)
        unit = take(recording, "n0", everything[min(start, already) : start + 8])
        for row in unit.bulk["segment"]:
            kept += [entry["step"] for entry in segments.unpack(row["payload"])]
    assert kept == list(range(1, recording.ingest.mark("n0", 1) + 1))


def test_without_marks_repeats_would_be_taken() -> None:
    recording = recorder()
    reports = [report(1, ReportsDropped(3, "full"))]
    assert take(recording, "n0", reports).bulk["mark"]
    assert not take(recording, "n0", reports).bulk["mark"]
    recording.ingest = Ingest({}, Finals())
    assert take(recording, "n0", reports).bulk["mark"]


def test_epochs_are_counted_apart() -> None:
    recording = recorder()
    take(recording, "n0", [report(7, ReportsDropped(0, ""))], epoch=1)
    assert take(recording, "n0", [report(1, ReportsDropped(0, ""))], epoch=2).bulk["mark"]


def test_rows_of_one_batch_are_packed_together(any_store: Store, writer: Writer) -> None:
    recording = recorder()
    unit = take(recording, "n0", [report(seq, steps(seq % 2, [record(seq, loss=float(seq))])) for seq in range(1, 9)])
    unit.add("segment", **segments.pack("n0", 1, 99, steps(0, [record(50, loss=float("nan"))])))
    writer.submit(unit).result(5)
    with any_store.reader.connect() as connection:
        found = connection.execute(select(rows).order_by(rows.c.seq)).all()
    assert [(row.rank, row.first_step, row.last_step, row.count) for row in found] == [
        (1, 1, 7, 4),
        (0, 2, 8, 4),
        (0, 50, 50, 1),
    ]
    assert (found[0].loss_min, found[0].loss_mean, found[0].loss_max) == (1.0, 4.0, 7.0)
    assert found[2].loss_mean is None
    assert segments.unpack(found[2].payload)[0]["loss"] is None


def test_processes_replace_each_other(any_store: Store, writer: Writer) -> None:
    recording = recorder()
    first = [events.Process("agent", 1), events.Process("worker", 2, "main", 1, 0)]
    take_all = [first, [events.Process("agent", 1), events.Process("worker", 3, "main", 2, 0)]]
    for seq, found in enumerate(take_all, start=1):
        writer.submit(take(recording, "n0", [report(seq, NodeProcesses(tuple(found)))])).result(5)
    shown = Queries(any_store).status()["processes"]
    assert [(entry["role"], entry["pid"], entry["rank"], entry["generation"]) for entry in shown] == [
        ("agent", 1, None, None),
        ("worker", 3, 0, 2),
    ]


def begin(recording: Recorder, world: int = 2) -> Unit:
    unit = Unit()
    recording.decide(unit, submitted(world=world))
    for number in range(world):
        recording.decide(unit, hello(f"n{number}"))
    return unit


def test_a_restart_goes_on_with_what_waits_for_a_rank(any_store: Store, writer: Writer) -> None:
    """Rank 0's record is stored, the controller dies, rank 1's comes: the step is compared all the same."""
    recording = recorder()
    unit = begin(recording)
    recording.state.jobs["main"].generation = 1
    recording.reports(unit, "n0", 1, [report(1, steps(0, [record(1), record(2)]))])
    writer.submit(unit).result(5)
    state, seq = load_state(any_store)
    state.jobs["main"].generation = 1
    assert seq == recording.seq
    ingest = load_ingest(any_store, state)
    assert load_marks(any_store) == {("n0", 1): 2 - 1}
    found = list(ingest.take(Unit(), "n1", 1, [report(1, steps(1, [record(1), record(2, "other")]))], lambda _: 2))
    assert [type(item).__name__ for item in found] == ["Final", "Disagreement"]


def test_dropped_reports_are_counted(any_store: Store, writer: Writer) -> None:
    recording = recorder()
    for seq in (1, 2):
        writer.submit(take(recording, "n0", [report(seq, ReportsDropped(5, "full"))])).result(5)
    with any_store.reader.connect() as connection:
        assert connection.execute(select(func.sum(marks.c.dropped))).scalar() == 10
