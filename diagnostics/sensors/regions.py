"""Where activation checkpointing runs what it will run again, or runs it again: torch's two kinds, by one question.

The kind without reentrant autograd pushes hooks for saved tensors, of torch.utils.checkpoint, around both runs. The
reentrant kind shows itself in nothing that can be asked, so while a step is open its forward is torch's own with the
function it was given wrapped: the wrapper counts how deep this thread is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch.utils import checkpoint


class _Depth(threading.local):
    """How many reentrant regions this thread is inside of."""

    value = 0


_depth = _Depth()
_lock = threading.Lock()
_open = 0  # steps that follow reentrant regions
_forward: Callable[..., Any] = checkpoint.CheckpointFunction.forward


def inside() -> bool:
    """Whether this thread is in a checkpointed region, in the forward or when it is run again; 0.2 us.

    False within hooks for saved tensors that the region itself pushed: both runs are alike in that.
    """
    if _depth.value:
        return True
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and getattr(hooks[0], "__module__", None) == checkpoint.__name__


def follow(until: ExitStack) -> None:
    """See the reentrant kind as well, in all threads, until `until` is closed. Steps of several guards may overlap."""
    global _open
    with _lock:
        if not _open:
            checkpoint.CheckpointFunction.forward = staticmethod(_followed)  # type: ignore[method-assign]
        _open += 1
    until.callback(_leave)


def _leave() -> None:
    global _open
    with _lock:
        _open -= 1
        if not _open:
            checkpoint.CheckpointFunction.forward = staticmethod(_forward)  # type: ignore[method-assign]


def _followed(ctx: Any, run_function: Callable[..., Any], *args: Any) -> Any:
    def run(*given: Any) -> Any:
        _depth.value += 1
        try:
            return run_function(*given)
        finally:
            _depth.value -= 1

    return _forward(ctx, run, *args)
