"""Strikes every operator of one guarded step, and takes each fault back as soon as the guard has judged the result.

A mode below the guard's flips one bit of one element of what an operator made; the guard looks at that as it looks at
any result; and before anybody uses it the element is put back. So no fault reaches another operator, the step gives the
bits of a clean one, and each of its operators can be struck, several times, at the price of so many more checks. An
operator runs once however often it is struck; one that writes over an operand runs again each time, on what that was.

A fault counts as seen if a reading of that very call alarms. One that is left in place can be seen later as well, where
it makes something infinite: that is not counted here.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from diagnostics.faults.bits import flipped, width_of
from diagnostics.faults.sites import makes_values, results
from diagnostics.sensors.announced import Announced
from diagnostics.sensors.checks.registry import plan_of
from diagnostics.sensors.guard import Guard
from diagnostics.sensors.quiet import quiet
from diagnostics.sensors.readings import ReadingLog
from diagnostics.sensors.watch import Eyes, Step


@dataclass(frozen=True, slots=True)
class Flip:
    """One fault. number: of the operator, as `faults.sites` numbers them; result, element, bit: what flipped in it.

    element: index in row-major order. width: bits of the result's type. product: whether the operator is a product.
    """

    number: int
    operator: str
    product: bool
    result: int
    element: int
    bit: int
    width: int
    seen: bool = False

    @property
    def upper(self) -> bool:
        """Whether the bit lies in the upper half of the number, its sign among them."""
        return 2 * self.bit >= self.width


def place_of(tensor: Tensor, element: int) -> Tensor:
    """One element as a tensor [], sharing its memory."""
    index = []
    for size in reversed(tensor.shape):
        element, at = divmod(element, size)
        index.append(at)
    return tensor[tuple(reversed(index))]


class Blows(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Below a guard: flips one bit in the next operator's result when it is told to, and takes it back."""

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rng = random.Random(seed)
        self._due = False
        self._given: Any = None  # handed on instead of another run
        self._place: Tensor | None = None
        self._clean: Tensor | None = None
        self._flip: tuple[int, int, int, int] | None = None

    def strike(self, given: Any = None) -> None:
        """The next operator is struck. given: its result, if it has run already."""
        self._due, self._given = True, given

    def take_back(self) -> tuple[int, int, int, int] | None:
        """Give the element its bits again; its result, place, bit and width, or None if there was nothing to strike."""
        flip, self._flip = self._flip, None
        if flip is not None and self._place is not None and self._clean is not None:
            with quiet():
                self._place.copy_(self._clean)
        self._due, self._given, self._place = False, None, None
        return flip

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self._due:
            return func(*args, **(kwargs or {}))
        self._due = False
        out = func(*args, **(kwargs or {})) if self._given is None else self._given
        made = results(func, args, kwargs or {}, out)
        if made:
            with quiet():
                self._damage(made)
        return out

    def _damage(self, made: list[Tensor]) -> None:
        result = self._rng.randrange(len(made))
        element, width = self._rng.randrange(made[result].numel()), width_of(made[result].dtype)
        bit = self._rng.randrange(width)
        self._place = place_of(made[result].detach(), element)
        self._clean = self._place.clone()
        self._place.copy_(flipped(self._clean, 1 << bit))
        self._flip = (result, element, bit, width)


class _Trial:
    """Between a guard's eyes and what looks at the operators: has each result judged `times` times, struck anew."""

    def __init__(self, inner: Step, log: ReadingLog, blows: Blows, times: int) -> None:
        self._inner = inner
        self._log = log
        self._blows = blows
        self._times = times
        self._number = -1
        self.found: list[
            tuple[Flip, int, int]
        ] = []  # with the numbers of its readings, from the first to before the last

    def not_seen(self, operation: str, reason: str) -> None:
        """See `watch.Step`."""
        self._inner.not_seen(operation, reason)

    def unseen(self, operation: str, results: Any, given: Any) -> None:
        """See `watch.Step`."""
        self._inner.unseen(operation, results, given)

    def announced(self, product: Announced, out: Tensor) -> None:
        """Kernels that no mode sees are judged and not struck."""
        self._inner.announced(product, out)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operator, and look at each of its wrong results; returns the right one."""
        if not makes_values(func):
            return self._inner.run(func, args, kwargs)
        self._number += 1
        written = _written(func, args, kwargs)
        with quiet():
            before = [tensor.clone() for tensor in written]
        out = None
        for _ in range(self._times):
            if out is not None and written:
                with quiet():
                    for tensor, value in zip(written, before, strict=True):
                        tensor.copy_(value)
            self._blows.strike(None if written else out)
            first = len(self._log)
            out = self._inner.run(func, args, kwargs)
            flip = self._blows.take_back()
            if flip is None:
                break
            plan = plan_of(func)
            fault = Flip(self._number, str(func), plan is not None and plan.product, *flip)
            self.found.append((fault, first, len(self._log)))
        return out


def strike_all(
    guard: Guard,
    work: Callable[[], Any],
    times: int,
    seed: int = 0,
    narrow: Callable[[], None] = lambda: None,
) -> list[Flip]:
    """Strike each operator that makes values `times` times in one guarded step of `work`; the faults, judged.

    The bit is any of the value's, the element any of the result's, the result any that the operator made. narrow: what
    is done to the guard's eyes once the step has begun.
    """
    with Blows(seed) as blows, guard.step():
        narrow()
        eyes = eyes_of_step()
        trial = _Trial(eyes.step, guard.log, blows, times)
        eyes.step = trial
        work()
    readings = [reading for _, reading in guard.log.by_site()]
    return [replace(fault, seen=_alarms(readings[first:last])) for fault, first, last in trial.found]


def eyes_of_step() -> Eyes:
    """The eyes of the guarded step that this thread is in."""
    eyes = _get_current_dispatch_mode()
    assert isinstance(eyes, Eyes)
    return eyes


def _alarms(readings: Sequence[float]) -> bool:
    return any(not reading <= 1 for reading in readings)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Arguments that the operator writes over."""
    named = enumerate(func._schema.arguments)
    given = [
        args[place] if place < len(args) else kwargs.get(argument.name)
        for place, argument in named
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return [value for value in given if isinstance(value, Tensor)]
