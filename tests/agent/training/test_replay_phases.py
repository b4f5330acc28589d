"""What a rank's progress word says in a hearing: that it replays while it does, and else that it waits for others."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from agent.monitor import FLOORS_S, Deadlines, Stall, Watch, Watched
from agent.slots import WAITING, Progress
from agent.training import replay
from agent.training.computation import Computation
from agent.training.evidence.leave import Left
from agent.training.held import Held, Member
from agent.training.replay import THIRD_VOTE_S, Replayer
from diagnostics.verify.votes import Vote

MEMBERS = [Member(f"n{rank}", f"cpu-n{rank}", rank) for rank in range(2)]
VOTES = {
    "original": Vote("original", "n0", "cpu-n0", 0, "bad", True),
    "suspect": Vote("suspect", "n0", "cpu-n0", 0, "bad", True),
    "peer": Vote("peer", "n1", "cpu-n1", 1, "good", False),
}
#: What the ranks bring to each exchange of a hearing of rank 0: three votes, a spare's that never came, the evidence.
BROUGHT: list[tuple[Any, Any]] = [
    (VOTES["original"], None),
    (VOTES["suspect"], None),
    (None, VOTES["peer"]),
    ([], []),
    ((Left(), 0), (Left(), 0)),
]


class Rank:
    """One of two ranks in a hearing of rank 0, and what it did in which phase, in order."""

    def __init__(self, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rank, self.world = rank, 2
        self.phase = "gate"
        self.done: list[tuple[str, str]] = []
        self.brought = list(BROUGHT)
        monkeypatch.setattr(replay, "recompute", self._recompute)
        monkeypatch.setattr(replay, "leave", self._leave)
        guard = SimpleNamespace(recalibrate=lambda alarms: 0, mute=lambda alarms: 0)
        spec = SimpleNamespace(mesh=None, replays=1, job="job")
        engine: Any = SimpleNamespace(spec=spec, layout=SimpleNamespace(flat=4), guard=guard)
        group: Any = self
        Replayer(engine, group, MEMBERS, group, self.enter).judge(held(), 0)
        assert not self.brought

    def enter(self, step: int, phase: str) -> None:
        assert step == 5
        self.phase = phase
        self.done.append(("enters", phase))

    def gather_objects(self, value: Any) -> list[Any]:
        self.done.append(("waits for ranks", self.phase))
        ranks = list(self.brought.pop(0))
        assert (value is None) == (ranks[self.rank] is None)
        return ranks

    def wait_vote(self, step: int, rank: int, timeout: float) -> list[dict[str, Any]]:
        self.done.append(("waits for a spare", self.phase))
        return []

    def report(self, kind: str, body: dict[str, Any], urgent: bool = False) -> None:
        pass

    def _recompute(
        self, engine: Any, gradients: Any, step: int, suspect: int, here: Any, role: str, n: int = 1
    ) -> Vote:
        self.done.append(("replays", self.phase))
        return VOTES[role]

    def _leave(self, *arguments: Any) -> Left:
        self.done.append(("leaves evidence", self.phase))
        return Left()


def held() -> Held:
    quiet = Computation(0.0, 9.0, True, (), 1, torch.zeros(0, 0, dtype=torch.int64), 0)
    return Held(1, 5, 1, quiet, "bad", None)  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_replays_in_one_phase_and_waits_in_another(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    done = Rank(rank, monkeypatch).done
    own = [what for what, phase in done if phase == "replay" and what != "enters"]
    assert own == (["replays", "leaves evidence"] if rank == 0 else ["replays"])
    waits = [phase for what, phase in done if what.startswith("waits")]
    assert len(waits) == len(BROUGHT) + (rank == 1)
    assert set(waits) <= WAITING
    for what in ("replays", "waits for a spare"):
        assert all(done[at - 1][0] == "enters" for at, (named, _) in enumerate(done) if named == what)


def watched(phases: list[tuple[str, float]]) -> list[Stall]:
    """The stalls of a worker that stays that long in each phase."""
    watch, found = Watch(Watched("j", 1, 0, 1, replay.__file__), Deadlines()), []  # type: ignore[arg-type]
    at = 0.0
    for step in range(1, 6):
        watch.observe(0.05, Progress(1, step, "forward", step, 1), "R")
    for phase, seconds in phases:
        at += 10.0
        for _ in range(round(seconds / 0.5)):
            found.append(watch.observe(0.5, Progress(1, 6, phase, int(at * 1e9), 1), "S"))
    return [stall for stall in found if stall is not None]


def test_the_longest_wait_for_a_third_vote_is_no_stall_of_a_rank_that_waits() -> None:
    assert FLOORS_S["verdict"] > THIRD_VOTE_S
    assert watched([("replay", 2.0), ("verdict", THIRD_VOTE_S + 2.0), ("replay", 2.0)]) == []
    (stall,) = watched([("replay", 2.0 + THIRD_VOTE_S + 2.0)])  # the negative control: all of it in one phase
    assert (stall.phase, stall.waiting) == ("replay", False)
    (stall,) = watched([("verdict", 2 * FLOORS_S["verdict"])])  # and it is seen when nobody moves
    assert stall.waiting
