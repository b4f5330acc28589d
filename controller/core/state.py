"""What the decisions remember: plain data, equal for equal histories, with the invariants written beside the fields."""

from dataclasses import dataclass, field
from enum import StrEnum

from controller.core.actions import Action, Placement
from controller.core.events import Device, Drill, Vote
from controller.core.policy import Policy

STATE_VERSION = 5  # grows when a stored snapshot can no longer be read as it is


class NodeState(StrEnum):
    """Where a node is in its life; `controller.core.nodes` holds the allowed transitions."""

    UNKNOWN = "UNKNOWN"
    ADMITTING = "ADMITTING"
    HEALTHY = "HEALTHY"
    SUSPECT = "SUSPECT"
    DRAINING = "DRAINING"
    QUARANTINED = "QUARANTINED"


class JobStatus(StrEnum):
    """Where a job is in its life: the first three are active, the last three are ends."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    RESTARTING = "RESTARTING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


ACTIVE = frozenset({JobStatus.PENDING, JobStatus.RUNNING, JobStatus.RESTARTING})
UNDER_WAY = frozenset({JobStatus.RUNNING, JobStatus.RESTARTING})


@dataclass(frozen=True, slots=True)
class Standby:
    """A warm worker that waits to be promoted."""

    id: str
    job: str
    pid: int
    device: str
    rendezvous: str
    fingerprint: str


@dataclass(slots=True)
class Node:
    """A host with an agent.

    Invariant: `epoch` never shrinks. Invariant: no standby is also in `spent`.
    `lost_at` (seconds since 1970) is when a missing link counts as lost; it is 0 while the link is up.
    `before_unknown` is the state to return to when the same agent (same epoch) comes back.
    """

    name: str
    state: NodeState = NodeState.UNKNOWN
    before_unknown: NodeState = NodeState.UNKNOWN
    epoch: int = 0
    linked: bool = False
    lost_at: float = 0.0
    spare: bool = False
    fingerprint: str = ""
    peer_endpoint: str = ""
    devices: tuple[Device, ...] = ()
    standbys: dict[str, Standby] = field(default_factory=dict)
    spent: tuple[str, ...] = ()
    findings: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint as far as the decisions need it; `trust` is captured, durable, verified or revoked.

    `final`: all ranks agreed on its step. `chain` is the step's, or what the checkpoint says, whichever came first.
    """

    step: int
    generation: int
    chain: str
    trust: str
    final: bool = False


@dataclass(frozen=True, slots=True)
class Resume:
    """Where one rank of the current generation found its state."""

    step: int
    source: str
    digest: str


@dataclass(frozen=True, slots=True)
class Restart:
    """A new generation that is wanted and has not started.

    `due`: without a known cause it starts then all the same; `deadline`: the job fails if it has not started by then.
    `avoid`: nodes that must not get a rank. `stopped`: nodes that StopGeneration was sent to.
    """

    incident: str
    since: float
    due: float
    deadline: float
    cause_known: bool
    avoid: tuple[str, ...] = ()
    stopped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Gate:
    """A held step of one suspect rank, by its attempts. Invariant: `asked` <= `alarmed`.

    `alarmed` is the newest one whose alarm came, `judged` the newest one with a verdict, `undecided` whether that said
    that nobody could tell, `asked` the newest one for which a spare's vote was arranged, as `role` ("peer", "third").
    `replay` is the outstanding Replay's id, to be answered by `vote_due`. `differed` is how often the ranks have said
    that they committed this step's state otherwise.
    """

    step: int
    rank: int
    incident: str
    alarmed: int = 0
    judged: int = 0
    undecided: bool = False
    asked: int = 0
    role: str = ""
    replay: str = ""
    vote_due: float = 0.0
    differed: int = 0

    @property
    def attempt(self) -> int:
        """The newest one known of; 0 before any. Alarm and verdict come from two nodes, in either order."""
        return max(self.alarmed, self.judged)


@dataclass(frozen=True, slots=True)
class Fired:
    """A drill that did its work; `incident` is empty until one is found that shows it."""

    id: str
    kind: str
    step: int
    rank: int
    node: str
    fired_at: float
    detail: str
    incident: str = ""


@dataclass(frozen=True, slots=True)
class Suspicion:
    """What is held against a device, weighed by the policy and decayed to `at` (seconds since 1970).

    The counts never decay: confirmed corruptions, alarms of which nobody could tell, false alarms; `last` is the time
    of the newest of them.
    """

    bad: float
    at: float
    faults: int = 0
    undecided: int = 0
    false_alarms: int = 0
    last: float = 0.0


