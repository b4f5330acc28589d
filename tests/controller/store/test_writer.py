"""The writer: what it says is stored is stored, in order, in few transactions, and only under the lease."""

import threading
from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import func, select

from controller.store.errors import LeaseLostError, StoreError
from controller.store.leases import read_lease, resign_lease, take_lease
from controller.store.opening import Store
from controller.store.schema import events, marks
from controller.store.writer import Unit, Writer

NAME = "controller"


@pytest.fixture
def commits() -> list[int]:
    return []


@pytest.fixture
def start(any_store: Store, commits: list[int]) -> Iterator[Callable[[], Writer]]:
    made: list[Writer] = []

    def starting() -> Writer:
        epoch = take_lease(any_store, NAME, "me", read_lease(any_store, NAME))
        assert epoch is not None
        made.append(Writer(any_store, NAME, epoch, lambda units, _seconds: commits.append(units)))
        return made[-1]

    yield starting
    for writer in made:
        writer.close()


def mark(seq: int, node: str = "n0") -> Unit:
    unit = Unit()
    unit.add("mark", node=node, epoch=1, seq=seq, dropped=1)
    return unit


def test_done_means_stored(any_store: Store, start: Callable[[], Writer]) -> None:
    start().submit(mark(5)).result(5)
    with any_store.reader.connect() as connection:
        assert connection.execute(select(marks.c.seq)).scalar() == 5


def test_marks_only_grow_and_drops_add_up(any_store: Store, start: Callable[[], Writer]) -> None:
    writer = start()
    for seq in (5, 9, 3):
        last = writer.submit(mark(seq))
    last.result(5)
    with any_store.reader.connect() as connection:
        assert tuple(connection.execute(select(marks.c.seq, marks.c.dropped)).one()) == (9, 3)


def test_what_waits_shares_a_transaction(
    any_store: Store, start: Callable[[], Writer], commits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = start()
    go, held = threading.Event(), threading.Event()
    inner = Writer._hold_lease

    def hold(self: Writer, *arguments: object) -> None:
        held.set()
        assert go.wait(5)
        inner(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Writer, "_hold_lease", hold)
    futures = [writer.submit(mark(1))]
    assert held.wait(5)
    futures += [writer.submit(mark(seq)) for seq in range(2, 102)]
    go.set()
    for future in futures:
        future.result(5)
    assert commits == [1, 100]


def test_a_cancelled_caller_does_not_stop_the_writer(start: Callable[[], Writer]) -> None:
    writer = start()
    assert not writer.submit(mark(1)).cancel()
    writer.submit(mark(2)).result(5)


def test_a_successor_fences_the_writer(any_store: Store, start: Callable[[], Writer]) -> None:
    old = start()
    old.submit(mark(1)).result(5)
    new = start()
    with pytest.raises(LeaseLostError):
        old.submit(mark(2)).result(5)
    new.submit(mark(3)).result(5)
    with any_store.reader.connect() as connection:
        assert connection.execute(select(marks.c.seq)).scalar() == 3


def test_without_the_fence_an_old_writer_would_write(
    any_store: Store, start: Callable[[], Writer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Writer, "_hold_lease", lambda *_: None)
    old = start()
    start()
    old.submit(mark(2)).result(5)


def test_a_resigned_lease_is_not_ours(any_store: Store, start: Callable[[], Writer]) -> None:
    writer = start()
    resign_lease(any_store, NAME, 1)
    with pytest.raises(LeaseLostError):
        writer.submit(mark(2)).result(5)


def event(seq: int) -> Unit:
    unit = Unit()
    row = {"time": 1.0, "recorded": 1.0, "type": "Tick", "node": "", "job": "", "body": "{}"}
    unit.add("event", seq=seq, **row, agent_epoch=None, report_seq=None)
    return unit


def test_after_a_failure_nothing_more_is_stored(any_store: Store, start: Callable[[], Writer]) -> None:
    writer = start()
    writer.submit(event(1)).result(5)
    with pytest.raises(StoreError):
        writer.submit(event(1)).result(5)
    with pytest.raises(StoreError):
        writer.submit(event(2)).result(5)
    with any_store.reader.connect() as connection:
        assert connection.execute(select(func.count()).select_from(events)).scalar() == 1


def test_epochs_grow_over_resignations(any_store: Store) -> None:
    assert take_lease(any_store, NAME, "a", None) == 1
    resign_lease(any_store, NAME, 1)
    row = read_lease(any_store, NAME)
    assert row is not None
    assert (row.epoch, row.resigned) == (1, True)
    assert 0 <= row.age_s < 60
    assert take_lease(any_store, NAME, "b", row) == 2
    assert take_lease(any_store, NAME, "late", row) is None
