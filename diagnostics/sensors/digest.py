"""The multilinear hash of tensors: one number that says whether state at rest is still what was written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from diagnostics.sensors.checks.piecewise import PIECE_BYTES, pieces
from diagnostics.sensors.checks.rows import bits
from diagnostics.sensors.multilinear import (
    BLOCK_WORDS,
    MASK,
    WORD_BYTES,
    Unsigned,
    block_multipliers,
    chain,
    check_start,
    digest_bytes,
    hexdigest,
    weight_table,
)

__all__ = [
    "Stamp",
    "chain",
    "differ",
    "digest",
    "digest_bytes",
    "digest_on_device",
    "hexdigest",
    "stamp",
    "words_of",
]

#: A digest that is still where the tensor lies: a number on the CPU, int64 [] on a device, which nobody waits for.
Stamp = int | torch.Tensor

#: Words that are widened to 64 bits at a time where no kernel does it: 64 MiB of products.
_WORDS_AT_ONCE = 2048 * BLOCK_WORDS

#: Bytes that are worth a thread of its own, which takes some 0.2 ms to start and to join: 0.3 to 0.6 ms of hashing.
_THREAD_BYTES = 1 << 23

_Part = tuple[npt.NDArray[Any], int]  # with the index of its first word


def words_of(t: torch.Tensor) -> int:
    """How many 32-bit words `t` takes in the digest: where the next segment of the same state starts."""
    return -(-t.numel() * t.element_size() // WORD_BYTES)


def digest(t: torch.Tensor, start: int = 0) -> int:
    """Digest of the tensor's bytes in row-major order: 0 <= result < 2^64, any shape, any dtype of whole bytes.

    `start` is the global index, in 32-bit words, of the first word: with s = words_of(first),
    digest(whole) == (digest(first) + digest(rest, s)) mod 2^64. A tensor whose bytes are not a multiple of 4 is
    padded with zeros; shape and dtype are not hashed (a manifest holds them). See `multilinear` for the formula.
    What is large is shared between as many threads as torch has; what has gaps is copied piece by piece, in the caches.
    Raises ValueError for a start that `check_start` refuses.
    """
    if t.device.type != "cpu":
        return int(digest_on_device(t, start).item()) & MASK
    parts = [] if t.is_contiguous() or t.nbytes <= PIECE_BYTES else _pieces(t, start)
    if parts:
        return _shared(parts, t.nbytes)
    flat = _flat(t)
    whole = flat.numel() // WORD_BYTES * WORD_BYTES
    total = _shared(_slices(flat[:whole].numpy().view(np.uint32), start), whole)
    if whole < flat.numel():
        total += digest_bytes(flat[whole:].numpy().tobytes(), start + whole // WORD_BYTES)
    return total & MASK


def _slices(words: npt.NDArray[np.uint32], start: int) -> list[_Part]:
    """One for each thread, cut where the weights' blocks end."""
    step = -(-len(words) // _threads(words.nbytes) // BLOCK_WORDS) * BLOCK_WORDS or 1
    places = [0, *range(step - start % BLOCK_WORDS, len(words), step)] if step < len(words) else [0]
    return [(words[a:b], start + a) for a, b in zip(places, [*places[1:], len(words)], strict=True)]


def _pieces(t: torch.Tensor, start: int) -> list[_Part]:
    """Pieces that a cache holds, in row-major order; none where one does not end with a word."""
    values = bits(t.detach())
    found, at = [], start * WORD_BYTES
    for piece in pieces(values):
        if at % WORD_BYTES:
            return []
        part = values[piece]
        found.append((part.numpy(), at // WORD_BYTES))
        at += part.nbytes
    return found


def _shared(parts: list[_Part], size: int) -> int:
    """The digest of all parts, `size` bytes, by threads of this call alone: a pool would not outlive a fork."""
    count = min(_threads(size), len(parts))
    if count < 2:
        return _digest_parts(parts)
    with ThreadPoolExecutor(count - 1) as others:
        theirs = [others.submit(_digest_parts, parts[i::count]) for i in range(1, count)]
        total = _digest_parts(parts[::count])
        return (total + sum(each.result() for each in theirs)) & MASK


def _digest_parts(parts: list[_Part]) -> int:
    total = 0
    for part, at in parts:
        total += digest_bytes(np.ascontiguousarray(part).data, at)
    return total & MASK


def _threads(size: int) -> int:
    return max(1, min(torch.get_num_threads(), size // _THREAD_BYTES))


def digest_on_device(t: torch.Tensor, start: int = 0) -> torch.Tensor:
    """The same number as int64 [] where the tensor lies (its bits are those of `digest`), without waiting for it.

    So two tensors, or one at two times, are compared without the host: `digest_on_device(a) == digest_on_device(b)`.
    """
    check_start(start, words_of(t))
    flat = _flat(t)
    if not flat.numel():
        return torch.zeros((), dtype=torch.int64, device=t.device)
    kernel = _kernel(t.device)
    return _by_torch(flat, start) if kernel is None else kernel(flat, start)


def stamp(t: torch.Tensor) -> Stamp:
    """The tensor's digest, to be compared with `differ` only."""
    return digest(t) if t.device.type == "cpu" else digest_on_device(t)


def differ(pairs: Sequence[tuple[Stamp, Stamp]]) -> list[bool]:
    """Which pairs of stamps, each of one device's, are not equal. Waits for each device once."""
    found = [first != second for first, second in pairs]
    for device in {each.device for each in found if isinstance(each, torch.Tensor)}:
        here = [n for n, each in enumerate(found) if isinstance(each, torch.Tensor) and each.device == device]
        read = torch.stack([found[n] for n in here]).tolist()  # type: ignore[misc]
        for n, wrong in zip(here, read, strict=True):
            found[n] = bool(wrong)
    return [bool(each) for each in found]


@lru_cache
def _kernel(device: torch.device) -> Callable[[torch.Tensor, int], torch.Tensor] | None:
    """What hashes on a CUDA device in one pass; None elsewhere, and where Triton is missing."""
    if device.type != "cuda":
        return None
    try:  # Triton comes with CUDA builds of torch only, so its kernels are imported where they are needed
        module = import_module("diagnostics.sensors.kernels.hashing")
    except ModuleNotFoundError:
        return None
    found: Callable[[torch.Tensor, int], torch.Tensor] = module.hashed
    return found


def _by_torch(flat: torch.Tensor, start: int) -> torch.Tensor:
    """By torch's own operators, in several passes. flat: uint8 [n], n > 0."""
    words = torch.nn.functional.pad(flat, (0, -flat.numel() % WORD_BYTES)).view(torch.int32)
    table = _there(weight_table(), words.device)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    lead = start % BLOCK_WORDS
    done = -lead  # as if the first block's missing words were zeros
    while done < words.numel():
        part = words[max(done, 0) : done + _WORDS_AT_ONCE]
        before = max(-done, 0)
        rows = torch.nn.functional.pad(part, (before, -(before + part.numel()) % BLOCK_WORDS)).view(-1, BLOCK_WORDS)
        sums = (rows.to(torch.int64) & 0xFFFFFFFF).mul_(table).sum(1)
        multipliers = block_multipliers((start + done) // BLOCK_WORDS, len(rows))
        total += sums.mul_(_there(multipliers, words.device)).sum()
        done += _WORDS_AT_ONCE
    return total


def _flat(t: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes in row-major order, uint8 [n]."""
    whole = t.detach().resolve_conj().resolve_neg().contiguous()
    return whole.as_strided((whole.numel(),), (1,)).view(torch.uint8)  # one element may keep any stride


def _there(weights: Unsigned, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(weights.view(np.int64).copy()).to(device, non_blocking=True)
