"""What autograd keeps is compared whatever its layout: views that lie across, with gaps, expanded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diagnostics.sensors.saved import Saved
from diagnostics.sensors.written import Written


class Hears:
    """Draws everything, and keeps what it is told."""

    def __init__(self) -> None:
        self.written = Written()
        self.equal: list[bool] = []

    def leaves_out(self, tensor: Tensor) -> str:
        return ""

    def compared(self, tensor: Tensor, equal: bool) -> None:
        self.equal.append(equal)

    def spent(self, seconds: float) -> None:
        pass

    def not_compared(self, reason: str) -> None:
        raise AssertionError(reason)

    def stepped_aside(self, reason: str) -> None:
        raise AssertionError(reason)

    def tried(self, operation: str, work: Callable[[], Any]) -> Any:
        return work()


VIEWS = {
    "whole": lambda t: t,
    "across": lambda t: t.permute(2, 0, 1, 3),
    "with gaps": lambda t: t[:, :, 1].transpose(1, 2),
    "expanded": lambda t: t[:, :, :, None].expand(-1, -1, -1, 3, -1).transpose(0, 3),
    "backwards in time": lambda t: t.flip(0)[1:],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("view", VIEWS)
def test_one_bit_of_a_kept_view_shows_and_what_lies_between_does_not(view: str, dtype: torch.dtype) -> None:
    hears = Hears()
    saved = Saved(hears)
    kept = VIEWS[view](torch.randn(6, 40, 3, 70).to(dtype))
    packed = saved.pack(kept)
    assert saved.unpack(packed) is kept
    bits = kept.data.view({2: torch.int16, 4: torch.int32}[dtype.itemsize])
    place = tuple(size // 2 for size in kept.shape)
    bits[place] ^= 1
    saved.unpack(packed)
    bits[place] ^= 1
    saved.unpack(packed)
    assert hears.equal == [True, False, True]
    if view == "with gaps":
        assert kept._base is not None
        kept._base.data[:, :, 0] += 1  # another view's values
        saved.unpack(packed)
        assert hears.equal[-1]
