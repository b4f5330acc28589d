"""The same step with its sums in another order: what clean runs on other hardware differ by, the natural floor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
#: Operators that sum over the columns of one operand and the rows of another, and which arguments these are.
_PRODUCTS = {aten.mm: (0, 1), aten.addmm: (1, 2), aten.bmm: (0, 1), aten.baddbmm: (1, 2), aten.mv: (0, 1)}


class Reordered(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives every product its terms in a random order. The mathematics and the kernels are the same."""

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generator = torch.Generator().manual_seed(seed)

    def samples(self, n: int) -> Tensor:
        """An order of the batch, for sums over tokens that are not products."""
        return torch.randperm(n, generator=self._generator)

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        places = _PRODUCTS.get(func.overloadpacket)
        if places is not None:
            left, right = places
            order = torch.randperm(args[left].shape[-1], generator=self._generator)
            changed = list(args)
            changed[left] = args[left].index_select(-1, order)
            changed[right] = args[right].index_select(0 if args[right].dim() == 1 else -2, order)
            args = tuple(changed)
        return func(*args, **(kwargs or {}))
