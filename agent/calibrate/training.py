"""Products in FP8 and steps of `tiny` as calibration meets them: what only the model's own code can run."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from agent.model.fp8.product import Fp8
from agent.model.presets import PRESETS
from agent.model.v3 import V3
from agent.training.engine import loss_scale
from diagnostics.calibration.operators import Family
from diagnostics.calibration.values import SCALES, Draw

# Steps of each precision: the first are the ones whose activations are smallest and most alike, and by these the loss
# has left the plateau of the letters' frequencies.
STEPS = 30

_PRESET = PRESETS["tiny"]

# A text that is on every machine with this Python; one of a few kilobytes is learned soon, so probabilities get steep.
_TEXT = inspect.getsource(textwrap).encode()


def fp8_products(draw: Draw, dtype: torch.dtype) -> None:
    """One linear's three products on the device's own back end, which announces them."""
    tokens, inner, outer = draw.size(96), draw.size(1024), draw.size(512)
    scale = draw.pick(SCALES)
    x = draw.values(tokens, inner, dtype=torch.bfloat16, scale=scale).requires_grad_()
    weight = draw.values(outer, inner, dtype=dtype).requires_grad_()
    torch.autograd.backward(Fp8()(x, weight), draw.values(tokens, outer, dtype=torch.bfloat16, scale=1 / scale))


class Training:
    """Steps of `tiny` with AdamW, each trial the next one; a model for each precision, from the same values."""

    def __init__(self) -> None:
        self._models: dict[torch.dtype, tuple[V3, torch.optim.Optimizer]] = {}

    def step(self, draw: Draw, dtype: torch.dtype) -> None:
        """One in the precision of that name, and beside fp32 one in FP8, whose sums are fp32."""
        self._step(draw, dtype)
        if dtype == torch.float32:
            self._step(draw, torch.float8_e4m3fn)

    def _step(self, draw: Draw, precision: torch.dtype) -> None:
        if precision not in self._models:
            model = V3(_PRESET.config, precision).to(draw.device)
            self._models[precision] = model, torch.optim.AdamW(model.parameters(), lr=_PRESET.peak_lr)
        model, optimizer = self._models[precision]
        scale = loss_scale(_PRESET) if precision == torch.float8_e4m3fn else 1.0
        total = model.loss(_tokens(draw)).total
        torch.autograd.backward(total, total.new_full((), scale))
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(1 / scale)
        optimizer.step()
        optimizer.zero_grad()


def _tokens(draw: Draw) -> Tensor:
    """int64 [batch, time + 1 + D] from random places of the text."""
    text = torch.frombuffer(bytearray(_TEXT), dtype=torch.uint8).long().to(draw.device)
    starts = draw.index(len(_TEXT) - _PRESET.sample_len, _PRESET.micro_batch)
    return text[starts[:, None] + torch.arange(_PRESET.sample_len, device=draw.device)]


def families() -> Mapping[str, Family]:
    """By name, as `diagnostics.calibration.operators` has its own; a new training run each time."""
    return MappingProxyType(
        {
            "FP8 products": Family(("fp8",), fp8_products, (torch.float32,)),
            "training": Family(("mm", "fp8"), Training().step, (torch.float32, torch.bfloat16), most=STEPS),
        }
    )
