"""What can be ordered: the typed actions that decisions end in, each with its id, fencing generation and reason."""

from dataclasses import dataclass

from controller.core.events import Drill, Vote


@dataclass(frozen=True, slots=True)
class Placement:
    """Which warm worker becomes which rank."""

    rank: int
    node: str
    standby: str
    device: str
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """Something to carry out.

    `id` is unique and derived from the deciding event, so that deciding again gives the same id; `node` is the agent
    that carries it out, empty for what the controller does itself; `deadline` is in seconds since 1970.
    """

    id: str
    node: str
    job: str
    generation: int
    deadline: float
    reason: str
    incident: str = ""
    traceparent: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareStandby(Action):
    """Keep a warm worker for this job on `node`."""

    spec: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StopGeneration(Action):
    """End the workers of `generation` on `node`; done means they are proven gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartGeneration(Action):
    """Promote `node`'s standbys to their ranks. The agent ends any worker of an older generation first."""

    spec: str
    ranks: tuple[Placement, ...]
    rendezvous: str
    drills: tuple[Drill, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay(Action):
    """Recompute a suspect's gradients on `node`, a spare, from state read at `source` (a peer endpoint)."""

    spec: str
    step: int
    rank: int
    source_rank: int
    source: str
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliverVote(Action):
    """Hand a spare's vote to the held gate on `node`; no votes means that there will be none."""

    step: int
    rank: int
    votes: tuple[Vote, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantine(Action):
    """Take `target` out of service."""

    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Release(Action):
    """Put `target` back into service."""

    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RevokeCheckpoints(Action):
    """Distrust every checkpoint of the job from `since_step` on."""

    since_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PromoteCheckpoint(Action):
    """Mark the checkpoint of `step` verified."""

    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AskHuman(Action):
    """Nothing safe is left to do without a person."""

    question: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EndJob(Action):
    """The job is over on `node`: release its standbys and slots. Outcome: completed, failed or cancelled."""

    outcome: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InjectDrill(Action):
    """Arm a drill in the running workers of `node`."""

    drill: Drill
