"""A held step as its ranks speak of it: who computes where, what was computed, and how both travel."""

from dataclasses import asdict, dataclass
from typing import Any

from agent.training.computation import Computation
from agent.training.handed import Finding
from agent.training.layout import State
from agent.training.reduction import UNCHECKED, Reduction
from agent.training.strays import Explained
from diagnostics.health import Alarm
from diagnostics.verify.votes import Vote


@dataclass(frozen=True, slots=True)
class Member:
    """Which device a rank runs on."""

    node: str
    device: str
    pid: int


@dataclass(frozen=True, slots=True)
class Held:
    """A step that the gate holds, on one rank: its own computation, and its digest if it alarmed.

    `state` is the committed one: the job's whole state hashed to `digest` then, this rank's words to `own`, and on a
    mesh its neighbour's shard in it must hash to `replica`. `reduction` is what summing gave on this rank, `sums` what
    was wrong in it on any; `findings` are what kept a state that was made already from being committed. `first` is the
    attempt with which this try of the step began: attempts go on where a roll-back takes a step again. `reason` and
    `overflowed` are the gate's.
    """

    generation: int
    step: int
    attempt: int
    computation: Computation
    original: str
    state: State
    replica: int = 0
    digest: int = 0
    own: int = 0
    reduction: Reduction = UNCHECKED
    sums: tuple[Explained, ...] = ()
    findings: tuple[Finding, ...] = ()
    first: int = 1
    reason: str = ""
    overflowed: bool = False


def vote_body(vote: Vote) -> dict[str, Any]:
    """A vote as it travels: assay.v1.Vote's fields."""
    body = asdict(vote)
    del body["finite"], body["alarmed"]
    return body


def alarm_body(alarm: Alarm) -> dict[str, Any]:
    """An alarm as it travels: assay.v1.Alarm's fields."""
    body = asdict(alarm)
    del body["exact"]
    body["pass"] = body.pop("pass_")
    return body
