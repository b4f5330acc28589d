"""Keeps a step's modes from changing bits, where torch computes otherwise when a mode is active.

torch's formulas for some gradients ask whether any dispatch mode is active (`areAnyTensorSubclassLike`) and take
another way if one is, whose roundings, or signs of zero, differ. So the step's modes are off while such a node runs,
unless somebody else's mode is on, under which torch would take that way unguarded as well. What these nodes compute is
not seen; their operators' forward is.

Within a mode's call, torch no longer resolves conjugates: a kernel that takes them of its own intermediate results
reads these unconjugated. `linalg_pinv` and `linalg_lstsq` do, whose complex results are wrong under any mode; here they
run with that put right.

`CHOOSES` and `_NODES` are those of torch 2.13 whose bits were found to differ, first and second gradients, over torch's
own samples for its operators (`torch.testing`'s op_db; fp32, bf16, complex64).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

NOT_SEEN = "torch's formula depends on whether a mode is active: it runs as it does unguarded, and is not seen"

#: Operators whose gradient is computed by one of these nodes.
CHOOSES = frozenset(
    (
        aten.prod.default,
        aten.prod.dim_int,
        aten.cumprod.default,
        aten.cumprod_.default,
        aten._linalg_det.default,
        aten.max.default,
        aten.min.default,
        aten.median.default,
        aten.nanmedian.default,
        aten.masked_fill.Tensor,
        aten.masked_fill_.Tensor,
    )
)
_NODES = frozenset(
    (
        "ProdBackward0",
        "ProdBackward1",
        "CumprodBackward0",
        "LinalgDetBackward0",
        "MaxBackward1",
        "MinBackward1",
        "MedianBackward0",
        "NanmedianBackward0",
        "MaskedFillBackward1",
        "torch::autograd::CopySlices",  # one of them, in place on a view
    )
)
_MARK = "assay.formulas"

#: Kernels that conjugate intermediate results.
CONJUGATES = frozenset(
    getattr(packet, name)
    for packet in (aten.linalg_pinv, aten.linalg_lstsq)
    for name in packet.overloads()  # type: ignore[no-untyped-call]
)


@contextmanager
def conjugates() -> Iterator[None]:
    """Conjugates are resolved in the block, though a mode's call is under way."""
    key = torch._C.DispatchKey.Conjugate
    before = torch._C._dispatch_tls_is_dispatch_key_excluded(key)
    torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        yield
    finally:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, before)


class Formulas:
    """Finds the nodes as they are made. An operator's result gets its node only after the mode has let it go, so it
    waits here until it is saved for the backward, the function that made it returns, or the next operator runs."""

    def __init__(self) -> None:
        self.waits: list[tuple[Tensor, int]] = []

    def wait_for(self, out: Any) -> None:
        """An operator of `CHOOSES` has run."""
        if torch.is_grad_enabled():
            since = torch._C._autograd._get_sequence_nr() - 1
            self.waits += [(leaf, since) for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]

    def settle(self) -> None:
        """Their nodes exist now."""
        waits, self.waits = self.waits, []
        for out, since in waits:
            _mark([out], since)


def _mark(tensors: Iterable[Tensor | None], since: int) -> None:
    """Find, among the nodes behind these tensors that were made since then, those that must run without modes."""
    left: list[Any] = [tensor.grad_fn for tensor in tensors if tensor is not None]
    while left:
        node = left.pop()
        if node is None or node._sequence_nr() < since or _MARK in node.metadata:
            continue
        node.metadata[_MARK] = True
        if node.name() in _NODES:
            away = _Away(node.name())
            node.register_prehook(away.begin)
            node.register_hook(away.end)
        left += [before for before, _ in node.next_functions]


class _Away:
    """The two hooks of one node. Where it raises, torch puts the modes back with the thread's other state."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._modes: dict[int, tuple[list[Any], int]] = {}

    def begin(self, gradients: tuple[Tensor | None, ...]) -> None:
        """Take the step's modes off this thread, if there are no others."""
        stack = [torch._C._get_dispatch_stack_at(at) for at in range(torch._C._len_torch_dispatch_stack())]
        if not stack or not all(hasattr(mode, "formulas") for mode in stack):
            return
        for mode in stack:
            torch._C._pop_torch_dispatch_stack(None)
            if mode.open:
                mode.step.not_seen(self._name, NOT_SEEN)
        self._modes[threading.get_ident()] = stack, torch._C._autograd._get_sequence_nr()

    def end(self, results: tuple[Tensor | None, ...], gradients: tuple[Tensor | None, ...]) -> None:
        """Put them back. With create_graph the node has made others, of which the same may hold."""
        stack, since = self._modes.pop(threading.get_ident(), ([], 0))
        for mode in stack:
            torch._C._push_on_torch_dispatch_stack(mode)
            if mode.open:
                mode.step.unseen(self._name, results, gradients)
        if stack and torch.is_grad_enabled():
            _mark(results, since)
