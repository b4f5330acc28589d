"""What the checks of one step work with: random signs, tolerances, and matrices that are measured once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from diagnostics.sensors.checks.gemm import KERNEL, fp32_precision
from diagnostics.sensors.checks.operand import Operand, Operands
from diagnostics.sensors.checks.signs import Signs
from diagnostics.sensors.tolerance import Kappa, ToleranceTable, UnknownTolerance

# Kernels whose results are products, or whose check makes some of its own. In less than fp32 neither is what it should.
_MULTIPLIES = frozenset((KERNEL, "sdpa", "sdpa_backward"))


class StepBench:
    """`operation.Bench` for the step with this key."""

    def __init__(self, key: int, table: ToleranceTable, device: torch.device) -> None:
        self.signs = Signs(key, device)
        self._table = table
        self._operands = Operands()

    def kappa(self, kernel: str, like: Tensor) -> Kappa:
        """See `operation.Bench`."""
        if kernel in _MULTIPLIES and like.dtype == torch.float32:
            precision = fp32_precision(like.device.type)
            if precision not in ("none", "ieee"):
                raise UnknownTolerance(f"no tolerance for fp32 products that torch may make in {precision}")
        return self._table.kappa(like.device.type, str(like.dtype).removeprefix("torch."), kernel)

    def has_tolerance(self, kernel: str, like: Tensor) -> bool:
        """Whether `kappa` has an answer."""
        try:
            self.kappa(kernel, like)
        except UnknownTolerance:
            return False
        return True

    def operand(self, value: Tensor) -> Operand:
        """See `operation.Bench`."""
        return self._operands.of(value)

    def forget(self, written: Iterable[Tensor]) -> None:
        """An operator has written to these: what was measured of them no longer holds."""
        self._operands.forget(written)

    def clear(self) -> None:
        """Let go of every tensor."""
        self._operands.clear()
