"""Bringing tokens to their experts and home again, in an order that never varies.

Copies of tokens are sorted by expert, stably, so each expert works on one contiguous slice. On the way back every token
gathers its own K rows and sums them in rank order. No scatter-add anywhere: the sums have one order, hence one result.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import Function

# On AMX, a bf16 product over a number of rows not met before runs at 40 GF/s, and at 562 GF/s in multiples of 64
# (measured): oneDNN builds a kernel per shape, and routing makes new shapes at every step.
BF16_ROWS = 64
# FP8's wgrad sums over tokens in blocks that share a scale: whole blocks need no padding of their own.
FP8_ROWS = 128
_ROWS = {torch.bfloat16: BF16_ROWS, torch.float8_e4m3fn: FP8_ROWS}


class Plan(NamedTuple):
    """Layout of the sorted copies; K copies of each token."""

    place: Tensor  # int64 [tokens * K]: row of copy t * K + j in the sorted buffer
    sizes: list[int]  # rows of the buffer per expert, padding included; 0 for an expert without tokens


def slice_rows(dtype: torch.dtype) -> int:
    """An expert's rows are padded to multiples of this."""
    return _ROWS.get(dtype, 1)


def plan(experts: Tensor, counts: Tensor, dtype: torch.dtype) -> Plan:
    """Lay the copies out for ``experts`` [tokens, K] with ``counts`` [N] per expert; bf16 and FP8 slices are padded."""
    multiple = slice_rows(dtype)
    padded = (counts + multiple - 1) // multiple * multiple
    shift = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    rows = torch.arange(flat.numel(), device=flat.device) + shift.index_select(0, flat.index_select(0, order))
    place = torch.empty_like(flat).index_copy_(0, order, rows)
    return Plan(place, padded.tolist())


def dispatch(x: Tensor, layout: Plan) -> Tensor:
    """[tokens, hidden] -> [rows, hidden], sorted by expert; padding rows are zero."""
    return cast(Tensor, _Dispatch.apply(x, layout.place, sum(layout.sizes)))  # type: ignore[no-untyped-call]


def combine(y: Tensor, gates: Tensor, layout: Plan) -> Tensor:
    """[rows, hidden] and gates fp32 [tokens, K] -> fp32 [tokens, hidden]: each token's gated sum (eq. 12)."""
    return cast(Tensor, _Combine.apply(y, gates, layout.place))  # type: ignore[no-untyped-call]


class _Dispatch(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor, rows: int) -> Tensor:
        copies = place.numel() // x.shape[0]
        ctx.save_for_backward(place)
        ctx.copies = copies
        return _placed(x.repeat_interleave(copies, 0), place, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        home = grad.index_select(0, place).view(-1, ctx.copies, grad.shape[1])
        return home.sum(1), None, None


class _Combine(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, gates: Tensor, place: Tensor) -> Tensor:
        home = y.index_select(0, place).view(*gates.shape, -1)
        ctx.save_for_backward(home, gates, place)
        ctx.rows = y.shape[0]
        return torch.bmm(gates.unsqueeze(1), home.float()).squeeze(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        home, gates, place = ctx.saved_tensors
        grad_gates = torch.bmm(home.float(), grad.unsqueeze(2)).squeeze(2)
        grad_home = (grad.unsqueeze(1) * gates.unsqueeze(-1)).to(home.dtype).flatten(0, 1)
        return _placed(grad_home, place, ctx.rows), grad_gates, None


def _placed(copies: Tensor, place: Tensor, rows: int) -> Tensor:
    """Row ``place[i]`` of the result is ``copies[i]``; rows that no copy takes are zero."""
    if rows == copies.shape[0]:
        return torch.empty_like(copies).index_copy_(0, place, copies)
    return copies.new_zeros(rows, copies.shape[1]).index_copy_(0, place, copies)
