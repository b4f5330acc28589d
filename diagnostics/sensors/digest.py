"""The multilinear hash of tensors: one number that says whether state at rest is still what was written."""

from __future__ import annotations

import torch

from diagnostics.sensors.multilinear import (
    BLOCK_WORDS,
    MASK,
    WORD_BYTES,
    block_multiplier,
    chain,
    digest_bytes,
    digest_words,
    hexdigest,
    weight_table,
)

__all__ = ["chain", "digest", "digest_bytes", "hexdigest", "words_of"]


def words_of(t: torch.Tensor) -> int:
    """How many 32-bit words `t` takes in the digest: where the next segment of the same state starts."""
    return -(-t.numel() * t.element_size() // WORD_BYTES)


def digest(t: torch.Tensor, start: int = 0) -> int:
    """Digest of the tensor's bytes in row-major order: 0 <= result < 2^64, any shape, any dtype of whole bytes.

    `start` is the global index, in 32-bit words, of the first word: with s = words_of(first),
    digest(whole) == (digest(first) + digest(rest, s)) mod 2^64. A tensor whose bytes are not a multiple of 4 is
    padded with zeros; shape and dtype are not hashed (a manifest holds them). See `multilinear` for the formula.
    """
    flat = t.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = flat.numel() // WORD_BYTES * WORD_BYTES
    if flat.device.type != "cpu":
        return _digest_on_device(flat, start)
    if whole and flat.data_ptr() % WORD_BYTES:
        flat = flat.clone()  # a byte view may start anywhere; words need 4-byte alignment
    total = digest_words(flat[:whole].view(torch.int32).numpy(), start) if whole else 0
    if whole < flat.numel():
        total += digest_bytes(flat[whole:].numpy().tobytes(), start + whole // WORD_BYTES)
    return total & MASK


def _digest_on_device(flat: torch.Tensor, start: int) -> int:
    """The same sum where the tensor lies; one host read at the end. flat: uint8 [n]."""
    pad = -flat.numel() % WORD_BYTES
    words = torch.nn.functional.pad(flat, (0, pad)).view(torch.int32)
    table = torch.from_numpy(weight_table().copy()).to(flat.device)
    sums: list[torch.Tensor] = []
    blocks: list[int] = []
    done = 0
    while done < words.numel():
        block, offset = divmod(start + done, BLOCK_WORDS)
        n = min(BLOCK_WORDS - offset, words.numel() - done)
        sums.append((words[done : done + n] * table[offset : offset + n]).sum())
        blocks.append(block)
        done += n
    if not sums:
        return 0
    values = torch.stack(sums).tolist()
    return sum(int(v) * block_multiplier(b) for v, b in zip(values, blocks, strict=True)) & MASK
