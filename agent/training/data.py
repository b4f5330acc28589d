"""The training text as bytes that all workers of a machine share, and batches that are proven to be cut from it.

A corpus is the concatenation of its files in the order of their relative paths; every byte is a token. Sample ``i`` is
the window that starts at byte ``i``. Workers map one cached copy, so a second worker costs neither time nor memory.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from agent.training.corpus_cache import CorpusError, cached
from agent.training.sampling import sample_ids

__all__ = ["Batch", "BatchCorrupted", "Corpus", "CorpusError", "sample_ids"]

_DIGEST_BYTES = 16  # 128 bits: no two batches of any run collide by chance


class BatchCorrupted(RuntimeError):
    """A batch's tokens are not the corpus bytes they claim to be; carries both digests and the sample ids."""

    def __init__(self, ids: tuple[int, ...], expected: str, found: str) -> None:
        super().__init__(f"batch of samples {list(ids)} has digest {found}, its corpus bytes have {expected}")
        self.ids = ids
        self.expected = expected
        self.found = found


@dataclass(frozen=True)
class Batch:
    """Tokens cut from a corpus, with the digest of the bytes they were cut from."""

    tokens: Tensor  # int64 [count, length], every value below 256
    ids: tuple[int, ...]  # sample id of each row
    digest: str  # hex, of ids, length and corpus bytes; never computed from ``tokens``

    def verify(self) -> Tensor:
        """The tokens, after comparing them with the corpus's digest: call it where they are handed to the model.

        Raises:
            BatchCorrupted: some token is not the byte that the corpus has there.
        """
        found = _tokens_digest(self.ids, self.tokens)
        if found != self.digest:
            raise BatchCorrupted(self.ids, self.digest, found)
        return self.tokens


class Corpus:
    """Bytes to train on; ``digest`` (hex) covers the list of files and their contents, and nothing else."""

    def __init__(self, data: mmap.mmap, digest: str, source: str) -> None:
        self._data = data
        self.digest = digest
        self.source = source

    @classmethod
    def open(cls, path: Path | str | None, cache_dir: Path) -> Corpus:
        """Open a file, a folder (all its files), or the running Python's own sources if ``path`` is None.

        The first call writes one concatenated copy into ``cache_dir``, atomically; later calls map it and check its
        hash (0.1 s for the default 31 MB).

        Raises:
            CorpusError: the path is missing, empty, unreadable, or neither file nor folder.
            OSError: ``cache_dir`` cannot be written.
        """
        entry = cached(None if path is None else Path(path), Path(cache_dir))
        with entry.blob.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return cls(data, entry.digest, entry.source)

    def __len__(self) -> int:
        """Bytes, which are tokens."""
        return len(self._data)

    def total(self, length: int) -> int:
        """Samples of ``length`` tokens: the ``total`` of :func:`sample_ids`.

        Raises:
            CorpusError: the corpus is shorter than one sample.
        """
        if length < 1:
            raise ValueError(f"length: at least 1, not {length}")
        if len(self) < length:
            raise CorpusError(f"corpus {self.source} is too short: {len(self)} bytes, one sample needs {length}")
        return len(self) - length + 1

    def batch(self, ids: Sequence[int], length: int) -> Batch:
        """Cut samples ``ids`` of ``length`` tokens each (for ``V3.loss``: time + 1 + D).

        Raises:
            ValueError: no ids, or an id outside [0, total(length)).
            BatchCorrupted: the tensor just built differs from the corpus.
        """
        total = self.total(length)
        if not ids or min(ids) < 0 or max(ids) >= total:
            raise ValueError(f"ids: at least one, each within 0..{total - 1}, not {list(ids)}")
        joined = bytearray().join(self._data[start : start + length] for start in ids)
        tokens = torch.frombuffer(joined, dtype=torch.uint8).view(len(ids), length).to(torch.int64)
        batch = Batch(tokens, tuple(ids), self._digest_of(ids, length))
        batch.verify()
        return batch

    def _digest_of(self, ids: Sequence[int], length: int) -> str:
        state = _header(ids, length)
        for start in ids:
            state.update(self._data[start : start + length])
        return state.hexdigest()


def _tokens_digest(ids: Sequence[int], tokens: Tensor) -> str:
    """As ``Corpus._digest_of``, from the tensor; a value that is no byte gives a digest that no corpus has."""
    state = _header(ids, tokens.shape[1])
    for row in tokens.tolist():
        try:
            state.update(bytes(row))
        except ValueError:  # outside 0..255
            return "not bytes"
    return state.hexdigest()


def _header(ids: Sequence[int], length: int) -> hashlib.blake2b:
    state = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    state.update(",".join(str(i) for i in (length, *ids)).encode() + b"\0")
    return state
