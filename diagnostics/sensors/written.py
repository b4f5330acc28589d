"""Which memory the step's operators wrote, and when: such a change of what autograd keeps is no fault of a device.

Autograd counts writes by a tensor's version, but is not told of all: writes through `.data`, and those by operators
whose schema does not declare them, e.g. batch normalisation's of its running statistics, which it saves and does not
use. Granularity: a storage, so a view's write counts for all of its views.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch._ops import OpOverload

from diagnostics.sensors.checks.arguments import targets, tensors


class Written:
    """Numbers the writes of a step, in the order in which their operators began."""

    def __init__(self) -> None:
        self.writes = 0
        self._last: dict[int, int] = {}  # by storage; one that is still held has its address to itself

    def note(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """An operator that writes to an argument is about to run."""
        trains = _training(func, args, kwargs)
        for target in targets(func):
            if trains or target.declared:
                for tensor in tensors(target.value(args, kwargs)):
                    self.writes += 1
                    self._last[storage_of(tensor)] = self.writes

    def since(self, storage: int, writes: int) -> bool:
        """Whether the storage was written after so many writes."""
        return self._last.get(storage, 0) > writes


def storage_of(tensor: Tensor) -> int:
    """What tells a tensor's storage from all that exist beside it; 0 for tensors that have none."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # sparse ones and subclasses
        return 0


def _training(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether running statistics are updated: not by a normalisation that only reads them."""
    place = next((at for at, argument in enumerate(func._schema.arguments) if argument.name == "training"), None)
    return place is None or bool(args[place] if place < len(args) else kwargs.get("training", True))
