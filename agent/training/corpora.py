"""Opens a corpus of any kind as one row of token ids and the places where its documents start.

A corpus is the running Python's own sources, a text file, a folder of text files, or a token file. Text is read as
bytes, each a token, or through a tokenizer.json. Knows nothing of torch, so that a command can look at a corpus fast.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from pathlib import Path

import numpy as np

from agent.training import token_file
from agent.training.corpus_cache import CacheEntry, CorpusError, cached, write_note
from agent.training.token_file import Offsets, TokenFile
from agent.training.tokens import Tokens, scan


def open_tokens(path: Path | None, cache_dir: Path, tokenizer: Path | None = None) -> Tokens:
    """Open a corpus; None is the running Python's standard library.

    Text is copied into `cache_dir` once (see `corpus_cache`), tokenised text as a token file. A token file is mapped
    where it lies; its digest and range of ids are found by reading it once, and noted in `cache_dir` for as long as
    names, sizes and times of both its files stay as they are.

    Raises:
        CorpusError: nothing that can be trained on; one line that names the path.
        OSError: `cache_dir` cannot be written.
    """
    prefix = None if path is None else token_prefix(path)
    if prefix is None:
        return _text(path, cache_dir, tokenizer)
    if tokenizer is not None:
        raise CorpusError(f"token file {prefix} holds ids already: a tokenizer is for text")
    return _token_file(prefix, cache_dir)


def token_prefix(path: Path) -> Path | None:
    """PREFIX if `path` names a token file as PREFIX, PREFIX.bin or PREFIX.idx; what exists under its own name wins."""
    try:
        if path.suffix in (".bin", ".idx") and path.with_suffix(".idx").exists() and not path.is_dir():
            return path.with_suffix("")
        if not path.exists() and any(half.exists() for half in token_file.paths(path)):
            return path
    except OSError as error:
        raise CorpusError(f"corpus {path} cannot be read: {error.strerror}") from error
    return None


def _text(path: Path | None, cache_dir: Path, tokenizer: Path | None) -> Tokens:
    """Each file is a document."""
    if tokenizer is not None:
        # Only here: nobody else should need the tokenizers library, or wait for it.
        tokenised = importlib.import_module("agent.training.tokenised")
        tokens: Tokens = tokenised.open_tokenised(path, cache_dir, tokenizer)
        return tokens
    entry = cached(path, cache_dir)
    ids = np.memmap(entry.blob, dtype=np.uint8, mode="r")
    return Tokens(ids, _file_starts(entry), entry.digest, entry.source, int(ids.min()), int(ids.max()))


def _file_starts(entry: CacheEntry) -> Offsets:
    starts = np.zeros(len(entry.files) + 1, np.int64)
    np.cumsum([size for _, size in entry.files], out=starts[1:])
    return starts


def _token_file(prefix: Path, cache_dir: Path) -> Tokens:
    file = token_file.read(prefix)
    note = cache_dir / f"scan-{_key(file)}.json"
    try:
        record = json.loads(note.read_text())
        digest, low, high = str(record["digest"]), int(record["low"]), int(record["high"])
    except (OSError, ValueError, KeyError, TypeError):
        digest, low, high = scan(file)
        cache_dir.mkdir(parents=True, exist_ok=True)
        write_note(note, {"digest": digest, "low": low, "high": high})
    return Tokens(file.ids(), file.documents, digest, str(prefix), low, high)


def _key(file: TokenFile) -> str:
    state = hashlib.sha256()
    for path in (file.data, file.index):
        status = path.stat()
        state.update(os.fsencode(f"{path.absolute()}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ino}\n"))
    return state.hexdigest()[:24]
