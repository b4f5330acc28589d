"""Attaches the sensors to a torch module: every product of a step is checked, and no number is changed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diagnostics.health import Alarm
from diagnostics.sensors.announced import Announced, watchers
from diagnostics.sensors.gemm import Operand, row_readings
from diagnostics.sensors.names import WeightNames
from diagnostics.sensors.products import Product, backward_node, product_of
from diagnostics.sensors.quiet import quiet
from diagnostics.sensors.readings import ReadingLog, Site
from diagnostics.sensors.signs import Signs
from diagnostics.sensors.statistics import History, Statistic
from diagnostics.sensors.tolerance import Kappa, ToleranceTable, UnknownTolerance, Widening, shipped_table

GEMM = "gemm"
FINITE = "finite"


class Guard:
    """Guards a module whose products go through F.linear (nn.Linear included), mm, addmm, 2-D matmul, or are announced.

    The native kernels run untouched: a function mode watches the forward, hooks on the autograd nodes the backward, so
    guarded and unguarded steps are bit-equal. One step at a time; the step before is settled when the next begins.

    Raises ValueError when tolerance_scale is not a positive finite number.
    """

    def __init__(
        self,
        model: nn.Module,
        tolerance_scale: float = 1.0,
        enabled: bool = True,
        table: ToleranceTable | None = None,
    ) -> None:
        self.enabled = enabled
        self.names = WeightNames(model)
        self.table = table or shipped_table()
        self.widening = Widening(tolerance_scale)
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.log = ReadingLog(self.device)
        self.histories: dict[str, History] = {}
        self.current: GuardedStep | None = None

    def step(self, key: int) -> GuardedStep:
        """One step's forward and backward, as a context manager. The same key draws the same signs."""
        if self.current is not None:
            self.current.settle()
        self.log.clear()
        self.current = GuardedStep(self, key)
        return self.current

    def check_finite(self, name: str, tensor: Tensor) -> None:
        """Alarm in the current step if any element is not finite. One pass, no host sync; no step, no check."""
        if self.current is not None:
            self.current.check_finite(name, tensor)

    def recalibrate(self, alarms: Iterable[Alarm]) -> int:
        """Widen what raised these false alarms to twice the reading, at most WIDEST times the shipped tolerance.

        All sites of the same sensor and pass are widened. Returns how many tolerances changed (`widening.count` sums
        them). Alarms that are not finite widen nothing: no tolerance could have admitted them.
        """
        worst: dict[tuple[str, str], float] = {}
        for alarm in alarms:
            key = (alarm.sensor, alarm.pass_)
            if math.isfinite(alarm.reading):
                worst[key] = max(worst.get(key, 0.0), alarm.reading)
        return sum(self.widening.widen(sensor, pass_, reading) for (sensor, pass_), reading in sorted(worst.items()))


