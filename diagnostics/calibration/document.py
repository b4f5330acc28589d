"""A calibration as the document that ships or that a job takes: constants, where they are from, what has none."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from diagnostics.calibration.measure import Measured
from diagnostics.calibration.rules import Constant, Rounding
from diagnostics.sensors.tolerance import SCHEMA

_CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a calibration was made."""

    name: str
    capability: str
    version: str  # torch\'s
    threads: int

    @classmethod
    def of(cls, device: torch.device) -> Machine:
        """This machine, or its accelerator."""
        if device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            name, capability = torch.cuda.get_device_name(device), f"compute capability {major}.{minor}"
        else:
            name, capability = _cpu_name(), torch.backends.cpu.get_cpu_capability()
        return cls(name, capability, torch.__version__, torch.get_num_threads())


def document(measured: Measured, machine: Machine, today: date) -> dict[str, Any]:
    """The JSON document of `tolerance.parse_table`; what has no constant is listed beside it."""
    plan = measured.plan
    origin = f"measured {today:%Y-%m-%d} on {machine.name} ({machine.capability}), torch {machine.version}"
    origin += f", {machine.threads} thread{'s' * (machine.threads != 1)}, seed {plan.seed}"
    return {
        "schema": SCHEMA,
        "measured": {
            "date": today.isoformat(),
            "device_class": plan.device.type,
            "device": machine.name,
            "capability": machine.capability,
            "torch": machine.version,
            "threads": machine.threads,
            "seed": plan.seed,
            "trials": plan.trials,
            "overflowed_calls": measured.overflowed,
        },
        "kappas": [
            {
                "device_class": plan.device.type,
                "dtype": dtype,
                "kernel": kernel,
                "output": constant.output,
                "accumulate": constant.accumulate,
                "provenance": f"{origin}: {_found(constant, plan.device.type)}",
            }
            for (dtype, kernel), constant in measured.constants.items()
        ],
        "skipped": _reasons(measured.skipped),
        "refused": _reasons(measured.refused),
    }


def write(path: Path, made: dict[str, Any]) -> None:
    """Write the document whole or not at all. Raises OSError."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text(made))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def text(made: dict[str, Any]) -> str:
    """The document as it stands in a file."""
    return json.dumps(made, indent=2) + "\n"


def _found(constant: Constant, device_class: str) -> str:
    """What was seen, and by which rule it gave the constants."""
    facts = [
        f"worst reading {constant.worst:.2f} of {constant.readings:,} in {constant.calls:,} calls"
        f", to stay below {constant.share:.2f}"
    ]
    rule = constant.rule
    if constant.output:
        facts.append(f"output: {rule.rounding.value}, of which one is {constant.once:.3g}")
    elif rule.rounding is Rounding.EXACT and constant.dtype != torch.float32:
        facts.append(f"{rule.rounding.value}, which is the reading")
    floor = rule.least_on(device_class)
    for kind, least in (("output", floor.output), ("accumulate", floor.accumulate)):
        if least and getattr(constant, kind) == least:
            facts.append(f"{kind}: not below {least:g}, {floor.because}")
    if constant.dtype != torch.float32 and rule.rounding is not Rounding.ITSELF:
        facts.append("accumulate: as float32 at least")
    return "; ".join(facts)


def _reasons(reasons: dict[tuple[str, str], str]) -> list[dict[str, str]]:
    return [{"dtype": dtype, "kernel": kernel, "reason": reason} for (dtype, kernel), reason in reasons.items()]


def _cpu_name() -> str:
    """As the kernel has it; "a CPU" where it does not say."""
    try:
        lines = _CPU_INFO.read_text("utf-8").splitlines()
    except OSError:
        return "a CPU"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "a CPU")
