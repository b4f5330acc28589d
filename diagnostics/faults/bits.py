"""The bits of values: flipped, carried into, compared; whatever the type of the result."""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGERS = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float64: torch.int64,
    torch.int64: torch.int64,
    torch.int32: torch.int32,
    torch.int16: torch.int16,
    torch.uint8: torch.uint8,
    torch.bool: torch.uint8,
}


class UnknownModel(ValueError):
    """No such fault model, or not for this kind of result; the message lists those there are."""


def width_of(dtype: torch.dtype) -> int:
    """Bits of a value that can flip without making it invalid: one of a bool. Raises UnknownModel."""
    if dtype == torch.bool:
        return 1
    if dtype.is_complex:
        return dtype.to_real().itemsize * 8
    if dtype not in _INTEGERS:
        raise UnknownModel(f"no fault model for {dtype}")
    return dtype.itemsize * 8


def integers(values: Tensor) -> Tensor:
    """The bits of the values, as integers of the same shape. Raises UnknownModel for a type without a model."""
    kind = _INTEGERS.get(values.dtype)
    if kind is None:
        raise UnknownModel(f"no fault model for {values.dtype}")
    return values if values.dtype == kind else values.view(kind)


def flipped(values: Tensor, mask: int) -> Tensor:
    """The values with the bits of `mask` (0 is the lowest) flipped in each."""
    bits = integers(values.contiguous())
    return _back(bits ^ as_signed(mask, bits.dtype), values)


def carried(values: Tensor, amount: int) -> Tensor:
    """The values with `amount` added to their bits as integers: a carry that came one too often, or too seldom."""
    bits = integers(values.contiguous())
    return _back(bits + amount, values)


def _back(bits: Tensor, like: Tensor) -> Tensor:
    return bits if like.dtype == bits.dtype else bits.view(like.dtype)


def as_signed(mask: int, dtype: torch.dtype) -> int:
    """A mask of bits as an integer of that type has it."""
    info = torch.iinfo(dtype)
    return mask - (1 << info.bits) if info.min < 0 and mask >> (info.bits - 1) else mask
