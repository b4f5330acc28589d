"""Makes one picture for the page of the controller's documents: flat, bounded, JSON types only."""

import math
from typing import Any

Document = dict[str, Any]
#: Newest incidents and checkpoints that one page shows; all of them are one command away.
SHOWN = 100


def picture(status: Document) -> Document:
    """The page's top-level keys: job, curve, placement, nodes, incidents, checkpoints."""
    job = status.get("job") or {}
    made: Document = clean(
        {
            "job": {key: value for key, value in job.items() if key not in ("loss", "spec", "placement", "drills")},
            "curve": job.get("loss") or [],
            "placement": job.get("placement") or [],
            "nodes": status.get("nodes") or [],
            "incidents": (status.get("incidents") or [])[-SHOWN:],
            "checkpoints": (status.get("checkpoints") or [])[-SHOWN:],
        }
    )
    return made


def clean(value: Any) -> Any:
    """The same with null for NaN and infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): clean(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [clean(entry) for entry in value]
    return value
