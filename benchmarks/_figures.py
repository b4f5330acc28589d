"""The document every benchmark prints: figures with their targets and peers, and the machine they were taken on."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata

SCHEMA = "assay.bench/1"


@dataclass
class Figure:
    """One published figure; keys that do not apply are null. `better` is "lower" or "higher".

    A value that a missing peer left unknown is null, and its target not met.
    """

    name: str
    value: float | None
    unit: str
    better: str
    target: float | None = None
    met: bool | None = None
    peer: str | None = None
    peer_value: float | None = None
    coverage: str | None = None
    samples: int | None = None

    def __post_init__(self) -> None:
        if self.target is not None and self.value is None:
            self.met = False
        elif self.target is not None and self.value is not None and self.met is None:
            self.met = self.value >= self.target if self.better == "higher" else self.value <= self.target


def document(name: str, figures: Sequence[Figure], threads: int, accelerator: str | None = None) -> str:
    """The JSON document for stdout; `accelerator` names the GPU that figures were taken on."""
    machine: dict[str, str | int | None] = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": metadata.version("torch"),
        "threads": threads,
    }
    if accelerator is not None:
        machine["accelerator"] = accelerator
    body = {"schema": SCHEMA, "name": name, "machine": machine, "figures": [asdict(figure) for figure in figures]}
    return json.dumps(body, indent=1)