@dataclass(frozen=True, slots=True)
class Claim:
    """Which device a serial stands for; neither, once two that were here at the same time had claimed it."""

    node: str
    uuid: str


@dataclass(frozen=True, slots=True)
class Failures:
    """Standbys of a job that could not be made on one node, since the last one that could: how many, and why."""

    count: int
    detail: str


@dataclass(slots=True)
class Job:
    """A job and the one generation of it that may run.

    Invariant: `generation` never shrinks, and `proofs` has an entry for each older one before it is exceeded.
    Invariant: `placements` names each rank of 0..world-1 once and each node at most once, or is empty.
    Invariant: `restart` is set exactly while RESTARTING; `outage` names an incident that has not recovered.
    Invariant: `committed_step` never shrinks.
    """

    id: str
    spec: str
    steps: int
    world: int
    drills: tuple[Drill, ...] = ()
    status: JobStatus = JobStatus.PENDING
    explanation: str = ""
    submitted_at: float = 0.0
    ended_at: float | None = None
    fingerprint: str = ""
    generation: int = 0
    run_steps: int = 0
    started_at: float = 0.0
    placements: tuple[Placement, ...] = ()
    exits: dict[int, str] = field(default_factory=dict)
    stalls: dict[int, int] = field(default_factory=dict)
    resumed: dict[int, Resume] = field(default_factory=dict)
    proofs: dict[int, str] = field(default_factory=dict)
    committed_step: int = 0
    final_step: int = 0
    fruitless: int = 0
    finish_due: float = 0.0
    checkpoints: dict[int, Checkpoint] = field(default_factory=dict)
    restart: Restart | None = None
    outage: str = ""
    gates: dict[str, Gate] = field(default_factory=dict)
    corruptions: dict[str, int] = field(default_factory=dict)
    fired: dict[str, Fired] = field(default_factory=dict)
    failures: dict[str, Failures] = field(default_factory=dict)

    def placed(self, rank: int) -> Placement | None:
        """Where `rank` of the current generation is, or None."""
        return next((place for place in self.placements if place.rank == rank), None)

    def holds(self, node: str) -> bool:
        """Whether `node` has a rank of the current generation."""
        return any(place.node == node for place in self.placements)


@dataclass(frozen=True, slots=True)
class Note:
    """One line of an incident's timeline; `time` is in seconds since 1970."""

    time: float
    text: str


@dataclass(frozen=True, slots=True)
class Ordered:
    """An action as the incident lists it."""

    type: str
    target: str
    reason: str


@dataclass(slots=True)
class Incident:
    """One thing that went wrong, from the fault to the next committed step. Times are in seconds since 1970.

    `generation` is the one it happened in, `restart_generation` the newest one started because of it (0: none).
    `evidence` names the bundles that its held attempts left, the first one first.
    Invariant: `verdict` is empty unless `kind` is sdc. Invariant: `closed_at` is set once `recovered_at` is.
    """

    id: str
    kind: str
    job: str
    generation: int
    traceparent: str
    opened_at: float
    rank: int = -1
    node: str = ""
    device: str = ""
    injected_step: int | None = None
    detected_step: int | None = None
    before_commit: bool | None = None
    verdict: str = ""
    votes: tuple[Vote, ...] = ()
    evidence: tuple[str, ...] = ()
    actions: tuple[Ordered, ...] = ()
    fault_at: float | None = None
    detected_at: float | None = None
    decided_at: float | None = None
    fenced_at: float | None = None
    restarted_at: float | None = None
    recovered_at: float | None = None
    closed_at: float | None = None
    restart_generation: int = 0
    resumed_from: str = ""
    caught: bool = True
    drills: tuple[str, ...] = ()
    timeline: tuple[Note, ...] = ()


@dataclass(slots=True)
class State:
    """Everything the decisions depend on.

    Invariant: `next_action` and `next_incident` only grow, so no id is ever given twice.
    `outstanding` holds what agents were told and have not answered. `wake` is when a Tick is needed; it follows from
    the rest and the time of the last event, so it takes no part in comparisons.
    `suspicion` is by serial, which outlives host names and jobs, or by uuid where there is none (`nodes.identity`).
    """

    policy: Policy = field(default_factory=Policy)
    controller_epoch: int = 0
    nodes: dict[str, Node] = field(default_factory=dict)
    jobs: dict[str, Job] = field(default_factory=dict)
    incidents: dict[str, Incident] = field(default_factory=dict)
    outstanding: dict[str, Action] = field(default_factory=dict)
    suspicion: dict[str, Suspicion] = field(default_factory=dict)
    serials: dict[str, Claim] = field(default_factory=dict)
    next_action: int = 1
    next_incident: int = 1
    wake: float | None = field(default=None, compare=False)
