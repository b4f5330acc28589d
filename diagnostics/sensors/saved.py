"""Watches what autograd keeps between forward and backward: bits must still be there when the backward reads them.

Identity. A saved tensor is hashed when it is kept and again when it is used; the two must be equal. The hash is the one
of `multilinear`: any flip of any number of bits of one word shows. Exact: a hash that differs reads PER_DIFFERENCE.

Under hooks torch no longer compares versions, so these do, of every tensor: what was modified in place raises torch's
own error. What an operator wrote that autograd was not told of (`written`) is not compared, nor a tensor that was given
other memory (`t.data = ...`); coverage says so.

Sees: memory that changed meanwhile, which the check of a product cannot see, since both of its sides share the operand.
Does not see: a value that was wrong when it was kept (its own operator's check does); what checkpointing drops and
makes again; the model's buffers, which a normalisation saves and then updates; regions that bear no hooks (`aside`).
Does not keep: the Python object. Under hooks, whosever, a tensor comes back as another one, without the attributes that
somebody put on it. Cost: one hash when a tensor is first kept, one whenever it is used, large ones by as many threads
as torch has; on GPUs the hashes and their comparison stay on the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from diagnostics.sensors.compiler import never_compiled
from diagnostics.sensors.digest import Stamp, stamp
from diagnostics.sensors.formulas import Formulas
from diagnostics.sensors.quiet import quiet
from diagnostics.sensors.written import Written, storage_of

SENSOR = "saved"
OPERATION = "saved tensor"
REWRITTEN = "written since it was kept, by an operator that autograd was not told of"


@dataclass(slots=True)
class Kept:
    """A tensor as it was when it was kept: its version, and its hash, or why it has none.

    theirs: once somebody has registered hooks for it, what theirs made of it, and what gives the tensor back.
    """

    tensor: Tensor | None
    version: int
    hash: Stamp | None = None
    storage: int = 0
    writes: int = 0
    left_out: str = ""
    theirs: tuple[Any, Callable[[Any], Tensor]] | None = None


class Watcher(Protocol):
    """Who draws which tensors are hashed, and hears of each comparison."""

    written: Written

    def leaves_out(self, tensor: Tensor) -> str:
        """Why this tensor is not hashed; nothing if it is."""

    def compared(self, tensor: Tensor, equal: bool | Tensor) -> None:
        """A tensor that is about to be used is what was kept, or not: bool, or bool [] on the tensor's device."""

    def spent(self, seconds: float) -> None:
        """Hashing took so long."""

    def not_compared(self, reason: str) -> None:
        """A tensor that is about to be used was not hashed, or could not be compared."""

    def stepped_aside(self, reason: str) -> None:
        """What is kept from here on is not seen."""

    def tried(self, operation: str, work: Callable[[], Any]) -> Any:
        """Do a sensor's work. If it fails itself, that is counted, and None comes back."""


class Saved:
    """The pair of hooks of `torch.autograd.graph.saved_tensors_hooks`."""

    def __init__(self, watcher: Watcher, formulas: Formulas | None = None) -> None:
        self.watcher = watcher
        self._formulas = formulas  # nodes that wait for the first tensor that they keep
        self._known: dict[tuple[object, ...], tuple[StorageWeakRef, Stamp, int]] = {}

    def pack(self, tensor: Tensor) -> Kept:
        """Keep a tensor, with its hash if it is drawn. Several operators keep one tensor: it is hashed once."""
        if self._formulas is not None and self._formulas.waits:
            self._formulas.settle()
        kept = Kept(_without_graph(tensor), tensor._version)
        self.watcher.tried(OPERATION, lambda: self._hash(kept, tensor))
        return kept

    def unpack(self, kept: Kept) -> Tensor:
        """Give the tensor back, compared. Raises RuntimeError if it was modified in place, as torch does."""
        if kept.theirs is not None:
            packed, given_back = kept.theirs
            return given_back(packed)
        tensor = kept.tensor
        assert tensor is not None
        if tensor._version != kept.version:
            raise RuntimeError(_modified(tensor, kept.version))
        if kept.hash is not None:
            self.watcher.tried(OPERATION, lambda: self._compare(kept, tensor))
        elif kept.left_out:
            self.watcher.tried(OPERATION, lambda: self.watcher.not_compared(kept.left_out))
        return tensor

    def _hash(self, kept: Kept, tensor: Tensor) -> None:
        if tensor.is_meta or not tensor.numel():
            return
        kept.left_out = _unlike(tensor) or self.watcher.leaves_out(tensor)
        if kept.left_out:
            return
        begin = time.perf_counter()
        written = self.watcher.written
        kept.storage, kept.writes = storage_of(tensor), written.writes
        with quiet():
            seen_as = (tensor.dtype, tensor.is_conj(), tensor.is_neg())
            key = (tensor.data_ptr(), tensor.shape, tensor.stride(), seen_as, tensor._version)
            known = self._known.get(key)
            # `expired` asks the reference, whose storage may be gone and its address another's.
            if known is None or known[0].expired() or written.since(kept.storage, known[2]):  # type: ignore[no-untyped-call]
                storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
                known = self._known[key] = (storage, stamp(in_order(tensor)), kept.writes)
        kept.hash = known[1]
        self.watcher.spent(time.perf_counter() - begin)

    def _compare(self, kept: Kept, tensor: Tensor) -> None:
        if storage_of(tensor) != kept.storage or self.watcher.written.since(kept.storage, kept.writes):
            self.watcher.not_compared(REWRITTEN)
            return
        begin = time.perf_counter()
        with quiet():
            self.watcher.compared(tensor, stamp(in_order(tensor)) == kept.hash)
        self.watcher.spent(time.perf_counter() - begin)


def _unlike(tensor: Tensor) -> str:
    """What about a tensor has no bytes of its own to hash; nothing of most."""
    if not _is_plain(tensor):
        return f"a {type(tensor).__name__}, which is no plain tensor"
    if tensor.layout is not torch.strided:
        return f"a tensor of layout {tensor.layout}"
    return "a quantised tensor" if tensor.is_quantized else "a nested tensor" if tensor.is_nested else ""


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter)


def _without_graph(tensor: Tensor) -> Tensor:
    """It, or, with a graph behind it, its values alone: an operator that keeps its own result would keep itself.

    Torch restores the graph when it unpacks. A leaf stays itself, as it does without hooks: `p.data = ...` is followed.
    """
    if tensor.is_leaf:
        return tensor
    try:
        if not _is_plain(tensor):  # what takes itself apart needs its mode
            with torch._C.DisableTorchFunction():
                return tensor.detach()
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():  # no mode sees it
            return tensor.detach()  # shares the version
    except (RuntimeError, TypeError, NotImplementedError):  # a subclass that cannot: it may cost memory, not the step
        return tensor


def _modified(tensor: Tensor, version: int) -> str:
    """What torch says, but for the operator's name, which the graph had."""
    return (
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"[{tensor.type()} {list(tensor.shape)}] is at version {tensor._version}; expected version {version} instead. "
        "Hint: enable anomaly detection to find the operation that failed to compute its gradient, with "
        "torch.autograd.set_detect_anomaly(True)."
    )


def in_order(tensor: Tensor) -> Tensor:
    """Its values in the order of its memory, each once: q, k and v are views of one product, which lie across."""
    steps = tensor.stride()
    seen = tensor.permute(sorted(range(len(steps)), key=lambda dim: -steps[dim]))
    return seen[tuple(slice(0, 1) if step == 0 else slice(None) for step in seen.stride())]


never_compiled(Saved.pack)
