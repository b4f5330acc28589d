"""The multilinear hash in one kernel, which leaves it on the device."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diagnostics.sensors.kernels import programs
from diagnostics.sensors.multilinear import BLOCK_WORDS, TABLE_SEED, WORD_BYTES, weight_table

#: Words a program takes, a whole block's: 16 a thread in eight warps. 256 MiB take 0.085 ms on an H200; 1,024 words in
#: four warps, with four times as many additions to the one total, 0.114.
_TILE = 4096
_WARPS = 8


def hashed(flat: Tensor, start: int, tile: int = _TILE, warps: int = _WARPS) -> Tensor:
    """Digest of bytes, uint8 [n] contiguous, whose first word has the global index `start`: int64 [], bits as `digest`.

    tile: words a program takes, a power of two that divides BLOCK_WORDS. Nothing waits for the device. The tail of 1-3
    bytes, padded to a word, is a launch of its own.
    """
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    whole = flat.numel() // WORD_BYTES
    if whole and flat.data_ptr() % WORD_BYTES:
        flat = flat.clone()  # a byte view may start anywhere; words need 4-byte alignment
    if whole:
        _launch(flat[: whole * WORD_BYTES], start, total, tile, warps)
    tail = flat[whole * WORD_BYTES :]
    if tail.numel():
        _launch(F.pad(tail, (0, WORD_BYTES - tail.numel())), start + whole, total, tile, warps)
    return total


def _launch(flat: Tensor, start: int, total: Tensor, tile: int, warps: int) -> None:
    words = flat.view(torch.int32)
    count = words.numel()
    tiles = (start + count - 1) // tile - start // tile + 1
    programs.hash_words[(tiles,)](
        words,
        _table(flat.device),
        total,
        start,
        count,
        TABLE_SEED,
        BLOCK_WORDS=BLOCK_WORDS,
        TILE=tile,
        num_warps=warps,
    )


@lru_cache  # 32 KiB a device
def _table(device: torch.device) -> Tensor:
    return torch.from_numpy(weight_table().view(np.int64).copy()).to(device)
