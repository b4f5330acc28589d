"""Makes what the controller's tests need: records, reports, recorders on a store, and the wire's messages."""

from collections.abc import Iterable

from opentelemetry.trace import NoOpTracer

from assay.v1 import agent_pb2 as pb
from controller.core import events
from controller.core.state import State
from controller.recorder import Recorder
from controller.store.finals import Finals
from controller.store.ingest import Ingest
from controller.store.reports import Fp8Summary, Report, StepRecord, StepRecords
from controller.telemetry import Metrics, Traces

SPEC = '{"schema":"assay.job/1","job":"main","steps":%d,"world":%d}'


def summary(amax: float = 3.0) -> Fp8Summary:
    """What an FP8 step says of its activations."""
    return Fp8Summary("activation", "fprop", amax, "layers.0.ffn.down", 0.01, "head", 0.25, "layers.1.moe.experts.0.up")


def record(
    step: int,
    digest: str = "",
    loss: float = 1.0,
    attempts: int = 1,
    fp8: tuple[Fp8Summary, ...] = (),
    lost: tuple[int, int, str] = (0, 0, ""),
) -> StepRecord:
    """One rank's record of a step that took 0.1 s and ended at `step` seconds; `lost` has its counts and a reason."""
    return StepRecord(
        step=step,
        time=float(step),
        loss=loss,
        grad_norm=1.0,
        reading=0.1,
        checks=10,
        attempts=attempts,
        digest=digest or f"d{step}",
        chain=f"c{step}",
        step_s=0.1,
        sensor_s=0.01,
        gate_s=0.01,
        tokens=100,
        expert_load=(1, 2),
        fp8=fp8,
        failed_checks=lost[0],
        unjudged=lost[1],
        lost_because=(lost[2],) if lost[2] else (),
    )


def steps(rank: int, records: Iterable[StepRecord], generation: int = 1, job: str = "main") -> StepRecords:
    """The records as a report's body."""
    return StepRecords(job, generation, rank, tuple(records))


def report(seq: int, body: object, time: float = 1.0) -> Report:
    """A report about `body`."""
    return Report(seq, time, "", body)  # type: ignore[arg-type]


def submitted(steps: int = 5, world: int = 2, job: str = "main", time: float = 1.0) -> events.JobSubmitted:
    """An operator's job."""
    spec = SPEC % (steps, world)
    return events.JobSubmitted(
        time=time, job=job, spec=spec, steps=steps, world=world, drills=(), actor="tests", reason="to test"
    )


def hello(node: str, epoch: int = 1, spare: bool = False, time: float = 1.0) -> events.AgentHello:
    """An agent's hello, without processes."""
    return events.AgentHello(
        time=time,
        node=node,
        epoch=epoch,
        boot_id="b",
        version="0",
        fingerprint="f",
        highest_controller_epoch=0,
        devices=(events.Device(f"dev-{node}", "", "cpu"),),
        processes=(),
        peer_endpoint=f"{node}:1",
        spare=spare,
    )


def ready(node: str, standby: str, job: str = "main") -> events.WorkerReady:
    """A warm worker of a node."""
    return events.WorkerReady(
        time=1.0,
        node=node,
        job=job,
        standby=standby,
        pid=100,
        device=f"dev-{node}",
        rendezvous=f"{node}:2",
        fingerprint="f",
    )


def exited(
    rank: int, generation: int, cause: str, step: int, phase: str = "forward", node: str = ""
) -> events.WorkerExited:
    """The end of a worker."""
    return events.WorkerExited(
        time=1.0,
        node=node,
        job="main",
        generation=generation,
        rank=rank,
        pid=100,
        cause=cause,
        detail="",
        step=step,
        phase=phase,
    )


def resumed(rank: int, generation: int, step: int, source: str) -> events.Resumed:
    """Where a rank found its state."""
    return events.Resumed(
        time=1.0,
        job="main",
        generation=generation,
        rank=rank,
        step=step,
        source=source,
        digest=f"d{step}",
        checkpoint="",
    )


class Clock:
    """Time that tests move."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


def recorder(ingest: Ingest | None = None) -> Recorder:
    """A recorder at the beginning of everything."""
    taken = ingest or Ingest({}, Finals())
    return Recorder(State(), 0, taken, Clock(), Metrics(), Traces(NoOpTracer()))


def batch(*reports: pb.Report) -> pb.AgentMessage:
    """The wire's message of some reports."""
    return pb.AgentMessage(batch=pb.ReportBatch(reports=reports))
