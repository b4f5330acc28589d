"""The outbox loses nothing it accepted, counts what it refused, and reads back whatever a crash left."""

import errno
import os
import threading
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import spool
from agent.outbox import ENTRY_BYTES, REPORT_BYTES, Outbox, leftovers
from agent.spool import Entry, decode, encode

BIG = 1 << 30
ENTRIES = st.lists(st.tuples(st.booleans(), st.binary(max_size=40)), min_size=1, max_size=8).map(
    lambda items: [Entry(seq, urgent, payload) for seq, (urgent, payload) in enumerate(items, start=1)]
)


def notice(count: int) -> bytes:
    return b"dropped %d" % count


def no_sync(_file: int) -> None:
    """Durability is not what most of these tests are about."""


def make(folder: Path, epoch: int = 1, **options: object) -> Outbox:
    return Outbox(folder, epoch, notice, **{"fsync": no_sync, **options})  # type: ignore[arg-type]


def payloads(entries: list[Entry]) -> list[bytes]:
    return [entry.payload for entry in entries]


def test_numbers_reports_from_one_and_forgets_what_is_acknowledged(tmp_path: Path) -> None:
    outbox = make(tmp_path)
    assert [outbox.append(b"a"), outbox.append(b"b", urgent=True), outbox.append(b"c")] == [1, 2, 3]
    assert outbox.last_urgent == 2
    outbox.acknowledge(2)
    assert payloads(outbox.pending(0, 10, BIG)) == [b"c"]
    outbox.acknowledge(99)
    assert outbox.empty
    assert outbox.acknowledged == 3
    outbox.close()
    assert not (tmp_path / "1").exists()


def test_a_batch_is_bounded_by_count_and_bytes_but_never_empty(tmp_path: Path) -> None:
    outbox = make(tmp_path)
    for _ in range(10):
        outbox.append(b"x" * 100)
    assert len(outbox.pending(0, 3, BIG)) == 3
    assert len(outbox.pending(0, 10, 250)) == 2
    assert len(outbox.pending(4, 10, 1)) == 1
    outbox.close()


def test_what_a_killed_agent_left_is_there_for_the_next(tmp_path: Path) -> None:
    first = make(tmp_path, 5)
    for number in range(6):
        first.append(b"%d" % number)
    # No close: the process was killed. What was handed to the system is on file all the same.
    (left,) = leftovers(tmp_path, 6)
    assert (left.epoch, payloads(left.pending(0, 10, BIG))) == (5, [b"0", b"1", b"2", b"3", b"4", b"5"])
    left.acknowledge(4)
    assert not left.empty
    assert leftovers(tmp_path, 5) == []  # only earlier lives are leftovers
    left.discard()
    assert leftovers(tmp_path, 6) == []
    first.close()


def test_segments_are_deleted_once_acknowledged(tmp_path: Path) -> None:
    outbox = make(tmp_path)
    while len(list((tmp_path / "1").glob("*.log"))) < 3:
        outbox.append(b"x" * 100_000)
    outbox.acknowledge(outbox.last)
    assert len(list((tmp_path / "1").glob("*.log"))) <= 1
    outbox.close()


@given(ENTRIES, st.data())
def test_a_file_cut_anywhere_gives_its_whole_records(entries: list[Entry], data: st.DataObject) -> None:
    records = [encode(entry) for entry in entries]
    cut = data.draw(st.integers(0, len(b"".join(records))))
    whole = sum(len(b"".join(records[: n + 1])) <= cut for n in range(len(records)))
    assert list(decode(b"".join(records)[:cut])) == entries[:whole]


@given(ENTRIES, st.data())
def test_a_changed_byte_is_never_read_as_a_report(entries: list[Entry], data: st.DataObject) -> None:
    raw = bytearray(b"".join(map(encode, entries)))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    assert list(decode(bytes(raw))) in [entries[:n] for n in range(len(entries))]


def test_the_checksum_is_what_finds_the_change(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = bytearray(encode(Entry(1, False, b"loss 1.5")))
    raw[-1] ^= 1
    assert list(decode(bytes(raw))) == []
    monkeypatch.setattr(zlib, "crc32", lambda data, start=0: 0)
    blind = bytearray(encode(Entry(1, False, b"loss 1.5")))
    blind[-1] ^= 1
    assert payloads(list(decode(bytes(blind)))) == [b"loss 1.4"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["ordinary", "urgent", "ack"]), st.integers(0, 300)), max_size=60))
