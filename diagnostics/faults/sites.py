"""The operators of a step, numbered as they run: what a campaign draws its targets from."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from diagnostics.sensors.spans import Spans

aten = torch.ops.aten

# They make no values: memory that is still to be filled, questions of types, a number for Python.
_NO_VALUES = frozenset(
    {
        aten.empty,
        aten.empty_like,
        aten.new_empty,
        aten.empty_strided,
        aten.promote_types,
        aten._local_scalar_dense,
        aten._unsafe_view,  # a view, whatever its schema says
    }
)
_PRODUCTS = (aten.mm, aten.addmm)


class Result(NamedTuple):
    """One tensor that an operator made."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Site:
    """One operator of a step: the `number`-th, from 0, of those that make values.

    operator: its name, e.g. "aten.mm.default". pass_: forward or backward; a product of matrices has fprop, dgrad or
    wgrad. module: the innermost in whose forward it ran, or whose forward made its autograd node; "" outside of any.
    node: the autograd node's name, "" in the forward. results: in the order of `results`.
    """

    number: int
    operator: str
    pass_: str
    module: str
    node: str
    results: tuple[Result, ...]


def makes_values(func: Any) -> bool:
    """Whether the operator computes or moves anything. Views do not, and how many there are depends on who looks on."""
    return not func.is_view and func.overloadpacket not in _NO_VALUES


def results(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[Tensor]:
    """The tensors with elements that an operator which makes values has just made or changed.

    None for a copy of memory onto itself (the second half of `x[i] += y`): torch does nothing for it.
    """
    if func.overloadpacket is aten.copy_ and _same_memory(args[0], args[1]):
        return []
    made = _tensors(out if isinstance(out, (tuple, list)) else (out,))
    return made or [t for value in _written(func, args, kwargs) for t in _tensors(value)]


def _same_memory(one: Tensor, other: Tensor) -> bool:
    alike = one.dtype == other.dtype and one.shape == other.shape and one.stride() == other.stride()
    return alike and one.data_ptr() == other.data_ptr()


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor) and value.numel() > 0]


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Arguments that the operator writes (a fused optimizer returns nothing), as lists."""
    found = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            found.append(value if isinstance(value, (tuple, list)) else (value,))
    return found


class Census(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes a site for every operator that makes values while the context is open.

    As long as nothing disturbs it, the same step on the same data has the same operators under the same numbers.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sites: list[Site] = []
        self._spans = Spans({id(module): name for name, module in model.named_modules()})
        self._hooks = ExitStack()
        self._number = -1
        # Storages that were the right-hand side of a product in the forward. Weak references keep their addresses from
        # being used again when the backward frees them.
        self._weights: dict[int, StorageWeakRef] = {}

    def __enter__(self) -> Census:
        self._spans.begin(self._hooks)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exit_: Any) -> None:
        super().__exit__(*exit_)  # type: ignore[no-untyped-call]
        self._hooks.close()

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not makes_values(func):
            return out
        self._number += 1
        made = results(func, args, kwargs or {}, out)
        if made:
            node = torch._C._current_autograd_node()
            module = (self._spans.here if node is None else self._spans.of(node)) or ""
            pass_ = self._pass(func, args, node is None)
            shapes = tuple(Result(tuple(tensor.shape), tensor.dtype) for tensor in made)
            name = "" if node is None else node.name()
            self.sites.append(Site(self._number, str(func), pass_, module, name, shapes))
        return out

    def _pass(self, func: Any, args: tuple[Any, ...], forward: bool) -> str:
        if func.overloadpacket not in _PRODUCTS:
            return "forward" if forward else "backward"
        left, right = (operand.untyped_storage() for operand in args[-2:])
        if forward:
            self._weights[right._cdata] = StorageWeakRef(right)  # type: ignore[no-untyped-call]
            return "fprop"
        return "dgrad" if left._cdata in self._weights or right._cdata in self._weights else "wgrad"
