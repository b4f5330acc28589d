"""Recognises matrix products among torch's functions and finds their autograd nodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# From a product's result back to its node: a view or two (3-D activations are flattened) may lie between.
_HOPS = 3
_NODES = ("MmBackward0", "AddmmBackward0")


@dataclass(frozen=True, slots=True)
class Product:
    """out [M, N] = left [M, K] right [K, N] (+ bias [N]); `weight` is the operand that has a name."""

    operation: str
    left: Tensor
    right: Tensor
    bias: Tensor | None
    weight: Tensor

    def in_type_of(self, out: Tensor) -> Product:
        """The same product, detached and cast as autocast casts it before the kernel."""
        left = self.left if self.left.dim() == 2 else self.left.reshape(-1, self.left.shape[-1])
        bias = None if self.bias is None else self.bias.to(out.dtype)
        return replace(self, left=left.to(out.dtype), right=self.right.to(out.dtype), bias=bias)


def product_of(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Product | None:
    """The product that calling `func` makes, or None if it is none that the row check covers."""
    read = _READERS.get(func)
    return None if read is None else read(*args, **(kwargs or {}))


def backward_node(out: Tensor) -> Any | None:
    """The autograd node whose inputs' gradients end with those of left and right; None if there is none near."""
    node: Any = out.grad_fn
    for _ in range(_HOPS):
        if node is None or node.name() in _NODES:
            return node
        node = node.next_functions[0][0] if node.next_functions else None
    return None


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Product | None:
    if weight.dim() != 2:
        return None
    return Product("linear", input, weight.t(), bias, weight)


def _matmul(input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Product | None:
    if input.dim() != 2 or other.dim() != 2 or out is not None:
        return None
    return Product("matmul", input, other, None, other)


def _addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1, out: Tensor | None = None
) -> Product | None:
    if input.dim() != 1 or beta != 1 or alpha != 1 or out is not None:
        return None
    return Product("addmm", mat1, mat2, input, mat2)


def _mm(input: Tensor, mat2: Tensor, *, out: Tensor | None = None) -> Product | None:
    return _matmul(input, mat2, out=out)


_READERS: dict[Callable[..., Any], Callable[..., Product | None]] = {
    F.linear: _linear,
    torch.mm: _mm,
    Tensor.mm: _mm,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
}
