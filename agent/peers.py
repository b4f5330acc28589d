"""Reading another node's state slots: a spare's replay, or a worker without state, takes it from here."""

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc

from agent.slots import SlotRecord, Slots, SlotsError
from assay.v1 import peer_pb2 as pb
from assay.v1 import peer_pb2_grpc

log = logging.getLogger(__name__)

#: Small enough for gRPC's default limit of 4 MiB and a short turn of the loop (about 0.2 ms), large enough for speed.
CHUNK_BYTES = 1 << 20
_Stub: Any = peer_pb2_grpc.PeerServiceStub


class PeerError(ConnectionError):
    """A peer's state could not be read: it is not there, it changed meanwhile, or the peer cannot be reached."""


def slots_path(folder: Path, job: str, rank: int) -> Path:
    """Where the slots of a rank lie. Raises PeerError if `job` is no name of a file."""
    if not job or "/" in job or "\0" in job or rank < 0:
        raise PeerError(f"there is no job {job!r} with a rank {rank}")
    return folder / f"{job}-{rank}.slots"


class PeerService(peer_pb2_grpc.PeerServiceServicer):
    """Serves the slots in `folder`. Reads shared memory only, so it needs nothing of the worker, held or dead."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def ReadSlot(
        self, request: pb.ReadSlotRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.SlotChunk]:
        """Stream the state committed at a step; NOT_FOUND if no slot holds it."""
        try:
            slots = Slots.open(slots_path(self._folder, request.job, request.rank), readonly=True)
        except (OSError, SlotsError, PeerError) as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, str(error))
        try:
            slot = holding(slots, request.step)
            if slot is None:
                await context.abort(grpc.StatusCode.NOT_FOUND, f"no slot holds step {request.step}")
            async for chunk in _stream(slots, slot):
                yield chunk
        finally:
            slots.close()


def holding(slots: Slots, step: int) -> int | None:
    """The slot that holds the state committed at `step`, or None."""
    for slot in (0, 1):
        record = slots.record(slot)
        if record is not None and record.step == step:
            return slot
    return None


async def _stream(slots: Slots, slot: int) -> AsyncIterator[pb.SlotChunk]:
    record = slots.record(slot)
    assert record is not None
    yield pb.SlotChunk(
        record=pb.PeerSlotRecord(
            generation=record.generation,
            step=record.step,
            digest=record.digest,
            chain=record.chain,
            nbytes=slots.nbytes,
        )
    )
    for start in range(0, slots.nbytes, CHUNK_BYTES):
        yield pb.SlotChunk(data=_copy(slots, slot, start))
        await asyncio.sleep(0)  # the loop's other work comes first
    # The worker invalidates the record before it writes: an unchanged one proves that every byte read belongs to it.
    yield pb.SlotChunk(complete=slots.record(slot) == record)


def _copy(slots: Slots, slot: int, start: int) -> bytes:
    with slots.state(slot) as state:
        return bytes(state[start : start + CHUNK_BYTES])


async def serve(folder: Path, host: str, port: int) -> tuple[grpc.aio.Server, str]:
    """Start the service; gives the server and its endpoint. Raises OSError if the port cannot be had."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    add: Any = peer_pb2_grpc.add_PeerServiceServicer_to_server
    add(PeerService(folder), server)
    try:
        bound = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:
        raise OSError(f"cannot listen on {host}:{port} for peers: {error}") from error
    await server.start()
    return server, f"{host}:{bound}"


async def fetch_slot(endpoint: str, job: str, rank: int, step: int, into: Path, timeout: float = 30.0) -> SlotRecord:
    """Read the state that `rank` of `job` committed at `step` from the peer at `endpoint` into the file `into`.

    The file holds the bare state, and appears only when complete. Gives the record with its digest, for the reader to
    check the bytes against. Raises PeerError; `timeout` is in seconds.
    """
    partial = into.with_name(f"{into.name}.part")
    try:
        async with grpc.aio.insecure_channel(endpoint, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            call = _Stub(channel).ReadSlot(pb.ReadSlotRequest(job=job, rank=rank, step=step), timeout=timeout)
            record = await _receive(call, partial)
        partial.rename(into)
    except grpc.aio.AioRpcError as error:
        raise PeerError(f"{endpoint}: {error.code().name}: {error.details()}") from error
    finally:
        partial.unlink(missing_ok=True)
    return record


async def _receive(call: Any, into: Path) -> SlotRecord:
    head: pb.PeerSlotRecord | None = None
    complete = False
    size = 0
    with into.open("wb") as file:
        async for chunk in call:
            match chunk.WhichOneof("body"):
                case "record":
                    head = chunk.record
                case "data":
                    size += file.write(chunk.data)
                case "complete":
                    complete = chunk.complete
    if head is None or not complete or size != head.nbytes:
        raise PeerError("the slot was written to while it was read")
    return SlotRecord(head.generation, head.step, head.digest, head.chain)
