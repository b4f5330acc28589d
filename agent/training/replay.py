"""Replay, a phase of the gate: who computed the held step wrongly, by recomputation here, on a peer, on a spare."""

import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from agent.training import seals, strays
from agent.training.collective import Group
from agent.training.engine import Engine, vote_digest
from agent.training.evidence.leave import Left, leave
from agent.training.held import Held, Member, alarm_body, vote_body
from agent.training.roles import Roles
from diagnostics.health import Verdict
from diagnostics.verify.votes import Role, Ruling, Vote, decide, places_of

#: A spare fetches the state (0.1 s) and recomputes one step; 30 s covers a slow network and a cold worker. The
#: controller gives up earlier and says so.
THIRD_VOTE_S = 30.0
#: Checks of what ranks hand each other: no recomputation of a rank's own part makes them again.
BETWEEN = frozenset({strays.SENSOR, seals.SENSOR})
#: Where nobody left any evidence.
NOTHING_LEFT = Left()


class Daemon(Protocol):
    """What training needs of the node's daemon. None of it blocks, but `wait_vote`."""

    def report(self, kind: str, body: dict[str, Any], urgent: bool = False) -> None:
        """Queue an event for the controller."""

    def step(self, record: dict[str, Any]) -> None:
        """Queue a step record."""

    def span(self, name: str, parent: str, **attributes: str | int | float) -> AbstractContextManager[str]:
        """A span of the trace that `parent` belongs to (empty: a new one); gives its own traceparent.

        What is reported inside carries it.
        """

    def wait_vote(self, step: int, rank: int, timeout: float) -> list[dict[str, Any]]:
        """Votes of other devices on `rank`'s `step`; empty when there will be none or time is up."""


@dataclass(frozen=True, slots=True)
class Judged:
    """What came of a hearing of one suspect, the evidence that it left, and how many tolerances it widened."""

    suspect: int
    votes: tuple[Vote, ...]
    ruling: Ruling
    left: Left = NOTHING_LEFT
    widened: int = 0


