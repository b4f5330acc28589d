"""Queries, keys and values as attention reads them: split, turned and laid out by head in one pass each way."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from agent.model.fused.precision import wide
from agent.model.rope import rotate


def query_heads(flat: Tensor, turns: Tensor, heads: int, rotary: int) -> Tensor:
    """Turn the last ``rotary`` of each head's elements (eq. 8-9) and lay the heads out one after another.

    The gradient of turning by e^{it} is turning back, by the conjugate.

    Args:
        flat: [batch * time, heads * dim], position after position.
        turns: rotations of the positions, complex64 [time, rotary / 2].
        heads: how many heads share a row.
        rotary: elements that carry a position.

    Returns:
        [batch * heads, time, dim], contiguous.
    """
    return cast(Tensor, _Query.apply(flat, turns, heads, rotary))  # type: ignore[no-untyped-call]


def key_value_heads(
    expanded: Tensor, shared: Tensor, turns: Tensor, heads: int, value_dim: int
) -> tuple[Tensor, Tensor]:
    """Keys [k^C ; turned k^R] and values of every head (eq. 2-5), laid out one head after another.

    k^R is one for all heads, so its gradient is the sum of theirs, turned back.

    Args:
        expanded: [batch * time, heads * (plain + value_dim)], k^C and v of each head.
        shared: k^R, [batch * time, rotary].
        turns: rotations of the positions, complex64 [time, rotary / 2].
        heads: how many.
        value_dim: size of a value.

    Returns:
        Keys [batch * heads, time, plain + rotary] and values [batch * heads, time, value_dim], contiguous.
    """
    made = _KeyValue.apply(expanded, shared, turns, heads, value_dim)  # type: ignore[no-untyped-call]
    return cast(tuple[Tensor, Tensor], made)


class _Query(Function):
    @staticmethod
    def forward(ctx: Any, flat: Tensor, turns: Tensor, heads: int, rotary: int) -> Tensor:
        ctx.save_for_backward(turns)
        ctx.heads, ctx.rotary = heads, rotary
        rows = flat.view(-1, turns.shape[0], heads, flat.shape[1] // heads)
        out = _empty_heads(rows, rows.shape[3])
        _turned(rows, turns, rotary, out=_by_position(out, heads))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (turns,) = ctx.saved_tensors
        rows = _by_position(grad, ctx.heads)
        out = grad.new_empty(rows.shape)
        _turned(rows, turns.conj(), ctx.rotary, out=out)
        return out.view(-1, ctx.heads * grad.shape[2]), None, None, None


class _KeyValue(Function):
    @staticmethod
    def forward(
        ctx: Any, expanded: Tensor, shared: Tensor, turns: Tensor, heads: int, value_dim: int
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(turns)
        ctx.heads = heads
        rows = expanded.view(-1, turns.shape[0], heads, expanded.shape[1] // heads)
        plain = rows.shape[3] - value_dim
        key, value = _empty_heads(rows, plain + shared.shape[1]), _empty_heads(rows, value_dim)
        keys = _by_position(key, heads)
        keys[..., :plain] = rows[..., :plain]
        keys[..., plain:] = rotate(shared.view(-1, turns.shape[0], 1, shared.shape[1]), turns)
        _by_position(value, heads).copy_(rows[..., plain:])
        return key, value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_key: Tensor, by_value: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (turns,) = ctx.saved_tensors
        keys, values = _by_position(by_key, ctx.heads), _by_position(by_value, ctx.heads)
        rotary = 2 * turns.shape[1]
        plain = keys.shape[3] - rotary
        out = keys.new_empty(*keys.shape[:3], plain + values.shape[3])
        out[..., :plain] = keys[..., :plain]
        out[..., plain:] = values
        turned = keys[..., plain:].sum(2, keepdim=True, dtype=wide(keys.dtype))
        shared = rotate(turned, turns.conj()).to(keys.dtype)
        return out.view(-1, ctx.heads * out.shape[3]), shared.view(-1, rotary), None, None, None


def _turned(rows: Tensor, turns: Tensor, rotary: int, out: Tensor) -> None:
    """``rows`` [batch, time, heads, dim] into ``out``, the last ``rotary`` elements of each turned."""
    plain = rows.shape[3] - rotary
    out[..., :plain] = rows[..., :plain]
    out[..., plain:] = rotate(rows[..., plain:], turns)


def _empty_heads(rows: Tensor, dim: int) -> Tensor:
    """Room for [batch * heads, time, dim], given [batch, time, heads, ...]."""
    batch, time, heads = rows.shape[:3]
    return rows.new_empty(batch * heads, time, dim)


def _by_position(x: Tensor, heads: int) -> Tensor:
    """[batch * heads, time, dim] seen as [batch, time, heads, dim]."""
    return x.view(-1, heads, x.shape[1], x.shape[2]).transpose(1, 2)
