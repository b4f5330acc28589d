"""Keeps the sensors' own arithmetic out of everybody's sight: it is not part of the computation under test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_HIDDEN = (
    "Python",  # dispatch modes: fault models, profilers, the guard's own
    "PythonTLSSnapshot",
    "AutogradCPU",
    "AutogradCUDA",
    "ADInplaceOrView",
    "AutocastCPU",  # a check's fp32 product must not become one of bf16
    "AutocastCUDA",
)


def _keys() -> torch._C.DispatchKeySet:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.Python)
    for name in _HIDDEN:
        keys = keys | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
    return keys


_KEYS = _keys()


@contextmanager
def quiet() -> Iterator[None]:
    """No gradients, no autocast, no function modes and no dispatch modes while the block runs.

    A profiler or a fault model that counts the step's aten.mm calls must not count, or corrupt, the checks' products.
    """
    with torch._C._ExcludeDispatchKeyGuard(_KEYS), torch._C.DisableTorchFunction():
        yield
