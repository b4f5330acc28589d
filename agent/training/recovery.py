"""Brings every rank to one state at a generation's start: a live one, else a checkpoint, else the seed's."""

from pathlib import Path

import torch

from agent.checkpoint.manifest import Manifest
from agent.checkpoint.storage import ShardRefused, Storage, read, read_manifest
from agent.slots import SlotRecord
from agent.training.collective import Group
from agent.training.division import Division
from agent.training.engine import MOMENTS, Engine
from agent.training.replay import Daemon
from agent.training.sources import Source, Tell
from agent.training.transaction import StateLost, Transaction


class Recovery:
    """Leaves every rank at the same committed state, verified by its digest, and reports where it came from."""

    def __init__(
        self,
        engine: Engine,
        group: Group,
        transaction: Transaction,
        division: Division,
        source: Source,
        storage: Storage,
        daemon: Daemon,
        generation: int,
    ) -> None:
        self.engine = engine
        self.group = group
        self.transaction = transaction
        self.division = division
        self.source = source
        self.storage = storage
        self.daemon = daemon
        self.generation = generation

    def restore(self, tell: Tell) -> None:
        """Find the nearest trusted state: live slots, a peer's, a checkpoint, the initial state."""
        found = self.source.recover(self.generation, tell) or self._from_checkpoint() or self._from_seed()
        self._agree()
        record = self.transaction.record
        self.daemon.report(
            "resumed",
            {
                "job": self.engine.spec.job,
                "generation": self.generation,
                "rank": self.group.rank,
                "step": record.step,
                "source": found,
                "digest": f"{record.digest:016x}",
                **self.engine.layout.held_bytes(),
            },
            urgent=True,
        )

    def roll_back(self, tell: Tell) -> None:
        """Return to the step before the committed one. Raises StateLost if no rank still has it unharmed."""
        self.source.return_to(self.transaction.record.step - 1, self.generation, tell)
        self._agree()

    def mend(self) -> None:
        """Give ranks whose committed state changed in memory, as is known, that of a rank that has it unharmed.

        Raises StateLost if there is none.
        """
        if self.source.recover(self.generation, lambda altered: None) is None:
            raise StateLost(f"no rank holds step {self.transaction.record.step} unharmed")
        self._agree()

    def parent_step(self) -> int:
        """The newest checkpoint before the state that was restored; 0 if there is none."""
        steps = [int(path.name.rpartition("-")[2]) for path in self.storage.published()]
        return max((s for s in steps if s <= self.transaction.record.step), default=0)

    def _from_checkpoint(self) -> str | None:
        """The newest checkpoint that verifies on every rank; damaged ones are refused, reported and set aside."""
        paths = self.group.gather_objects([str(path) for path in self.storage.published()])[0]
        for path in paths:
            manifest = self._load(Path(path))
            if all(self.group.gather_objects(manifest is not None)) and manifest and self._take(Path(path), manifest):
                return "checkpoint"
            if self.group.rank == 0:
                self.storage.set_aside(Path(path), self.generation)
        return None

    def _load(self, path: Path) -> Manifest | None:
        """Fill slot 0 with what this rank holds of a checkpoint; None if it is refused."""
        self.transaction.slots.invalidate(0)
        state = self.transaction.slot_state(0)
        parts = {name: target for name, _, target in self.engine.layout.parts(state)}
        try:
            check_same_job(self.engine, path, read_manifest(path))
            manifest, arrays = read(path, parts.keys())
            for name, target in parts.items():
                if arrays[name].shape != tuple(target.shape):
                    raise ShardRefused(path, manifest.step, name, f"{arrays[name].shape}", f"room for {target.shape}")
        except ShardRefused as refused:
            self._refuse(refused)
            return None
        state.words.zero_()
        for name, target in parts.items():
            target.copy_(torch.from_numpy(arrays[name]))
        return manifest

    def _take(self, path: Path, manifest: Manifest) -> bool:
        """Adopt what `_load` filled in, if all ranks' parts together are the state that the manifest names."""
        value, shard = self.division.settle(self.transaction.slot_state(0))
        record = SlotRecord(self.generation, manifest.step, int(manifest.digest, 16), int(manifest.chain, 16), shard)
        if not all(self.group.gather_objects(value == record.digest)):
            if self.group.rank == 0:
                self._refuse(ShardRefused(path, manifest.step, "state", manifest.digest, f"{value:016x}"))
            return False
        self.transaction.adopt(0, record)
        return True

    def _refuse(self, refused: ShardRefused) -> None:
        self.daemon.report(
            "shard_refused",
            {
                "job": self.engine.spec.job,
                "generation": self.generation,
                "step": refused.step,
                "path": str(refused.path),
                "shard": refused.shard,
                "expected": refused.expected,
                "found": refused.found,
                "reason": str(refused),
            },
            urgent=True,
        )

    def _from_seed(self) -> str:
        """Step 0: a function of the seed alone."""
        self.transaction.slots.invalidate(0)
        state = self.transaction.slot_state(0)
        self.engine.initialise(state)
        value, shard = self.division.settle(state)
        self.transaction.adopt(0, SlotRecord(self.generation, 0, value, self.engine.link(0, 0, value), shard))
        return "init"

    def _agree(self) -> None:
        """Every rank must now be at the same state. Raises StateLost otherwise."""
        record = self.transaction.record
        found = self.group.gather_objects((record.step, record.digest, record.chain))
        if len(set(found)) > 1:
            raise StateLost(f"ranks restored different states: {found}")


def check_same_job(engine: Engine, path: Path, manifest: Manifest) -> None:
    """Refuse a checkpoint of another job's data, model or mesh, or whose moments are of another type.

    Raises ShardRefused.
    """
    spec = engine.spec
    mesh = str(spec.mesh or "")
    wanted = (spec.preset, engine.preset.config.vocab_size, spec.seed, engine.corpus.digest, spec.pack, mesh)
    found = (manifest.preset, manifest.vocab_size, manifest.seed, manifest.corpus, manifest.pack, manifest.mesh)
    if found != wanted:
        told = f"preset, vocab_size, seed, corpus, pack, mesh {wanted}"
        raise ShardRefused(path, 0, "manifest", told, str(found))
    if MOMENTS.get(manifest.precision, torch.float32) != engine.layout.moments:
        raise ShardRefused(path, 0, "manifest", f"precision {spec.precision!r}", repr(manifest.precision))
