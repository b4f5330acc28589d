"""The row check of a matrix product: C r = A (W r), for random signs r.

Identity. C = A W, so C r - A (W r) is rounding noise, row by row; two thin products check a whole GEMM. Forward, dgrad
(dA = G W^T) and wgrad (dW^T = G^T A) are the same identity with other operands.

Tolerance of row i, z = 7: z (kappa_output * norm_i + kappa_accumulate * ||A_i|| ||W||_F). The first term is the
rounding of each element of C to its type and exists for bf16 outputs only; norm_i stands for ||C_i|| but is never
computed from C, since a corrupted C would raise its own threshold. It comes from probes: E[(A W s)_i^2] = ||C_i||^2 for
random signs s. The estimate has m = 32 degrees of freedom; to it is added ||A_i||^2 times the batch's mean gain
(sum of estimates / sum of ||A_i||^2), so that one row's unlucky draw cannot make its tolerance vanish. The second term
is Cauchy-Schwarz on the fp32 sums, sqrt(K) looser than typical noise, and still 1e-3 of an element or less.

Sees: any change of C above the floor (a non-finite value always). Does not see: wrong A or W, which both sides share;
what happens to C after the check; changes below the floor. Cost: about 10 small operations a check in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.sensors.signs import PROBES, Signs
from diagnostics.sensors.tolerance import NORM_FLOOR, Kappa, Z


@dataclass(frozen=True, slots=True)
class Operand:
    """A matrix [m, n] as the check needs it: its own value, an fp32 form, and its norms (fp32, on the device)."""

    value: Tensor
    fp32: Tensor
    row_norms: Tensor  # [m]
    norm: Tensor  # []

    @classmethod
    def of(cls, value: Tensor) -> Operand:
        """Measure a matrix [m, n] that is read by rows."""
        fp32 = value.float()
        rows = torch.linalg.vector_norm(fp32, dim=1)
        return cls(value, fp32, rows, torch.linalg.vector_norm(rows))

    @classmethod
    def by_blas(cls, value: Tensor) -> Operand:
        """Measure an fp32 matrix [m, n] that is read by rows, whatever its strides (see `both_ways` for the way)."""
        rows = torch.mv(value.square(), value.new_ones(value.shape[1])).sqrt_()
        return cls(value, value, rows, torch.linalg.vector_norm(rows))

    @classmethod
    def both_ways(cls, value: Tensor) -> tuple[Operand, Operand]:
        """Measure a matrix [m, n] that is read by rows and, transposed, by columns.

        One pass makes the squares of both; BLAS sums columns 10 times as fast as a strided norm does.
        """
        fp32 = value.float()
        squares = fp32.square()
        rows = torch.mv(squares, fp32.new_ones(fp32.shape[1])).sqrt_()
        columns = torch.mv(squares.t(), fp32.new_ones(fp32.shape[0])).sqrt_()
        norm = torch.linalg.vector_norm(rows)
        return cls(value, fp32, rows, norm), cls(value.t(), fp32.t(), columns, norm)


def row_readings(
    c: Tensor,
    left: Operand,
    right: Tensor,
    right_norm: Tensor,
    signs: Signs,
    kappa: Kappa,
    factor: float,
    bias: Tensor | None = None,
) -> Tensor:
    """Readings fp32 [M] of c [M, N] against left [M, K] times right [K, N] (plus bias [N]): |residual| / tolerance.

    `right` may be fp32 or in c's dtype; right_norm is its Frobenius norm []. Never negative; NaN where c, or the
    prediction, is not finite.
    """
    n = c.shape[1]
    r = signs.vector(n)
    predicted = torch.mv(left.fp32, torch.mv(right.float(), r))
    if bias is not None:
        bias = bias.float()
        predicted = predicted + torch.dot(bias, r)
    residual = torch.addmv(predicted, c.float(), r, alpha=-1).abs_()
    limit = left.row_norms.clamp(min=NORM_FLOOR).mul_(right_norm.clamp(min=NORM_FLOOR))
    if bias is not None:
        limit.add_(torch.linalg.vector_norm(bias))
    limit.mul_(Z * factor * kappa.accumulate_at(max(n, left.value.shape[1])))
    if kappa.output:
        norms = output_norms(left, right, signs, bias)
        limit.add_(norms.clamp_(min=NORM_FLOOR), alpha=Z * factor * kappa.output)
    return residual.div_(limit)


def output_norms(left: Operand, right: Tensor, signs: Signs, bias: Tensor | None = None) -> Tensor:
    """Upper estimate fp32 [M] of the row norms of left times right (+ bias), made without the product itself.

    Runs in the operands' own type: signs are exact in it, and an estimate can bear its rounding.
    """
    probes = signs.probes(right.shape[1], right.dtype)
    seen = left.value @ (right @ probes)
    if bias is not None:
        seen = seen + bias.to(probes.dtype) @ probes
    estimate: Tensor = torch.linalg.vector_norm(seen, dim=1, dtype=torch.float32).square_().mul_(1 / PROBES)
    squares = left.row_norms.square()
    gain = estimate.sum() / squares.sum().clamp(min=NORM_FLOOR**2)
    estimate.add_(squares.mul_(gain)).sqrt_()
    return estimate
