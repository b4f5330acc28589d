"""Batches of token ids, proven to be cut from the corpus that all workers of a machine map.

Sample ``i`` is the window that starts at token ``i``; `corpora` says what a corpus is, `sampling` which samples a step
uses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agent.training.corpora import open_tokens
from agent.training.corpus_cache import CorpusError
from agent.training.sampling import sample_ids
from agent.training.token_file import Offsets
from agent.training.tokens import Tokens

__all__ = ["Batch", "BatchCorrupted", "Corpus", "CorpusError", "sample_ids"]

_DIGEST_BYTES = 16  # 128 bits: no two batches of any run collide by chance
_BYTES = np.dtype(np.uint8)


class BatchCorrupted(RuntimeError):
    """A batch's tokens are not the corpus's that they claim to be; carries both digests and the sample ids."""

    def __init__(self, ids: tuple[int, ...], expected: str, found: str) -> None:
        super().__init__(f"batch of samples {list(ids)} has digest {found}, its corpus has {expected}")
        self.ids = ids
        self.expected = expected
        self.found = found


@dataclass(frozen=True)
class Batch:
    """Tokens cut from a corpus, with the digest of what they were cut from."""

    tokens: Tensor  # int64 [count, length]
    ids: tuple[int, ...]  # sample id of each row
    digest: str  # hex, of ids, length and the corpus's own bytes; never computed from ``tokens``
    dtype: np.dtype[Any] = _BYTES  # of the corpus: the digest is over ids as the corpus holds them
    documents: Tensor | None = None  # int64 [count, length]: document of each token, from 0 in each row; or not asked

    def verify(self) -> Tensor:
        """The tokens, after comparing them with the corpus's digest: call it where they are handed to the model.

        Raises:
            BatchCorrupted: some token is not the one that the corpus has there, or its document is not.
        """
        found = _tokens_digest(self.ids, self.tokens, self.dtype, self.documents)
        if found != self.digest:
            raise BatchCorrupted(self.ids, self.digest, found)
        return self.tokens


class Corpus:
    """What to train on; ``digest`` (hex) covers its contents, and nothing else."""

    def __init__(self, tokens: Tokens) -> None:
        self.content = tokens
        self.digest = tokens.digest
        self.source = tokens.source

    @classmethod
    def open(cls, path: Path | str | None, cache_dir: Path, tokenizer: Path | str | None = None) -> Corpus:
        """Open a text file, a folder of them, a token file, or the running Python's own sources if ``path`` is None.

        Args:
            path: a token file may be given as PREFIX, PREFIX.bin or PREFIX.idx.
            cache_dir: where copies and records are kept; the default corpus takes a second at first, then 0.1 s.
            tokenizer: a tokenizer.json for text; without one each byte is a token.

        Raises:
            CorpusError: the path is missing, empty, unreadable, or nothing that can be trained on.
            OSError: ``cache_dir`` cannot be written.
        """
        paths = [None if p is None else Path(p) for p in (path, tokenizer)]
        return cls(open_tokens(paths[0], Path(cache_dir), paths[1]))

    def __len__(self) -> int:
        """Tokens."""
        return len(self.content.ids)

    def total(self, length: int) -> int:
        """Samples of ``length`` tokens: the ``total`` of :func:`sample_ids`.

        Raises:
            CorpusError: the corpus is shorter than one sample.
        """
        return self.content.samples(length)

    def batch(self, ids: Sequence[int], length: int, documents: bool = False) -> Batch:
        """Cut samples ``ids`` of ``length`` tokens each (for ``V3.loss``: time + 1 + D).

        Args:
            ids: where the samples start.
            length: tokens of each.
            documents: also say which document each token belongs to.

        Raises:
            ValueError: no ids, or an id outside [0, total(length)).
            BatchCorrupted: the tensor just built differs from the corpus.
        """
        total = self.total(length)
        if not ids or min(ids) < 0 or max(ids) >= total:
            raise ValueError(f"ids: at least one, each within 0..{total - 1}, not {list(ids)}")
        rows = np.stack([self.content.ids[start : start + length] for start in ids]).astype(np.int64)
        numbers = np.stack([self._documents(start, length) for start in ids]) if documents else None
        batch = Batch(
            torch.from_numpy(rows),
            tuple(ids),
            self._digest_of(ids, length, documents),
            self.content.ids.dtype,
            None if numbers is None else torch.from_numpy(numbers),
        )
        batch.verify()
        return batch

    def _documents(self, start: int, length: int) -> Offsets:
        """Document of each token of a window, counted from 0 within it: int64 [length]."""
        edges = self.content.documents
        first, last = np.searchsorted(edges, [start, start + length - 1], side="right")
        return np.searchsorted(edges[first:last], np.arange(start, start + length), side="right")

    def _digest_of(self, ids: Sequence[int], length: int, documents: bool) -> str:
        state = _header(ids, length)
        for start in ids:
            state.update(self.content.ids[start : start + length].tobytes())
            if documents:
                state.update(self._documents(start, length).tobytes())
        return state.hexdigest()


def _tokens_digest(
    ids: tuple[int, ...], tokens: Tensor, dtype: np.dtype[Any] = _BYTES, documents: Tensor | None = None
) -> str:
    """As ``Corpus._digest_of``, from the tensors; a value the corpus cannot hold gives a digest that no corpus has."""
    state = _header(ids, tokens.shape[1])
    wide = tokens.numpy()
    narrow = wide.astype(dtype)
    if (narrow.astype(np.int64) != wide).any():
        return "not ids"
    for index, row in enumerate(narrow):
        state.update(row.tobytes())
        if documents is not None:
            state.update(documents[index].numpy().tobytes())
    return state.hexdigest()


def _header(ids: Sequence[int], length: int) -> hashlib.blake2b:
    state = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    state.update(",".join(str(i) for i in (length, *ids)).encode() + b"\0")
    return state
