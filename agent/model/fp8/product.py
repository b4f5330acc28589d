"""A linear's three FP8 products under autograd: what is quantised when, what is kept, what the sensors are shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from agent.model.fp8.blocks import Blocks
from agent.model.fp8.choose import backend_for
from agent.model.fp8.recipe import Backend
from agent.model.fp8.tally import Tally
from diagnostics.sensors.announced import Announced, Watcher, announce, made, watchers


def activation_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """What flows between the products: bf16 where these are FP8, else their own type."""
    return torch.bfloat16 if compute_dtype == torch.float8_e4m3fn else compute_dtype


class Fp8:
    """The products of one linear.

    Kept between forward and backward: the bf16 activation and the quantised weight. The gradient of the weight is the
    fp32 sum itself; those of activations are rounded to bf16.
    """

    def __init__(self, backend: Backend | None = None) -> None:
        self.backend = backend  # None: by the device of the activation
        self.activation = Tally("activation", "fprop")
        self.weight = Tally("weight", "fprop")
        self.gradient = Tally("gradient", "dgrad")

    @property
    def tallies(self) -> tuple[Tally, Tally, Tally]:
        """The statistics of the products made since they were cleared."""
        return self.activation, self.weight, self.gradient

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """[tokens, in] times the transpose of the fp32 master [out, in]: bf16 [tokens, out]."""
        place = _Place(weight, self, self.backend or backend_for(x.device), watchers(weight))
        return cast(Tensor, _Product.apply(x.to(torch.bfloat16), weight, place))  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _Place:
    """Which linear, and who watches it."""

    weight: Tensor
    fp8: Fp8
    backend: Backend
    watchers: tuple[Watcher, ...]

    def product(self, pass_: str, left: Blocks, right: Blocks) -> Tensor:
        """fp32 [M, N] = left [M, K] times the transpose of right [N, K]; shown before anybody uses it."""
        with made(self.watchers):
            out = self.backend.product(left, right)
        seen = Announced(
            "fp8",
            pass_,
            self.weight,
            lambda: (left.dequantised(), right.dequantised().t()),
            lambda: self.backend.product(left, right),
        )
        return announce(seen, out, self.watchers)


class _Product(Function):
    """Torch functions are off inside: whoever watches is told of the products, and of nothing smaller."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, place: _Place) -> Tensor:
        with torch._C.DisableTorchFunction():
            left = place.backend.along_rows(x, place.fp8.activation)
            right = place.backend.tiles(weight, place.fp8.weight)
            # Through autograd, not as an attribute: whoever hashes what a step keeps must see the codes too.
            ctx.save_for_backward(x, right.values, right.scales)
            ctx.place, ctx.height = place, right.height
            return place.product("fprop", left, right).to(torch.bfloat16)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, values, scales = ctx.saved_tensors
        place, tiles = ctx.place, Blocks(values, scales, ctx.height)
        dgrad = wgrad = None
        with torch._C.DisableTorchFunction():
            if ctx.needs_input_grad[0]:
                rows = place.backend.along_rows(grad, place.fp8.gradient)
                dgrad = place.product("dgrad", rows, tiles.t()).to(torch.bfloat16)
            if ctx.needs_input_grad[1]:
                left, right = place.backend.along_columns(grad), place.backend.along_columns(x)
                wgrad = place.product("wgrad", left, right)
        return dgrad, wgrad, None
