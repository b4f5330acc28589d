"""How a guard and `torch.compile` keep out of each other's way, without importing the compiler, which takes seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def has_compiled() -> bool:
    """Whether `torch.compile` has been called in this process so far."""
    frame = sys.modules.get("torch._dynamo.eval_frame")
    return any(backend is not None for backend in getattr(frame, "cached_backends", {}).values())


def is_compiled(module: nn.Module) -> bool:
    """Whether calling the module runs what was compiled of it."""
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None


def never_compiled(method: Callable[..., Any]) -> None:
    """The compiler leaves the method, and what it calls, alone where it runs between compiled pieces.

    Where its call is traced into a compiled function, the method itself must ask `torch.compiler.is_compiling`.
    """
    frame = torch._C._dynamo.eval_frame
    skip = frame._FrameAction.SKIP
    frame.set_code_exec_strategy(method.__code__, frame._FrameExecStrategy(skip, skip))
