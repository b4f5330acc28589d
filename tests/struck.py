"""Operators that come out wrong, below the sensors: an outsider's own means, which knows nothing of Assay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Struck(TorchDispatchMode):
    """Does something to the result of one operator, or of several, in its memory; counts their calls.

    `at` is the number of the call that is struck, from 0: -1 only counts, None strikes each. `damage` is given what the
    operator gave, a tuple where that are several tensors.
    """

    def __init__(self, operators: Any, damage: Callable[[Any], object], at: int | None = None) -> None:
        super().__init__()
        self.operators = operators if isinstance(operators, tuple) else (operators,)
        self.damage, self.at, self.count = damage, at, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in self.operators:
            if self.at is None or self.count == self.at:
                self.damage(out)
            self.count += 1
        return out


def first(out: Any) -> Tensor:
    """Of several results the first."""
    return out[0] if isinstance(out, (tuple, list)) else out


def plus(error: float) -> Callable[[Tensor], None]:
    """One element is off by this."""

    def damage(out: Tensor) -> None:
        out.view(-1)[out.numel() // 3] += error

    return damage


def largest(times: float) -> Callable[[Tensor], None]:
    """One element is off by so many times the largest."""
    return lambda out: plus(times * max(float(out.float().abs().max()), 1e-3))(out)


def last_bit(out: Any) -> None:
    """Of one element of the first result."""
    flat = first(out).view(-1)
    flat[len(flat) // 2 :][:1].view(INTEGERS[flat.element_size()]).bitwise_xor_(1)


def product(at: int | None = -1, damage: Callable[[Tensor], None] = largest(8.0)) -> Struck:  # noqa: B008 - immutable
    """One product that is wrong, by its number."""
    return Struck(PRODUCTS, damage, at)
