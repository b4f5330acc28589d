"""Products whose kernels torch's functions do not show (FP8, fused ones): announced by whoever makes them.

Asking who watches is itself a torch function, so the function modes of fault models answer it, in the forward; the
guard is found by its dispatch mode. The answer is kept for the backward, where a function mode need not be active
(`Tensor.backward` suspends it) and which may run in another thread. With nobody watching it costs one question.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function


@dataclass(frozen=True, slots=True)
class Announced:
    """One product out [M, N] = left [M, K] right [K, N].

    operation: the kind of kernel, by which its tolerance is looked up, with out's type: "fp8" (fp32 out), or "mm".
    pass_: fprop, dgrad or wgrad. weight: the parameter that names the place. operands: gives left and right as the
    kernel saw them (of "fp8" dequantised, fp32); called only where somebody watches, after the product was made. again:
    makes it once more, of the same operands in memory of its own, for whoever compares bits; None: it cannot.
    """

    operation: str
    pass_: str
    weight: Tensor
    operands: Callable[[], tuple[Tensor, Tensor]]
    again: Callable[[], Tensor] | None = None


class Watcher(Protocol):
    """Who is shown a product right after it was made."""

    def announced(self, product: Announced, out: Tensor) -> None:
        """`out` is the kernel's own result, before anybody used it."""


def watchers(weight: Tensor) -> tuple[Watcher, ...]:
    """Who watches the products of `weight` now, in the order in which they are to be shown; call it in the forward.

    A function mode, which changes results, answers with itself and what it finds below; those that read them, whose
    dispatch mode has a `watcher`, come last: so faults lie below the sensors whichever mode was entered first.
    """
    if has_torch_function((weight,)):
        found: tuple[Watcher, ...] = handle_torch_function(watchers, (weight,), weight)
        return found
    if torch.compiler.is_compiling():
        return ()
    return tuple(_guards())


def guarded_here() -> bool:
    """Whether what runs in this thread is seen by a guard."""
    return any(True for _ in _guards())


def _guards() -> Iterator[Watcher]:
    for at in range(torch._C._len_torch_dispatch_stack()):
        watcher: Watcher | None = getattr(torch._C._get_dispatch_stack_at(at), "watcher", None)
        if watcher is not None:
            yield watcher


class _Depth(threading.local):
    """How many announced kernels this thread is inside of."""

    value = 0


_depth = _Depth()


@contextmanager
def made(to: Sequence[Watcher]) -> Iterator[None]:
    """Around the making of a product that will be announced: its parts are not looked at one by one meanwhile.

    What is built of torch's own functions (an emulation, products into shared memory) is then shown once, as a whole.
    """
    if not to:
        yield
        return
    _depth.value += 1
    try:
        yield
    finally:
        _depth.value -= 1


def inside_announced() -> bool:
    """Whether this thread is making a product that will be announced."""
    return _depth.value > 0


def announce(product: Announced, out: Tensor, to: Sequence[Watcher]) -> Tensor:
    """Show a product to each watcher, before anybody uses its result; returns `out` [M, N]."""
    for watcher in to:
        watcher.announced(product, out)
    return out
