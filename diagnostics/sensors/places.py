"""Where in a model an operator runs: by its weight's address, by the module being called, by its autograd node."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from diagnostics.sensors.spans import Spans

UNNAMED = "<unnamed>"

FPROP, DGRAD, WGRAD, BACKWARD = "fprop", "dgrad", "wgrad", "backward"


class Place(NamedTuple):
    """A module, and the pass that the operator belongs to."""

    module: str
    pass_: str


class _Forward(NamedTuple):
    """What the forward knows of an operator that its backward has to be told."""

    module: str
    weight: int  # address of a product's weight; 0 where it has none


class Places:
    """Names the place of every operator of a step. Weights may be views, transposes or casts of parameters.

    Modules are followed while the step's context is open (`spans`). Backward operators are matched to their forward by
    the sequence number that autograd gives both, or to the module that made their node.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._spans = Spans({id(module): name or type(model).__name__ for name, module in model.named_modules()})
        self._starts: list[int] = []
        self._weights: list[tuple[int, str]] = []
        self.buffers: set[int] = set()  # addresses of the model's buffers
        self._casts: dict[int, tuple[StorageWeakRef, str]] = {}
        self._forwards: dict[int, _Forward] = {}

    def begin(self, hooks: ExitStack, follow: bool = True) -> None:
        """A step begins: parameters may have moved. `hooks` removes what is registered to follow modules."""
        self._casts.clear()
        self._spans.clear()
        self._forwards.clear()
        spans = sorted(
            (p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), self._owner(name))
            for name, p in self._model.named_parameters()
            if p.numel() and p.layout is torch.strided
        )
        self.buffers = {b.data_ptr() for b in self._model.buffers() if b.layout is torch.strided}
        self._starts = [start for start, _, _ in spans]
        self._weights = [(stop, name) for _, stop, name in spans]
        if follow:
            self._spans.begin(hooks)

    @property
    def elsewhere(self) -> set[str]:
        """Modules whose forward ran in threads that no guard looks at, in the step that began last."""
        return self._spans.elsewhere

    def of(self, operands: Sequence[Tensor], product: bool) -> Place:
        """The place of the operator that reads `operands` now; of a product they are the left and the right one."""
        node: Any = torch._C._current_autograd_node()
        if node is None or torch.is_grad_enabled():
            return self._of_forward(operands, product)
        forward = self._forwards.get(node._sequence_nr())
        if forward is not None and forward.weight and product:
            reads_it = any(value.data_ptr() == forward.weight for value in operands)
            return Place(forward.module, DGRAD if reads_it else WGRAD)
        named = self._named(operands)
        if named is not None:
            return Place(named, DGRAD if product else BACKWARD)
        return Place(self._spans.of(node) or UNNAMED if forward is None else forward.module, BACKWARD)

    def named(self, weight: Tensor) -> str:
        """The module of a weight; UNNAMED when no parameter of the model lies behind it."""
        return self.weight(weight) or UNNAMED

    def weight(self, value: Tensor) -> str | None:
        """The module of the parameter that `value` is, shows or was cast from."""
        if value.layout is not torch.strided:
            return None
        address = value.data_ptr()
        at = bisect_right(self._starts, address) - 1
        if at >= 0 and address < self._weights[at][0]:
            return self._weights[at][1]
        cast = self._casts.get(address)
        if cast is None:
            return None
        if cast[0].cdata != value.untyped_storage()._cdata or cast[0].expired():  # type: ignore[no-untyped-call]
            del self._casts[address]
            return None
        return cast[1]

    def is_parameter(self, value: Tensor) -> bool:
        """Whether `value` lies in the memory of one of the model's parameters."""
        if value.layout is not torch.strided:
            return False
        at = bisect_right(self._starts, value.data_ptr()) - 1
        return at >= 0 and value.data_ptr() < self._weights[at][0]

    def copied(self, source: Tensor, out: Tensor) -> None:
        """`out` holds the values of `source`, in another type or layout: a weight keeps its name."""
        if out.numel() != source.numel() or not self._starts:
            return
        name = self.weight(source)
        if name is not None:
            storage = StorageWeakRef(out.untyped_storage())  # type: ignore[no-untyped-call]
            self._casts[out.data_ptr()] = (storage, name)

    def _of_forward(self, operands: Sequence[Tensor], product: bool) -> Place:
        named = self._named(operands)
        module = named or self._here()
        if torch.is_grad_enabled():
            weight = operands[-1].data_ptr() if product and named is not None else 0
            # The node was made just before the operator ran, and the number counted on. Operators that make no node
            # leave the number as it was.
            self._forwards.setdefault(torch._C._autograd._get_sequence_nr() - 1, _Forward(module, weight))
        return Place(module, FPROP)

    def _named(self, operands: Sequence[Tensor]) -> str | None:
        """Right operands first: that is where weights stand."""
        return next((name for value in reversed(operands) if (name := self.weight(value)) is not None), None)

    def _owner(self, parameter: str) -> str:
        """The module of a weight; other parameters keep their own name. The model itself goes by its class."""
        if parameter == "weight":
            return type(self._model).__name__
        return parameter.removesuffix(".weight")

    def _here(self) -> str:
        return self._spans.here or UNNAMED
