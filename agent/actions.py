"""What the controller can order an agent to do, as plain data; protobuf stays in convert."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """One order. `deadline` is in seconds since 1970, 0 for none; `controller_epoch` fences former controllers."""

    id: str
    controller_epoch: int
    job: str
    generation: int
    deadline: float = 0.0
    reason: str = ""
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class Placement:
    """Which warm worker becomes which rank."""

    rank: int
    node: str
    standby: str
    device: str
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareStandby(Action):
    """Keep a warm worker for the job of `spec` (JSON "assay.job/1")."""

    spec: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StopGeneration(Action):
    """End the job's workers up to `generation`; done means that they are proven gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartGeneration(Action):
    """Promote this node's standbys to their ranks, after ending the workers of older generations."""

    spec: str
    ranks: tuple[Placement, ...]
    rendezvous: str
    drills: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay(Action):
    """Recompute a suspect's gradients of `step` from the state read at `source` (a peer endpoint)."""

    spec: str
    step: int
    rank: int
    source_rank: int
    source: str
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliverVote(Action):
    """Hand votes on `rank` to the held gate of `step`; none means that there will be none."""

    step: int
    rank: int
    votes: tuple[dict[str, Any], ...] = field(default=())


@dataclass(frozen=True, slots=True, kw_only=True)
class EndJob(Action):
    """The job is over here: end its workers, release its standbys and slots."""

    outcome: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InjectDrill(Action):
    """Arm a drill in this node's running workers."""

    drill: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Noted(Action):
    """An order that the controller itself carries out (`kind`); the agent only acknowledges it."""

    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsupported(Action):
    """An order of a `kind` that this version of the agent cannot carry out."""

    kind: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an action: "done" or "failed"."""

    outcome: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Process:
    """A process of ours on this node; `generation` is 0 and `rank` -1 unless it is a worker."""

    role: str
    pid: int
    job: str = ""
    generation: int = 0
    rank: int = -1


@dataclass(frozen=True, slots=True)
class Controller:
    """The controller at the other end of the link, as its Welcome named it; pid 0 while none was heard."""

    pid: int = 0
    host: str = ""
    epoch: int = 0
