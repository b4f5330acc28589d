"""Which of its arguments an operator writes to, whether its schema says so or not, and the tensors in them."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

# Batch normalisation, whoever's, updates them in training, and no schema says so. In its gradient they are read.
_STATISTICS = frozenset(("running_mean", "running_var"))


class Target(NamedTuple):
    """An argument that an operator writes to. position: None if it goes by name alone. declared: by the schema."""

    position: int | None
    name: str
    declared: bool

    def value(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a call has in its place."""
        return args[self.position] if self.position is not None and self.position < len(args) else kwargs.get(self.name)


@cache
def targets(func: OpOverload) -> tuple[Target, ...]:
    """The arguments that `func` writes to. Communication writes to any of its own."""
    forward = func.namespace == "aten" and not func._schema.name.endswith("_backward")
    found = []
    for position, argument in enumerate(func._schema.arguments):
        declared = argument.alias_info is not None and argument.alias_info.is_write
        if declared or (forward and argument.name in _STATISTICS) or func.namespace == "c10d":
            found.append(Target(None if argument.kwarg_only else position, argument.name, declared))
    return tuple(found)


def written_by(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that `func` writes to."""
    return [tensor for target in targets(func) for tensor in tensors(target.value(args, kwargs))]


def read_by(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors in the other arguments."""
    written = {target.name for target in targets(func)}
    found = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.name not in written:
            found += tensors(args[position] if position < len(args) else kwargs.get(argument.name))
    return found


def tensors(value: Any) -> list[Tensor]:
    """The tensors in an argument, or in what an operator returned."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
