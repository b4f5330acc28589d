"""Matrices as the checks of products read them: fp32 form and norms, measured once however many products read them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from functools import cached_property

import torch
from torch import Tensor

# An activation feeds several products and a gradient two; with a weight beside them, three are in use at a time.
_KEPT = 3
# Elements of a part: 1 MiB in fp32, which an L2 cache holds.
_PART = 1 << 18
# Of a matrix of more than a part, what `least` norms are made of: one row in so many, or the first columns of as many.
_SHARE = 8


class _Measured:
    """A matrix [..., p, q] in its own row-major layout."""

    def __init__(self, base: Tensor) -> None:
        self.base = base
        self.version = _version(base)

    @cached_property
    def fp32(self) -> Tensor:
        return self.base.float()

    @cached_property
    def row_norms(self) -> Tensor:
        if self.base.is_cuda:
            return _norms(self.base, -1)  # one kernel, which casts in registers
        parts = [_norms(part.float(), -1) for part in self._parts()]
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]

    @cached_property
    def column_norms(self) -> Tensor:
        if self.base.is_cuda:
            return _norms(self.base, -2)
        total = None
        for part in self._parts():
            squares = _column_squares(part.float())
            total = squares if total is None else total.add_(squares)
        assert total is not None
        return total.sqrt_()

    def _parts(self) -> tuple[Tensor, ...]:
        """By rows, so that temporaries stay in the caches: memory that is asked for anew costs ten passes over it."""
        rows = max(1, _PART // max(1, self.base.shape[-1] * self.base[..., :1, :1].numel()))
        return torch.split(self.base, rows, dim=-2) if self.base.shape[-2] > rows else (self.base,)

    @cached_property
    def norm(self) -> Tensor:
        if "row_norms" in self.__dict__:
            return _norms(self.row_norms, -1)
        if "column_norms" in self.__dict__:
            return _norms(self.column_norms, -1)
        return _norms(self.base, (-2, -1))

    @cached_property
    def least_row_norms(self) -> Tensor:
        return _norms(self.base[..., : -(-self.base.shape[-1] // _SHARE)], -1)

    @cached_property
    def least_column_norms(self) -> Tensor:
        return _column_squares(self.base[..., ::_SHARE, :].float()).sqrt_()

    @cached_property
    def least_norm(self) -> Tensor:
        return _norms(self.base[..., ::_SHARE, :], (-2, -1))

    def knows(self, *names: str) -> bool:
        """Whether any of these measures has been taken."""
        return any(name in self.__dict__ for name in names)


class Operand:
    """A matrix [..., m, n], or a batch of them, with its fp32 form [..., m, n] and its norms (fp32, on the device)."""

    def __init__(self, value: Tensor, measured: _Measured | None = None) -> None:
        self.value = value
        self._turned = _is_turned(value)
        self._measured = measured or _Measured(_base(value))

    @property
    def fp32(self) -> Tensor:
        """The value in fp32; not a copy where it is already."""
        return self._measured.fp32.transpose(-1, -2) if self._turned else self._measured.fp32

    @property
    def row_norms(self) -> Tensor:
        """[..., m]."""
        return self._measured.column_norms if self._turned else self._measured.row_norms

    @property
    def norm(self) -> Tensor:
        """Of each matrix, Frobenius: [...]."""
        return self._measured.norm

    @property
    def is_dear(self) -> bool:
        """Whether its rows' norms would take another pass over memory, on a CPU."""
        known = self._measured.knows("column_norms" if self._turned else "row_norms")
        return not known and self.value.numel() > _PART and self.value.device.type == "cpu"

    @property
    def least_row_norms(self) -> Tensor:
        """[..., m]: at most the rows' norms; of a part of each row where they are not known."""
        if not self.is_dear:
            return self.row_norms
        return self._measured.least_column_norms if self._turned else self._measured.least_row_norms

    @property
    def least_norm(self) -> Tensor:
        """[...]: at most the norm of each matrix; that of some rows where it is not known."""
        known = self._measured.knows("norm", "row_norms", "column_norms")
        return self.norm if known or self.value.numel() <= _PART else self._measured.least_norm

    def along(self, signs: Tensor) -> Tensor:
        """[..., m, probes]: the value times signs [..., n, probes], in its own type."""
        if self._turned and self.value.device.type == "cpu":  # quicker there than a matrix that lies across
            return (signs.transpose(-1, -2) @ self._measured.base).transpose(-1, -2)
        return self.value @ signs


class Operands:
    """The last few matrices by identity, so that what one product measured serves the next.

    Invariant: an entry holds its tensor, so its memory cannot be another tensor's; one written over since is measured
    anew: its version counts writes, and `forget` is told of those that `.data` hides from it.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[object, ...], _Measured] = OrderedDict()

    def of(self, value: Tensor) -> Operand:
        """The operand of a matrix, or batch of matrices; a transposed view shares the measures."""
        base = _base(value)
        key = (base.data_ptr(), base.shape, base.stride(), base.dtype, base.is_conj(), base.is_neg())
        found = self._kept.pop(key, None)
        if found is None or found.version != _version(base):
            found = _Measured(base)
        self._kept[key] = found
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return Operand(value, found)

    def forget(self, written: Iterable[Tensor]) -> None:
        """Drop what shares memory with any of these."""
        if self._kept:
            touched = {each.untyped_storage().data_ptr() for each in written if each.layout is torch.strided}
            for key in [key for key, kept in self._kept.items() if kept.base.untyped_storage().data_ptr() in touched]:
                del self._kept[key]

    def clear(self) -> None:
        """Let go of every tensor."""
        self._kept.clear()


def _column_squares(value: Tensor) -> Tensor:
    """Sums of squares over rows; BLAS sums columns 10 times as fast as a strided norm does."""
    squares = value.square()
    return torch.mv(squares.t(), squares.new_ones(squares.shape[0])) if squares.dim() == 2 else squares.sum(-2)


def _norms(value: Tensor, dim: int | tuple[int, int]) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(value, dim=dim, dtype=torch.float32)
    return norms


def _is_turned(value: Tensor) -> bool:
    return value.stride(-1) != 1 and value.stride(-2) == 1


def _base(value: Tensor) -> Tensor:
    return value.transpose(-1, -2) if _is_turned(value) else value


def _version(value: Tensor) -> int:
    return -1 if value.is_inference() else value._version
