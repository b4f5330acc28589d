"""From votes to a verdict: who computed what, and therefore which device, if any, is to blame."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from diagnostics.health import Verdict

Role = Literal["original", "suspect", "peer", "third"]
ROLES: tuple[Role, ...] = ("original", "suspect", "peer", "third")


@dataclass(frozen=True, slots=True)
class Vote:
    """One recomputation of the alarmed rank's gradients.

    original: the run that alarmed. suspect: its replay on the same device. peer: the same sample ids on another
    node. third: the same on a node that is neither (the spare).
    """

    role: Role
    node: str
    device: str
    pid: int
    digest: str
    alarm: bool
    finite: bool = True


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


def decide(votes: Iterable[Vote], unavailable: frozenset[Role] = frozenset()) -> Ruling:
    """Judge the votes cast so far; their order does not matter.

    `unavailable` names the roles nobody can fill (no second node, no spare), so that the answer is a verdict instead
    of another request. A peer or third vote from a node that has voted already does not count as a second device.
    Raises ValueError on two different votes for one role, and on an unknown role.
    """
    by_role = _by_role(votes)
    original = by_role.get("original")
    if original is None:
        raise ValueError("no original vote: there is nothing to judge")
    suspect = by_role.get("suspect")
    if suspect is None:
        if "suspect" in unavailable:
            return _without_suspect(original)
        return _ask("suspect", "the suspect has not replayed the step yet")
    peer = _elsewhere(by_role.get("peer"), original, suspect)
    if peer is None:
        if "peer" in unavailable or by_role.get("peer") is not None:
            return _verdict(Verdict.UNDECIDED, "no second device recomputed the step")
        return _ask("peer", "no other node has recomputed the step yet")
    if suspect.digest == peer.digest:
        return _agreed(original, suspect, peer)
    third = _elsewhere(by_role.get("third"), original, suspect, peer)
    if third is not None:
        return _majority(suspect, peer, third)
    if "third" in unavailable or by_role.get("third") is not None:
        return _by_sensors(suspect, peer)
    return _ask("third", f"{suspect.node} and {peer.node} differ: a third device must say which is right")


def _by_role(votes: Iterable[Vote]) -> dict[Role, Vote]:
    by_role: dict[Role, Vote] = {}
    for vote in votes:
        if vote.role not in ROLES:
            raise ValueError(f"unknown role {vote.role!r}: one of {', '.join(ROLES)}")
        if by_role.setdefault(vote.role, vote) != vote:
            raise ValueError(f"two different votes for {vote.role}: {by_role[vote.role]} and {vote}")
    return by_role


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
    if not (original.finite and suspect.finite and peer.finite):
        return _verdict(Verdict.SOFTWARE, "every device computes the same result, and it is not finite")
    return _verdict(Verdict.FALSE_ALARM, f"{suspect.node} and {peer.node} reproduce the run bit for bit")


def _majority(suspect: Vote, peer: Vote, third: Vote) -> Ruling:
    if third.digest == peer.digest:
        return _blame(suspect, True, f"{peer.node} and {third.node} agree, {suspect.node} differs again")
    if third.digest == suspect.digest:
        return _blame(peer, False, f"{suspect.node} and {third.node} agree, {peer.node} differs")
    return _verdict(Verdict.SOFTWARE, "three devices computed three different results")


def _by_sensors(suspect: Vote, peer: Vote) -> Ruling:
    if suspect.alarm and not peer.alarm:
        return _blame(
            suspect,
            True,
            f"no third device: {suspect.node} and {peer.node} differ, and only {suspect.node}'s sensors alarmed again",
        )
    return _verdict(
        Verdict.UNDECIDED, f"{suspect.node} and {peer.node} differ and no third device can say who is right"
    )


def _without_suspect(original: Vote) -> Ruling:
    return _verdict(Verdict.UNDECIDED, f"{original.node} could not replay the step")


def _ask(role: Role, reason: str) -> Ruling:
    return Ruling(None, None, None, recurrent=False, needs=role, reason=reason)


def _verdict(verdict: Verdict, reason: str) -> Ruling:
    return Ruling(verdict, None, None, recurrent=False, needs=None, reason=reason)


def _blame(vote: Vote, recurrent: bool, reason: str) -> Ruling:
    return Ruling(Verdict.CORRUPT, vote.node, vote.device, recurrent=recurrent, needs=None, reason=reason)
