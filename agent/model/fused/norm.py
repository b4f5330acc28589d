"""RMSNorm in few passes: beside its input it keeps one number a row."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from agent.model.fused.precision import widened


def rms_norm(x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467, eq. 4), computed in fp32.

    With i = 1 / sqrt(mean(x^2) + eps), n the size of a row and g = dL/dy:

        dL/dweight = sum over rows of g x i
        dL/dx = i (g weight - x i mean(g weight x i))

    Args:
        x: [..., n], fp32 or bf16.
        weight: fp32 [n].
        eps: added to the mean of squares.
        out_dtype: of the result.

    Returns:
        [..., n] in ``out_dtype``.
    """
    return cast(Tensor, _RMSNorm.apply(x, weight, eps, out_dtype))  # type: ignore[no-untyped-call]


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
        values = widened(x)
        length: Tensor = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
        inverse = length.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (values * inverse).mul_(weight).to(out_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        unit = widened(x) * inverse
        g = widened(grad)
        both = (g * unit).flatten(0, -2)  # its columns sum to one gradient, its rows to the mean in the other
        along = torch.mv(both, weight).mul_(1 / x.shape[-1]).view_as(inverse)
        by_input = (g * weight).addcmul_(unit, along, value=-1).mul_(inverse)
        return by_input.to(x.dtype), both.sum(0), None, None
