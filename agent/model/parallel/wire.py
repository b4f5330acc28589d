"""Rows as FP8 training sends them to their experts (section 3.3.3): E4M3 codes and their scales, in one row of bytes.

Quantising is what the experts' linears do first anyway, 1x128 with power-of-two scales, and doing it twice changes
nothing: codes under such a scale are exact under any that the quantised values could be given. So an expert's products
are the same whether a row has travelled or not, and a second hop may quantise again instead of passing bytes on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from agent.model.fp8 import Blocks, Recipe
from agent.model.fp8.recipe import BLOCK

_RECIPE = Recipe()


def packed(x: Tensor) -> Tensor:
    """[n, hidden] quantised in 1x128: uint8 [n, hidden + 4 * ceil(hidden / 128)], codes and then fp32 scales.

    A block with a NaN, an infinity or 2^100 is NaN throughout, as in every other quantised tensor.
    """
    n, hidden = x.shape
    count = -(-hidden // BLOCK)
    if n == 0:
        return x.new_empty(0, hidden + 4 * count, dtype=torch.uint8)
    blocks = F.pad(x.float(), (0, -hidden % BLOCK)).view(n, count, BLOCK)
    scales = _RECIPE.scales(blocks.abs().amax(2))
    codes = (blocks / scales.unsqueeze(2)).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.cat([codes.flatten(1)[:, :hidden], scales.view(torch.uint8)], 1)


def unpacked(sent: Tensor, hidden: int) -> Tensor:
    """The values that `packed` rows stand for: bf16 [n, hidden], exact under power-of-two scales."""
    codes = sent[:, :hidden].contiguous().view(torch.float8_e4m3fn)
    scales = sent[:, hidden:].clone(memory_format=torch.contiguous_format)  # where a float may begin
    return Blocks(codes, scales.view(torch.float32)).dequantised().to(torch.bfloat16)
