"""Keeps the sensors' own arithmetic out of everybody's sight: it is not part of the computation under test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.utils._python_dispatch import _disable_current_modes


@contextmanager
def quiet() -> Iterator[None]:
    """No gradients, no function modes (the guard's own among them), no dispatch modes while the block runs.

    A profiler or a fault model that counts the step's aten.mm calls must not count, or corrupt, the checks' products.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch._C.DisableTorchFunction())
        if torch._C._len_torch_dispatch_stack():
            stack.enter_context(_disable_current_modes())
        yield
