from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AgentMessage(_message.Message):
    __slots__ = ("hello", "batch")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    batch: ReportBatch
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., batch: _Optional[_Union[ReportBatch, _Mapping]] = ...) -> None: ...

class ControllerMessage(_message.Message):
    __slots__ = ("welcome", "ack", "action")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    ack: Ack
    action: Action
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ..., action: _Optional[_Union[Action, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("node", "epoch", "boot_id", "version", "highest_controller_epoch", "fingerprint", "devices", "processes", "completed_actions", "peer_endpoint", "spare")
    NODE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    HIGHEST_CONTROLLER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    PROCESSES_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_ACTIONS_FIELD_NUMBER: _ClassVar[int]
    PEER_ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    SPARE_FIELD_NUMBER: _ClassVar[int]
    node: str
    epoch: int
    boot_id: str
    version: str
    highest_controller_epoch: int
    fingerprint: str
    devices: _containers.RepeatedCompositeFieldContainer[Device]
    processes: _containers.RepeatedCompositeFieldContainer[Process]
    completed_actions: _containers.RepeatedScalarFieldContainer[str]
    peer_endpoint: str
    spare: bool
    def __init__(self, node: _Optional[str] = ..., epoch: _Optional[int] = ..., boot_id: _Optional[str] = ..., version: _Optional[str] = ..., highest_controller_epoch: _Optional[int] = ..., fingerprint: _Optional[str] = ..., devices: _Optional[_Iterable[_Union[Device, _Mapping]]] = ..., processes: _Optional[_Iterable[_Union[Process, _Mapping]]] = ..., completed_actions: _Optional[_Iterable[str]] = ..., peer_endpoint: _Optional[str] = ..., spare: _Optional[bool] = ...) -> None: ...

class Device(_message.Message):
    __slots__ = ("uuid", "serial", "kind")
    UUID_FIELD_NUMBER: _ClassVar[int]
    SERIAL_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    uuid: str
    serial: str
    kind: str
    def __init__(self, uuid: _Optional[str] = ..., serial: _Optional[str] = ..., kind: _Optional[str] = ...) -> None: ...

class Process(_message.Message):
    __slots__ = ("role", "pid", "job", "generation", "rank")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    role: str
    pid: int
    job: str
    generation: int
    rank: int
    def __init__(self, role: _Optional[str] = ..., pid: _Optional[int] = ..., job: _Optional[str] = ..., generation: _Optional[int] = ..., rank: _Optional[int] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("controller_epoch", "acknowledged_seq", "credits", "pid", "host")
    CONTROLLER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGED_SEQ_FIELD_NUMBER: _ClassVar[int]
    CREDITS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    controller_epoch: int
    acknowledged_seq: int
    credits: int
    pid: int
    host: str
    def __init__(self, controller_epoch: _Optional[int] = ..., acknowledged_seq: _Optional[int] = ..., credits: _Optional[int] = ..., pid: _Optional[int] = ..., host: _Optional[str] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("epoch", "seq")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    seq: int
    def __init__(self, epoch: _Optional[int] = ..., seq: _Optional[int] = ...) -> None: ...

class ReportBatch(_message.Message):
    __slots__ = ("reports",)
    REPORTS_FIELD_NUMBER: _ClassVar[int]
    reports: _containers.RepeatedCompositeFieldContainer[Report]
    def __init__(self, reports: _Optional[_Iterable[_Union[Report, _Mapping]]] = ...) -> None: ...

class Report(_message.Message):
    __slots__ = ("seq", "time", "traceparent", "steps", "processes", "worker_ready", "worker_exited", "progress_stalled", "gate_alarm", "replay_result", "audit_result", "digest_disagreement", "resumed", "checkpoint_captured", "checkpoint_durable", "shard_refused", "finding_raised", "finding_cleared", "probe_result", "drill_fired", "action_result", "reports_dropped")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    PROCESSES_FIELD_NUMBER: _ClassVar[int]
    WORKER_READY_FIELD_NUMBER: _ClassVar[int]
    WORKER_EXITED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_STALLED_FIELD_NUMBER: _ClassVar[int]
    GATE_ALARM_FIELD_NUMBER: _ClassVar[int]
    REPLAY_RESULT_FIELD_NUMBER: _ClassVar[int]
    AUDIT_RESULT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_DISAGREEMENT_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_CAPTURED_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_DURABLE_FIELD_NUMBER: _ClassVar[int]
    SHARD_REFUSED_FIELD_NUMBER: _ClassVar[int]
    FINDING_RAISED_FIELD_NUMBER: _ClassVar[int]
    FINDING_CLEARED_FIELD_NUMBER: _ClassVar[int]
    PROBE_RESULT_FIELD_NUMBER: _ClassVar[int]
    DRILL_FIRED_FIELD_NUMBER: _ClassVar[int]
    ACTION_RESULT_FIELD_NUMBER: _ClassVar[int]
    REPORTS_DROPPED_FIELD_NUMBER: _ClassVar[int]
    seq: int
    time: float
    traceparent: str
    steps: StepRecords
    processes: Processes
    worker_ready: WorkerReady
    worker_exited: WorkerExited
    progress_stalled: ProgressStalled
    gate_alarm: GateAlarm
    replay_result: ReplayResult
    audit_result: AuditResult
    digest_disagreement: DigestDisagreement
    resumed: Resumed
    checkpoint_captured: CheckpointCaptured
    checkpoint_durable: CheckpointDurable
    shard_refused: ShardRefused
    finding_raised: FindingRaised
    finding_cleared: FindingCleared
    probe_result: ProbeResult
    drill_fired: DrillFired
    action_result: ActionResult
    reports_dropped: ReportsDropped
    def __init__(self, seq: _Optional[int] = ..., time: _Optional[float] = ..., traceparent: _Optional[str] = ..., steps: _Optional[_Union[StepRecords, _Mapping]] = ..., processes: _Optional[_Union[Processes, _Mapping]] = ..., worker_ready: _Optional[_Union[WorkerReady, _Mapping]] = ..., worker_exited: _Optional[_Union[WorkerExited, _Mapping]] = ..., progress_stalled: _Optional[_Union[ProgressStalled, _Mapping]] = ..., gate_alarm: _Optional[_Union[GateAlarm, _Mapping]] = ..., replay_result: _Optional[_Union[ReplayResult, _Mapping]] = ..., audit_result: _Optional[_Union[AuditResult, _Mapping]] = ..., digest_disagreement: _Optional[_Union[DigestDisagreement, _Mapping]] = ..., resumed: _Optional[_Union[Resumed, _Mapping]] = ..., checkpoint_captured: _Optional[_Union[CheckpointCaptured, _Mapping]] = ..., checkpoint_durable: _Optional[_Union[CheckpointDurable, _Mapping]] = ..., shard_refused: _Optional[_Union[ShardRefused, _Mapping]] = ..., finding_raised: _Optional[_Union[FindingRaised, _Mapping]] = ..., finding_cleared: _Optional[_Union[FindingCleared, _Mapping]] = ..., probe_result: _Optional[_Union[ProbeResult, _Mapping]] = ..., drill_fired: _Optional[_Union[DrillFired, _Mapping]] = ..., action_result: _Optional[_Union[ActionResult, _Mapping]] = ..., reports_dropped: _Optional[_Union[ReportsDropped, _Mapping]] = ...) -> None: ...

class Fp8Summary(_message.Message):
    __slots__ = ("tensor", "amax", "amax_module", "saturation", "saturation_module", "underflow", "underflow_module")
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    PASS_FIELD_NUMBER: _ClassVar[int]
    AMAX_FIELD_NUMBER: _ClassVar[int]
    AMAX_MODULE_FIELD_NUMBER: _ClassVar[int]
    SATURATION_FIELD_NUMBER: _ClassVar[int]
    SATURATION_MODULE_FIELD_NUMBER: _ClassVar[int]
    UNDERFLOW_FIELD_NUMBER: _ClassVar[int]
    UNDERFLOW_MODULE_FIELD_NUMBER: _ClassVar[int]
    tensor: str
    amax: float
    amax_module: str
    saturation: float
    saturation_module: str
    underflow: float
    underflow_module: str
    def __init__(self, tensor: _Optional[str] = ..., amax: _Optional[float] = ..., amax_module: _Optional[str] = ..., saturation: _Optional[float] = ..., saturation_module: _Optional[str] = ..., underflow: _Optional[float] = ..., underflow_module: _Optional[str] = ..., **kwargs) -> None: ...

class StepRecord(_message.Message):
    __slots__ = ("step", "time", "loss", "grad_norm", "reading", "checks", "attempts", "digest", "chain", "step_s", "sensor_s", "gate_s", "tokens", "expert_load", "fp8", "crossing_bytes", "unlimited_bytes", "failed_checks", "unjudged", "lost_because")
    STEP_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    READING_FIELD_NUMBER: _ClassVar[int]
    CHECKS_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    SENSOR_S_FIELD_NUMBER: _ClassVar[int]
    GATE_S_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_LOAD_FIELD_NUMBER: _ClassVar[int]
    FP8_FIELD_NUMBER: _ClassVar[int]
    CROSSING_BYTES_FIELD_NUMBER: _ClassVar[int]
    UNLIMITED_BYTES_FIELD_NUMBER: _ClassVar[int]
    FAILED_CHECKS_FIELD_NUMBER: _ClassVar[int]
    UNJUDGED_FIELD_NUMBER: _ClassVar[int]
    LOST_BECAUSE_FIELD_NUMBER: _ClassVar[int]
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
    expert_load: _containers.RepeatedScalarFieldContainer[int]
    fp8: _containers.RepeatedCompositeFieldContainer[Fp8Summary]
    crossing_bytes: int
    unlimited_bytes: int
    failed_checks: int
    unjudged: int
    lost_because: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, step: _Optional[int] = ..., time: _Optional[float] = ..., loss: _Optional[float] = ..., grad_norm: _Optional[float] = ..., reading: _Optional[float] = ..., checks: _Optional[int] = ..., attempts: _Optional[int] = ..., digest: _Optional[str] = ..., chain: _Optional[str] = ..., step_s: _Optional[float] = ..., sensor_s: _Optional[float] = ..., gate_s: _Optional[float] = ..., tokens: _Optional[int] = ..., expert_load: _Optional[_Iterable[int]] = ..., fp8: _Optional[_Iterable[_Union[Fp8Summary, _Mapping]]] = ..., crossing_bytes: _Optional[int] = ..., unlimited_bytes: _Optional[int] = ..., failed_checks: _Optional[int] = ..., unjudged: _Optional[int] = ..., lost_because: _Optional[_Iterable[str]] = ...) -> None: ...

class StepRecords(_message.Message):
    __slots__ = ("job", "generation", "rank", "records")
    JOB_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    job: str
    generation: int
    rank: int
    records: _containers.RepeatedCompositeFieldContainer[StepRecord]
    def __init__(self, job: _Optional[str] = ..., generation: _Optional[int] = ..., rank: _Optional[int] = ..., records: _Optional[_Iterable[_Union[StepRecord, _Mapping]]] = ...) -> None: ...

class Processes(_message.Message):
    __slots__ = ("processes",)
    PROCESSES_FIELD_NUMBER: _ClassVar[int]
    processes: _containers.RepeatedCompositeFieldContainer[Process]
    def __init__(self, processes: _Optional[_Iterable[_Union[Process, _Mapping]]] = ...) -> None: ...

class WorkerReady(_message.Message):
    __slots__ = ("job", "standby", "pid", "device", "rendezvous", "fingerprint")
    JOB_FIELD_NUMBER: _ClassVar[int]
    STANDBY_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    RENDEZVOUS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    job: str
    standby: str
    pid: int
    device: str
    rendezvous: str
    fingerprint: str
    def __init__(self, job: _Optional[str] = ..., standby: _Optional[str] = ..., pid: _Optional[int] = ..., device: _Optional[str] = ..., rendezvous: _Optional[str] = ..., fingerprint: _Optional[str] = ...) -> None: ...

class WorkerExited(_message.Message):
    __slots__ = ("job", "generation", "rank", "pid", "cause", "detail", "step", "phase", "standby")
    JOB_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    STANDBY_FIELD_NUMBER: _ClassVar[int]
    job: str
    generation: int
    rank: int
    pid: int
    cause: str
    detail: str
    step: int
    phase: str
    standby: str
    def __init__(self, job: _Optional[str] = ..., generation: _Optional[int] = ..., rank: _Optional[int] = ..., pid: _Optional[int] = ..., cause: _Optional[str] = ..., detail: _Optional[str] = ..., step: _Optional[int] = ..., phase: _Optional[str] = ..., standby: _Optional[str] = ...) -> None: ...

class ProgressStalled(_message.Message):
    __slots__ = ("job", "generation", "rank", "pid", "step", "phase", "stalled_s", "deadline_s", "process_state", "waiting")
    JOB_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    STALLED_S_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    PROCESS_STATE_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
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
    def __init__(self, job: _Optional[str] = ..., generation: _Optional[int] = ..., rank: _Optional[int] = ..., pid: _Optional[int] = ..., step: _Optional[int] = ..., phase: _Optional[str] = ..., stalled_s: _Optional[float] = ..., deadline_s: _Optional[float] = ..., process_state: _Optional[str] = ..., waiting: _Optional[bool] = ...) -> None: ...

class Vote(_message.Message):
    __slots__ = ("role", "node", "device", "pid", "digest", "alarm", "number")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    ALARM_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    role: str
    node: str
    device: str
    pid: int
    digest: str
    alarm: bool
    number: int
    def __init__(self, role: _Optional[str] = ..., node: _Optional[str] = ..., device: _Optional[str] = ..., pid: _Optional[int] = ..., digest: _Optional[str] = ..., alarm: _Optional[bool] = ..., number: _Optional[int] = ...) -> None: ...

class Alarm(_message.Message):
    __slots__ = ("sensor", "module", "operation", "reading", "location")
    SENSOR_FIELD_NUMBER: _ClassVar[int]
    MODULE_FIELD_NUMBER: _ClassVar[int]
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    PASS_FIELD_NUMBER: _ClassVar[int]
    READING_FIELD_NUMBER: _ClassVar[int]
    LOCATION_FIELD_NUMBER: _ClassVar[int]
    sensor: str
    module: str
    operation: str
    reading: float
    location: str
    def __init__(self, sensor: _Optional[str] = ..., module: _Optional[str] = ..., operation: _Optional[str] = ..., reading: _Optional[float] = ..., location: _Optional[str] = ..., **kwargs) -> None: ...

class GateAlarm(_message.Message):
    __slots__ = ("job", "generation", "step", "rank", "device", "attempt", "alarms", "votes", "needs_third", "evidence", "reason")
    JOB_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    ALARMS_FIELD_NUMBER: _ClassVar[int]
    VOTES_FIELD_NUMBER: _ClassVar[int]
    NEEDS_THIRD_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    job: str
    generation: int
    step: int
    rank: int
    device: str
    attempt: int
    alarms: _containers.RepeatedCompositeFieldContainer[Alarm]
    votes: _containers.RepeatedCompositeFieldContainer[Vote]
    needs_third: bool
    evidence: str
    reason: str
    def __init__(self, job: _Optional[str] = ..., generation: _Optional[int] = ..., step: _Optional[int] = ..., rank: _Optional[int] = ..., device: _Optional[str] = ..., attempt: _Optional[int] = ..., alarms: _Optional[_Iterable[_Union[Alarm, _Mapping]]] = ..., votes: _Optional[_Iterable[_Union[Vote, _Mapping]]] = ..., needs_third: _Optional[bool] = ..., evidence: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class ReplayResult(_message.Message):
    __slots__ = ("job", "generation", "step", "rank", "votes", "verdict", "blamed_node", "blamed_device", "recurrent", "reason", "action_id", "evidence", "evidence_note", "widened", "attempt", "first_attempt")
    JOB_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    VOTES_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    BLAMED_NODE_FIELD_NUMBER: _ClassVar[int]
    BLAMED_DEVICE_FIELD_NUMBER: _ClassVar[int]
    RECURRENT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ACTION_ID_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_NOTE_FIELD_NUMBER: _ClassVar[int]
    WIDENED_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    FIRST_ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    job: str
    generation: int
    step: int
    rank: int
    votes: _containers.RepeatedCompositeFieldContainer[Vote]
    verdict: str
    blamed_node: str
    blamed_device: str
    recurrent: bool
    reason: str
    action_id: str
    evidence: str
    evidence_note: str
    widened: int
    attempt: int
    first_attempt: int
    def __init__(self, job: _Optional[str] = ..., generation: _Optional[int] = ..., step: _Optional[int] = ..., rank: _Optional[int] = ..., votes: _Optional[_Iterable[_Union[Vote, _Mapping]]] = ..., verdict: _Optional[str] = ..., blamed_node: _Optional[str] = ..., blamed_device: _Optional[str] = ..., recurrent: _Optional[bool] = ..., reason: _Optional[str] = ..., action_id: _Optional[str] = ..., evidence: _Optional[str] = ..., evidence_note: _Optional[str] = ..., widened: _Optional[int] = ..., attempt: _Optional[int] = ..., first_attempt: _Optional[int] = ...) -> None: ...

class AuditResult(_message.Message):
    __slots__ = ("job", "generation", "step", "rank", "equal", "expected", "found")
    JOB_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    EQUAL_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    job: str
    generation: int
    step: int
    rank: int
    equal: bool
    expected: str
    found: str
    def __init__(self, job: _Optional[str] = ..., generation: _Optional[int] = ..., step: _Optional[int] = ..., rank: _Optional[int] = ..., equal: _Optional[bool] = ..., expected: _Optional[str] = ..., found: _Optional[str] = ...) -> None: ...

class DigestDisagreement(_message.Message):
    __slots__ = ("job", "generation", "step", "digests", "blamed_rank", "reason", "times")
    class DigestsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: str
        def __init__(self, key: _Optional[int] = ..., value: _Optional[str] = ...) -> None: ...
    JOB_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    BLAMED_RANK_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    job: str
    generation: int
    step: int
    digests: _containers.ScalarMap[int, str]
    blamed_rank: int
    reason: str
    times: int
    def __init__(self, job: _Optional[str] = ..., generation: _Optional[int] = ..., step: _Optional[int] = ..., digests: _Optional[_Mapping[int, str]] = ..., blamed_rank: _Optional[int] = ..., reason: _Optional[str] = ..., times: _Optional[int] = ...) -> None: ...

class Resumed(_message.Message):
    __slots__ = ("job", "generation", "rank", "step", "source", "digest", "checkpoint", "parameter_bytes", "expert_bytes", "optimizer_bytes", "replica_bytes")
    JOB_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_BYTES_FIELD_NUMBER: _ClassVar[int]
    EXPERT_BYTES_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_BYTES_FIELD_NUMBER: _ClassVar[int]
    REPLICA_BYTES_FIELD_NUMBER: _ClassVar[int]
    job: str
    generation: int
    rank: int
    step: int
    source: str
    digest: str
    checkpoint: str
    parameter_bytes: int
    expert_bytes: int
    optimizer_bytes: int
    replica_bytes: int
    def __init__(self, job: _Optional[str] = ..., generation: _Optional[int] = ..., rank: _Optional[int] = ..., step: _Optional[int] = ..., source: _Optional[str] = ..., digest: _Optional[str] = ..., checkpoint: _Optional[str] = ..., parameter_bytes: _Optional[int] = ..., expert_bytes: _Optional[int] = ..., optimizer_bytes: _Optional[int] = ..., replica_bytes: _Optional[int] = ...) -> None: ...

class CheckpointCaptured(_message.Message):
    __slots__ = ("job", "generation", "step", "digest", "stall_s")
    JOB_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    STALL_S_FIELD_NUMBER: _ClassVar[int]
    job: str
    generation: int
    step: int
    digest: str
    stall_s: float
    def __init__(self, job: _Optional[str] = ..., generation: _Optional[int] = ..., step: _Optional[int] = ..., digest: _Optional[str] = ..., stall_s: _Optional[float] = ...) -> None: ...

class CheckpointDurable(_message.Message):
    __slots__ = ("job", "generation", "step", "digest", "chain", "path", "bytes", "parent_step", "write_s")
    JOB_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    PARENT_STEP_FIELD_NUMBER: _ClassVar[int]
    WRITE_S_FIELD_NUMBER: _ClassVar[int]
    job: str
    generation: int
    step: int
    digest: str
    chain: str
    path: str
    bytes: int
    parent_step: int
    write_s: float
    def __init__(self, job: _Optional[str] = ..., generation: _Optional[int] = ..., step: _Optional[int] = ..., digest: _Optional[str] = ..., chain: _Optional[str] = ..., path: _Optional[str] = ..., bytes: _Optional[int] = ..., parent_step: _Optional[int] = ..., write_s: _Optional[float] = ...) -> None: ...

class ShardRefused(_message.Message):
    __slots__ = ("job", "generation", "step", "path", "shard", "expected", "found", "reason")
    JOB_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    job: str
    generation: int
    step: int
    path: str
    shard: str
    expected: str
    found: str
    reason: str
    def __init__(self, job: _Optional[str] = ..., generation: _Optional[int] = ..., step: _Optional[int] = ..., path: _Optional[str] = ..., shard: _Optional[str] = ..., expected: _Optional[str] = ..., found: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class FindingRaised(_message.Message):
    __slots__ = ("finding", "check", "severity", "device", "confidence", "detail")
    FINDING_FIELD_NUMBER: _ClassVar[int]
    CHECK_FIELD_NUMBER: _ClassVar[int]
    SEVERITY_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    finding: str
    check: str
    severity: str
    device: str
    confidence: float
    detail: str
    def __init__(self, finding: _Optional[str] = ..., check: _Optional[str] = ..., severity: _Optional[str] = ..., device: _Optional[str] = ..., confidence: _Optional[float] = ..., detail: _Optional[str] = ...) -> None: ...

class FindingCleared(_message.Message):
    __slots__ = ("finding",)
    FINDING_FIELD_NUMBER: _ClassVar[int]
    finding: str
    def __init__(self, finding: _Optional[str] = ...) -> None: ...

class ProbeResult(_message.Message):
    __slots__ = ("probe", "passed", "value", "unit", "detail")
    PROBE_FIELD_NUMBER: _ClassVar[int]
    PASSED_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    probe: str
    passed: bool
    value: float
    unit: str
    detail: str
    def __init__(self, probe: _Optional[str] = ..., passed: _Optional[bool] = ..., value: _Optional[float] = ..., unit: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class DrillFired(_message.Message):
    __slots__ = ("drill", "job", "kind", "step", "rank", "node", "time", "detail")
    DRILL_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    drill: str
    job: str
    kind: str
    step: int
    rank: int
    node: str
    time: float
    detail: str
    def __init__(self, drill: _Optional[str] = ..., job: _Optional[str] = ..., kind: _Optional[str] = ..., step: _Optional[int] = ..., rank: _Optional[int] = ..., node: _Optional[str] = ..., time: _Optional[float] = ..., detail: _Optional[str] = ...) -> None: ...

class ActionResult(_message.Message):
    __slots__ = ("action_id", "outcome", "detail")
    ACTION_ID_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    action_id: str
    outcome: str
    detail: str
    def __init__(self, action_id: _Optional[str] = ..., outcome: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class ReportsDropped(_message.Message):
    __slots__ = ("count", "reason")
    COUNT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    count: int
    reason: str
    def __init__(self, count: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class Drill(_message.Message):
    __slots__ = ("id", "kind", "step", "rank", "node", "params")
    class ParamsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    id: str
    kind: str
    step: int
    rank: int
    node: str
    params: _containers.ScalarMap[str, str]
    def __init__(self, id: _Optional[str] = ..., kind: _Optional[str] = ..., step: _Optional[int] = ..., rank: _Optional[int] = ..., node: _Optional[str] = ..., params: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Placement(_message.Message):
    __slots__ = ("rank", "node", "standby", "device", "pid")
    RANK_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    STANDBY_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    rank: int
    node: str
    standby: str
    device: str
    pid: int
    def __init__(self, rank: _Optional[int] = ..., node: _Optional[str] = ..., standby: _Optional[str] = ..., device: _Optional[str] = ..., pid: _Optional[int] = ...) -> None: ...

class Action(_message.Message):
    __slots__ = ("id", "controller_epoch", "job", "generation", "deadline", "reason", "traceparent", "prepare_standby", "stop_generation", "start_generation", "replay", "deliver_vote", "quarantine", "release", "drain", "run_probes", "revoke_checkpoints", "promote_checkpoint", "ask_human", "end_job", "inject_drill")
    ID_FIELD_NUMBER: _ClassVar[int]
    CONTROLLER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    PREPARE_STANDBY_FIELD_NUMBER: _ClassVar[int]
    STOP_GENERATION_FIELD_NUMBER: _ClassVar[int]
    START_GENERATION_FIELD_NUMBER: _ClassVar[int]
    REPLAY_FIELD_NUMBER: _ClassVar[int]
    DELIVER_VOTE_FIELD_NUMBER: _ClassVar[int]
    QUARANTINE_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    RUN_PROBES_FIELD_NUMBER: _ClassVar[int]
    REVOKE_CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    PROMOTE_CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    ASK_HUMAN_FIELD_NUMBER: _ClassVar[int]
    END_JOB_FIELD_NUMBER: _ClassVar[int]
    INJECT_DRILL_FIELD_NUMBER: _ClassVar[int]
    id: str
    controller_epoch: int
    job: str
    generation: int
    deadline: float
    reason: str
    traceparent: str
    prepare_standby: PrepareStandby
    stop_generation: StopGeneration
    start_generation: StartGeneration
    replay: Replay
    deliver_vote: DeliverVote
    quarantine: Quarantine
    release: Release
    drain: Drain
    run_probes: RunProbes
    revoke_checkpoints: RevokeCheckpoints
    promote_checkpoint: PromoteCheckpoint
    ask_human: AskHuman
    end_job: EndJob
    inject_drill: InjectDrill
    def __init__(self, id: _Optional[str] = ..., controller_epoch: _Optional[int] = ..., job: _Optional[str] = ..., generation: _Optional[int] = ..., deadline: _Optional[float] = ..., reason: _Optional[str] = ..., traceparent: _Optional[str] = ..., prepare_standby: _Optional[_Union[PrepareStandby, _Mapping]] = ..., stop_generation: _Optional[_Union[StopGeneration, _Mapping]] = ..., start_generation: _Optional[_Union[StartGeneration, _Mapping]] = ..., replay: _Optional[_Union[Replay, _Mapping]] = ..., deliver_vote: _Optional[_Union[DeliverVote, _Mapping]] = ..., quarantine: _Optional[_Union[Quarantine, _Mapping]] = ..., release: _Optional[_Union[Release, _Mapping]] = ..., drain: _Optional[_Union[Drain, _Mapping]] = ..., run_probes: _Optional[_Union[RunProbes, _Mapping]] = ..., revoke_checkpoints: _Optional[_Union[RevokeCheckpoints, _Mapping]] = ..., promote_checkpoint: _Optional[_Union[PromoteCheckpoint, _Mapping]] = ..., ask_human: _Optional[_Union[AskHuman, _Mapping]] = ..., end_job: _Optional[_Union[EndJob, _Mapping]] = ..., inject_drill: _Optional[_Union[InjectDrill, _Mapping]] = ...) -> None: ...

class PrepareStandby(_message.Message):
    __slots__ = ("spec",)
    SPEC_FIELD_NUMBER: _ClassVar[int]
    spec: str
    def __init__(self, spec: _Optional[str] = ...) -> None: ...

class StopGeneration(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StartGeneration(_message.Message):
    __slots__ = ("spec", "ranks", "rendezvous", "drills")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    RENDEZVOUS_FIELD_NUMBER: _ClassVar[int]
    DRILLS_FIELD_NUMBER: _ClassVar[int]
    spec: str
    ranks: _containers.RepeatedCompositeFieldContainer[Placement]
    rendezvous: str
    drills: _containers.RepeatedCompositeFieldContainer[Drill]
    def __init__(self, spec: _Optional[str] = ..., ranks: _Optional[_Iterable[_Union[Placement, _Mapping]]] = ..., rendezvous: _Optional[str] = ..., drills: _Optional[_Iterable[_Union[Drill, _Mapping]]] = ...) -> None: ...

class Replay(_message.Message):
    __slots__ = ("spec", "step", "rank", "source_rank", "source", "attempt")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    SOURCE_RANK_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    spec: str
    step: int
    rank: int
    source_rank: int
    source: str
    attempt: int
    def __init__(self, spec: _Optional[str] = ..., step: _Optional[int] = ..., rank: _Optional[int] = ..., source_rank: _Optional[int] = ..., source: _Optional[str] = ..., attempt: _Optional[int] = ...) -> None: ...

class DeliverVote(_message.Message):
    __slots__ = ("step", "rank", "votes")
    STEP_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    VOTES_FIELD_NUMBER: _ClassVar[int]
    step: int
    rank: int
    votes: _containers.RepeatedCompositeFieldContainer[Vote]
    def __init__(self, step: _Optional[int] = ..., rank: _Optional[int] = ..., votes: _Optional[_Iterable[_Union[Vote, _Mapping]]] = ...) -> None: ...

class Quarantine(_message.Message):
    __slots__ = ("node",)
    NODE_FIELD_NUMBER: _ClassVar[int]
    node: str
    def __init__(self, node: _Optional[str] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ("node",)
    NODE_FIELD_NUMBER: _ClassVar[int]
    node: str
    def __init__(self, node: _Optional[str] = ...) -> None: ...

class Drain(_message.Message):
    __slots__ = ("node",)
    NODE_FIELD_NUMBER: _ClassVar[int]
    node: str
    def __init__(self, node: _Optional[str] = ...) -> None: ...

class RunProbes(_message.Message):
    __slots__ = ("probes",)
    PROBES_FIELD_NUMBER: _ClassVar[int]
    probes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, probes: _Optional[_Iterable[str]] = ...) -> None: ...

class RevokeCheckpoints(_message.Message):
    __slots__ = ("since_step",)
    SINCE_STEP_FIELD_NUMBER: _ClassVar[int]
    since_step: int
    def __init__(self, since_step: _Optional[int] = ...) -> None: ...

class PromoteCheckpoint(_message.Message):
    __slots__ = ("step",)
    STEP_FIELD_NUMBER: _ClassVar[int]
    step: int
    def __init__(self, step: _Optional[int] = ...) -> None: ...

class AskHuman(_message.Message):
    __slots__ = ("question",)
    QUESTION_FIELD_NUMBER: _ClassVar[int]
    question: str
    def __init__(self, question: _Optional[str] = ...) -> None: ...

class EndJob(_message.Message):
    __slots__ = ("outcome",)
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    outcome: str
    def __init__(self, outcome: _Optional[str] = ...) -> None: ...

class InjectDrill(_message.Message):
    __slots__ = ("drill",)
    DRILL_FIELD_NUMBER: _ClassVar[int]
    drill: Drill
    def __init__(self, drill: _Optional[_Union[Drill, _Mapping]] = ...) -> None: ...
