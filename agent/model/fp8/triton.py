"""The back end of Triton kernels, for GPUs with E4M3. Compared with the emulation under Triton's interpreter; its
quantisation has run on an H200, its product on no GPU yet."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from agent.model.fp8 import kernels
from agent.model.fp8.blocks import Blocks
from agent.model.fp8.recipe import BLOCK, Recipe
from agent.model.fp8.tally import Tally

#: Rows a program quantises when each has scales of its own: 16 x 128 elements are 16 a thread in four warps.
_ROWS = 16
#: Tile of a product; 64 x 64 x 128 E4M3 operands take 16 KiB of shared memory a stage. Not tuned on a GPU.
_TILE = 64


class Triton:
    """See `recipe.Backend`."""

    def __init__(self, recipe: Recipe | None = None) -> None:
        self.recipe = recipe or Recipe()

    def along_rows(self, x: Tensor, tally: Tally | None = None) -> Blocks:
        """[rows, k] quantised in 1x128 blocks along k."""
        return self._quantised(x, 1, tally)

    def along_columns(self, x: Tensor) -> Blocks:
        """The transpose of [k, columns], quantised in 1x128 blocks along k; read in place, written along k."""
        return self._quantised(x.t(), 1, None)

    def tiles(self, weight: Tensor, tally: Tally | None = None) -> Blocks:
        """[rows, k] quantised in 128x128 blocks."""
        return self._quantised(weight, BLOCK, tally)

    def product(self, left: Blocks, right: Blocks) -> Tensor:
        """left [M, K] times the transpose of right [N, K]: fp32 [M, N]."""
        (m, k), n = left.values.shape, right.values.shape[0]
        out = torch.empty(m, n, dtype=torch.float32, device=left.values.device)
        grid = (triton.cdiv(m, _TILE), triton.cdiv(n, _TILE))
        tiled = right.height == BLOCK
        kernels.multiply[grid](
            left.values, right.values, left.scales, right.scales, out, m, n, k, TILED=tiled, M=_TILE, N=_TILE
        )
        return out

    def _quantised(self, x: Tensor, height: int, tally: Tally | None) -> Blocks:
        rows, k = x.shape
        shared = height == BLOCK
        tall = BLOCK if shared else _ROWS
        grid = (triton.cdiv(rows, tall), triton.cdiv(k, BLOCK))
        codes = torch.empty(rows, k, dtype=torch.float8_e4m3fn, device=x.device)
        scales = torch.empty(grid[0] if shared else rows, grid[1], dtype=torch.float32, device=x.device)
        counts = torch.empty(*grid, 4, dtype=torch.float32, device=x.device)
        if x.numel() == 0:
            return Blocks(codes, scales, height)
        kernels.quantise[grid](
            x,
            codes,
            scales,
            counts,
            rows,
            k,
            x.stride(0),
            x.stride(1),
            HEIGHT=tall,
            SHARED=shared,
            POWER_OF_TWO=self.recipe.power_of_two,
            COUNT=tally is not None,
        )
        if tally is not None:
            flat = counts.flatten(0, 1)
            tally.add(torch.cat([flat[:, :1].amax(0), flat[:, 1:].sum(0)]), x.numel())
        return Blocks(codes, scales, height)


BACKEND = Triton
