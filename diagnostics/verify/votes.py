"""From votes to a verdict: who computed what, and therefore which device, if any, is to blame."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from diagnostics.health import Alarm, Verdict

Role = Literal["original", "suspect", "peer", "third"]
ROLES: tuple[Role, ...] = ("original", "suspect", "peer", "third")


@dataclass(frozen=True, slots=True)
class Vote:
    """One recomputation of the alarmed rank's gradients.

    original: the run that alarmed. suspect: its replay on the same device. peer: the same sample ids on another node.
    third: the same on a node that is neither (the spare). `alarm` says that some check alarmed, `alarmed` of an
    original and of a suspect which ones did. Checks are functions of the operands and of the step's key: of the same
    bits they read the same again. `finite` is, of an original that did not alarm, also whether the sum it went into
    is. `number` counts the votes of a role, from 1: only a suspect casts more than one, and they count as one device.
    """

    role: Role
    node: str
    device: str
    pid: int
    digest: str
    alarm: bool
    finite: bool = True
    number: int = 1
    alarmed: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Ruling:
    """A verdict with its reason, or, when `needs` is set, the vote to ask for before there can be one.

    Invariants: exactly one of verdict and needs is set; blamed_* are set if and only if the verdict is CORRUPT.
    """

    verdict: Verdict | None
    blamed_node: str | None
    blamed_device: str | None
    recurrent: bool
    needs: Role | None
    reason: str


def places_of(alarms: Iterable[Alarm]) -> frozenset[str]:
    """Which checks raised these."""
    return frozenset(f"{alarm.sensor} at {alarm.module} ({alarm.operation}, {alarm.pass_})" for alarm in alarms)


def decide(votes: Iterable[Vote], unavailable: frozenset[Role] = frozenset(), replays: int = 1) -> Ruling:
    """Judge the votes cast so far; their order does not matter.

    `unavailable` names the roles nobody can fill (no second node, no spare), so that the answer is a verdict instead
    of another request. A peer or third vote from a node that has voted already does not count as a second device.
    `replays` is how often the suspect computes the step again at most: one decides wherever others can be asked, and
    the rest is for a suspect that agrees with its run while nobody else can say who is right.
    Raises ValueError on two different votes for one role and number, and on an unknown role.
    """
    by_role = _by_role(votes)
    original, suspects = _one(by_role["original"]), by_role["suspect"]
    if original is None:
        raise ValueError("no original vote: there is nothing to judge")
    if not suspects:
        if "suspect" in unavailable:
            return _verdict(Verdict.UNDECIDED, f"{original.node} could not replay the step")
        return _ask("suspect", "the suspect has not replayed the step yet")
    more = replays if "suspect" not in unavailable else 0
    peer = _elsewhere(_one(by_role["peer"]), original, *suspects)
    if peer is None:
        if "peer" in unavailable or by_role["peer"]:
            return _without_peer(original, suspects, more)
        return _ask("peer", "no other node has recomputed the step yet")
    suspect = suspects[0]
    if suspect.digest == peer.digest:
        return _agreed(original, suspect, peer)
    third = _elsewhere(_one(by_role["third"]), original, *suspects, peer)
    if third is not None:
        return _majority(suspect, peer, third)
    if "third" in unavailable or by_role["third"]:
        return _without_third(original, suspects, peer, more)
    return _ask("third", f"{suspect.node} and {peer.node} differ: a third device must say which is right")


def _by_role(votes: Iterable[Vote]) -> dict[Role, list[Vote]]:
    """The votes of each role, in the order of their numbers."""
    cast: dict[tuple[Role, int], Vote] = {}
    for vote in votes:
        if vote.role not in ROLES:
            raise ValueError(f"unknown role {vote.role!r}: one of {', '.join(ROLES)}")
        known = cast.setdefault((vote.role, vote.number), vote)
        if known != vote:
            raise ValueError(f"two different votes for {vote.role}: {known} and {vote}")
    return {role: [cast[key] for key in sorted(cast) if key[0] == role] for role in ROLES}


def _one(votes: list[Vote]) -> Vote | None:
    return votes[0] if votes else None


def _elsewhere(vote: Vote | None, *others: Vote) -> Vote | None:
    """The vote, if it comes from another node than every other one (else it is no second device); else None."""
    if vote is None or any(vote.node == other.node for other in others):
        return None
    return vote


def _agreed(original: Vote, suspect: Vote, peer: Vote) -> Ruling:
    if original.digest != suspect.digest:
        return _blame(
            suspect, False, f"did not reproduce: {suspect.node} and {peer.node} agree on a result that the run lacked"
        )
    once = sorted(original.alarmed - suspect.alarmed)
    if once or (original.alarm and suspect.finite and not original.finite):
        what = once[0] if once else "a check that was not finite"
        return _blame(suspect, False, f"did not reproduce: {what} on {suspect.node}, of the same bits")
    if original.alarm and not suspect.finite and peer.finite and not peer.alarm:
        return _blame(
            suspect, True, f"{suspect.node}'s checks are not finite again, and {peer.node}'s are, of the same bits"
        )
    if not suspect.finite:
        return _verdict(Verdict.SOFTWARE, "every device computes the same result, and it is not finite")
    if not original.alarm and not original.finite:
        return _verdict(Verdict.SOFTWARE, "every device computes the same result, and its sum over ranks is not finite")
    return _verdict(Verdict.FALSE_ALARM, f"{suspect.node} and {peer.node} reproduce the run bit for bit")


def _majority(suspect: Vote, peer: Vote, third: Vote) -> Ruling:
    if third.digest == peer.digest:
        return _blame(suspect, True, f"{peer.node} and {third.node} agree, {suspect.node} differs again")
    if third.digest == suspect.digest:
        return _blame(peer, False, f"{suspect.node} and {third.node} agree, {peer.node} differs")
    return _verdict(Verdict.SOFTWARE, "three devices computed three different results")


def _without_peer(original: Vote, suspects: list[Vote], replays: int) -> Ruling:
    if _steady(original, suspects) and len(suspects) < replays:
        return _ask("suspect", f"nobody else can recompute the step: {original.node} does once more")
    return _verdict(Verdict.UNDECIDED, f"no second device recomputed the step; {_told(original, suspects)}")


def _without_third(original: Vote, suspects: list[Vote], peer: Vote, replays: int) -> Ruling:
    """Two devices differ and nobody can say which is right, but one of them may contradict itself."""
    suspect = suspects[0]
    if not _steady(original, suspects) and any(vote.digest == peer.digest for vote in (original, *suspects)):
        return _blame(
            suspect,
            True,
            f"no third device: {_told(original, suspects)}, one of them the result of {peer.node}",
        )
    if any(vote.alarm for vote in suspects) and not peer.alarm:
        return _blame(
            suspect,
            True,
            f"no third device: {suspect.node} and {peer.node} differ, and only {suspect.node}'s sensors alarmed again",
        )
    if _steady(original, suspects) and len(suspects) < replays:
        return _ask("suspect", f"no third device: {suspect.node} may yet contradict itself")
    return _verdict(
        Verdict.UNDECIDED,
        f"{suspect.node} and {peer.node} differ and no third device can say who is right; {_told(original, suspects)}",
    )


def _steady(original: Vote, suspects: list[Vote]) -> bool:
    """Whether the device has computed nothing but what it computed in the run."""
    return all(vote.digest == original.digest for vote in suspects)


def _told(original: Vote, suspects: list[Vote]) -> str:
    results = {vote.digest for vote in (original, *suspects)}
    made = "the same result" if len(results) == 1 else f"{len(results)} different results"
    return f"{original.node} computed {made} in {len(suspects) + 1} tries"


def _ask(role: Role, reason: str) -> Ruling:
    return Ruling(None, None, None, recurrent=False, needs=role, reason=reason)


def _verdict(verdict: Verdict, reason: str) -> Ruling:
    return Ruling(verdict, None, None, recurrent=False, needs=None, reason=reason)


def _blame(vote: Vote, recurrent: bool, reason: str) -> Ruling:
    return Ruling(Verdict.CORRUPT, vote.node, vote.device, recurrent=recurrent, needs=None, reason=reason)
