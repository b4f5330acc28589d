"""Lets code run that bears no hooks on saved tensors, though a guarded step has some: they step aside for that long.

`torch.func`'s transforms, and whoever else enters `torch.autograd.graph.disable_saved_tensors_hooks`, raise where hooks
stand, and so does `register_hooks` on a saved tensor that has some. While a step's hooks stand both functions of torch
are therefore ones that first take the guard's away; other people's stay, and raise as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.autograd import graph

from diagnostics.sensors.saved import Kept, Saved

_autograd: Any = torch._C._autograd
_lock = Lock()
_standing = 0
_disable: Any = graph.disable_saved_tensors_hooks  # as found when replaced
_register: Any = _autograd.SavedTensor.register_hooks


@contextmanager
def standing(saved: Saved) -> Iterator[None]:
    """The step's hooks, while they can be: not where hooks are disabled, nor instead of somebody else's."""
    top = _autograd._top_saved_tensors_default_hooks(True)
    if not _autograd._saved_tensors_hooks_is_enabled():
        saved.watcher.stepped_aside(_autograd._saved_tensors_hooks_get_disabled_error_message())
        yield
    elif top is not None and _guards(top) is None:
        saved.watcher.stepped_aside("other hooks stand, which they would replace")
        yield
    else:
        _patch()
        try:
            with graph.saved_tensors_hooks(saved.pack, saved.unpack):
                yield
        finally:
            _restore()


@contextmanager
def _disable_aside(error_message: str) -> Iterator[None]:
    """`disable_saved_tensors_hooks`, without those of guards until its end."""
    aside = []
    while (top := _autograd._top_saved_tensors_default_hooks(True)) is not None and (saved := _guards(top)) is not None:
        _autograd._pop_saved_tensors_default_hooks()
        aside.append(saved)
        saved.watcher.stepped_aside(error_message)
    try:
        with _disable(error_message):
            yield
    finally:
        for saved in reversed(aside):
            _autograd._push_saved_tensors_default_hooks(saved.pack, saved.unpack)


def _register_aside(tensor: Any, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> None:
    """`SavedTensor.register_hooks`, on a tensor with a guard's hooks as well: it keeps what the new ones make of it."""
    try:
        kept = tensor.data
    except RuntimeError:  # a tensor that is kept no longer: torch says so
        kept = None
    if not isinstance(kept, Kept) or kept.tensor is None:
        _register(tensor, pack, unpack)
        return
    with torch.no_grad():
        kept.theirs = (pack(kept.tensor), unpack)
    kept.tensor = None


def _guards(hooks: tuple[Callable[..., Any], ...]) -> Saved | None:
    """Whose hooks these are, if a guard's."""
    owner = getattr(hooks[0], "__self__", None)
    return owner if isinstance(owner, Saved) else None


def _patch() -> None:
    global _standing, _disable, _register
    with _lock:
        if not _standing:
            _disable, _register = graph.disable_saved_tensors_hooks, _autograd.SavedTensor.register_hooks
        _standing += 1
        graph.disable_saved_tensors_hooks = _disable_aside
        _autograd.SavedTensor.register_hooks = _register_aside


def _restore() -> None:
    global _standing
    with _lock:
        _standing -= 1
        if not _standing:
            graph.disable_saved_tensors_hooks = _disable
            _autograd.SavedTensor.register_hooks = _register
