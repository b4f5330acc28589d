"""When a rank captures, and when what was captured becomes a checkpoint: after the gate agreed on its step."""

from collections.abc import Sequence
from typing import Protocol

from agent.checkpoint.capture import Capture
from agent.checkpoint.manifest import Manifest
from agent.checkpoint.shard_capture import ShardCapture
from agent.checkpoint.storage import Storage
from agent.slots import SlotRecord
from agent.training.collective import Group
from agent.training.engine import Engine
from agent.training.gate import Row
from agent.training.layout import State
from agent.training.replay import Daemon
from agent.training.shards import ShardLayout


class Checkpoints(Protocol):
    """A rank's part in the job's checkpoints. Every rank makes the same calls. All of them may raise PeerLost."""

    @property
    def written(self) -> int:
        """The newest step of which this rank's shard lies on storage; 0 if it writes none."""

    def wait_copied(self) -> bool:
        """Return once the captured slot may be overwritten; False, once, if its copy is not what was committed."""

    def start(self, record: SlotRecord, state: State) -> None:
        """Capture the state just committed."""

    def settle(self, step: int, rows: Sequence[Row]) -> None:
        """The gate, whose rows these are, agreed on `step`."""

    def discard(self, step: int) -> None:
        """The gate did not agree on `step`."""

    def close(self) -> None:
        """Wait until what was agreed on is a checkpoint."""


class WholeCheckpoints:
    """Rank 0 captures for all: every rank has the whole state."""

    written = 0

    def __init__(self, capture: Capture | None) -> None:
        self._capture = capture

    def wait_copied(self) -> bool:
        """See `Checkpoints`."""
        return self._capture is None or self._capture.wait_copied()

    def start(self, record: SlotRecord, state: State) -> None:
        """Capture the state just committed."""
        if self._capture is not None:
            self._capture.start(record, state)

    def settle(self, step: int, rows: Sequence[Row]) -> None:
        """A capture of `step` may be published."""
        if self._capture is not None:
            self._capture.finalise(step)

    def discard(self, step: int) -> None:
        """A capture of `step` is dropped."""
        if self._capture is not None:
            self._capture.discard(step)
            self._capture.close()

    def close(self) -> None:
        """Wait for the capture under way."""
        if self._capture is not None:
            self._capture.close()


class ShardCheckpoints:
    """Every rank captures its shard; they learn at the gate when all are written, and then rank 0 publishes."""

    def __init__(self, capture: ShardCapture, group: Group) -> None:
        self._capture = capture
        self._group = group

    @property
    def written(self) -> int:
        """As the gate's rows say it."""
        return self._capture.written

    def wait_copied(self) -> bool:
        """See `Checkpoints`."""
        return self._capture.wait_copied()

    def start(self, record: SlotRecord, state: State) -> None:
        """Capture this rank's shard. A checkpoint that is not complete by now is waited for."""
        self.close()
        self._capture.start(record, state)

    def settle(self, step: int, rows: Sequence[Row]) -> None:
        """Publish a captured step that lies behind the gate, if all its shards are written."""
        pending = self._capture.pending
        if pending is not None and pending <= step and all(row.written == pending for row in rows):
            self._capture.publish()

    def discard(self, step: int) -> None:
        """A capture of `step` is dropped."""
        self._capture.discard(step)

    def close(self) -> None:
        """Wait until every rank has written its shard of the pending step, and publish it if none has failed."""
        pending = self._capture.pending
        self._capture.close()
        if pending is None:
            return
        with self._group.waiting():
            rows = self._group.gather([self.written])
        if all(row == [pending] for row in rows):
            self._capture.publish()
            self._capture.close()
        else:
            self._capture.abandon()


def checkpoints(engine: Engine, group: Group, storage: Storage, describe: Manifest, daemon: Daemon) -> Checkpoints:
    """What fits the job: one capture by rank 0, or one by each rank of a mesh."""
    if isinstance(engine.layout, ShardLayout):
        return ShardCheckpoints(ShardCapture(storage, engine.layout, describe, daemon.report), group)
    if group.rank != 0:
        return WholeCheckpoints(None)
    return WholeCheckpoints(Capture(storage, engine.layout, describe, daemon.report))
