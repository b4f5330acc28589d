"""The row check of grouped products (experts on their slices): the identity of `gemm`, group by group, in one pass.

Identity. Rows, or inner positions, are divided into groups at `offs`. Row i of group e: C_i r = A_i (W_e r). Where the
inner positions are divided (wgrad), C_e r = A_e (B_e r), a sum over the positions of group e.

Tolerance, blindness: those of `gemm`. The norms of 16-bit results come from probes as there, without the mean gain of
the batch: instead ||A_i|| ||W_e|| / sqrt(K), the norm of a row that meets W_e at random, is added. The probes go
through the grouped kernel itself.
Cost: one elementwise product as large as A beside the passes of `gemm`, one more over C in fp32; no host
sync, since `offs` stays on the device.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch._ops import OpOverloadPacket

from diagnostics.sensors.checks import recompute
from diagnostics.sensors.checks.gemm import ALIKE, KERNEL, SENSOR, subnormal_norm
from diagnostics.sensors.checks.operation import Before, Bench, Call, Check, Checked, Unsupported
from diagnostics.sensors.checks.rows import alike, differences, rows_of
from diagnostics.sensors.tolerance import NORM_FLOOR, Z


def product_again(call: Call) -> Checked:
    """The product once more, bit for bit, on a CPU; rows behind the last offset are memory that nobody has written."""
    left, right, offs = _operands(call)
    end = int(offs[-1]) if offs is not None and left.dim() == 2 and right.dim() == 3 else len(call.out)
    again = call.func(*call.args, **call.kwargs)
    readings = differences(rows_of(call.out[:end]), rows_of(again[:end]))
    return Checked(recompute.SENSOR, "out", readings, tuple(call.out.shape), exact=True)


def _operands(call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    return call.args[0], call.args[1], call.kwargs.get("offs", call.args[2] if len(call.args) > 2 else None)


def _grouped(call: Call, bench: Bench) -> Iterable[Checked]:
    left, right, offs = _operands(call)
    if offs is None or left.dim() != 2 or right.dim() not in (2, 3):
        raise Unsupported(f"a grouped product of {left.dim()}-D and {right.dim()}-D operands")
    readings = _by_rows if right.dim() == 3 else _by_inner
    yield Checked(SENSOR, "out", readings(call.out, left, right, offs, bench).flatten(), tuple(call.out.shape))


def _by_rows(c: Tensor, left: Tensor, right: Tensor, offs: Tensor, bench: Bench) -> Tensor:
    """c [T, N] of left [T, K] and right [G, K, N]; rows behind the last offset belong to no group and are not read."""
    kappa, inner, columns = bench.kappa(KERNEL, c), left.shape[1], c.shape[1]
    r = bench.signs.vector(columns)
    group = _groups(left.shape[0], offs)
    mine = group < right.shape[0]
    group = group.clamp(max=right.shape[0] - 1)
    a = left.float()
    predicted = (a * torch.matmul(right.float(), r)[group]).sum(1)
    residual = predicted.sub_(torch.mv(c.float(), r)).abs_()
    rows = torch.linalg.vector_norm(a, dim=1).clamp(min=NORM_FLOOR)
    weights = torch.linalg.vector_norm(right, dim=(1, 2), dtype=torch.float32).clamp(min=NORM_FLOOR)[group]
    limit = _of_sums(c, rows * weights, kappa.output == 0).mul_(Z * kappa.accumulate_at(max(columns, inner)))
    if kappa.output:
        norms = _estimate(left, right, offs, bench).add_(rows * weights / max(inner, 1) ** 0.5)
        limit.add_(norms.clamp_(min=NORM_FLOOR).add_(subnormal_norm(c)), alpha=Z * kappa.output)
    return torch.where(mine, residual.div_(limit), 0.0)


def _by_inner(c: Tensor, left: Tensor, right: Tensor, offs: Tensor, bench: Bench) -> Tensor:
    """c [G, M, N] of left [M, T] and right [T, N]."""
    kappa, groups, columns = bench.kappa(KERNEL, c), c.shape[0], c.shape[2]
    r = bench.signs.vector(columns)
    group = _groups(left.shape[1], offs)
    a, b = left.float().t(), right.float()  # [T, M], [T, N]
    predicted = _sums(a * torch.mv(b, r).unsqueeze(1), group, groups)
    residual = predicted.sub_(torch.matmul(c.float(), r)).abs_()
    rows = _sums(a.square(), group, groups).sqrt_().clamp_(min=NORM_FLOOR)
    weights = _sums(b.square().sum(1, keepdim=True), group, groups).sqrt_().clamp_(min=NORM_FLOOR)
    limit = _of_sums(c, rows * weights, kappa.output == 0).mul_(Z * kappa.accumulate_at(max(columns, left.shape[1])))
    if kappa.output:
        norms = _estimate(left, right, offs, bench)
        count = _sums(a.new_ones(a.shape[0], 1), group, groups).clamp_(min=1).sqrt_()
        norms = norms.add_(rows * weights / count)
        limit.add_(norms.clamp_(min=NORM_FLOOR).add_(subnormal_norm(c)), alpha=Z * kappa.output)
    return residual.div_(limit)


def _of_sums(c: Tensor, size: Tensor, fp32: bool) -> Tensor:
    """`size`, to which fp32 results add the term for equal ones."""
    return size.add_(alike(c, size), alpha=ALIKE) if fp32 else size


def _groups(positions: int, offs: Tensor) -> Tensor:
    """The group of each position, int64 [positions]; the number of groups for those behind the last offset."""
    return torch.searchsorted(offs, torch.arange(positions, device=offs.device, dtype=offs.dtype), right=True)


def _sums(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """[T, M] summed by group: [groups, M]."""
    return values.new_zeros(groups + 1, values.shape[1]).index_add_(0, group, values)[:groups]


def _estimate(left: Tensor, right: Tensor, offs: Tensor, bench: Bench) -> Tensor:
    """Row norms of the product: root mean square over the probes, E[(C s)^2] = ||C||^2. fp16 is left, as in `gemm`."""
    if right.dtype == torch.float16:
        left, right = left.float(), right.float()
    seen = torch._grouped_mm(left, right @ bench.signs.probes(right.shape[-1], right.dtype), offs=offs)
    return seen.float().square().mean(-1).sqrt_()


CHECKS: dict[OpOverloadPacket, Check] = {torch.ops.aten._grouped_mm: _grouped}
BEFORE: dict[OpOverloadPacket, Before] = {}