class Replayer:
    """Carries out the replays that a held gate asks for; every rank calls `judge` with the same suspects.

    It enters (step, phase) as it goes: "replay" for what this rank does itself, "verdict" to wait for others.
    """

    def __init__(
        self,
        engine: Engine,
        group: Group,
        members: Sequence[Member],
        daemon: Daemon,
        enter: Callable[[int, str], None],
    ) -> None:
        self.engine = engine
        self.roles = Roles(engine, group)
        self.group = group
        self.members = tuple(members)
        self.daemon = daemon
        self.enter = enter
        self._scratch = torch.empty(0)
        self._redone = Redone()

    def judge(self, held: Held, suspect: int) -> Judged:
        """Collect votes until there is a verdict on `suspect`; the same on every rank, and not published yet."""
        held = self._with_original(held, suspect)
        self.alarm(held, suspect, (), needs_third=False)
        votes = self._exchange(held, suspect, {suspect: "original"})
        unavailable: frozenset[Role] = frozenset()
        ruling = decide(votes, unavailable, self.engine.spec.replays)
        while ruling.needs is not None:
            role = ruling.needs
            cast = self._cast(held, suspect, role, votes)
            if not cast:
                unavailable |= {role}
            votes += cast
            ruling = decide(votes, unavailable, self.engine.spec.replays)
        mesh = self.engine.spec.mesh
        if held.overflowed or (mesh is not None and mesh.ep > 1):
            ruling = self._redone.unless_first(held, suspect, ruling)
        concluded = self._conclude(held, suspect, votes, ruling)
        self.roles.close()
        return Judged(suspect, tuple(votes), ruling, *concluded)

    def _cast(self, held: Held, suspect: int, role: Role, votes: Sequence[Vote]) -> list[Vote]:
        """The vote of that role, from a rank or a spare; none if nobody can cast it."""
        voter = self._voter(role, suspect)
        if voter is not None:
            if not self.roles.hand_over(held.state, held.replica, suspect, voter):
                return []
            number = 1 + sum(vote.role == role for vote in votes)
            return self._exchange(held, suspect, {voter: role}, number)
        vote = None if self.engine.spec.mesh else self._from_spare(held, suspect, role, votes)
        return [] if vote is None else [vote]

    def deviating(self, held: Held, suspects: Sequence[int]) -> list[int]:
        """Which suspects, computing their part again from what they received, now send other rows than they did."""
        mine = self.group.rank in suspects and self._deviates(held)
        self.enter(held.step, "verdict")
        return [rank for rank, (deviates,) in enumerate(self.group.gather([int(mine)])) if deviates]

    def _deviates(self, held: Held) -> bool:
        rank = self.group.rank
        self.enter(held.step, "replay")
        self.roles.hand_over(held.state, held.replica, rank, rank)
        with self.roles.acting(held.state, rank) as engine:
            found = engine.compute(held.step, rank, 0, self._scratch_buffer())
        self.roles.close()
        return bool(found.deviation)

    def _with_original(self, held: Held, suspect: int) -> Held:
        """A suspect that did not alarm itself (a gradient that overflowed in the sum) has its digest taken afresh.

        The sum lies where its gradients were; of the run are the counts and the loss.
        """
        if suspect != self.group.rank or held.original:
            return held
        self.enter(held.step, "replay")
        self.roles.hand_over(held.state, held.replica, suspect, suspect)
        gradients, run = self._scratch_buffer(), held.computation
        with self.roles.acting(held.state, suspect) as engine:
            deviation = engine.compute(held.step, suspect, 0, gradients).deviation
        return replace(held, original=deviation or vote_digest(gradients, run.counts, run.loss))

    def _scratch_buffer(self) -> Tensor:
        """A replay's gradients; made at the first alarm, which most jobs never see."""
        if self._scratch.numel() == 0:
            self._scratch = torch.zeros(self.engine.layout.flat)
        return self._scratch

    def _voter(self, role: Role, suspect: int) -> int | None:
        """The rank that casts `role`'s vote, or None if that takes a spare."""
        distance = {"original": 0, "suspect": 0, "peer": 1, "third": 2}[role]
        return (suspect + distance) % self.group.world if distance < self.group.world else None

    def _reporter(self, suspect: int) -> int:
        """The rank that speaks for the gate: not the suspect, where there is another."""
        return (suspect + 1) % self.group.world

    def _exchange(self, held: Held, suspect: int, casting: dict[int, Role], number: int = 1) -> list[Vote]:
        """Every rank learns the votes that the `casting` ranks cast, each the `number`-th of its role."""
        mine = None
        role = casting.get(self.group.rank)
        here = self.members[self.group.rank]
        if role == "original":
            computed = held.computation
            alarms = [alarm for alarm in computed.alarms if alarm.sensor not in BETWEEN]
            finite = math.isfinite(computed.loss) and all(math.isfinite(alarm.reading) for alarm in alarms)
            finite = finite and not held.overflowed
            cast = (held.original, bool(alarms), finite)
            mine = Vote(role, here.node, here.device, os.getpid(), *cast, alarmed=places_of(alarms))
        elif role is not None:
            self.enter(held.step, "replay")
            with self.roles.acting(held.state, suspect) as engine:
                mine = recompute(engine, self._scratch_buffer(), held.step, suspect, here, role, number)
        self.enter(held.step, "verdict")
        return [vote for vote in self.group.gather_objects(mine) if vote is not None]

    def _from_spare(self, held: Held, suspect: int, role: Role, votes: Sequence[Vote]) -> Vote | None:
        """Ask the controller for a spare's vote; every rank waits for the reporter's answer."""
        self.alarm(held, suspect, votes, needs_third=True)
        answer: list[dict[str, Any]] = []
        self.enter(held.step, "verdict")
        if self.group.rank == self._reporter(suspect):
            answer = self.daemon.wait_vote(held.step, suspect, THIRD_VOTE_S)
        (cast,) = self.group.gather_objects(answer)[self._reporter(suspect)][:1] or (None,)
        if cast is None:
            return None
        return Vote(
            role=role,
            node=str(cast["node"]),
            device=str(cast["device"]),
            pid=int(cast["pid"]),
            digest=str(cast["digest"]),
            alarm=bool(cast["alarm"]),
        )

    def alarm(self, held: Held, suspect: int, votes: Sequence[Vote], needs_third: bool) -> None:
        """The suspect says what its sensors read."""
        if self.group.rank != suspect:
            return
        self.daemon.report(
            "gate_alarm",
            {
                **self._coordinates(held, suspect),
                "device": self.members[suspect].device,
                "attempt": held.attempt,
                "alarms": [alarm_body(alarm) for alarm in held.computation.alarms[:16]],
                "votes": [vote_body(vote) for vote in votes],
                "needs_third": needs_third,
                "reason": held.reason,
            },
            urgent=True,
        )

    def _conclude(self, held: Held, suspect: int, votes: Sequence[Vote], ruling: Ruling) -> tuple[Left, int]:
        """The suspect leaves evidence and, after a false alarm, widens or mutes what raised it; all learn of both."""
        mine = (Left(), 0)
        if self.group.rank == suspect:
            self.enter(held.step, "replay")
            left = leave(self.engine, held, suspect, self.members[suspect], votes, ruling, self.roles.record)
            false = ruling.verdict is Verdict.FALSE_ALARM
            guard, alarms = self.engine.guard, held.computation.alarms
            mine = left, guard.recalibrate(alarms) + guard.mute(alarms) if false else 0
        self.enter(held.step, "verdict")
        concluded: tuple[Left, int] = self.group.gather_objects(mine)[suspect]
        return concluded

    def publish(self, held: Held, judged: Judged) -> None:
        """Another rank than the suspect, where there is one, says what was found."""
        suspect, ruling, left = judged.suspect, judged.ruling, judged.left
        if self.group.rank != self._reporter(suspect):
            return
        self.daemon.report(
            "replay_result",
            {
                **self._coordinates(held, suspect),
                "attempt": held.attempt,
                "first_attempt": held.first,
                "votes": [vote_body(vote) for vote in judged.votes],
                "verdict": ruling.verdict.value if ruling.verdict else "",
                "blamed_node": ruling.blamed_node or "",
                "blamed_device": ruling.blamed_device or "",
                "recurrent": ruling.recurrent,
                "reason": ruling.reason,
                "evidence": left.name,
                "evidence_note": left.note,
                "widened": judged.widened,
            },
            urgent=True,
        )

    def _coordinates(self, held: Held, suspect: int) -> dict[str, Any]:
        return {
            "job": self.engine.spec.job,
            "generation": held.generation,
            "step": held.step,
            "rank": suspect,
        }


