"""JSON as the tables hold it: compact, and readable in any language."""

import json
import math
from typing import Any


def dump(document: Any) -> str:
    """Write a document for others to read: what is not finite becomes null."""
    return json.dumps(_finite(document), separators=(",", ":"), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value
