"""Asynchronous capture: copy and hash the committed slot while training goes on, write it, publish it once final."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agent.checkpoint.manifest import Manifest, TensorEntry
from agent.checkpoint.storage import SHARD, Fenced, Storage, tensor_digest
from agent.slots import SlotRecord
from agent.training.layout import State, StateLayout
from diagnostics.sensors.multilinear import MASK

#: (kind of report, body, urgent)
Report = Callable[[str, dict[str, Any], bool], None]


@dataclass(slots=True)
class Job:
    """One capture under way. `same` is false, once copied, if the copy does not hash to its record."""

    record: SlotRecord
    state: State
    copied: threading.Event
    final: threading.Event
    dropped: bool = False
    same: bool = True


class Capture:
    """Captures one state at a time in a thread of its own.

    The caller starts a capture after a commit, calls `finalise` when the next gate has agreed on that step's digest
    (only then is the checkpoint published), and `wait_copied` before it overwrites the slot.
    """

    def __init__(self, storage: Storage, layout: StateLayout, describe: Manifest, report: Report) -> None:
        self._storage = storage
        self._layout = layout
        self._describe = describe
        self._shard = SHARD
        self._speaks = True
        self._report = report
        self._staging = layout.view(memoryview(bytearray(layout.nbytes)))
        self._parent = describe.parent_step
        self._job: Job | None = None
        self._thread: threading.Thread | None = None

    def start(self, record: SlotRecord, state: State) -> None:
        """Begin to capture `state`, just committed as `record`; waits for an unfinished capture before it."""
        self.close()
        self._job = Job(record, state, threading.Event(), threading.Event())
        self._thread = threading.Thread(target=self._run, args=(self._job,), name="capture", daemon=True)
        self._thread.start()

    def wait_copied(self) -> bool:
        """Return once the slot being captured may be overwritten; False, once, if its copy is not what was committed.

        Either the copy is wrong, or the state changed in memory, which the caller has to find out.
        """
        if self._job is None:
            return True
        self._job.copied.wait()
        same = self._job.same
        if not same:
            self._job = None
        return same

    def finalise(self, step: int) -> None:
        """The gate has agreed on the state of `step`: a capture of it may be published."""
        if self._job is not None and self._job.record.step == step:
            self._job.final.set()

    def discard(self, step: int) -> None:
        """The state of `step` did not hold: a capture of it is dropped."""
        if self._job is not None and self._job.record.step == step and not self._job.final.is_set():
            self._job.dropped = True
            self._job.final.set()

    def close(self) -> None:
        """Wait for the capture under way, which must have been finalised or discarded."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, job: Job) -> None:
        begun = time.monotonic()
        entries = self._copy(job)
        stall = time.monotonic() - begun
        total = sum(int(entry.digest, 16) for entry in entries) & MASK
        job.same = total == job.record.own
        job.copied.set()
        record = job.record
        if not job.same:
            self._failed(record.step, f"its copy hashes to {total:016x}, the state to {record.own:016x} at its commit")
            return
        if self._speaks:
            coordinates = {"job": self._describe.job, "generation": record.generation, "step": record.step}
            told = {**coordinates, "digest": f"{record.digest:016x}", "stall_s": stall}
            self._report("checkpoint_captured", told, False)
        self._write(job, entries)

    def _copy(self, job: Job) -> list[TensorEntry]:
        """Copy part by part, hashing the copy while it is in the cache: what is hashed is what will be written."""
        entries = []
        targets = self._layout.parts(self._staging)
        for (name, word, source), (_, _, target) in zip(self._layout.parts(job.state), targets, strict=True):
            target.copy_(source)
            found = tensor_digest(target.numpy(), word)
            entries.append(TensorEntry(name, _dtype(target), tuple(target.shape), word, f"{found:016x}", self._shard))
        return entries

    def _write(self, job: Job, entries: list[TensorEntry]) -> None:
        manifest = replace(self._manifest(job.record), tensors=tuple(entries))
        begun = time.monotonic()
        try:
            aside = self._storage.write(manifest, {n: t.numpy() for n, _, t in self._layout.parts(self._staging)})
            job.final.wait()
            if not job.dropped:
                self._publish(aside, manifest, begun)
        except (OSError, Fenced) as error:
            self._failed(manifest.step, error)

    def _manifest(self, record: SlotRecord) -> Manifest:
        return replace(
            self._describe,
            generation=record.generation,
            step=record.step,
            parent_step=self._parent,
            digest=f"{record.digest:016x}",
            chain=f"{record.chain:016x}",
            created=time.time(),
        )

    def _publish(self, aside: Path, manifest: Manifest, begun: float) -> None:
        path = self._storage.publish(aside, manifest)
        self._parent = manifest.step
        self._report(
            "checkpoint_durable",
            {
                "job": manifest.job,
                "generation": manifest.generation,
                "step": manifest.step,
                "digest": manifest.digest,
                "chain": manifest.chain,
                "path": str(path),
                "bytes": sum(file.stat().st_size for file in path.iterdir()),
                "parent_step": manifest.parent_step,
                "write_s": time.monotonic() - begun,
            },
            True,
        )

    def _failed(self, step: int, error: Exception | str) -> None:
        """Training goes on from memory; the operator hears of it."""
        self._report(
            "finding_raised",
            {
                "finding": f"checkpoint-{step}",
                "check": "checkpoint",
                "severity": "CRITICAL",
                "confidence": 1.0,
                "detail": f"checkpoint of step {step} was not written: {error}",
            },
            True,
        )


def _dtype(tensor: Tensor) -> str:
    return {torch.float32: "float32", torch.int64: "int64", torch.int16: "bfloat16"}[tensor.dtype]
