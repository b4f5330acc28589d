"""A layer's routed experts as one operation: autograd keeps one record for all of them, and small work is done once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from diagnostics.sensors.announced import Announced, Watcher, announce, made, watchers


class Weights(NamedTuple):
    """One expert's parameters, fp32 masters."""

    gate: Tensor  # [intermediate_size, hidden_size]
    up: Tensor  # [intermediate_size, hidden_size]
    down: Tensor  # [hidden_size, intermediate_size]


def routed_experts(rows: Tensor, sizes: Sequence[int], experts: Sequence[Weights]) -> Tensor:
    """down(silu(gate(x)) * up(x)) of each expert on its own slice of the rows (FFN_i of eq. 12; arXiv 2002.05202).

    With x an expert's slice, s the logistic function, g = x G^T, u = x U^T, h = g s(g) u and y = h D^T:

        dh = dy D        dg = dh u s(g) (1 + g (1 - s(g)))        du = dh g s(g)
        dD = dy^T h      dG = dg^T x                              dU = du^T x
        dx = dg G + du U

    Products are one expert's, in the experts' order, in the type of the rows; each is announced to the sensors before
    anybody uses it, under its parameter. What lies between them is done once for all rows. Kept for the backward are
    x, g, u and the weights as the products read them. An expert without rows makes no product and its parameters get
    no gradient: None, not zeros.

    Args:
        rows: [sum(sizes), hidden_size], sorted by expert, in the type that the products compute in.
        sizes: rows of each expert; 0 for one without.
        experts: their weights, as many as sizes.

    Returns:
        [sum(sizes), hidden_size] in the type of the rows.

    Raises:
        ValueError: the sizes are not those of the rows, or not as many as the experts.
    """
    if len(sizes) != len(experts) or sum(sizes) != rows.shape[0]:
        raise ValueError(
            f"sizes are {list(sizes)}: give one for each of {len(experts)} experts, {rows.shape[0]} rows together"
        )
    flat = [weight for expert in experts for weight in expert]
    layer = _Layer(flat, _busy(sizes), watchers(flat[0]))
    return cast(Tensor, _Experts.apply(rows, layer, *flat))  # type: ignore[no-untyped-call]


class _Part(NamedTuple):
    """An expert with rows: where these are, and its weights among the layer's."""

    at: slice
    gate: int
    up: int
    down: int


def _busy(sizes: Sequence[int]) -> list[_Part]:
    stops = list(accumulate(sizes))
    return [
        _Part(slice(stop - size, stop), 3 * number, 3 * number + 1, 3 * number + 2)
        for number, (size, stop) in enumerate(zip(sizes, stops, strict=True))
        if size
    ]


@dataclass(frozen=True)
class _Layer:
    """Whose products these are: the parameters, three of each expert; who has rows; who watches."""

    weights: Sequence[Tensor]
    parts: Sequence[_Part]
    watchers: tuple[Watcher, ...]

    @property
    def used(self) -> list[int]:
        """Places of the weights that take part."""
        return [place for part in self.parts for place in part[1:]]

    def product(self, pass_: str, place: int, left: Tensor, right: Tensor, out: Tensor) -> None:
        """``out`` [M, N] = left [M, K] right [K, N], of the weight at ``place``; shown before anybody uses it."""
        if not self.watchers:
            torch.mm(left, right, out=out)
            return
        with made(self.watchers):
            torch.mm(left, right, out=out)
        seen = Announced("mm", pass_, self.weights[place], lambda: (left, right), lambda: torch.mm(left, right))
        announce(seen, out, self.watchers)


class _Experts(Function):
    """Torch functions are off inside: whoever watches is told of the products, and of nothing smaller."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, layer: _Layer, *weights: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            used = {place: weights[place].to(rows.dtype) for place in layer.used}
            gates = rows.new_empty(rows.shape[0], weights[0].shape[0])
            ups, out = torch.empty_like(gates), torch.empty_like(rows)
            for at, gate, up, _ in layer.parts:
                x = rows[at]
                layer.product("fprop", gate, x, used[gate].t(), gates[at])
                layer.product("fprop", up, x, used[up].t(), ups[at])
            hidden = F.silu(gates).mul_(ups)
            for at, _, _, down in layer.parts:
                layer.product("fprop", down, hidden[at], used[down].t(), out[at])
            ctx.save_for_backward(rows, gates, ups, *used.values())
            ctx.layer, ctx.dtype = layer, weights[0].dtype
            return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, gates, ups, *kept = ctx.saved_tensors
        layer: _Layer = ctx.layer
        used = dict(zip(layer.used, kept, strict=True))
        with torch._C.DisableTorchFunction():
            by_hidden = torch.empty_like(gates)
            for at, _, _, down in layer.parts:
                layer.product("dgrad", down, grad[at], used[down], by_hidden[at])
            hidden, by_gate, by_up = _swiglu_backward(gates, ups, by_hidden)
            # Two products and a sum: were the second accumulated onto the first, nobody could check either.
            by_rows, rest = torch.empty_like(rows), torch.empty_like(rows)
            room = rows.new_empty(len(used), layer.weights[0].numel())  # one block, cast to the masters' type at once
            by_weight = {place: part.view_as(used[place]) for place, part in zip(used, room, strict=True)}
            for at, gate, up, down in layer.parts:
                x, g, u = rows[at], by_gate[at], by_up[at]
                layer.product("dgrad", gate, g, used[gate], by_rows[at])
                layer.product("dgrad", up, u, used[up], rest[at])
                layer.product("wgrad", gate, g.t(), x, by_weight[gate])
                layer.product("wgrad", up, u.t(), x, by_weight[up])
                layer.product("wgrad", down, grad[at].t(), hidden[at], by_weight[down])
            gradients: list[Tensor | None] = [None] * len(layer.weights)
            for place, part in zip(used, room.to(ctx.dtype), strict=True):
                gradients[place] = part.view_as(used[place])
            return by_rows.add_(rest), None, *gradients


def _swiglu_backward(gates: Tensor, ups: Tensor, by_hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """silu(gates) * ups, made anew, and the gradients of gates and ups; ``by_hidden`` is spent."""
    swish = F.silu(gates)
    hidden = swish * ups
    by_up = swish.mul_(by_hidden)
    return hidden, torch.ops.aten.silu_backward(by_hidden.mul_(ups), gates), by_up
