"""Capture where the state is divided: every rank writes its shard; one of them publishes when all have."""

import threading
import time

from agent.checkpoint.capture import Capture, Job, Report
from agent.checkpoint.manifest import Manifest, TensorEntry
from agent.checkpoint.storage import Fenced, ShardRefused, Storage, shard_name
from agent.slots import SlotRecord
from agent.training.layout import State
from agent.training.shards import ShardLayout


class ShardCapture(Capture):
    """Like Capture, on every rank of a mesh.

    `written` is the step of which this rank's shard lies on storage. The ranks tell each other at the gate; when
    all have written a step that the gate agreed on, every rank calls `publish`, and rank 0 does.
    """

    def __init__(self, storage: Storage, layout: ShardLayout, describe: Manifest, report: Report) -> None:
        super().__init__(storage, layout, describe, report)
        self._share = layout
        self._rank = layout.rank
        self._ranks = layout.mesh.dp
        self._shard = shard_name(layout.rank)
        self._speaks = layout.rank == 0
        self._pending: SlotRecord | None = None
        self._begun = 0.0
        self.written = 0

    def start(self, record: SlotRecord, state: State) -> None:
        """Begin to capture this rank's shard of `state`; the capture before must have been published or abandoned."""
        self.close()
        self.written = 0  # the same step may be captured again, after a roll-back
        super().start(record, state)
        self._pending, self._begun = record, time.monotonic()

    @property
    def pending(self) -> int | None:
        """The step that was captured and is not yet published."""
        return None if self._pending is None else self._pending.step

    def publish(self) -> None:
        """All shards of the pending step are written, and the gate agreed on it: rank 0 makes it a checkpoint.

        In the capture's thread, which is done with writing; `close` waits for it.
        """
        record, self._pending = self._pending, None
        if record is None or self._rank != 0:
            return
        self.close()
        self._thread = threading.Thread(target=self._assemble, args=(record,), name="publish", daemon=True)
        self._thread.start()

    def abandon(self) -> None:
        """Some rank could not write its shard of the pending step: there will be no such checkpoint."""
        record, self._pending = self._pending, None
        if record is not None and self._rank == 0:
            self._storage.abandon(record.step, record.generation)

    def _assemble(self, record: SlotRecord) -> None:
        try:
            aside, manifest = self._storage.assemble(self._manifest(record), self._ranks)
            self._publish(aside, manifest, self._begun)
        except (OSError, Fenced, ShardRefused) as error:
            self._failed(record.step, error)
            self._storage.abandon(record.step, record.generation)

    def discard(self, step: int) -> None:
        """The state of `step` did not hold: a capture of it is dropped, once this rank has stopped writing it."""
        if self.pending == step:
            self.close()
            self._pending, self.written = None, 0

    def _write(self, job: Job, entries: list[TensorEntry]) -> None:
        mine = [entry for entry in entries if self._share.writes(entry.name)]
        names = {entry.name for entry in mine}
        arrays = {name: t.numpy() for name, _, t in self._layout.parts(self._staging) if name in names}
        try:
            self._storage.write_shard(job.record.step, job.record.generation, self._rank, mine, arrays)
        except OSError as error:
            self._failed(job.record.step, error)
            return
        self.written = job.record.step
