"""Bringing tokens to their experts and home again, in an order that never varies.

Copies of tokens are sorted by expert, stably, so each expert works on one contiguous slice. On the way back every token
gathers its own K rows and sums them in rank order. No scatter-add anywhere: the sums have one order, hence one result.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

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
    source: Tensor  # int64 [rows]: the token whose copy a row is; tokens (one past the last) for padding


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
    sizes = padded.tolist()
    source = flat.new_full((sum(sizes),), experts.shape[0]).index_copy_(0, rows, order // experts.shape[1])
    return Plan(place, sizes, source)


def dispatch(x: Tensor, layout: Plan) -> Tensor:
    """[tokens, hidden] -> [rows, hidden], sorted by expert; padding rows are zero."""
    return cast(Tensor, _Dispatch.apply(x, layout.place, layout.source))  # type: ignore[no-untyped-call]


def combine(y: Tensor, gates: Tensor, layout: Plan) -> Tensor:
    """[rows, hidden] and gates fp32 [tokens, K] -> fp32 [tokens, hidden]: each token's gated sum (eq. 12).

    With g = dL/dresult of a token, home its K rows and gate their gates: dL/dgate_j = <home_j, g>, and the gradient of
    the row is gate_j g.
    """
    return cast(Tensor, _Combine.apply(y, gates, layout.place, layout.source))  # type: ignore[no-untyped-call]


class _Dispatch(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor, source: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.tokens = x.shape[0]
        return _with_none(x).index_select(0, source)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        # A bag is a token's K rows, read in order and summed in fp32: one pass, where index_select and sum are three.
        return F.embedding_bag(place.view(ctx.tokens, -1), grad, mode="sum"), None, None


class _Combine(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, gates: Tensor, place: Tensor, source: Tensor) -> Tensor:
        home = y.index_select(0, place).view(*gates.shape, -1)
        ctx.save_for_backward(home, gates, place, source)
        return torch.bmm(gates.unsqueeze(1), home.to(gates.dtype)).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        home, gates, place, source = ctx.saved_tensors
        by_gate = torch.bmm(grad.unsqueeze(1), home.to(grad.dtype).transpose(1, 2)).squeeze(1)
        gate = gates.new_zeros(source.shape).index_copy_(0, place, gates.flatten())
        by_row = F.embedding_bag(  # bags of one: gathered and weighted in one pass
            source.unsqueeze(1), _with_none(grad), per_sample_weights=gate.unsqueeze(1), mode="sum"
        )
        return by_row.to(home.dtype), by_gate, None, None


def _with_none(tokens: Tensor) -> Tensor:
    """[tokens, hidden] with a row of zeros behind the last, for padding to read."""
    return torch.cat([tokens, tokens.new_zeros(1, tokens.shape[1])])
