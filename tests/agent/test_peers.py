"""A peer's slot arrives whole and unchanged, or not at all."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent import peers
from agent.peers import CHUNK_BYTES, PeerError, fetch_slot, slots_path
from agent.slots import SlotRecord, Slots
from assay.v1 import peer_pb2 as pb

NBYTES = 2 * CHUNK_BYTES + 12345
RECORD = SlotRecord(3, 41, 0xFEDCBA9876543210, 2**64 - 1)


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[str]:
    server, endpoint = await peers.serve(folder, "127.0.0.1", 0)
    yield endpoint
    await server.stop(None)


@pytest.fixture
def held(tmp_path: Path) -> Slots:
    """Slots of which the second holds step 41."""
    slots = Slots.create(slots_path(tmp_path, "j", 1), NBYTES)
    with slots.state(1) as state:
        state[:] = bytes(i * 7 % 251 for i in range(1000)) * (NBYTES // 1000) + b"z" * (NBYTES % 1000)
    slots.write_record(1, RECORD)
    slots.commit(1)
    return slots


async def test_a_state_is_read_with_its_record(held: Slots, tmp_path: Path) -> None:
    async with serving(tmp_path) as endpoint:
        assert await fetch_slot(endpoint, "j", 1, 41, tmp_path / "got") == RECORD
    with held.state(1) as state:
        assert (tmp_path / "got").read_bytes() == bytes(state)


@pytest.mark.parametrize(
    ("job", "rank", "step"), [("j", 1, 40), ("j", 0, 41), ("k", 1, 41), ("../j", 1, 41), ("", 1, 41)]
)
async def test_what_is_not_held_is_refused(held: Slots, tmp_path: Path, job: str, rank: int, step: int) -> None:
    async with serving(tmp_path) as endpoint:
        with pytest.raises(PeerError, match="NOT_FOUND"):
            await fetch_slot(endpoint, job, rank, step, tmp_path / "got")
    assert not (tmp_path / "got").exists()
    assert not (tmp_path / "got.part").exists()


async def test_a_peer_that_is_away_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match=r"UNAVAILABLE|DEADLINE"):
        await fetch_slot("127.0.0.1:1", "j", 1, 41, tmp_path / "got", timeout=5.0)


@pytest.mark.parametrize("disturbed", [True, False])
async def test_a_slot_that_is_written_while_it_is_read_is_refused(
    held: Slots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disturbed: bool
) -> None:
    copy = peers._copy

    def copy_and_disturb(slots: Slots, slot: int, start: int) -> bytes:
        if disturbed and start == CHUNK_BYTES:
            held.invalidate(1)
        return copy(slots, slot, start)

    monkeypatch.setattr(peers, "_copy", copy_and_disturb)
    async with serving(tmp_path) as endpoint:
        if disturbed:
            with pytest.raises(PeerError, match="written to"):
                await fetch_slot(endpoint, "j", 1, 41, tmp_path / "got")
        else:
            await fetch_slot(endpoint, "j", 1, 41, tmp_path / "got")
    assert (tmp_path / "got").exists() != disturbed


async def test_a_stream_that_ends_early_is_refused(tmp_path: Path) -> None:
    head = pb.SlotChunk(record=pb.PeerSlotRecord(step=1, nbytes=4))
    whole = [head, pb.SlotChunk(data=b"abcd"), pb.SlotChunk(complete=True)]
    assert (await peers._receive(_chunks(whole), tmp_path / "x")).step == 1
    for missing in range(3):
        with pytest.raises(PeerError):
            await peers._receive(_chunks(whole[:missing] + whole[missing + 1 :]), tmp_path / "x")


async def _chunks(chunks: list[pb.SlotChunk]) -> AsyncIterator[pb.SlotChunk]:
    for chunk in chunks:
        yield chunk


async def test_a_port_in_use_is_an_error(tmp_path: Path) -> None:
    async with serving(tmp_path) as endpoint:
        port = int(endpoint.rpartition(":")[2])
        with pytest.raises(OSError, match="cannot listen"):
            await peers.serve(tmp_path, "127.0.0.1", port)
