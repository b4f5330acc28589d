"""Which check covers which aten operator, and which operators compute nothing that could be wrong."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch._ops import OpOverload, OpOverloadPacket

from diagnostics.sensors import gemm, grouped
from diagnostics.sensors.operation import Before, Check

aten = torch.ops.aten

_SENSORS = (gemm, grouped)
_CHECKS: dict[OpOverloadPacket, Check] = {}
_BEFORE: dict[OpOverloadPacket, Before] = {}
for _sensor in _SENSORS:
    _CHECKS |= _sensor.CHECKS
    _BEFORE |= _sensor.BEFORE
PRODUCTS = frozenset(gemm.CHECKS | grouped.CHECKS)
# Values in another type or layout: a weight that is cast keeps its name.
COPIES = frozenset((aten._to_copy, aten.clone))
_MEMORY = frozenset((aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided))


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do with an operator: check it, with what was kept before it ran; or say why not."""

    name: str
    check: Check | None
    before: Before | None
    product: bool
    copies: bool
    reason: str


@cache
def plan_of(func: OpOverload) -> Plan | None:
    """None for views and for memory without values: there is nothing to get wrong."""
    packet = func.overloadpacket
    if packet in _MEMORY or _is_view(func):
        return None
    check = _CHECKS.get(packet)
    return Plan(
        packet.__name__,
        check,
        _BEFORE.get(packet),
        packet in PRODUCTS,
        packet in COPIES,
        "" if check is not None else "no check covers this operator",
    )


def _is_view(func: OpOverload) -> bool:
    """Every result shows memory of an argument that is not written."""
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
