"""The modes that show a guard every operator of a step as its kernel's result comes out."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from diagnostics.sensors.announced import Watcher, watchers


class Step(Watcher, Protocol):
    """Whoever looks."""

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one aten operator, and look at what it was given and what it gave."""


class Eyes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees the operators of forward and backward, in whichever thread autograd runs them.

    Only the innermost of a step's eyes looks: results pass through every mode below it first.
    """

    def __init__(self, step: Step) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.step = step
        self.open = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would keep the compiler off the method below, at 3 us an operator: nothing compiles it."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(kind is not Tensor and kind is not nn.Parameter for kind in types):
            if _tracing():
                return func(*args, **(kwargs or {}))  # by the mode below: the subclass would refuse
            return NotImplemented  # a tensor subclass: it takes itself apart first, and its parts are seen
        if not self.open:
            return func(*args, **(kwargs or {}))
        return self.step.run(func, args, kwargs or {})


def _tracing() -> bool:
    """Whether a mode of torch's own (fake tensors, functional ones, a trace) stands below all others."""
    key = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(each) is not None for each in (key.FAKE, key.FUNCTIONAL, key.PROXY))


class CompiledEyes(Eyes):  # type: ignore[no-untyped-call]
    """Leaves compiled functions compiled, and sees the kernels that they call through aten.

    Under plain eyes torch runs what was compiled as it was written. This kind costs some 5 us more an operator.
    """

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """What torch asks a mode before it runs a compiled function."""
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return True

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return super().__torch_dispatch__(func, types, args, kwargs)


def has_compiled() -> bool:
    """Whether this process has compiled anything so far; without importing the compiler."""
    frame = sys.modules.get("torch._dynamo.eval_frame")
    return any(backend is not None for backend in getattr(frame, "cached_backends", {}).values())


class Keeper(TorchFunctionMode):
    """Keeps the eyes innermost: a mode that was entered after them, e.g. a fault model's, would stand above them.

    Also answers for the step when a kernel that no mode can see asks who watches (`announced.watchers`).
    """

    def __init__(self, eyes: Eyes) -> None:
        super().__init__()
        self._eyes = eyes

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is watchers:
            return (*func(*args, **(kwargs or {})), self._eyes.step)
        depth = torch._C._len_torch_dispatch_stack()
        if not depth or torch._C._get_dispatch_stack_at(depth - 1) is self._eyes or not self._eyes.open:
            return func(*args, **(kwargs or {}))
        self._eyes.open = False
        try:
            with type(self._eyes)(self._eyes.step):
                return func(*args, **(kwargs or {}))
        finally:
            self._eyes.open = True
