"""The vocabulary of health that every layer shares; plain data, so that the controller can use it without torch."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


class Severity(enum.Enum):
    """How much a finding or an alarm matters to a running job."""

    INFO = "INFO"
    WARNING = "WARNING"
    CRITICAL = "CRITICAL"
    FATAL = "FATAL"  # acts at once, whatever the node's score


class Verdict(enum.Enum):
    """What replay on the suspect, on a peer and on a third device has shown."""

    CORRUPT = "CORRUPT"  # one device computed something else than the others
    FALSE_ALARM = "FALSE_ALARM"  # everybody agrees: the tolerance was too tight
    UNDECIDED = "UNDECIDED"  # no second device could be asked
    SOFTWARE = "SOFTWARE"  # it differs, or is not finite, everywhere: no device is to blame


class RecommendedAction(enum.Enum):
    """What the finder of a fault thinks should be done; the controller decides."""

    NONE = "NONE"
    WATCH = "WATCH"
    REPLAY = "REPLAY"
    RUN_PROBES = "RUN_PROBES"
    DRAIN = "DRAIN"
    QUARANTINE = "QUARANTINE"
    ASK_HUMAN = "ASK_HUMAN"


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator (or one CPU socket). The serial outlives host names and slots, so suspicion is keyed on it."""

    uuid: str
    serial: str
    node: str
    kind: str = "cpu"


@dataclass(frozen=True, slots=True)
class Reading:
    """One sensor's residual over its tolerance. Dimensionless; NaN and inf are legal and are alarms."""

    sensor: str
    module: str
    operation: str
    pass_: str
    value: float

    @property
    def alarming(self) -> bool:
        """True above 1. Written as a negation so that NaN, which compares false with everything, is an alarm."""
        return not (self.value <= 1.0)


@dataclass(frozen=True, slots=True)
class Alarm:
    """A reading above 1: which sensor, at which module, operation and pass, and where in the result.

    exact: bits or whole numbers were compared, with no tolerance that could have been too tight.
    """

    sensor: str
    module: str
    operation: str
    pass_: str
    reading: float
    location: str
    exact: bool = field(default=False, repr=False)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is needed to judge an alarm again: what was seen, where, and how to rebuild the operands."""

    job: str
    generation: int
    step: int
    rank: int
    node: str
    device: str
    alarms: tuple[Alarm, ...] = ()
    sample_ids: tuple[int, ...] = ()
    rng_key: int = 0
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """A fault some check saw on a node or device, with what was measured and what the check would do about it."""

    check: str
    code: str
    severity: Severity
    confidence: float  # 0..1; invariant checked below, because scores multiply by it
    node: str
    device: str | None
    group: str  # findings of one independence group echo one cause: only the worst of them counts
    observed_at: float  # seconds since the epoch, on the node's clock
    value: float | None = None
    unit: str = ""
    reason: str = ""
    recommended: RecommendedAction = RecommendedAction.NONE
    raw: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        if not 0.0 <= self.confidence <= 1.0:
            raise ValueError(f"finding {self.check}/{self.code}: confidence is {self.confidence}, must be in 0..1")
