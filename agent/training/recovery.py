"""Carries out the choice of state: own slot, a peer's slot over the group, a checkpoint, or the seed."""

from pathlib import Path

import torch

from agent.checkpoint.manifest import Manifest
from agent.checkpoint.storage import ShardRefused, Storage, read
from agent.slots import SlotRecord
from agent.training.collective import Group
from agent.training.engine import MOMENTS, Engine
from agent.training.replay import Daemon
from agent.training.restore import Choice, Holding, choose
from agent.training.transaction import StateLost, Transaction
from diagnostics.sensors.digest import digest


class Recovery:
    """Leaves every rank with the same committed state, verified by its digest, and reports where it came from."""

    def __init__(
        self, engine: Engine, group: Group, transaction: Transaction, storage: Storage, daemon: Daemon, generation: int
    ) -> None:
        self.engine = engine
        self.group = group
        self.transaction = transaction
        self.storage = storage
        self.daemon = daemon
        self.generation = generation

    def restore(self) -> None:
        """Find the nearest trusted state: live slots, a peer's, a checkpoint, the initial state."""
        held = self.transaction.holdings()
        choice = choose(self.group.gather_objects([Holding(r.step, r.digest, r.chain) for r in held]))
        if choice is not None:
            source = "live" if self.group.rank in choice.holders else "replica"
            self._take(choice)
        else:
            source = self._from_checkpoint() or self._from_seed()
        self._agree()
        record = self.transaction.record
        self.daemon.report(
            "resumed",
            {
                "job": self.engine.spec.job,
                "generation": self.generation,
                "rank": self.group.rank,
                "step": record.step,
                "source": source,
                "digest": f"{record.digest:016x}",
            },
            urgent=True,
        )

    def roll_back(self) -> None:
        """Return to the step before the committed one. Raises StateLost if no rank still has it unharmed."""
        step = self.transaction.record.step - 1
        record = self.transaction.previous()
        mine = [Holding(record.step, record.digest, record.chain)] if record and record.step == step else []
        choice = choose(self.group.gather_objects(mine))
        if choice is None or choice.state.step != step:
            raise StateLost(f"no rank holds step {step} unharmed")
        self._take(choice)
        self._agree()

    def parent_step(self) -> int:
        """The newest checkpoint before the state that was restored; 0 if there is none."""
        steps = [int(path.name.rpartition("-")[2]) for path in self.storage.published()]
        return max((s for s in steps if s <= self.transaction.record.step), default=0)

    def _take(self, choice: Choice) -> None:
        """Holders adopt their slot; the others receive it and check it."""
        state = choice.state
        record = SlotRecord(self.generation, state.step, state.digest, state.chain)
        lacking = [rank for rank in range(self.group.world) if rank not in choice.holders]
        if self.group.rank in choice.holders:
            slot = next(s for s in (0, 1) if self._holds(s, state))
            self.transaction.adopt(slot, record)
            if self.group.rank == choice.holders[0]:
                for rank in lacking:
                    self.group.send(self.transaction.state.words, rank)
            return
        self.transaction.slots.invalidate(0)
        words = self.transaction.slot_state(0).words
        self.group.receive(words, choice.holders[0])
        if digest(words) != state.digest:
            raise StateLost(f"step {state.step} arrived with other bits than rank {choice.holders[0]} has")
        self.transaction.adopt(0, record)

    def _holds(self, slot: int, state: Holding) -> bool:
        record = self.transaction.slots.record(slot)
        return record is not None and (record.step, record.digest, record.chain) == (
            state.step,
            state.digest,
            state.chain,
        )

    def _from_checkpoint(self) -> str | None:
        """The newest checkpoint that verifies on every rank; damaged ones are refused, reported and set aside."""
        paths = self.group.gather_objects([str(path) for path in self.storage.published()])[0]
        for path in paths:
            if all(self.group.gather_objects(self._load(Path(path)))):
                return "checkpoint"
            if self.group.rank == 0:
                self.storage.set_aside(Path(path), self.generation)
        return None

    def _load(self, path: Path) -> bool:
        try:
            manifest, arrays = read(path)
            self._matches(path, manifest)
        except ShardRefused as refused:
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
            return False
        self.transaction.slots.invalidate(0)
        state = self.transaction.slot_state(0)
        state.words.zero_()
        for name, _, target in self.engine.layout.parts(state):
            target.copy_(torch.from_numpy(arrays[name]))
        record = SlotRecord(self.generation, manifest.step, int(manifest.digest, 16), int(manifest.chain, 16))
        if digest(state.words) != record.digest:
            return False
        self.transaction.adopt(0, record)
        return True

    def _matches(self, path: Path, manifest: Manifest) -> None:
        """Refuse a checkpoint of another job's data or model, or whose moments are of another type."""
        engine, spec = self.engine, self.engine.spec
        wanted = (spec.preset, engine.preset.config.vocab_size, spec.seed, engine.corpus.digest, spec.pack)
        found = (manifest.preset, manifest.vocab_size, manifest.seed, manifest.corpus, manifest.pack)
        if found != wanted:
            raise ShardRefused(path, 0, "manifest", f"preset, vocab_size, seed, corpus, pack {wanted}", str(found))
        if MOMENTS.get(manifest.precision, torch.float32) != self.engine.layout.moments:
            raise ShardRefused(path, 0, "manifest", f"precision {spec.precision!r}", repr(manifest.precision))

    def _from_seed(self) -> str:
        """Step 0: a function of the seed alone."""
        self.transaction.slots.invalidate(0)
        state = self.transaction.slot_state(0)
        self.engine.initialise(state)
        value = digest(state.words)
        self.transaction.adopt(0, SlotRecord(self.generation, 0, value, self.engine.link(0, 0, value)))
        return "init"

    def _agree(self) -> None:
        """Every rank must now be at the same state. Raises StateLost otherwise."""
        record = self.transaction.record
        found = self.group.gather_objects((record.step, record.digest, record.chain))
        if len(set(found)) > 1:
            raise StateLost(f"ranks restored different states: {found}")
