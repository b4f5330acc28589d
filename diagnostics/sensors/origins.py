"""Says which value a tensor holds without looking at it: by what made it, of what, in the order things were written."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Name = Hashable


class Origins:
    """Names of what lies in storages. Two tensors with one name and one layout hold the same value, if nothing failed.

    What somebody named holds that name until it is written to. Any other memory goes by its address, by autograd's
    count of the writes to it, and by ours, which counts those through `.data` too: it holds what it held, and what
    another storage holds is another value. Addresses stay unique: a storage that is known is held weakly, which keeps
    its address, not its memory.
    """

    def __init__(self) -> None:
        self._names: dict[int, Name] = {}
        self._held: dict[int, StorageWeakRef] = {}
        self._writes: dict[int, int] = {}

    def of(self, t: Tensor) -> tuple[Name, ...] | None:
        """The value that `t` shows, its layout included; None for what has no memory of its own."""
        if not _plain(t):
            return None
        storage = t.untyped_storage()
        at = storage._cdata
        name = self._names.get(at)
        if name is None:
            self._hold(at, storage)
            name = (at, t._version, self._writes.get(at, 0))
        return (name, *layout(t))

    def call(self, t: Tensor, name: Name | None) -> None:
        """The whole storage of `t` holds what goes by `name` from now on; None: something new, which has no name."""
        if name is None:
            self.wrote(t)
        elif _plain(t):
            storage = t.untyped_storage()
            self._hold(storage._cdata, storage)
            self._names[storage._cdata] = name

    def wrote(self, t: Tensor) -> None:
        """Somebody has written to `t`: its storage holds another value now."""
        if _plain(t):
            at = t.untyped_storage()._cdata
            self._names.pop(at, None)
            self._writes[at] = self._writes.get(at, 0) + 1

    def clear(self) -> None:
        """Forget everything."""
        self._names.clear()
        self._held.clear()
        self._writes.clear()

    def _hold(self, at: int, storage: torch.UntypedStorage) -> None:
        if at not in self._held:
            self._held[at] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]


def layout(t: Tensor) -> tuple[Hashable, ...]:
    """Which part of its storage a tensor shows, and as what."""
    return t.storage_offset(), t.shape, t.stride(), t.dtype, t.is_conj(), t.is_neg()


def fills(t: Tensor) -> bool:
    """Whether nothing lies in the storage of a tensor but its own elements."""
    return _plain(t) and t.numel() * t.element_size() == t.untyped_storage().nbytes()


def _plain(t: Tensor) -> bool:
    """Has memory of its own, and a count of the writes to it."""
    return t.layout is torch.strided and not t.is_quantized and not t.is_inference()
