"""Whose device is blamed: the product's own rules, fed with the computations of the trial."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from agent.training.agreement import Again, Hashes, findings
from benchmarks.campaign.bench import Computed
from diagnostics.health import Alarm
from diagnostics.verify.between import Changed, Repeat, changed_ruling, update_ruling
from diagnostics.verify.votes import Role, Ruling, Vote, decide, places_of

#: The device that is struck, and those that cast the other votes. The suspect's replay is on the device itself.
STRUCK, PEER, THIRD = "n0", "n1", "n2"
_DEVICES: dict[Role, str] = {"original": STRUCK, "suspect": STRUCK, "peer": PEER, "third": THIRD}


def by_votes(original: Computed, clean: str, again: Callable[[], Computed | None]) -> dict[str, Any]:
    """Replay until there is a verdict, as `agent.training.replay` does.

    clean: digest of the right result, which every other device computes. again: the suspect's replay; None where the
    fault does not come back, and the suspect is right this time.
    """
    finite = original.finite and all(math.isfinite(alarm.reading) for alarm in original.alarms)
    votes = [_vote("original", original.digest, original.alarms, finite)]
    ruling = decide(votes)
    while ruling.needs is not None:
        role = ruling.needs
        replay = again() if role == "suspect" else None
        if replay is None:
            votes.append(_vote(role, clean, (), True))
        else:
            votes.append(_vote(role, replay.digest, replay.alarms, replay.finite))
        ruling = decide(votes)
    verdict = "" if ruling.verdict is None else ruling.verdict.value
    return {"verdict": verdict, "blamed": ruling.blamed_device or "", "replays": len(votes) - 1}


def by_redo(ours: int, peers: int, clean: int) -> dict[str, Any]:
    """States differ at the next gate: both ranks roll back, and the redo shows whose words were others.

    One rank is blamed; if both differ from the redo, none is (`agent.training.doubt`).
    """
    wrong = [device for device, state in ((STRUCK, ours), (PEER, peers)) if state != clean]
    return {"verdict": "ROLLED_BACK", "blamed": wrong[0] if len(wrong) == 1 else "", "replays": 1}


def by_ruling(ruling: Ruling) -> dict[str, Any]:
    """A ruling that took no replay."""
    verdict = "" if ruling.verdict is None else ruling.verdict.value
    return {"verdict": verdict, "blamed": ruling.blamed_device or "", "replays": 0}


def on_states(made: Sequence[int], known: Hashes, seen: Sequence[Again]) -> Ruling:
    """The ruling on states that differ before they are committed, as ranks with whole copies judge them.

    made: digests of the new states by the struck device and its peer. known: what both started from. seen: what each
    finds when it looks once more.
    """
    evidence = findings(made, known, seen)[0].evidence
    members = [(STRUCK, STRUCK), (PEER, PEER)]
    if isinstance(evidence, Changed):
        return changed_ruling(evidence, members)
    assert isinstance(evidence, Repeat)
    return update_ruling(evidence, members)


def _vote(role: Role, digest: str, alarms: Sequence[Alarm], finite: bool) -> Vote:
    return Vote(role, _DEVICES[role], _DEVICES[role], 0, digest, bool(alarms), finite, alarmed=places_of(alarms))
