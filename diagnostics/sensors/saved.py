"""Watches what autograd keeps between forward and backward: bits must still be there when the backward reads them.

Identity. A saved tensor is hashed when it is kept and again when it is used; the two must be equal. The hash is the one
of `multilinear`: any flip of any number of bits of one word shows. Exact: a hash that differs reads PER_DIFFERENCE.

Sees: memory that changed meanwhile, which the check of a product cannot see, since both of its sides share the operand.
Does not see: a value that was wrong when it was kept (its own operator's check does); what checkpointing drops and
makes again; the model's buffers, which a normalisation saves and then updates. Cost: one hash when a tensor is first
kept, one whenever it is used, large ones by as many threads as torch has; on GPUs the hashes and their comparison stay
on the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from diagnostics.sensors.digest import Stamp, stamp
from diagnostics.sensors.quiet import quiet

SENSOR = "saved"
OPERATION = "saved tensor"


class Kept(NamedTuple):
    """A tensor with the hash it had when it was kept."""

    tensor: Tensor
    hash: Stamp


class Watcher(Protocol):
    """Who draws which tensors are hashed, and hears of each comparison."""

    def draws_saved(self, tensor: Tensor) -> bool:
        """Whether this tensor is hashed."""

    def compared(self, tensor: Tensor, equal: bool | Tensor) -> None:
        """A tensor that is about to be used is what was kept, or not: bool, or bool [] on the tensor's device."""

    def spent(self, seconds: float) -> None:
        """Hashing took so long."""

    def tried(self, operation: str, work: Callable[[], Any]) -> Any:
        """Do a sensor's work. If it fails itself, that is counted, and None comes back."""


class Saved:
    """The pair of hooks of `torch.autograd.graph.saved_tensors_hooks`."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._known: dict[tuple[object, ...], tuple[StorageWeakRef, Stamp]] = {}

    def pack(self, tensor: Tensor) -> Tensor | Kept:
        """Keep a tensor, with its hash if it is drawn. Several operators keep one tensor: it is hashed once."""
        kept: Kept | None = self._watcher.tried(OPERATION, lambda: self._hashed(tensor))
        return tensor if kept is None else kept

    def unpack(self, kept: Tensor | Kept) -> Tensor:
        """Give the tensor back, compared."""
        if isinstance(kept, Tensor):
            return kept
        self._watcher.tried(OPERATION, lambda: self._compare(kept))
        return kept.tensor

    def _hashed(self, tensor: Tensor) -> Kept | None:
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
        if not plain or tensor.is_quantized or tensor.is_nested:
            return None
        if not tensor.numel() or not self._watcher.draws_saved(tensor):
            return None
        begin = time.perf_counter()
        with quiet():
            key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
            known = self._known.get(key)
            if known is None or known[0].expired():  # type: ignore[no-untyped-call]
                storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
                known = self._known[key] = (storage, stamp(in_order(tensor)))
        self._watcher.spent(time.perf_counter() - begin)
        return Kept(tensor, known[1])

    def _compare(self, kept: Kept) -> None:
        begin = time.perf_counter()
        with quiet():
            self._watcher.compared(kept.tensor, stamp(in_order(kept.tensor)) == kept.hash)
        self._watcher.spent(time.perf_counter() - begin)


def in_order(tensor: Tensor) -> Tensor:
    """Its values in the order of its memory, each once: q, k and v are views of one product, which lie across."""
    steps = tensor.stride()
    seen = tensor.permute(sorted(range(len(steps)), key=lambda dim: -steps[dim]))
    return seen[tuple(slice(0, 1) if step == 0 else slice(None) for step in seen.stride())]
