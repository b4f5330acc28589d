"""State at rest: a bit that changes between a commit and the next update is seen, whatever part it is in."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from little_v3 import CONFIG
from torch import Tensor

from agent.model import V3
from agent.model.parallel import Echo, ExpertParallel
from agent.slots import SlotRecord, Slots
from agent.training.collective import Subgroup
from agent.training.division import Division, Replicated
from agent.training.layout import State, StateLayout
from agent.training.optimizer import AdamW
from agent.training.shards import ShardLayout
from agent.training.spec import Mesh
from agent.training.transaction import Altered, Commit, Transaction
from agent.training.zero import Zero1
from diagnostics.sensors.digest import digest

PARTS = ["master.embed", "master.layers", "exp_avg.", "exp_avg_sq.", "router_bias.", "meta"]
KINDS = ["fp32", "bf16 moments", "mesh"]


class One:
    """A group of one rank."""

    rank, world = 0, 1

    def gather(self, row: Sequence[int]) -> list[list[int]]:
        return [list(row)]

    def among(self, ranks: Sequence[int]) -> Subgroup:
        return Subgroup(None, (0,), 0)

    def everybody(self) -> Subgroup:
        return Subgroup(None, (0,), 0)

    def waiting(self) -> AbstractContextManager[None]:
        return nullcontext()


class Job:
    """The state of a job of one rank, with two slots."""

    def __init__(self, folder: Path, kind: str, alone: bool) -> None:
        model = V3(CONFIG, parallel=ExpertParallel(0, Echo(1), Echo(1)) if kind == "mesh" else None)
        model.initialise(3)
        moments = torch.bfloat16 if kind == "bf16 moments" else torch.float32
        self.layout = StateLayout(model, moments)
        self.division: Division = Replicated(self.layout, One())  # type: ignore[arg-type]
        if kind == "mesh":
            shard = ShardLayout(model, Mesh(1), 0, moments)
            self.layout, self.division = shard, Zero1(shard, One())  # type: ignore[arg-type]
        self.transaction = Transaction(Slots.create(folder / "slots", self.layout.nbytes), self.layout, alone)
        self.layout.capture(model, self.transaction.slot_state(0))
        value, digests = self.division.settle(self.transaction.slot_state(0))
        self.transaction.adopt(0, SlotRecord(1, 0, value, 0, digests))

    def commit(self, step: int) -> int:
        """The digest after a step with gradients of the step's own."""
        flat = torch.zeros(self.layout.flat)
        generator = torch.Generator().manual_seed(step)
        for span in self.layout.spans:
            flat[span.start : span.start + span.size].normal_(0, 1e-2, generator=generator)
        change = Commit(1, step, 1e-3, 1.0, 4, lambda biases: biases + 0.001)
        return self.transaction.commit(flat, AdamW(), change, lambda *parts: 0, self.division).digest

    def flip(self, part: str) -> None:
        """Bit 24 of the sixth word of the first part of that name: of an fp32 it is in the exponent."""
        tensor = next(t for name, _, t in self.layout.parts(self.transaction.state) if name.startswith(part))
        words: Tensor = tensor.view(-1).view(torch.int32)
        words[5 if part != "meta" else 0] ^= 1 << 24


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", PARTS)
def test_the_gate_sees_it_where_nobody_else_updates_the_part(tmp_path: Path, kind: str, part: str) -> None:
    job = Job(tmp_path, kind, alone=True)
    job.commit(1)
    assert job.transaction.own() == job.transaction.record.own
    job.flip(part)
    assert job.transaction.own() != job.transaction.record.own


@pytest.mark.parametrize("kind", ["fp32", "bf16 moments"])
@pytest.mark.parametrize("part", PARTS)
def test_the_digest_after_the_next_update_tells_where_others_have_the_whole(
    tmp_path: Path, kind: str, part: str
) -> None:
    """This rank commits something else than the others, and the slot it came from does not verify."""
    ends = []
    for name in ("clean", "flipped"):
        job = Job(tmp_path / name, kind, alone=False)
        job.commit(1)
        if name == "flipped":
            job.flip(part)
        assert job.transaction.own() == job.transaction.record.own  # no pass over the state at the gate
        ends.append(job.commit(2))
        assert isinstance(job.transaction.previous(), Altered) == (name == "flipped")
    assert ends[0] != ends[1]


@pytest.mark.parametrize("part", PARTS)
def test_what_the_hash_leaves_out_is_not_seen(tmp_path: Path, part: str) -> None:
    """The negative control: each part is seen by its own words in the hash."""
    job = Job(tmp_path, "fp32", alone=True)
    job.commit(1)
    before = without(job.layout, job.transaction.state, part)
    job.flip(part)
    assert without(job.layout, job.transaction.state, part) == before


def without(layout: StateLayout, state: State, part: str) -> int:
    """A digest of all but the parts of that name."""
    return sum(digest(t, at) for name, at, t in layout.parts(state) if not name.startswith(part)) % 2**64
