"""The hash: it shards, it is the same on bytes and tensors, and it sees the structured faults that XOR folds miss."""

from __future__ import annotations

import threading
from collections.abc import Callable
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diagnostics.sensors import digest as hashing
from diagnostics.sensors.checks import piecewise
from diagnostics.sensors.digest import chain, digest, digest_bytes, digest_on_device, hexdigest, words_of
from diagnostics.sensors.multilinear import BLOCK_WORDS, TABLE_SEED, block_multipliers, splitmix64, weight_table

MASK = (1 << 64) - 1
TRIALS = 3000
LANES = 32


def multiplier(block: int) -> int:
    return splitmix64(block ^ TABLE_SEED) | 1


def naive(data: bytes, start: int = 0) -> int:
    """The formula, word by word."""
    data = data + b"\0" * (-len(data) % 4)
    table = weight_table()
    total = 0
    for i in range(len(data) // 4):
        block, offset = divmod(start + i, BLOCK_WORDS)
        total += int.from_bytes(data[4 * i : 4 * i + 4], "little") * int(table[offset]) * multiplier(block)
    return total & MASK


@given(st.binary(max_size=200), st.integers(0, 3 * BLOCK_WORDS))
def test_digest_is_the_formula(data: bytes, start: int) -> None:
    assert digest_bytes(data, start) == naive(data, start)
    assert digest(torch.tensor(list(data), dtype=torch.uint8), start) == naive(data, start)


@given(st.integers(1, 3 * BLOCK_WORDS), st.integers(0, 3 * BLOCK_WORDS), st.integers(0, 2**31))
def test_segments_sum_to_the_whole(length: int, cut: int, seed: int) -> None:
    cut = min(cut, length)
    words = torch.from_numpy(np.random.default_rng(seed).integers(-(2**31), 2**31, length, dtype=np.int32))
    first, rest = words[:cut], words[cut:]
    assert digest(words) == (digest(first) + digest(rest, words_of(first))) & MASK


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8])
def test_tensor_and_bytes_agree(dtype: torch.dtype) -> None:
    t = (torch.randn(7, 13, generator=torch.Generator().manual_seed(1)) * 50).to(dtype)
    assert digest(t) == digest_bytes(t.view(torch.uint8).numpy().tobytes())
    assert digest(t.t()) == digest(t.t().contiguous())


@settings(max_examples=25)
@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.complex64]),
    st.integers(1, 5),
    st.integers(1, 40),
    st.integers(1, 3000),
    st.integers(0, 2 * BLOCK_WORDS),
    st.sampled_from([(0, 1, 2), (1, 0, 2), (2, 1, 0)]),
    st.integers(1, 3),
)
def test_threads_and_gaps_change_no_digest(
    dtype: torch.dtype, a: int, b: int, c: int, start: int, order: tuple[int, int, int], threads: int
) -> None:
    """Parts of a large tensor are hashed by several threads, those of a view with gaps from copies of its pieces."""
    generator = torch.Generator().manual_seed(a * b * c)
    t = (torch.randn(a, b, c + 3, generator=generator) * 50).to(dtype)[..., :c].permute(order)
    data = t.clone(memory_format=torch.contiguous_format)
    with (
        patch.object(hashing, "PIECE_BYTES", 1 << 12),
        patch.object(piecewise, "PIECE_BYTES", 1 << 12),
        patch.object(hashing, "_THREAD_BYTES", 1 << 13),
        patch.object(torch, "get_num_threads", lambda: threads),
    ):
        found = digest(t, start), digest(data, start)
    assert found == (digest_bytes(data.view(-1).view(torch.uint8).numpy().tobytes(), start),) * 2


def test_large_tensors_are_shared_between_threads() -> None:
    seen: set[int] = set()

    def followed(*part: object) -> int:
        seen.add(threading.get_ident())
        return digest_bytes(*part)  # type: ignore[arg-type]

    t = torch.arange(1 << 21)
    with patch.object(hashing, "digest_bytes", followed), patch.object(torch, "get_num_threads", lambda: 2):
        for value, count in ((t, 2), (t[:1000], 1), (t.view(-1, 2)[:, 0], 1), (t.repeat(3).view(-1, 3)[:, :2], 2)):
            seen.clear()
            digest(value)
            assert len(seen) == count


def test_edge_shapes() -> None:
    assert digest(torch.empty(0)) == 0
    assert digest(torch.tensor(1.0)) == digest(torch.tensor([[1.0]]))
    assert digest(torch.ones(1, 4)[:, :1].t()) == digest(torch.ones(1))  # one element, of whatever stride
    turned = torch.tensor([1 + 2j]).conj()
    assert digest(turned) == digest(torch.tensor([1 - 2j]))
    odd = torch.arange(9, dtype=torch.uint8)
    assert digest(odd[1:]) == digest_bytes(bytes(range(1, 9)))  # not aligned to a word


