"""The account of a committed step that a rank gives: what it computed, what the sensors read, how long it took."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from agent.model.fp8 import Summary
from agent.slots import SlotRecord
from agent.training.computation import Computation


@dataclass(frozen=True, slots=True)
class Times:
    """Monotonic seconds when the step was begun, when its forward and backward ended, and when it was committed."""

    begun: float
    sensed: float
    committed: float


def step_record(
    record: SlotRecord,
    computation: Computation,
    grad_norm: float,
    attempts: int,
    times: Times,
    lost_because: Sequence[str],
) -> dict[str, Any]:
    """assay.v1.StepRecord's fields. `grad_norm` is of the mean gradient, before clipping; of the reasons for lost
    coverage those are in `lost_because` that no earlier record of the rank has told.
    """
    crossing = computation.crossing
    return {
        "step": record.step,
        "time": time.time(),
        "loss": computation.loss,
        "grad_norm": grad_norm,
        "reading": computation.reading,
        "checks": computation.checks,
        "attempts": attempts,
        "digest": f"{record.digest:016x}",
        "chain": f"{record.chain:016x}",
        "step_s": times.committed - times.begun,
        "gate_s": times.committed - times.sensed,
        "tokens": computation.tokens,
        "expert_load": computation.counts.flatten().tolist(),
        "fp8": [_summary_body(summary) for summary in computation.fp8],
        "crossing_bytes": 0 if crossing is None else crossing.limited.nbytes,
        "unlimited_bytes": 0 if crossing is None else crossing.unlimited.nbytes,
        "failed_checks": computation.lost.failed,
        "unjudged": computation.lost.unjudged,
        "lost_because": list(lost_because),
    }


def _summary_body(summary: Summary) -> dict[str, Any]:
    """A summary as it travels: assay.v1.Fp8Summary's fields."""
    body = asdict(summary)
    body["pass"] = body.pop("pass_")
    return body
