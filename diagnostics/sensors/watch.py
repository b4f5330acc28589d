"""The modes that show a guard every operator of a step as its kernel's result comes out."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode
from torch.utils._python_dispatch import TorchDispatchMode

from diagnostics.sensors.announced import Watcher
from diagnostics.sensors.compiler import never_compiled
from diagnostics.sensors.formulas import CHOOSES, CONJUGATES, Formulas, conjugates

# By address: a torch operator hashes in Python, slowly, and these live as long as torch does.
_CONJUGATES, _CHOOSES = (frozenset(map(id, funcs)) for funcs in (CONJUGATES, CHOOSES))


class Step(Watcher, Protocol):
    """Whoever looks."""

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one aten operator, and look at what it was given and what it gave."""

    def not_seen(self, operation: str, reason: str) -> None:
        """Something ran that the eyes were kept from."""

    def unseen(self, operation: str, results: Iterable[Tensor | None], given: Iterable[Tensor | None]) -> None:
        """This is what it made of what it was given."""


class Eyes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees the operators of forward and backward, in whichever thread autograd runs them.

    Only the innermost of a step's eyes looks: results pass through every mode below it first. Compiled functions stay
    compiled: of them it sees the kernels that they call through aten. Higher-order operators run as one.
    """

    supports_higher_order_operators = True

    def __init__(self, step: Step, formulas: Formulas | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.step = step
        self.open = True
        self.formulas = Formulas() if formulas is None else formulas

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """What torch asks a mode before it runs a compiled function: otherwise it would run it as it was written."""
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would keep the compiler off the method below, at 3 us an operator: `never_compiled` takes none."""
        return False

    @property
    def watcher(self) -> Watcher | None:
        """Who is to be shown announced products (`announced.watchers`)."""
        return self.step if self.open else None

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(kind is not Tensor and kind is not nn.Parameter for kind in types):
            if _tracing():
                return func(*args, **(kwargs or {}))  # by the mode below: the subclass would refuse
            return NotImplemented  # a tensor subclass: it takes itself apart first, and its parts are seen
        if id(func) in _CONJUGATES:
            with conjugates():
                return self._look(func, args, kwargs or {})
        return self._look(func, args, kwargs or {})

    def _look(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.open:
            return func(*args, **kwargs)
        if self.formulas.waits:
            self.formulas.settle()
        out = self.step.run(func, args, kwargs)
        if id(func) in _CHOOSES:
            self.formulas.wait_for(out)
        return out


def _tracing() -> bool:
    """Whether a mode of torch's own (fake tensors, functional ones, a trace) stands below all others."""
    key = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(each) is not None for each in (key.FAKE, key.FUNCTIONAL, key.PROXY))


# Torch's modules that have another way to compute in evaluation, which they leave when a function mode is active.
_ASK_FOR_MODES = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)


class Keeper(TorchFunctionMode):
    """Keeps the eyes innermost: a mode that was entered after them, e.g. a fault model's, would stand above them.

    It is away while what torch does depends on whether a function mode is active: where its body is being traced by
    the compiler, and in the modules above while they evaluate, if no other function mode is there.
    """

    def __init__(self, eyes: Eyes) -> None:
        super().__init__()
        self._eyes = eyes
        self._thread = threading.get_ident()
        self._away: nn.Module | None = None

    def follow(self, hooks: ExitStack) -> None:
        """Step aside where modules need it, until `hooks` is closed."""
        hooks.callback(self._back)
        hooks.callback(register_module_forward_pre_hook(self._entered).remove)
        hooks.callback(register_module_forward_hook(self._left, always_call=True).remove)

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.compiler.is_compiling():
            return func(*args, **(kwargs or {}))
        eyes = self._eyes
        depth = torch._C._len_torch_dispatch_stack()
        if not depth or torch._C._get_dispatch_stack_at(depth - 1) is eyes or not eyes.open:
            out = func(*args, **(kwargs or {}))
        else:
            eyes.open = False
            try:
                with Eyes(eyes.step, eyes.formulas):
                    out = func(*args, **(kwargs or {}))
            finally:
                eyes.open = True
        if eyes.formulas.waits:
            eyes.formulas.settle()
        return out

    def _entered(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if isinstance(module, _ASK_FOR_MODES) and not module.training and self._stands_alone():
            _pop_mode()  # type: ignore[no-untyped-call]
            self._away = module

    def _left(self, module: nn.Module, args: Any, out: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if module is self._away and threading.get_ident() == self._thread:
            self._back()

    def _back(self) -> None:
        if self._away is not None:
            self._away = None
            _push_mode(self)  # type: ignore[no-untyped-call]

    def _stands_alone(self) -> bool:
        stack = torch._C._len_torch_function_stack()
        return stack == 1 and torch._C._get_function_stack_at(0) is self


for _method in (Eyes.__torch_dispatch__, Keeper.__torch_function__, Keeper._entered, Keeper._left):
    never_compiled(_method)
