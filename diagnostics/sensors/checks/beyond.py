"""Products that leave the range of their type, or whose norms leave that of fp32: checked at a smaller scale, on a CPU.

Result. An element of C that is infinite is right where alpha A W + beta D, made in fp32, lies beyond the largest number
of C's type (within four of its roundings) and has the same sign: fp16 ends at 65,504, and a scaled loss that is too
large is found by just that (`torch.amp.GradScaler`). In bf16 and fp32, whose range is that of the sums, a part of a sum
may overflow before the whole: there any infinity or NaN is right where the sizes of the terms add up to more than the
largest number. E holds these elements and zeros elsewhere; C without them is alpha A W + beta D - E, which is a product
with an addend, and is checked as one.

Norms. Squares of numbers from 1.8e19 on overflow in fp32. A and W are divided by powers of two, which rounds nothing,
until their largest elements are at most 1, C and D accordingly.

Sees: what `gemm` does, and any infinity whose element is within the range. Cost: the product once more, in fp32, and
copies of all operands; only where a reading is not finite though the operands are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# An infinity may stand for what is within four roundings of the largest number of its type.
_ROUNDINGS = 4


def shrunk(
    c: Tensor, left: Tensor, right: Tensor, added: Tensor | None, alpha: float, beta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(C', A', W', D') of which C' = alpha A' W' + D' must hold as C = alpha A W + beta D did.

    All are of the shapes of c [..., M, N], left [..., M, K], right [..., K, N] and c, in their types; D' is fp32, and E
    as above is taken from it. added broadcasts to c.
    """
    of_left, of_right = _exponent(left), _exponent(right)
    plus = added is not None and beta != 0
    if plus:
        assert added is not None
        of_left += max(0, _exponent(added) - of_left - of_right)
    down = 2.0 ** -(of_left + of_right)
    a, w = _scaled(left, 2.0**-of_left), _scaled(right, 2.0**-of_right)
    d = torch.zeros(c.shape, dtype=torch.float32)
    if plus:
        assert added is not None
        d += added.double() * (beta * down)
    whole = torch.matmul(a.float(), w.float()).mul_(alpha).add_(d)
    info = torch.finfo(c.dtype)
    largest = info.max * (1 - _ROUNDINGS * info.eps) * down
    beyond = c.isinf() & (whole.abs() > largest) & (whole.sign() == c.sign())
    if c.dtype != torch.float16:
        most = torch.matmul(a.float().abs(), w.float().abs()).mul_(abs(alpha)).add_(d.abs())
        beyond |= ~c.isfinite() & (most > largest)
    return torch.where(beyond, 0.0, _scaled(c, down)), a, w, d.sub_(torch.where(beyond, whole, 0.0))


def all_finite(t: Tensor) -> bool:
    """Whether no element is an infinity or NaN; waits for the device."""
    if t.numel() == 0 or not t.is_floating_point():
        return True
    low, high = torch.aminmax(t)
    return math.isfinite(float(low)) and math.isfinite(float(high))


def _exponent(t: Tensor) -> int:
    """By which power of two to divide so that nothing exceeds 1; 0 where fp32 holds the sum of squares in any case."""
    if t.dtype == torch.float16 or t.numel() == 0:
        return 0
    low, high = torch.aminmax(t)
    return max(0, math.frexp(max(-float(low), float(high)))[1])


def _scaled(t: Tensor, factor: float) -> Tensor:
    return t if factor == 1.0 else (t.double() * factor).to(t.dtype)
