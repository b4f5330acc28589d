"""What agents report, as our own types: an event for the decisions, or numbers that are only kept."""

from dataclasses import dataclass

from controller.core.events import Event, Process


@dataclass(frozen=True, slots=True)
class Fp8Summary:
    """What FP8 quantisation did to one kind of tensor: the worst of each statistic, and the module where it was.

    `saturation` is the share of values stored as the largest code, `underflow` that of non-zero values that became 0.
    """

    tensor: str
    pass_: str
    amax: float
    amax_module: str
    saturation: float
    saturation_module: str
    underflow: float
    underflow_module: str


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One rank's account of one committed step. `loss` (nats per token), `grad_norm` and `reading` may be NaN.

    `reading` is the worst residual over tolerance; `attempts` is above 1 when the step was redone; `digest` is of the
    state after the commit; `expert_load` counts routed tokens per (MoE layer, expert), row-major; `fp8` has one
    summary for each kind of tensor, and is empty in other precisions and from agents that know of none.
    `crossing_bytes` left for other nodes in the dispatches of all layers, `unlimited_bytes` would have without groups.
    `failed_checks` failed themselves, `unjudged` other calls could not be judged; `lost_because` has the reasons that
    no earlier record of this rank and generation had.
    """

    step: int
    time: float
    loss: float
    grad_norm: float
    reading: float
    checks: int
    attempts: int
    digest: str
    chain: str
    step_s: float
    sensor_s: float
    gate_s: float
    tokens: int
    expert_load: tuple[int, ...]
    fp8: tuple[Fp8Summary, ...] = ()
    crossing_bytes: int = 0
    unlimited_bytes: int = 0
    failed_checks: int = 0
    unjudged: int = 0
    lost_because: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StepRecords:
    """Consecutive records of one rank, in ascending steps."""

    job: str
    generation: int
    rank: int
    records: tuple[StepRecord, ...]


@dataclass(frozen=True, slots=True)
class NodeProcesses:
    """Every process of ours on a node; replaces what was known."""

    processes: tuple[Process, ...]


@dataclass(frozen=True, slots=True)
class ReportsDropped:
    """How many reports an agent had to drop, and why."""

    count: int
    reason: str


@dataclass(frozen=True, slots=True)
class Report:
    """One report: `seq` ascends within (node, epoch); `time` is the node's, in seconds since 1970."""

    seq: int
    time: float
    traceparent: str
    body: Event | StepRecords | NodeProcesses | ReportsDropped
