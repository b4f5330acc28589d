"""Slots: a commit is one store, a torn record holds nothing, and a file of another kind is refused."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.slots import HEADER, PHASES, ShardDigests, SlotRecord, Slots, SlotsError

RECORD = SlotRecord(generation=2, step=7, digest=0xFFFFFFFFFFFFFFFF, chain=3)


@pytest.fixture
def slots(tmp_path: Path) -> Slots:
    return Slots.create(tmp_path / "job-0.slots", 5000)


def test_a_new_file_has_nothing_committed(slots: Slots) -> None:
    assert slots.committed is None
    assert slots.record(0) is None
    assert slots.progress().phase == "idle"


def test_a_commit_is_seen_by_another_mapping(slots: Slots) -> None:
    slots.state(1)[:3] = b"abc"
    slots.write_record(1, RECORD)
    assert slots.committed is None  # nothing counts before the commit word
    slots.commit(1)
    other = Slots.open(slots.path, readonly=True)
    assert other.committed == 1
    assert other.record(1) == RECORD
    assert bytes(other.state(1)[:3]) == b"abc"


def test_a_record_of_a_shard_says_what_its_own_bits_hash_to(slots: Slots) -> None:
    shard = SlotRecord(generation=2, step=7, digest=5, chain=3, shard=ShardDigests(own=2**64 - 1, replica=0))
    slots.write_record(0, shard)
    assert slots.record(0) == shard
    assert (shard.own, RECORD.own) == (2**64 - 1, RECORD.digest)


def test_a_slot_under_change_is_no_state_even_if_committed(slots: Slots) -> None:
    slots.write_record(0, RECORD)
    slots.commit(0)
    slots.invalidate(0)
    assert slots.committed is None


@given(st.binary(min_size=40, max_size=40))
def test_random_bytes_are_no_record(tmp_path_factory: pytest.TempPathFactory, noise: bytes) -> None:
    path = tmp_path_factory.mktemp("slots") / "s"
    Slots.create(path, 100).close()
    with path.open("r+b") as file:
        file.seek(64)
        file.write(noise)
    assert Slots.open(path).record(0) is None


@pytest.mark.parametrize("phase", PHASES)
def test_progress_names_the_phase(slots: Slots, phase: str) -> None:
    slots.enter(3, 9, phase)
    seen = slots.progress()
    assert (seen.generation, seen.step, seen.phase) == (3, 9, phase)
    assert seen.monotonic_ns > 0


def test_states_are_page_aligned_and_apart(slots: Slots) -> None:
    slots.state(0)[:] = b"a" * 5000
    slots.state(1)[:] = b"b" * 5000
    assert set(bytes(slots.state(0))) == {ord("a")}
    assert slots.path.stat().st_size == HEADER + 2 * 8192


def test_another_file_is_refused(tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_bytes(b"x")
    with pytest.raises(SlotsError, match="shorter"):
        Slots.open(short)
    other = tmp_path / "other"
    other.write_bytes(b"x" * 10_000)
    with pytest.raises(SlotsError, match="not a slots file"):
        Slots.open(other)
