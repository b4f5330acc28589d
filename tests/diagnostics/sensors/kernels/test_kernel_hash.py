"""The hash's kernel under Triton's interpreter: the reference's bits, for any length, start and alignment."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from on_device import DEVICE
from torch import Tensor

from diagnostics.sensors import digest as module
from diagnostics.sensors.digest import digest, digest_on_device
from diagnostics.sensors.kernels.hashing import hashed
from diagnostics.sensors.multilinear import BLOCK_WORDS, MASK

STARTS = st.one_of(st.integers(0, 3 * BLOCK_WORDS), st.integers(0, 2**40), st.sampled_from([0, 1, BLOCK_WORDS - 1]))


def bytes_of(size: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)).to(DEVICE)


@settings(max_examples=60)
@given(st.integers(0, 5 * BLOCK_WORDS), STARTS, st.integers(0, 3), st.integers(0, 2**31))
def test_the_bits_are_the_references(size: int, start: int, skip: int, seed: int) -> None:
    flat = bytes_of(size + skip, seed)[skip:]
    found = hashed(flat, start)
    assert (found.dtype, found.shape) == (torch.int64, ())
    assert int(found) & MASK == digest(flat.cpu(), start)


def test_two_states_are_compared_where_they_lie() -> None:
    words = bytes_of(8 * BLOCK_WORDS, 1)
    bad = words.clone()
    bad[12345] ^= 1
    assert bool(hashed(words, 3) == hashed(words.clone(), 3))
    assert bool(hashed(words, 3) != hashed(bad, 3))
    assert bool(hashed(words, 3) != hashed(words, 4))


def test_parts_add_up_on_the_device() -> None:
    words = bytes_of(8 * BLOCK_WORDS, 2)
    cut = 4 * 1001
    assert bool(hashed(words, 7) == hashed(words[:cut], 7) + hashed(words[cut:], 7 + 1001))


def test_only_a_cuda_device_asks_for_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def absent(name: str) -> None:
        asked.append(name)
        raise ModuleNotFoundError(name="triton")

    monkeypatch.setattr(module, "import_module", absent)
    module._kernel.cache_clear()
    assert int(digest_on_device(torch.ones(5))) & MASK == digest(torch.ones(5))
    assert asked == []
    assert module._kernel(torch.device("cuda")) is None  # torch's own operators then
    assert asked == ["diagnostics.sensors.kernels.hashing"]
    monkeypatch.undo()
    module._kernel.cache_clear()
    assert module._kernel(torch.device("cuda")) is hashed
    assert module._kernel(torch.device("cpu")) is None
