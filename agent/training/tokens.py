"""A corpus as the model reads it, whatever it was made from: one row of token ids and where its documents start."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from agent.training.corpus_cache import CorpusError
from agent.training.token_file import Ids, Offsets, TokenFile

_CHUNK = 1 << 22  # ids looked at in one go: at most 32 MiB, whatever the file's size


@dataclass(frozen=True, slots=True)
class Tokens:
    """A corpus that can be trained on, whatever it was made from."""

    ids: Ids  # one dimension, mapped; a whole-number type
    documents: Offsets  # int64 [documents + 1]: where each starts in `ids`; the last entry is len(ids)
    digest: str  # hex, of everything above; equal wherever the corpus is the same
    source: str  # what the user named, for messages
    low: int  # the smallest and the largest id that occur
    high: int
    vocabulary: int | None = None  # ids that its tokenizer knows; None: it has none

    def check_vocabulary(self, size: int) -> None:
        """Refuse ids that a model of `size` ids does not have. Raises CorpusError naming the first of them."""
        if self.low >= 0 and self.high < size:
            return
        at, found = _first_outside(self.ids, size)
        document = int(np.searchsorted(self.documents, at, side="right")) - 1
        where = f"corpus {self.source} has id {found} at token {at} (document {document})"
        wanted = self.high + 1 if self.vocabulary is None else self.vocabulary
        remedy = "no vocabulary has negative ids" if self.low < 0 else f"train with --vocab-size {wanted} or more"
        raise CorpusError(f"{where}, outside the vocabulary of {size}: {remedy}")

    def samples(self, length: int) -> int:
        """How many windows of `length` tokens there are. Raises CorpusError if there is none."""
        if length < 1:
            raise ValueError(f"length: at least 1, not {length}")
        if len(self.ids) < length:
            raise CorpusError(f"corpus {self.source} is too short: {len(self.ids)} tokens, one sample needs {length}")
        return len(self.ids) - length + 1


def scan(file: TokenFile) -> tuple[str, int, int]:
    """Read a token file once: hex SHA-256 over both its files, its smallest and its largest id."""
    content, ids = hashlib.sha256(), file.ids()
    low, high = int(ids[0]), int(ids[0])
    for start in range(0, len(ids), _CHUNK):
        part = ids[start : start + _CHUNK]
        content.update(part.tobytes())
        low, high = min(low, int(part.min())), max(high, int(part.max()))
    index = hashlib.sha256(file.index.read_bytes()).digest()
    return hashlib.sha256(b"assay.tokens/1\0" + index + content.digest()).hexdigest(), low, high


def _first_outside(ids: Ids, size: int) -> tuple[int, int]:
    """Position and value of the first id outside 0 .. size - 1; there is one."""
    for start in range(0, len(ids), _CHUNK):
        part = ids[start : start + _CHUNK].astype(np.int64)
        outside = (part < 0) | (part >= size)
        if outside.any():
            at = int(outside.argmax())
            return start + at, int(part[at])
    raise AssertionError("the scan found an id outside the vocabulary, and then there was none")
