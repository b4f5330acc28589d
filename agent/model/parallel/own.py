"""The end of the way: a rank's own experts on the rows that came to it, each with some of these experts or none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from agent.model.parallel.copies import Copies, copies, gathered, placed, spread
from agent.model.parallel.hop import Tokens

#: Experts on their slices: [sum(sizes), hidden_size] sorted by expert -> the same; one without rows is not called.
Slices = Callable[[Tensor, list[int]], Tensor]


def own_sum(tokens: Tokens, held: int, multiple: int, slices: Slices) -> Tensor:
    """Each row's gated sum over ``held`` experts, fp32 [n, hidden_size], in the order of the experts.

    Slices are padded to multiples of ``multiple`` rows. The result depends on the rows by autograd even when no expert
    is called, so that the backward takes the same way on every rank.
    """
    layout = copies(tokens.experts, held, multiple)
    rows = cast(Tensor, _Spread.apply(tokens.rows, layout))  # type: ignore[no-untyped-call]
    y = slices(rows, layout.sizes) if layout.length else rows
    absent = tokens.experts.masked_fill(tokens.experts < 0, held)
    order = absent.argsort(dim=1, stable=True)[:, : layout.home.shape[1]]
    return cast(Tensor, _Weighted.apply(y, tokens.gates, order, layout))  # type: ignore[no-untyped-call]


class _Spread(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, layout: Copies) -> Tensor:
        ctx.save_for_backward(*layout.tensors)
        ctx.sizes, ctx.length = layout.sizes, layout.length
        return spread(rows, layout)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        copied, places, spots, home = ctx.saved_tensors
        layout = Copies(copied, places, spots, home, ctx.sizes, ctx.length)
        return gathered(grad, layout).to(grad.dtype), None


class _Weighted(Function):
    """With t the row of a copy, g its gate and y what its expert made of it: dy = g dt, dg = <y, dt>."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gates: Tensor, order: Tensor, layout: Copies) -> Tensor:
        weights = gates.gather(1, order)
        ctx.save_for_backward(y, weights, order, *layout.tensors)
        ctx.sizes, ctx.length, ctx.shape = layout.sizes, layout.length, gates.shape
        return gathered(y, layout, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y, weights, order, copied, places, spots, home = ctx.saved_tensors
        layout = Copies(copied, places, spots, home, ctx.sizes, ctx.length)
        at = grad.index_select(0, layout.rows)
        # Copy c is the j-th of its row where home says so; both lists name every copy once.
        of_spot = weights.new_zeros(layout.length + 1).index_put_((layout.home,), weights)
        grad_y = placed((at * of_spot[layout.spots].unsqueeze(1)).to(y.dtype), layout)
        dots = weights.new_zeros(layout.length + 1)
        dots[layout.spots] = (y.index_select(0, layout.spots).float() * at).sum(1)
        grad_gates = grad.new_zeros(ctx.shape).scatter_(1, order, dots[layout.home])
        return grad_y, grad_gates, None, None
