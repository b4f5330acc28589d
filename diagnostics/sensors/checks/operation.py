"""What a check is told: one aten operator that has run, and what it may use to judge it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor
from torch._ops import OpOverload

from diagnostics.sensors.checks.operand import Operand
from diagnostics.sensors.checks.signs import Signs
from diagnostics.sensors.tolerance import Kappa


class Unsupported(LookupError):
    """No check covers this call (its layout, its options); the message says why, and coverage lists it."""


@dataclass(frozen=True, slots=True)
class Call:
    """One operator: what it was given and what it gave. While it is looked at, no mode and no autograd is active.

    out: the kernel's own result, a tensor or a tuple. before: what the check's `BEFORE` kept of arguments that the
    operator writes over.
    """

    func: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    before: Any = None


class Bench(Protocol):
    """What a check may use."""

    signs: Signs

    def kappa(self, kernel: str, like: Tensor) -> Kappa:
        """The tolerance's constants for a kernel by the device and dtype of `like`. Raises UnknownTolerance."""

    def operand(self, value: Tensor) -> Operand:
        """A matrix with its measures; those of the last few are kept, since several operators read one tensor."""


class Checked(NamedTuple):
    """One check of one result.

    result: which one, e.g. "out", "dq". readings: fp32 [rows] on the device, residual over tolerance; above 1 or NaN
    is an alarm. shape: of the checked result. exact: bits or whole numbers were compared, so that there is no tolerance
    to widen: a reading above 1 is a value that was made otherwise.
    """

    sensor: str
    result: str
    readings: Tensor
    shape: tuple[int, ...]
    exact: bool = False


Check = Callable[[Call, Bench], Iterable[Checked]]
Before = Callable[[tuple[Any, ...], dict[str, Any], Bench], Any]
