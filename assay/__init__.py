"""The public face of Assay for people's own training loops: `assay.Guard`, and callbacks for others' loops.

guard = assay.Guard(model, optimizer)
for batch in data:
    with guard.step() as step:
        loss = model(**batch).loss
        loss.backward()
    if assay.clean_everywhere(step):  # on every rank; in a process that trains alone it is step.clean
        optimizer.step()
    elif assay.corrupted_anywhere(step):  # alone: step.corrupted
        break  # parameters or moments were wrong before: restore a checkpoint
    else:
        print(step.alarms)
    optimizer.zero_grad()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diagnostics.health import Alarm
    from diagnostics.sensors.agreement import clean_everywhere, corrupted_anywhere
    from diagnostics.sensors.coverage import CoverageRow, NothingToCheck
    from diagnostics.sensors.guard import Guard
    from diagnostics.sensors.guarded_step import GuardedStep
    from diagnostics.sensors.loops import TrainerCallback, lightning_callback

__all__ = [
    "Alarm",
    "CoverageRow",
    "Guard",
    "GuardedStep",
    "NothingToCheck",
    "TrainerCallback",
    "clean_everywhere",
    "corrupted_anywhere",
    "lightning_callback",
]

_HOMES = {
    "Alarm": "diagnostics.health",
    "CoverageRow": "diagnostics.sensors.coverage",
    "Guard": "diagnostics.sensors.guard",
    "GuardedStep": "diagnostics.sensors.guarded_step",
    "NothingToCheck": "diagnostics.sensors.coverage",
    "TrainerCallback": "diagnostics.sensors.loops",
    "clean_everywhere": "diagnostics.sensors.agreement",
    "corrupted_anywhere": "diagnostics.sensors.agreement",
    "lightning_callback": "diagnostics.sensors.loops",
}


def __getattr__(name: str) -> Any:
    """Import a public name's home on its first use: the daemon and the controller import this package without torch."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'assay' has no attribute {name!r}: it has {', '.join(__all__)}")
    return getattr(importlib.import_module(home), name)
