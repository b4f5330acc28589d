"""Text through a tokenizer.json, kept in the cache as a token file; nothing else needs the tokenizers library."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

from agent.training import token_file
from agent.training.corpus_cache import CacheEntry, CorpusError, cached, write_note
from agent.training.tokens import Tokens, scan

#: Bytes of text handed to the library at a time: enough documents for all its threads, and a bound on memory. A single
#: larger file is handed over whole, since a cut could fall into a token.
_BATCH = 1 << 22


def open_tokenised(path: Path | None, cache_dir: Path, tokenizer: Path) -> Tokens:
    """The text at `path` (None: Python's standard library) as ids of `tokenizer`; each file is one document.

    A document gets the marks that the tokenizer's own post-processor adds. The token file in `cache_dir` is found by
    the digests of text and tokenizer, and used only if it still has the digest that was noted when it was written.

    Raises:
        CorpusError: the tokenizer does not parse or cannot be read, the text is unusable, or a file is not UTF-8.
        OSError: `cache_dir` cannot be written.
    """
    content, loaded = load(tokenizer)
    entry = cached(path, cache_dir)
    key = hashlib.sha256(f"{entry.digest}\0{hashlib.sha256(content).hexdigest()}".encode()).hexdigest()[:24]
    prefix = cache_dir / f"tokens-{key}"
    size = vocabulary(loaded)
    tokens = _noted(prefix, entry.source, size)
    if tokens is None:
        _build(entry, loaded, prefix, size)
        tokens = _opened(prefix, entry.source, size)
        write_note(_note(prefix), {"digest": tokens.digest})
    return tokens


def vocabulary(tokenizer: Tokenizer) -> int:
    """One more than its largest id, added tokens included: ids may have gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def load(path: Path) -> tuple[bytes, Tokenizer]:
    """A tokenizer.json's bytes, and what they are. Raises CorpusError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"tokenizer {path} cannot be read: {error.strerror}") from error
    try:
        loaded = Tokenizer.from_buffer(content)
    except ValueError as error:
        raise CorpusError(f"tokenizer {path} is no tokenizer.json: {_line(error)}") from error
    loaded.no_truncation()  # a file's settings for one model's input would cut documents
    loaded.no_padding()
    return content, loaded


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _note(prefix: Path) -> Path:
    return Path(f"{prefix}.json")


def _noted(prefix: Path, source: str, size: int) -> Tokens | None:
    """What an earlier call left, if it is whole."""
    try:
        digest = json.loads(_note(prefix).read_text())["digest"]
        tokens = _opened(prefix, source, size)
    except (OSError, ValueError, KeyError, TypeError):  # CorpusError is a ValueError
        return None
    return tokens if tokens.digest == digest else None


def _opened(prefix: Path, source: str, size: int) -> Tokens:
    try:
        file = token_file.read(prefix)
    except CorpusError as error:
        raise CorpusError(f"corpus {source} gave no token: {error}") from error
    digest, low, high = scan(file)
    return Tokens(file.ids(), file.documents, digest, source, low, high, size)


def _build(entry: CacheEntry, tokenizer: Tokenizer, prefix: Path, size: int) -> None:
    with token_file.Writer(prefix, token_file.dtype_for(size)) as writer:
        for texts in _batches(entry):
            for encoding in tokenizer.encode_batch_fast(texts):
                writer.add(encoding.ids)


def _batches(entry: CacheEntry) -> Iterator[list[str]]:
    """The files' texts in order, some at a time."""
    texts: list[str] = []
    held = 0
    with entry.blob.open("rb") as blob:
        for name, size in entry.files:
            texts.append(_decoded(name, blob.read(size), entry))
            held += size
            if held >= _BATCH:
                yield texts
                texts, held = [], 0
    yield texts


def _decoded(name: str, content: bytes, entry: CacheEntry) -> str:
    if entry.stdlib:  # four of Python 3.11's 1,790 sources have other encodings, and nobody can be asked to mend them
        return content.decode(errors="replace")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        told = f"not UTF-8 text: byte {error.start} is {content[error.start]:#04x}"
        raise CorpusError(f"corpus {entry.source}: file {name} is {told}; a tokenizer needs text") from None