@pytest.mark.parametrize("start", [-1, 1 << 63, 1 << 64])
@pytest.mark.parametrize("hashed", [digest, digest_on_device])
def test_a_start_that_is_no_words_index_is_refused(hashed: Callable[[torch.Tensor, int], object], start: int) -> None:
    with pytest.raises(ValueError, match=f"start is {start}, must be"):
        hashed(torch.ones(1), start)


def test_the_last_start_is_hashed() -> None:
    t = torch.arange(3 * BLOCK_WORDS)
    last = (1 << 63) - words_of(t)
    assert digest(t, last) == naive(t.numpy().tobytes(), last) == int(digest_on_device(t, last)) & MASK


@settings(max_examples=25)
@given(st.integers(0, 10 * BLOCK_WORDS), st.integers(0, 2 * BLOCK_WORDS), st.integers(0, 7), st.integers(0, 2**31))
def test_whole_blocks_are_the_formula_whatever_the_alignment(count: int, start: int, skip: int, seed: int) -> None:
    data = np.random.default_rng(seed).bytes(4 * count + skip)
    assert digest_bytes(memoryview(data)[skip:], start) == naive(data[skip:], start)


@given(st.integers(0, 12 * BLOCK_WORDS), st.integers(0, 3 * BLOCK_WORDS), st.integers(0, 2**31))
def test_device_form_agrees(size: int, start: int, seed: int) -> None:
    t = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8))
    found = digest_on_device(t, start)
    assert found.dtype == torch.int64
    assert found.shape == ()
    assert int(found) & MASK == digest(t, start)


def test_device_form_in_parts_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diagnostics.sensors.digest._WORDS_AT_ONCE", 2 * BLOCK_WORDS)
    t = torch.randn(9 * BLOCK_WORDS + 11, generator=torch.Generator().manual_seed(2))
    for start in (0, 1, BLOCK_WORDS - 1, 5 * BLOCK_WORDS):
        assert int(digest_on_device(t, start)) & MASK == digest(t, start)


def test_weights_are_odd_and_differ() -> None:
    multipliers = block_multipliers(3, 500)
    assert [int(m) for m in multipliers[:20]] == [multiplier(3 + i) for i in range(20)]
    for weights in (weight_table(), multipliers):
        assert bool((weights & np.uint64(1)).all())
        assert len(set((weights & np.uint64(0xFFFFFFFF)).tolist())) > 0.999 * len(weights)


def test_hexdigest_and_chain() -> None:
    assert hexdigest(255) == "00000000000000ff"
    assert chain(1, 2, 3) != chain(1, 3, 2)
    assert chain(1, 2) != chain(2, 2)
    assert chain(0, 1, 2) == chain(0, 1, 2)


def xor_fold(words: np.ndarray) -> int:
    return int(np.bitwise_xor.reduce(words))


def plain_sum(words: np.ndarray) -> int:
    return int(words.astype(np.int64).sum()) & MASK


def faults(kind: str, words: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    bad = words.copy()
    at = int(rng.integers(0, len(words) - 64 * LANES))
    if kind == "same bit in 32 lanes":
        bad[at : at + LANES] ^= np.int32(-(2**31)) if (bit := int(rng.integers(32))) == 31 else np.int32(1 << bit)
    elif kind == "same bit, periodic":
        bad[at : at + 32 * LANES : LANES] ^= np.int32(1 << int(rng.integers(31)))
    elif kind == "stuck lanes":
        bad[at : at + 64 * LANES : LANES] = bad[at]
    elif kind == "permutation":
        bad[at : at + LANES] = rng.permutation(bad[at : at + LANES])
    elif kind == "swap":
        other = int(rng.integers(0, len(words)))
        bad[[at, other]] = bad[[other, at]]
    elif kind == "block swap":
        bad[at : at + LANES], bad[at + LANES : at + 2 * LANES] = (
            words[at + LANES : at + 2 * LANES],
            words[at : at + LANES],
        )
    return bad


KINDS = ["same bit in 32 lanes", "same bit, periodic", "stuck lanes", "permutation", "swap", "block swap"]


def misses(hash_of: object, kind: str, trials: int = TRIALS) -> int:
    rng = np.random.default_rng(5)
    words = rng.standard_normal(8192, dtype=np.float32).view(np.int32)
    clean = hash_of(words)  # type: ignore[operator]
    missed = 0
    for _ in range(trials):
        bad = faults(kind, words, rng)
        missed += bool((bad != words).any()) and hash_of(bad) == clean  # type: ignore[operator]
    return missed


@pytest.mark.parametrize("kind", KINDS)
def test_no_structured_fault_is_missed(kind: str) -> None:
    assert misses(lambda words: digest_bytes(words.tobytes()), kind) == 0


def test_xor_folds_and_plain_sums_miss_them() -> None:
    """The negative control: with the weights switched off, the same faults pass."""
    assert misses(xor_fold, "same bit in 32 lanes", 300) == 300
    assert misses(xor_fold, "permutation", 300) > 290
    assert misses(plain_sum, "swap", 300) > 290
    assert misses(plain_sum, "same bit in 32 lanes", 1000) > 0
