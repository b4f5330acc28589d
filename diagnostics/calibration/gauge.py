"""Reads every check of what runs under it, and raises a constant where a clean reading leaves its share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diagnostics.calibration.rules import DTYPES, RULES, Constant
from diagnostics.sensors.announced import Announced, inside_announced
from diagnostics.sensors.checks import gemm, recompute
from diagnostics.sensors.checks.operand import Operand, Operands
from diagnostics.sensors.checks.operation import Call, Checked, Unsupported
from diagnostics.sensors.checks.registry import plan_of
from diagnostics.sensors.checks.signs import Signs
from diagnostics.sensors.quiet import quiet
from diagnostics.sensors.tolerance import Kappa, ToleranceTable, UnknownTolerance
from diagnostics.sensors.watch import Eyes, Keeper

# Results that another constant decides than the first that their check asks for, if it asks for this one too.
_DECIDES = {"lse": "sdpa_exp", "dw": "norm_weight", "db": "norm_weight"}

# Readings of one call. Limits that a constant makes up in small part need several; the ceiling on constants ends them.
_AGAIN = 400

Key = tuple[torch.dtype, str]


class _Seen(NamedTuple):
    worst: float  # NaN if a reading is
    readings: int


class Gauge:
    """The bench of checks whose constants are being measured; one that only grows settles in one pass over the data.

    kernels: those that are measured; the constants of others are `table`'s, else their floor, and stay as they are.
    """

    def __init__(self, device: torch.device, kernels: Iterable[str], table: ToleranceTable) -> None:
        self.signs = Signs(0, device)
        self.constants: dict[Key, Constant] = {}
        self.overflowed = 0  # calls whose result was not finite: no rounding, nothing to read
        self._device = device
        self._kernels = frozenset(kernels)
        self._table = table
        self._operands = Operands()
        self._asked: list[Key] = []

    @contextmanager
    def reading(self, key: int) -> Iterator[None]:
        """One trial, forward and backward: what runs in the block is read, with signs drawn from `key`."""
        self.signs = Signs(key, self._device)
        eyes = Eyes(self)
        with eyes, Keeper(eyes):
            try:
                yield
            finally:
                self._operands.clear()

    def kappa(self, kernel: str, like: Tensor) -> Kappa:
        """See `operation.Bench`: the constants as they are now."""
        constant = self._constant(like.dtype, kernel)
        self._asked.append((like.dtype, kernel))
        return Kappa(constant.output, constant.accumulate, "being measured")

    def operand(self, value: Tensor) -> Operand:
        """See `operation.Bench`."""
        return self._operands.of(value)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `watch.Step`: operators that have an identity are read."""
        plan, before = plan_of(func), None
        if plan is None or plan.check is None or plan.again or inside_announced():
            return func(*args, **kwargs)
        if plan.before is not None:
            with quiet():
                before = plan.before(args, kwargs, self)
        out = func(*args, **kwargs)
        if isinstance(before, recompute.Overwritten):
            return out  # nothing is left for an identity to read
        call, judge = Call(func, args, kwargs, out, before), plan.check
        self.read(_values(func, out), lambda: judge(call, self))
        return out

    def announced(self, product: Announced, out: Tensor) -> None:
        """See `announced.Watcher`."""

        def check() -> Iterable[Checked]:
            left, right = product.operands()
            return gemm.product_check(product.operation, left, right, out, self)

        self.read(out, check)

    def not_seen(self, operation: str, reason: str) -> None:
        """See `watch.Step`: what does not run here cannot be measured."""

    def unseen(self, operation: str, results: Any, given: Any) -> None:
        """See `watch.Step`."""

    def _constant(self, dtype: torch.dtype, kernel: str) -> Constant:
        found = self.constants.get((dtype, kernel))
        if found is None:
            found = self.constants[(dtype, kernel)] = self._first(dtype, kernel)
        return found

    def _first(self, dtype: torch.dtype, kernel: str) -> Constant:
        rule = RULES.get(kernel)
        if rule is None or dtype not in DTYPES.values() or rule.lacks(dtype):
            raise UnknownTolerance(f"{kernel} in {dtype} has no constant")
        known = self._table.entries.get((self._device.type, str(dtype).removeprefix("torch."), kernel))
        if kernel not in self._kernels and known is not None:
            return Constant(rule, dtype, known.output, known.accumulate)
        sums = self.constants.get((torch.float32, kernel))  # 16-bit kernels sum in fp32
        return Constant.floor(rule, dtype, 0.0 if sums is None else sums.accumulate, self._device.type)

    def read(self, out: Any, check: Callable[[], Iterable[Checked]]) -> None:
        """Read one check of a clean result, as often as it makes a constant grow."""
        if not _finite(out):
            self.overflowed += 1
            return
        with quiet():
            self._settle(check)

    def _settle(self, check: Callable[[], Iterable[Checked]]) -> None:
        for _ in range(_AGAIN):
            self._asked.clear()
            try:
                found = self._by_constant(check())
            except (Unsupported, UnknownTolerance):
                return
            again = [self.constants[key].admit(seen.worst) for key, seen in found.items()]
            if not any(again):
                self._count(found)
                return
        raise RuntimeError(
            f"the constants of {sorted(kernel for _, kernel in found)} do not settle: a sensor is broken"
        )

    def _by_constant(self, found: Iterable[Checked]) -> dict[Key, _Seen]:
        """What a check saw, by the constant that decides it; of kernels that are measured."""
        seen: dict[Key, _Seen] = {}
        for one in list(found):  # a check has asked for all its constants only when it is through
            if not self._asked or not one.readings.numel() or one.sensor == recompute.SENSOR:
                continue  # an exact check has no constant
            dtype, first = self._asked[0]
            other = dtype, _DECIDES.get(one.result, first)
            key = other if other in self._asked else (dtype, first)
            if key[1] in self._kernels:
                before = seen.get(key, _Seen(0.0, 0))
                worst = float(torch.cat((one.readings, one.readings.new_tensor([before.worst]))).amax())
                seen[key] = _Seen(worst, before.readings + one.readings.numel())
        return seen

    def _count(self, found: dict[Key, _Seen]) -> None:
        for key, seen in found.items():
            constant = self.constants[key]
            constant.readings += seen.readings
            constant.calls += 1


def _values(func: Any, out: Any) -> Any:
    """The results that are finite where nothing overflowed; attention's logsumexp may be padded with infinities."""
    names = {value.name for value in func._schema.returns}
    return out[0] if names & {"logsumexp", "log_sumexp"} else out


def _finite(out: Any) -> bool:
    results = out if isinstance(out, tuple) else (out,)  # a gradient that nobody asked for is None
    return all(bool(t.isfinite().all()) for t in results if isinstance(t, Tensor) and t.is_floating_point())
