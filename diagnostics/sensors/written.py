"""Which memory the step's operators wrote, and when: such a change of what autograd keeps is no fault of a device.

Autograd counts writes by a tensor's version, but is not told of all: writes through `.data`, and those by operators
whose schema does not declare them, e.g. batch normalisation's of its running statistics, which it saves and does not
use. Granularity: a storage, so a view's write counts for all of its views.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor
from torch._ops import OpOverload

# Written wherever they occur but in a gradient, also by operators whose schema says nothing of it.
_STATISTICS = frozenset(("running_mean", "running_var"))


class _Target(NamedTuple):
    """An argument that an operator writes to. training_only: not where its `training` is False."""

    position: int | None
    name: str
    training_only: bool


class Written:
    """Numbers the writes of a step, in the order in which their operators began."""

    def __init__(self) -> None:
        self.writes = 0
        self._last: dict[int, int] = {}  # by storage; one that is still held has its address to itself

    def note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """An operator is about to run."""
        targets, training = _targets(func)
        if not targets:
            return
        trains = training is None or _argument(training, "training", args, kwargs) is not False
        for position, name, training_only in targets:
            if trains or not training_only:
                for tensor in _tensors(_argument(position, name, args, kwargs)):
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


@cache
def _targets(func: Any) -> tuple[tuple[_Target, ...], int | None]:
    """With the position of the argument `training`, None where there is none."""
    if not isinstance(func, OpOverload):
        return (), None
    schema = func._schema
    found, training = [], None
    forward = func.namespace == "aten" and not schema.name.endswith("_backward")
    for position, argument in enumerate(schema.arguments):
        declared = argument.alias_info is not None and argument.alias_info.is_write
        undeclared = (forward and argument.name in _STATISTICS) or func.namespace == "c10d"
        if declared or undeclared:
            place = None if argument.kwarg_only else position
            found.append(_Target(place, argument.name, training_only=not argument.kwarg_only))
        elif argument.name == "training":
            training = position
    return tuple(found), training


def _argument(position: int | None, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[position] if position is not None and position < len(args) else kwargs.get(name)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