class Redone:
    """Whose step came out not finite on every device once, in this try of it; the same on every rank."""

    def __init__(self) -> None:
        self._attempts: dict[int, tuple[int, int]] = {}

    def unless_first(self, held: Held, suspect: int, ruling: Ruling) -> Ruling:
        """The ruling on a suspect whose rows came from other ranks, or whose part is finite and the sum is not.

        Votes repeat what a rank made of the rows it received, and not the sum. If all agree and the result is not
        finite, the rows may have been bad on their way, or what was added up; only an attempt with rows sent and parts
        added again tells that from a fault of the model.
        """
        if ruling.verdict is not Verdict.SOFTWARE:
            return ruling
        step, attempt = self._attempts.get(suspect, (0, 0))
        if step == held.step and attempt >= held.first:
            return ruling
        self._attempts[suspect] = (held.step, held.attempt)
        reason = f"{ruling.reason}; what ranks gave each other may be to blame, so the step is redone"
        return replace(ruling, verdict=Verdict.UNDECIDED, reason=reason)


def recompute(
    engine: Engine, gradients: Tensor, step: int, rank: int, here: Member, role: Role, number: int = 1
) -> Vote:
    """One vote: `rank`'s part of `step`, computed on this device into `gradients` (float32 [flat]).

    Attempts count from 1 and a replay is none of them, so a transient drill stays silent in it.
    """
    result = engine.compute(step, rank, 0, gradients)
    finite = math.isfinite(result.reading) and (math.isfinite(result.loss) or bool(result.deviation))
    return Vote(
        role=role,
        node=here.node,
        device=here.device,
        pid=os.getpid(),
        digest=result.deviation or vote_digest(gradients, result.counts, result.loss),
        alarm=result.alarm,
        finite=finite,
        number=number,
        alarmed=places_of(result.alarms),
    )
