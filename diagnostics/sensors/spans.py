"""Follows modules: which one's forward is running, and which one's made an autograd node.

Autograd numbers nodes as they are made, and a forward makes those between the numbers at its begin and its end: so a
node has a module even where its forward shows no operator, as in a function of autograd that was written by hand.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from diagnostics.sensors.announced import guarded_here
from diagnostics.sensors.compiler import never_compiled


class Spans:
    """`names` are those of modules by id; others go by the module that called them."""

    def __init__(self, names: Mapping[int, str]) -> None:
        self.elsewhere: set[str] = set()  # modules whose forward ran in a thread that no guard looks at
        self._names = names
        self._thread = 0
        self._stack: list[str] = []
        self._starts: list[int] = []
        self._owners: list[str | None] = []

    def begin(self, hooks: ExitStack) -> None:
        """Follow modules from now on, by torch's global hooks, until `hooks` is closed. Forgets what was before."""
        self.clear()
        self.elsewhere.clear()
        self._thread = threading.get_ident()
        hooks.callback(register_module_forward_pre_hook(self._entered).remove)
        hooks.callback(register_module_forward_hook(self._left, always_call=True).remove)

    def clear(self) -> None:
        """Forget all nodes."""
        self._stack.clear()
        self._starts.clear()
        self._owners.clear()

    @property
    def here(self) -> str | None:
        """The innermost module whose forward runs; None outside of any."""
        return self._stack[-1] if self._stack else None

    def of(self, node: Any) -> str | None:
        """The innermost module whose forward made the node; None for one that none made."""
        at = bisect_right(self._starts, node._sequence_nr()) - 1
        return self._owners[at] if at >= 0 else None

    def _entered(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if self._is_elsewhere():
            if id(module) in self._names or getattr(module, "_is_replica", False):  # DataParallel's
                self.elsewhere.add(self._names.get(id(module), type(module).__name__))
            return
        self._stack.append(self._names.get(id(module), self.here or ""))
        self._mark()

    def _left(self, module: nn.Module, args: Any, out: Any) -> None:
        if torch.compiler.is_compiling() or self._is_elsewhere():
            return
        if self._stack:
            self._stack.pop()
        self._mark()

    def _is_elsewhere(self) -> bool:
        """Whether this is a thread that has no part in the step: autograd's have its modes."""
        return threading.get_ident() != self._thread and not guarded_here()

    def _mark(self) -> None:
        self._starts.append(torch._C._autograd._get_sequence_nr())
        self._owners.append(self.here)


for _hook in (Spans._entered, Spans._left):
    never_compiled(_hook)
