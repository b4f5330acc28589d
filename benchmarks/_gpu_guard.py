"""What a guard does to a model's steps on a device: the bits it must not change, clean steps, and products struck."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks._gpu_models import Case
from diagnostics.faults.models import Fault
from diagnostics.faults.sites import Census, Site
from diagnostics.faults.strike import Blow, Strike
from diagnostics.sensors.checks.rows import bits as bits_of
from diagnostics.sensors.guard import Guard
from diagnostics.sensors.tolerance import ToleranceTable

#: What embeddings are multiplied by: clean steps at either size must not alarm.
SCALES = (1e4, 1e-4)
#: Of a struck tile's values, in units of the result's rms.
STRENGTH = 1.0
_PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm")


@dataclass
class Bits:
    """Parameters whose gradients differ: between two plain steps, and between a plain one and a guarded one."""

    parameters: int
    unrepeated: list[str]
    changed: list[str]

    @property
    def by_guard(self) -> list[str]:
        """What the guard changed of what torch itself repeats."""
        return [name for name in self.changed if name not in self.unrepeated]


def bits(case: Case, table: ToleranceTable) -> Bits:
    """Gradients of the same step, plain twice and guarded."""
    guard = Guard(case.model, table=table)
    plain: dict[str, Tensor] = {}
    unrepeated: set[str] = set()
    for turn in range(4):
        loss = case.step()
        found = {"loss": loss, **case.gradients()}
        if turn:
            unrepeated |= _differing(plain, found)
        plain = found
    with guard.step():
        loss = case.step()
    changed = _differing(plain, {"loss": loss, **case.gradients()})
    return Bits(len(plain), sorted(unrepeated), sorted(changed))


def _differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    """Gradients that only one step made differ too."""
    return {
        name
        for name in one.keys() | other.keys()
        if name not in one or name not in other or not _same(one, other, name)
    }


def _same(one: dict[str, Tensor], other: dict[str, Tensor], name: str) -> bool:
    return torch.equal(bits_of(one[name]), bits_of(other[name]))


@dataclass
class Clean:
    """What guarded steps on clean data read. worst: by (sensor, operator, pass), the largest reading."""

    steps: int = 0
    checks: int = 0
    failures: int = 0
    alarms: list[str] = field(default_factory=list)
    worst: dict[str, float] = field(default_factory=dict)
    coverage: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def largest(self) -> float:
        """The largest reading of all."""
        return max(self.worst.values(), default=0.0)


def clean(case: Case, table: ToleranceTable, steps: int) -> Clean:
    """Steps with the optimizer, and then one at each scale of the embeddings."""
    guard, found = Guard(case.model, case.optimizer, table=table), Clean()
    for number in range(steps):
        found.losses.append(_clean_step(case, guard, found, f"step {number}"))
        case.optimizer.step()
    for scale in SCALES:
        with torch.no_grad():
            case.embedding.mul_(scale)
        guard.forget()
        _clean_step(case, guard, found, f"scale {scale:g}")
        with torch.no_grad():
            case.embedding.mul_(1 / scale)
        guard.forget()
    found.failures = guard.failures
    found.coverage = [
        f"{row.checked:.2f} of {row.calls} {row.operation} ({row.pass_}) in {row.module}: {row.reason}"
        for row in guard.coverage()
    ]
    return found


def _clean_step(case: Case, guard: Guard, found: Clean, name: str) -> float:
    with guard.step() as step:
        loss = case.step()
        step.observe("loss", loss)
    found.alarms += [f"{name}: {alarm}" for alarm in step.alarms]
    found.steps, found.checks = found.steps + 1, found.checks + step.checks
    for site, reading in guard.log.by_site():
        kind = f"{site.sensor} {site.operation} {site.pass_}"
        found.worst[kind] = max(found.worst.get(kind, 0.0), reading)
    return float(loss)


@dataclass
class Struck:
    """Products that were struck, one a step. missed: the sites whose step was clean. unnamed: seen elsewhere only."""

    products: int = 0
    missed: list[str] = field(default_factory=list)
    unnamed: list[str] = field(default_factory=list)


def struck(case: Case, table: ToleranceTable, most: int) -> Struck:
    """A tile of each product in turn, or of so many that are spread over the step."""
    guard, found = Guard(case.model, again=0.0, table=table), Struck()
    with Census(case.model) as census:
        case.step()
    products = [site for site in census.sites if site.operator.startswith(_PRODUCTS)]
    count = min(most, len(products))
    for number in range(count):
        site = products[number * len(products) // count]
        with Strike({site.number: Blow(site.operator, Fault("tile", number, STRENGTH))}, lambda *_: None):
            with guard.step() as step:
                case.step()
        found.products += 1
        if step.clean:
            found.missed.append(_told(site))
        elif not any(alarm.sensor == "gemm" for alarm in step.alarms):
            found.unnamed.append(f"{_told(site)}: {step.alarms[0]}")
    return found


def _told(site: Site) -> str:
    return f"{site.operator} {site.pass_} {site.module} {[tuple(result.shape) for result in site.results]}"
