"""What can happen: the typed events that decisions are made from, each plain data that survives a trip as JSON."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened.

    `time` is in seconds since 1970 on the clock of whoever saw it; `node` is empty for events of the controller itself.
    """

    time: float
    node: str = ""
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator: `uuid` names it for ever, `kind` is its class."""

    uuid: str
    serial: str
    kind: str


@dataclass(frozen=True, slots=True)
class Process:
    """A process of ours on a node; `generation` is 0 and `rank` -1 unless it is a worker."""

    role: str
    pid: int
    job: str = ""
    generation: int = 0
    rank: int = -1


@dataclass(frozen=True, slots=True)
class Vote:
    """One computation of a suspect's gradients: who computed it, and the digest of the bits.

    `number` counts the votes of a role, from 1: a suspect may be asked again. 0 is an older agent's, which cast one.
    """

    role: str
    node: str
    device: str
    pid: int
    digest: str
    alarm: bool
    number: int = 0


@dataclass(frozen=True, slots=True)
class Alarm:
    """A reading above 1: which check, where."""

    sensor: str
    module: str
    operation: str
    pass_: str
    reading: float
    location: str


@dataclass(frozen=True, slots=True)
class Drill:
    """A fault injected on purpose. `rank` is -1 when the target is `node` or the kind's default."""

    id: str
    kind: str
    step: int
    rank: int = -1
    node: str = ""
    params: dict[str, str] = field(default_factory=dict)

    @property
    def persistent(self) -> bool:
        """Whether the fault stays with its device, whatever is restarted."""
        return self.params.get("persistent", "") == "true"


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentHello(Event):
    """An agent (re)connected and says what it observes. A new `epoch` is a new life: its old workers are gone."""

    epoch: int
    boot_id: str
    version: str
    fingerprint: str
    highest_controller_epoch: int
    devices: tuple[Device, ...]
    processes: tuple[Process, ...]
    peer_endpoint: str
    spare: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkLost(Event):
    """The stream of `node` broke. Says nothing about its workers."""

    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReady(Event):
    """A warm worker waits on `node` to be promoted."""

    job: str
    standby: str
    pid: int
    device: str
    rendezvous: str
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerExited(Event):
    """A worker (or, with generation 0, a standby) is proven gone.

    `cause`: "completed" (trained to the last step), "signal" (killed from outside), "collective" (a peer was lost),
    "error" (an exception of its own), "stopped" (on the controller's word).
    """

    job: str
    generation: int
    rank: int
    pid: int
    cause: str
    detail: str
    step: int
    phase: str
    standby: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressStalled(Event):
    """A worker has not moved for longer than its phase may take. `waiting`: it waits for others, a victim."""

    job: str
    generation: int
    rank: int
    pid: int
    step: int
    phase: str
    stalled_s: float
    deadline_s: float
    process_state: str
    waiting: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GateAlarm(Event):
    """The commit gate holds a step because of `rank` (the suspect, on `node`).

    `reason` is the gate's, for there may be no alarm; an older agent gives none.
    """

    job: str
    generation: int
    step: int
    rank: int
    device: str
    attempt: int
    alarms: tuple[Alarm, ...]
    votes: tuple[Vote, ...]
    needs_third: bool
    evidence: str
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayResult(Event):
    """A vote from a spare (`verdict` empty, `action_id` set), or the gate's own verdict on a held step.

    `evidence` names the bundle that the held step left, if it left one; the note says what is to be said of it.
    `widened` counts the tolerances that the suspect widened after a false alarm. `attempt` is the alarm's (0: from an
    older agent), `first_attempt` the first one of this try: a roll-back takes the step again.
    """

    job: str
    generation: int
    step: int
    rank: int
    votes: tuple[Vote, ...]
    verdict: str
    blamed_node: str
    blamed_device: str
    recurrent: bool
    reason: str
    action_id: str
    evidence: str = ""
    evidence_note: str = ""
    widened: int = 0
    attempt: int = 0
    first_attempt: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditResult(Event):
    """A spare recomputed a rank's gradients and compared the bits."""

    job: str
    generation: int
    step: int
    rank: int
    equal: bool
    expected: str
    found: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DigestDisagreement(Event):
    """Ranks that hold the same shard committed different states at `step`.

    times: how often the generation has found that of this step, from 1; 0 is the comparison of the step's records.
    """

    job: str
    generation: int
    step: int
    digests: dict[int, str]
    blamed_rank: int
    reason: str
    times: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed(Event):
    """A rank of a generation found its state: `source` is live, spare, replica, checkpoint or init.

    The bytes are of one state, as the rank holds it: parameters but routed experts, routed experts, both moments, and
    the replica it keeps of another rank's shard.
    """

    job: str
    generation: int
    rank: int
    step: int
    source: str
    digest: str
    checkpoint: str
    parameter_bytes: int = 0
    expert_bytes: int = 0
    optimizer_bytes: int = 0
    replica_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFinal(Event):
    """Every rank committed `step` with one digest. Only the steps that core asks for become events (`wants_final`)."""

    job: str
    generation: int
    step: int
    digest: str
    chain: str
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointCaptured(Event):
    """The state of `step` is staged in memory and hashed."""

    job: str
    generation: int
    step: int
    digest: str
    stall_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointDurable(Event):
    """A checkpoint is complete on storage, under its final name."""

    job: str
    generation: int
    step: int
    digest: str
    chain: str
    path: str
    bytes: int
    parent_step: int
    write_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRefused(Event):
    """A checkpoint's shard does not have the digest of its manifest; the restore fell back."""

    job: str
    generation: int
    step: int
    path: str
    shard: str
    expected: str
    found: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FindingRaised(Event):
    """A hardware check found something on `node`."""

    finding: str
    check: str
    severity: str
    device: str
    confidence: float
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FindingCleared(Event):
    """A finding no longer holds."""

    finding: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult(Event):
    """An offline test of `node` ended."""

    probe: str
    passed: bool
    value: float
    unit: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DrillFired(Event):
    """A drill did its work; learnt after the fact, and used only to annotate incidents."""

    drill: str
    job: str
    kind: str
    step: int
    rank: int
    fired_at: float
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionResult(Event):
    """What became of an action on `node`: outcome is done, failed or unknown."""

    action_id: str
    outcome: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSubmitted(Event):
    """An operator asks for a job, or for more steps of one that has ended. `spec` is JSON "assay.job/1"."""

    job: str
    spec: str
    steps: int
    world: int
    drills: tuple[Drill, ...]
    actor: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JobCancelled(Event):
    """An operator ends a job."""

    job: str
    actor: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DrillRequested(Event):
    """An operator wants a drill in a running job."""

    job: str
    drill: Drill
    actor: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyChanged(Event):
    """Thresholds of the decisions changed; `policy` maps a field of Policy to its value."""

    policy: dict[str, float]
    actor: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseAcquired(Event):
    """A controller became the active one. `unclean`: its predecessor did not resign; last seen alive at `last_seen`."""

    epoch: int
    unclean: bool
    last_seen: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick(Event):
    """Time passed; recorded only when it causes actions or changes state."""
