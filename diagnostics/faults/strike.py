"""Strikes any operator of a real training step, below every sensor: in the operator's own result, by coordinates.

The modes here are entered outside of the guard's, so they stand below it: a result is corrupted before the guard, or
anybody else, sees it. The guard's own arithmetic runs with all modes off (`diagnostics.sensors.quiet`) and is neither
counted nor struck.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from diagnostics.faults.models import Damage, Fault, damage
from diagnostics.faults.sites import makes_values, results

#: (operator, arguments by position and by name, damage), after each blow; the operator is None where memory is struck.
Witness = Callable[[Any, tuple[Any, ...], dict[str, Any], Damage], None]


class StepDiffers(RuntimeError):
    """The operator at the drawn number is not the one that the census found there."""


@dataclass(frozen=True, slots=True)
class Blow:
    """What happens to one operator. operator: its name, as the census has it. result: which of its `Site.results`."""

    operator: str
    fault: Fault
    result: int = 0


class Strike(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Corrupts the results of the operators with these numbers (`sites.Site.number`) while the context is open.

    `witness` is told of each blow.

    With `strict` it raises StepDiffers from within the step when another operator has the number. Without, such a blow
    falls on whatever operator is there, or is lost where that makes no such result: after a first blow a step may
    take another course.
    """

    def __init__(self, blows: Mapping[int, Blow], witness: Witness, strict: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._blows = blows
        self._witness = witness
        self._strict = strict
        self._number = -1

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not makes_values(func):
            return out
        self._number += 1
        blow = self._blows.get(self._number)
        if blow is not None:
            self._strike(blow, func, args, kwargs or {}, out)
        return out

    def _strike(self, blow: Blow, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if self._strict and str(func) != blow.operator:
            raise StepDiffers(f"operator {self._number} of the step is {func}, and was {blow.operator} in the census")
        made = results(func, args, kwargs, out)
        if not self._strict and len(made) <= blow.result:
            return
        target = made[blow.result]
        self._witness(func, args, kwargs, damage(target, blow.fault))


class Triggered(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A device that is wrong whenever an operand's value lies in a range, from one operator of the step on.

    The range is `width` (relative) around a value that the seed draws from the first operand of operator `number`.
    From there on every call of the same operator whose first operand has a value in the range is struck by the blow's
    fault at the place of the first such value (counted in row-major order, modulo the result's size). `width`: one part
    in a thousand holds a handful of a matrix's values.
    """

    def __init__(self, number: int, blow: Blow, witness: Witness, width: float = 1e-3) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._due = number
        self._blow = blow
        self._witness = witness
        self._width = width
        self._number = -1
        self._range: tuple[float, float] | None = None

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not makes_values(func):
            return func(*args, **(kwargs or {}))
        self._number += 1
        before = self._operand(func, args)
        place = None if before is None else self._place(before)
        out = func(*args, **(kwargs or {}))
        if place is not None:
            self._corrupt(func, args, kwargs or {}, out, place)
        return out

    def _operand(self, func: Any, args: tuple[Any, ...]) -> Tensor | None:
        """The first operand where the device may be wrong: read before the operator, which may write it."""
        if self._number < self._due or str(func) != self._blow.operator:
            if self._number == self._due:
                raise StepDiffers(f"operator {self._due} of the step is {func}, not {self._blow.operator}")
            return None
        return next((a for a in args if isinstance(a, Tensor) and a.is_floating_point() and a.numel()), None)

    def _place(self, operand: Tensor) -> int | None:
        """Index of the first value within the range, which the first call settles."""
        values = operand.detach().float().flatten()
        if self._range is None:
            at = float(values[self._blow.fault.seed % values.numel()])
            low, high = sorted((at * (1 - self._width), at * (1 + self._width)))
            self._range = (low, high)
        inside = (values >= self._range[0]) & (values <= self._range[1])
        return int(inside.int().argmax()) if bool(inside.any()) else None

    def _corrupt(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, place: int) -> None:
        target = results(func, args, kwargs, out)[self._blow.result]
        self._witness(func, args, kwargs, damage(target, self._blow.fault, place % target.numel()))


class _Made(NamedTuple):
    """A result of the forward: a reference that does not keep it, and how it lies in its storage."""

    storage: StorageWeakRef
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]

    def tensor(self) -> Tensor:
        """It, sharing its memory, which must still be there."""
        held = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        whole = torch.empty(0, dtype=self.dtype, device=held.device)
        return whole.set_(held, self.offset, self.shape, self.stride)


class SavedFlip(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Corrupts one result of the forward that is still kept when the backward begins: as memory does, not an operator.

    `ordinal` counts what is kept by then, in the order in which it was made, modulo how many there are. Parameters are
    no results; what they were cast to is one.
    """

    def __init__(self, ordinal: int, fault: Fault, witness: Witness) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ordinal = ordinal
        self._fault = fault
        self._witness = witness
        self._made: dict[int, _Made] = {}
        self._struck = False

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        forward = torch._C._current_autograd_node() is None
        if not self._struck and not forward:
            self._struck = True
            self._strike()
        out = func(*args, **(kwargs or {}))
        if forward and not self._struck and not func.is_view:
            for tensor in results(func, args, kwargs or {}, out):
                self._remember(tensor, new=not func._schema.is_mutable)
        return out

    def _remember(self, tensor: Tensor, new: bool) -> None:
        """What an operator writes into counts if it was made in the step (empty, and then filled), else it is state."""
        storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        if not new and storage.cdata not in self._made:
            return
        offset = int(tensor.storage_offset())
        self._made[storage.cdata] = _Made(storage, tensor.dtype, offset, tensor.shape, tensor.stride())

    def _strike(self) -> None:
        kept = [made for made in self._made.values() if not made.storage.expired()]  # type: ignore[no-untyped-call]
        target = kept[self._ordinal % len(kept)].tensor()
        self._made.clear()
        self._witness(None, (), {}, damage(target, self._fault))
