"""Which check covers which operator: an identity where there is one, the operator once more where there is none."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

from diagnostics.sensors.checks import (
    attention,
    attention_backward,
    gemm,
    grouped,
    losses,
    moves,
    norms,
    recompute,
    router,
    softmax,
    sums,
)
from diagnostics.sensors.checks.kinds import is_in_place, kind_of, name_of
from diagnostics.sensors.checks.operation import Before, Check

aten = torch.ops.aten

_CHECKS: dict[OpOverloadPacket, Check] = {}
_BEFORE: dict[OpOverloadPacket, Before] = {}
for _sensor in (gemm, grouped, attention, attention_backward, softmax, losses, norms, router, sums, moves):
    _CHECKS |= _sensor.CHECKS
    _BEFORE |= _sensor.BEFORE
# Their check fetches every value again: it takes what the operator takes.
_AGAIN = frozenset(moves.CHECKS)
_PRODUCTS = frozenset(gemm.CHECKS | grouped.CHECKS)
# Values in another type or layout: a weight that is cast keeps its name.
_COPIES = frozenset((aten._to_copy, aten.clone))
_HIGHER = "a higher-order operator: what it calls is not seen"


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do with an operator: check it, with what was kept before it ran; or say why not.

    again: the check costs what the operator does, or more. product: its last tensor may be a weight, its second one if
    it is grouped. copies: its result holds the values of its first argument. writes: to an argument.
    """

    name: str
    check: Check | None
    before: Before | None
    again: bool
    product: bool
    copies: bool
    writes: bool
    reason: str = ""
    grouped: bool = False


@cache
def plan_of(func: OpOverload | HigherOrderOperator) -> Plan | None:
    """None for views and for memory without values: there is nothing to get wrong."""
    if isinstance(func, HigherOrderOperator):
        return Plan(func.__name__, None, None, False, False, False, False, _HIGHER)
    packet, kind, name = func.overloadpacket, kind_of(func), name_of(func)
    if kind in ("view", "blank"):
        return None
    product, copies, writes = packet in _PRODUCTS, packet in _COPIES, is_in_place(func)
    check = _CHECKS.get(packet)
    if check is not None:
        before = _BEFORE.get(packet) or (recompute.overwritten(func) if writes else None)
        is_grouped = packet in grouped.CHECKS
        return Plan(name, check, before, packet in _AGAIN, product, copies, writes, grouped=is_grouped)
    if func.namespace != "aten":
        return Plan(
            name, None, None, False, product, copies, writes, f"{func.namespace} is not torch's: it may have effects"
        )
    reason = recompute.why_not(func, "cpu", 0.0)  # what differs by device or dropout, each call says
    if reason is not None:
        return Plan(name, None, None, False, product, copies, writes, reason)
    return Plan(name, recompute.check, recompute.keeper(func), True, product, copies, writes)