class GuardedStep:
    """What the sensors saw in one step. Reading any of clean, worst, alarms or evidence waits for the device once."""

    def __init__(self, guard: Guard, key: int) -> None:
        self._guard = guard
        self._key = key
        self._signs = Signs(key, guard.device)
        self._modes = ExitStack()
        self._scalars: dict[str, Tensor] = {}
        self._settled: tuple[float, list[Alarm], list[Statistic], int] | None = None
        self._left: Operand | None = None
        self.skipped: dict[str, int] = {}  # products that no check covers, by reason

    def __enter__(self) -> GuardedStep:
        if self._guard.enabled:
            self._modes.enter_context(_Watch(self))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._modes.close()
        self._left = None

    @property
    def clean(self) -> bool:
        """True when no reading is `not (reading <= 1)`; with the guard disabled there are none."""
        return self.worst <= 1.0

    @property
    def worst(self) -> float:
        """The largest reading; NaN when one is NaN; 0.0 when there is none."""
        return self.settle()[0]

    @property
    def alarms(self) -> list[Alarm]:
        """Every alarm, in the order the checks were made."""
        return self.settle()[1]

    @property
    def evidence(self) -> list[Statistic]:
        """What was observed, with its robust z: beside an alarm it is evidence, alone it is nothing."""
        return self.settle()[2]

    @property
    def first_alarm(self) -> int | None:
        """The number, from 0, of the first check that alarmed; None when clean, and once the next step has begun."""
        current = self._guard.current is self
        return None if self.clean or not current else self._guard.log.first_alarm()

    @property
    def checks(self) -> int:
        """How many checks were made."""
        return self._settled[3] if self._settled is not None else len(self._guard.log)

    def observe(self, name: str, value: Tensor | float) -> None:
        """Remember a scalar (loss, gradient norm) for the statistics; alarm if it is not finite."""
        tensor = torch.as_tensor(value, dtype=torch.float32, device=self._guard.device).detach()
        self._scalars[name] = tensor
        self.check_finite(name, tensor)

    def check_finite(self, name: str, tensor: Tensor) -> None:
        """Alarm if any element is not finite. One pass over the tensor, no host sync."""
        if not self._guard.enabled or self._settled is not None or tensor.numel() == 0:
            return
        with quiet():
            low, high = torch.aminmax(tensor.detach())
            reading = (low * 0 + high * 0).float()  # 0 if finite, NaN if not: inf * 0 and NaN * 0 are NaN
            site = Site(FINITE, name, "value", "step", tuple(tensor.shape))
            self._guard.log.append(site, reading.reshape(1))

    def settle(self) -> tuple[float, list[Alarm], list[Statistic], int]:
        """Read the device and keep what was seen; later readings of this step are ignored."""
        if self._settled is None:
            log = self._guard.log
            worst = log.worst()
            alarms = [] if worst <= 1.0 else log.alarms()
            self._settled = (worst, alarms, self._statistics(), len(log))
        return self._settled

    def _statistics(self) -> list[Statistic]:
        found = []
        for name, tensor in self._scalars.items():
            value = float(tensor)
            history = self._guard.histories.setdefault(name, History())
            found.append(Statistic(name, value, history.z(self._key, value)))
            history.add(self._key, value)
        return found

    def forward(self, product: Product, out: Tensor) -> None:
        """Check a product that was just made, and arrange for its two backward products to be checked."""
        kappa = self._kappa(out)
        if kappa is None or self._settled is not None:
            return
        with quiet():
            product = product.in_type_of(out)
            name = self._guard.names.of(product.weight)
            left = self._operand(product.left)
            right_norm = torch.linalg.vector_norm(product.right, dtype=torch.float32)
            check = _Check(name, product.operation, kappa, right_norm, left.norm)
            self._check(check, "fprop", out.reshape(-1, out.shape[-1]), left, product.right, right_norm, product.bias)
        node = backward_node(out)
        if node is None:
            if out.requires_grad:
                self._skip("no mm node behind the result: its backward is not checked")
            return
        left_value, right_value = product.left, product.right

        def after(grad_inputs: tuple[Tensor | None, ...], grad_outputs: tuple[Tensor | None, ...]) -> None:
            if grad_outputs[0] is not None and self._settled is None:
                self._backward(check, left_value, right_value, grad_inputs[-2:], grad_outputs[0])

        node.register_hook(after)

    def announced(self, product: Announced, out: Tensor) -> None:
        """Check one product that was announced, in whichever pass, against the operands that its kernel saw."""
        kappa = self._kappa(out, product.operation)
        if kappa is None or self._settled is not None:
            return
        with quiet():
            left_value, right = product.operands()
            left = Operand.by_blas(left_value)
            right_norm = torch.linalg.vector_norm(right)
            check = _Check(self._guard.names.of(product.weight), product.operation, kappa, right_norm, left.norm)
            self._check(check, product.pass_, out, left, right, right_norm)

    def _backward(
        self, check: _Check, left: Tensor, right: Tensor, grads: tuple[Tensor | None, ...], grad: Tensor
    ) -> None:
        dgrad, wgrad = grads
        with quiet():
            by_rows, by_columns = Operand.both_ways(grad)
            if dgrad is not None:
                self._check(check, "dgrad", dgrad, by_rows, right.t(), check.right_norm)
            if wgrad is not None:
                self._check(check, "wgrad", wgrad.t(), by_columns, left, check.left_norm)

    def _check(
        self,
        check: _Check,
        pass_: str,
        c: Tensor,
        left: Operand,
        right: Tensor,
        right_norm: Tensor,
        bias: Tensor | None = None,
    ) -> None:
        if c.numel() == 0:
            return
        factor = self._guard.widening.factor(GEMM, pass_)
        readings = row_readings(c, left, right, right_norm, self._signs, check.kappa, factor, bias)
        self._guard.log.append(Site(GEMM, check.module, check.operation, pass_, tuple(c.shape)), readings)

    def _kappa(self, out: Tensor, kernel: str = "mm") -> Kappa | None:
        try:
            return self._guard.table.kappa(out.device.type, str(out.dtype).removeprefix("torch."), kernel)
        except UnknownTolerance as reason:
            self._skip(str(reason))
            return None

    def _operand(self, value: Tensor) -> Operand:
        """Several linears read one activation: measure it once. Keeps the last one only, and its storage alive."""
        if self._left is None or self._left.value is not value:
            self._left = Operand.of(value)
        return self._left

    def _skip(self, reason: str) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + 1


@dataclass(frozen=True, slots=True)
class _Check:
    """What the three checks of one product share."""

    module: str
    operation: str
    kappa: Kappa
    right_norm: Tensor
    left_norm: Tensor


class _Watch(TorchFunctionMode):
    """Sees every torch function of the forward and hands the products to the step."""

    def __init__(self, step: GuardedStep) -> None:
        super().__init__()
        self._step = step

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is watchers:
            return (*out, self._step)
        product = product_of(func, args, kwargs)
        if product is not None:
            self._step.forward(product, out)
        return out