def test_bounds_and_counts_hold_under_any_use(
    tmp_path_factory: pytest.TempPathFactory, uses: list[tuple[str, int]]
) -> None:
    capacity, reserve = 8 * ENTRY_BYTES, 3 * ENTRY_BYTES
    outbox = make(tmp_path_factory.mktemp("o"), capacity=capacity, reserve=reserve)
    offered = said = 0
    for use, size in uses:
        if use == "ack":
            outbox.acknowledge(outbox.acknowledged + size % 4)
            continue
        offered += 1
        before = outbox.last
        taken = outbox.append(b"x" * size, urgent=use == "urgent")
        said += outbox.last - before - (taken is not None)
        held = sum(len(e.payload) + ENTRY_BYTES for e in outbox.pending(0, 1000, BIG))
        assert held <= capacity + ENTRY_BYTES + 32
        assert [e.seq for e in outbox.pending(0, 1000, BIG)] == list(range(outbox.acknowledged + 1, outbox.last + 1))
    assert outbox.last - said + outbox.dropped == offered
    outbox.close()


def test_ordinary_reports_are_refused_before_urgent_ones(tmp_path: Path) -> None:
    outbox = make(tmp_path, capacity=6 * ENTRY_BYTES, reserve=3 * ENTRY_BYTES)
    while outbox.append(b"") is not None:
        pass
    assert outbox.append(b"", urgent=True) is not None
    assert outbox.append(b"") is None
    assert outbox.dropped == 2
    outbox.acknowledge(outbox.last)
    outbox.append(b"after")
    assert payloads(outbox.pending(0, 10, BIG)) == [notice(2), b"after"]
    outbox.close()
    unreserved = make(tmp_path, 2, capacity=6 * ENTRY_BYTES, reserve=0)
    while unreserved.append(b"") is not None:
        pass
    assert unreserved.append(b"", urgent=True) is None  # without the reserve the urgent one would be lost
    unreserved.close()


def test_a_report_too_long_for_a_message_is_refused(tmp_path: Path) -> None:
    outbox = make(tmp_path)
    assert outbox.append(b"x" * (REPORT_BYTES + 1), urgent=True) is None
    assert outbox.append(b"x" * REPORT_BYTES) is not None
    outbox.close()


def test_urgent_reports_are_synced_at_once_and_others_are_not(tmp_path: Path) -> None:
    synced = threading.Event()
    outbox = make(tmp_path, fsync=lambda _file: synced.set())
    outbox.append(b"step")
    assert not synced.is_set()  # its period is a second
    outbox.append(b"alarm", urgent=True)
    assert synced.wait(spool.SYNC_PERIOD_S / 2)
    outbox.close()


def test_appending_does_not_wait_for_the_disk(tmp_path: Path) -> None:
    free = threading.Event()
    outbox = make(tmp_path, fsync=lambda _file: free.wait(10) and None)
    for _ in range(100):
        outbox.append(b"x", urgent=True)  # returns although every fsync hangs
    assert len(outbox) == 100
    free.set()
    outbox.close()


def test_a_full_disk_keeps_reports_in_memory_and_goes_on_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = make(tmp_path)
    outbox.append(b"before")
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", _no_room)
        assert outbox.append(b"meanwhile") == 2
    outbox.append(b"after")
    assert payloads(outbox.pending(0, 10, BIG)) == [b"before", b"meanwhile", b"after"]
    (left,) = leftovers(tmp_path, 2)
    assert payloads(left.pending(0, 10, BIG)) == [b"before", b"after"]
    outbox.close()


def test_a_record_torn_by_a_full_disk_does_not_hide_those_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = make(tmp_path)
    outbox.append(b"before")
    write = os.write
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda file, data: write(file, data[:5]))
        outbox.append(b"torn")
    outbox.append(b"after")
    (left,) = leftovers(tmp_path, 2)
    assert payloads(left.pending(0, 10, BIG)) == [b"before", b"after"]
    outbox.close()


def _no_room(_file: int, _data: bytes) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")
