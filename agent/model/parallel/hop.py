"""One hop of expert parallelism: a copy of each token to every rank that has one of its experts, and the sums home.

What travels, in this order: how many rows, the rows, their gates, the numbers of their experts; on the way home one
partial sum for each copy. The backward goes the same way in reverse: gradients of the partial sums out, those of rows
and then of gates home. Rows and gates are one autograd function, so that this order holds on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from agent.model.parallel.copies import Copies, copies, gathered
from agent.model.parallel.transport import Transport
from agent.model.parallel.wire import packed, unpacked

#: How often each count of rows is sent. The one in the middle counts, so that one that changes on its way does not
#: leave ranks waiting for rows that never come; whoever hashes exchanges sees the change.
COPIES = 3


class Tokens(NamedTuple):
    """Rows and what is still to be done for them. K = num_experts_per_tok."""

    rows: Tensor  # [n, hidden_size], fp32 or bf16
    gates: Tensor  # fp32 [n, K], 0 where there is no expert
    experts: Tensor  # int64 [n, K], numbered within those that this rank can still reach; -1: none


@dataclass(frozen=True)
class Trip:
    """Where the copies of one dispatch went, for the way home."""

    transport: Transport
    layout: Copies
    kept: Tensor  # bool [copies, K]: which of its row's experts a copy goes to
    receive: list[int]

    def out(self, rows: Tensor) -> Tensor:
        """[copies, ...] at their origin -> as they arrive, [sum(receive), ...]."""
        return self.transport.exchange(rows.contiguous(), self.layout.sizes, self.receive)

    def back(self, rows: Tensor) -> Tensor:
        """[sum(receive), ...] where they arrived -> at their origin, [copies, ...]."""
        return self.transport.exchange(rows.contiguous(), self.receive, self.layout.sizes)


def dispatch(tokens: Tokens, transport: Transport, each: int, *, fp8: bool) -> tuple[Tokens, Trip]:
    """Send tokens to the ranks of one hop, each of which reaches ``each`` experts.

    A token goes once to every rank that reaches one of its experts, with the gates and numbers of just those; rows
    arrive sorted by the rank they come from, then in its order. Differentiable in rows and gates.

    With ``fp8`` the (bf16) rows travel quantised, see `agent.model.parallel.wire`; gradients pass as if they had not.
    """
    wanted = tokens.experts.div(each, rounding_mode="floor")  # -1 stays -1
    layout = copies(wanted, transport.world)
    ones = [1] * transport.world
    told = torch.tensor(layout.sizes, dtype=torch.int64, device=tokens.rows.device).unsqueeze(1).repeat(1, COPIES)
    receive: list[int] = transport.exchange(told, ones, ones).median(1).values.tolist()
    kept = wanted.index_select(0, layout.rows) == layout.places.unsqueeze(1)
    trip = Trip(transport, layout, kept, receive)
    rows, gates = _Dispatch.apply(tokens.rows, tokens.gates, trip, fp8)  # type: ignore[no-untyped-call]
    numbers = (tokens.experts % each).index_select(0, layout.rows).masked_fill(~kept, -1)
    # A number that changed on its way may be none of an expert: the step is lost, but the rank must come to its end.
    return Tokens(rows, gates, trip.out(numbers).clamp(-1, each - 1)), trip


def combine(partial: Tensor, trip: Trip, dtype: torch.dtype) -> Tensor:
    """Bring home what became of the copies: fp32 [sum(receive), hidden_size] -> fp32 [n, hidden_size].

    Partial sums travel in ``dtype`` and are summed in fp32, by the rank that they come from.
    """
    return cast(Tensor, _Combine.apply(partial, trip, dtype))  # type: ignore[no-untyped-call]


def _keep(ctx: Any, trip: Trip) -> None:
    """Tensors through autograd, not as attributes: whoever hashes what a step keeps must see where rows went too."""
    ctx.save_for_backward(*trip.layout.tensors, trip.kept)
    ctx.transport, ctx.receive = trip.transport, trip.receive
    ctx.sizes, ctx.length = trip.layout.sizes, trip.layout.length


def _kept(ctx: Any) -> Trip:
    rows, places, spots, home, kept = ctx.saved_tensors
    return Trip(ctx.transport, Copies(rows, places, spots, home, ctx.sizes, ctx.length), kept, ctx.receive)


class _Dispatch(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, gates: Tensor, trip: Trip, fp8: bool) -> tuple[Tensor, Tensor]:
        _keep(ctx, trip)
        sent = trip.out((packed(rows) if fp8 else rows).index_select(0, trip.layout.rows))
        arrived = unpacked(sent, rows.shape[1]) if fp8 else sent
        return arrived, trip.out(gates.index_select(0, trip.layout.rows).masked_fill(~trip.kept, 0.0))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_gates: Tensor) -> tuple[Tensor, Tensor, None, None]:
        trip = _kept(ctx)
        rows = gathered(trip.back(grad_rows), trip.layout).to(grad_rows.dtype)
        gates = trip.back(grad_gates).masked_fill(~trip.kept, 0.0)
        return rows, gathered(gates, trip.layout), None, None


class _Combine(Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, trip: Trip, dtype: torch.dtype) -> Tensor:
        _keep(ctx, trip)
        ctx.dtype = dtype
        return gathered(trip.back(partial.to(dtype)), trip.layout)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        trip = _kept(ctx)
        return trip.out(grad.to(ctx.dtype).index_select(0, trip.layout.rows)).float(), None, None
