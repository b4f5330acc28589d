"""What a guard has checked, by place and operator, and why the rest was not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from traceback import extract_tb

from diagnostics.sensors.sampling import NOT_WATCHED

# A failing check's messages may differ in every call.
_REASONS = 4


def broken(error: Exception) -> str:
    """The reason of a call that is not covered because its check failed itself, and where."""
    frames = extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    first = (str(error).splitlines() or [""])[0]  # torch goes on for pages
    return f"the check itself failed: {type(error).__name__}: {first[:200]}{where}"


@dataclass(frozen=True, slots=True)
class CoverageRow:
    """How much of one operator at one place was checked: `checked`, a share in 0..1; `reason` why not all.

    Several reasons are divided by semicolons. calls: that were seen; where a budget lets whole steps go unwatched,
    `checked` counts as many calls in each of these, unchecked.
    """

    module: str
    operation: str
    pass_: str
    checked: float
    reason: str
    calls: int


class NothingToCheck(RuntimeError):
    """No step of a guard so far ran an operator that any check covers; the message says what ran, and why it was not
    checked."""

    @classmethod
    def of(cls, rows: list[CoverageRow]) -> NothingToCheck:
        """With the reasons of all rows."""
        reasons = "; ".join(sorted({f"{row.operation}: {row.reason}" for row in rows}))
        if any(row.calls for row in rows):
            return cls(f"nothing in the guarded step can be checked: {reasons}")
        ran_none = "the guarded step ran no operator: forward and backward belong inside `with guard.step()`"
        return cls(f"{ran_none}; what cannot be seen: {reasons}" if rows else ran_none)


class Coverage:
    """Counts calls and checks. Rows come in the order in which operators first ran."""

    def __init__(self) -> None:
        self._calls: dict[tuple[str, str, str], int] = {}
        self._checked: dict[tuple[str, str, str], int] = {}
        self._reasons: dict[tuple[str, str, str], list[str]] = {}
        self._watched = self._steps = 0

    def step(self, watched: bool) -> None:
        """One step; in one that was not watched nothing was counted, and as many calls were not checked."""
        self._steps += 1
        self._watched += watched

    def count(self, module: str, operation: str, pass_: str, checked: bool, reason: str = "") -> None:
        """One call that was checked, or was not because of `reason`."""
        key = (module, operation, pass_)
        self._calls[key] = self._calls.get(key, 0) + 1
        if checked:
            self._checked[key] = self._checked.get(key, 0) + 1
        elif reason:
            self._tell(key, reason)

    def credit(self, module: str, operation: str, pass_: str) -> None:
        """A call that was counted as not checked has been checked after all."""
        key = (module, operation, pass_)
        self._checked[key] = self._checked.get(key, 0) + 1

    def note(self, module: str, operation: str, reason: str) -> None:
        """Something that no call shows: what the guard cannot see at all. Counted once."""
        key = (module, operation, "")
        self._calls.setdefault(key, 0)
        self._tell(key, reason)

    def _tell(self, key: tuple[str, str, str], reason: str) -> None:
        """Each once, and of very many the first ones."""
        told = self._reasons.setdefault(key, [])
        if reason not in told and len(told) < _REASONS:
            told.append(reason)

    @property
    def checked(self) -> int:
        """Calls that were checked."""
        return sum(self._checked.values())

    def rows(self) -> list[CoverageRow]:
        """The account so far."""
        return [self._row(key, calls, self._checked.get(key, 0)) for key, calls in self._calls.items()]

    def _row(self, key: tuple[str, str, str], calls: int, checked: int) -> CoverageRow:
        reasons = [] if calls and checked == calls else self._reasons.get(key, [])
        share = checked / calls if calls else 0.0
        if self._watched < self._steps:
            share *= self._watched / self._steps
            reasons = [*reasons, NOT_WATCHED]
        return CoverageRow(*key, share, "; ".join(reasons), calls)
