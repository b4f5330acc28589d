"""What a step has to know of each operator, found once for each: a torch operator hashes in Python, slowly."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch._ops import OpOverload

from diagnostics.sensors import fingerprints
from diagnostics.sensors.checks.arguments import targets
from diagnostics.sensors.checks.registry import Plan, plan_of


class Facts(NamedTuple):
    """func: kept, so that its address stays its own. writes: to an argument. changes: memory, for the fingerprints."""

    func: Any
    plan: Plan | None
    writes: bool
    changes: bool


_known: dict[int, Facts] = {}


def facts_of(func: Any) -> Facts:
    """By the operator's address."""
    found = _known.get(id(func))
    if found is None:
        known = isinstance(func, OpOverload)
        writes, changes = known and bool(targets(func)), known and fingerprints.changes(func)
        found = _known[id(func)] = Facts(func, plan_of(func), writes, changes)
    return found
