"""One concatenated, hash-checked copy of a corpus per machine: opening it is fast, and its bytes do not change."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# Not sources of Python itself: what was installed beside it, and byte code.
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__"})
_CHUNK = 1 << 20  # bytes read at a time


class CorpusError(ValueError):
    """The corpus cannot be used; the message is one line that names the path and says why."""


class CacheEntry(NamedTuple):
    """A corpus that lies in the cache and was checked."""

    blob: Path  # the concatenation
    digest: str  # hex SHA-256 over file list and contents
    source: str  # what the user named, for messages
    files: tuple[tuple[str, int], ...]  # name and size of each file, in the order of the concatenation
    stdlib: bool  # the running Python's own sources


class _File(NamedTuple):
    name: str  # relative path with forward slashes; the order of the concatenation
    path: Path
    size: int
    modified_ns: int
    inode: int


def cached(path: Path | None, cache_dir: Path) -> CacheEntry:
    """Find or build the cached copy of ``path`` (None: the running Python's standard library).

    A copy is found by names, sizes and times of the corpus files, and used only if its bytes still have the digest that
    was noted when it was written; else it is built anew. Several processes may do this at once.

    Raises:
        CorpusError: nothing usable at ``path``.
        OSError: ``cache_dir`` cannot be written.
    """
    source = "of Python's standard library" if path is None else str(path)
    files = _stdlib_files() if path is None else _user_files(path)
    if not any(file.size for file in files):
        raise CorpusError(f"corpus {source} is empty")
    cache_dir.mkdir(parents=True, exist_ok=True)
    stem = cache_dir / f"corpus-{_listing_key(files)}"
    blob, note = stem.with_suffix(".bin"), stem.with_suffix(".json")
    digest = _noted_digest(blob, note)
    if digest is None:
        digest = _build(files, blob, note)
    return CacheEntry(blob, digest, source, tuple(_noted_files(note)), path is None)


def _stdlib_files() -> list[_File]:
    root = Path(sysconfig.get_path("stdlib"))
    return _sorted(file for file in _walk(root, _NOT_STDLIB) if file.name.endswith(".py"))


def _user_files(path: Path) -> list[_File]:
    """The file itself, or every regular file below the folder that is not hidden."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            return [_entry(path, path.name)]
        if stat.S_ISDIR(mode):
            return _sorted(_walk(path, frozenset({"__pycache__"})))
    except FileNotFoundError:
        raise CorpusError(f"corpus {path} does not exist") from None
    except OSError as error:
        raise CorpusError(f"corpus {path} cannot be read: {error.strerror}") from error
    raise CorpusError(f"corpus {path} is neither a file nor a folder")


def _sorted(files: Iterator[_File]) -> list[_File]:
    return sorted(files, key=lambda file: file.name.encode("utf-8", "surrogateescape"))


def _walk(root: Path, pruned: frozenset[str]) -> Iterator[_File]:
    def unreadable(error: OSError) -> None:
        raise CorpusError(f"corpus folder {error.filename} cannot be read: {error.strerror}") from error

    for folder, below, names in os.walk(root, onerror=unreadable):
        below[:] = [name for name in below if name not in pruned and not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                yield _entry(path, path.relative_to(root).as_posix())


def _entry(path: Path, name: str) -> _File:
    status = path.stat()
    return _File(name, path, status.st_size, status.st_mtime_ns, status.st_ino)


def _listing_key(files: list[_File]) -> str:
    """Where to look in the cache; a guess only, since contents are checked by digest."""
    state = hashlib.sha256()
    for file in files:
        state.update(os.fsencode(f"{file.path.absolute()}\0{file.size}\0{file.modified_ns}\0{file.inode}\n"))
    return state.hexdigest()[:24]


def _noted_files(note: Path) -> list[tuple[str, int]]:
    return [(str(name), int(size)) for name, size in json.loads(note.read_text())["files"]]


def _noted_digest(blob: Path, note: Path) -> str | None:
    """The digest on record if the copy still has it, else None."""
    try:
        record = json.loads(note.read_text())
        files = _noted_files(note)
        with blob.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").digest()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    digest = _digest(files, content)
    return digest if digest == record.get("digest") else None


def _digest(files: list[tuple[str, int]], content: bytes) -> str:
    """SHA-256 of the file list (relative names and sizes) and of the concatenation's own SHA-256."""
    return hashlib.sha256(json.dumps(files).encode() + b"\0" + content).hexdigest()


def _build(files: list[_File], blob: Path, note: Path) -> str:
    """Write copy and note, each under its final name only when complete; the note goes last."""
    content = hashlib.sha256()
    listed: list[tuple[str, int]] = []
    with tempfile.NamedTemporaryFile(dir=blob.parent, prefix=".corpus-", delete=False) as target:
        try:
            for file in files:
                size = 0
                for chunk in _chunks(file.path):
                    content.update(chunk)
                    target.write(chunk)
                    size += len(chunk)
                listed.append((file.name, size))
            digest = _digest(listed, content.digest())
        except BaseException:
            os.unlink(target.name)
            raise
    os.replace(target.name, blob)
    write_note(note, {"digest": digest, "files": listed})
    return digest


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk
    except OSError as error:
        raise CorpusError(f"corpus file {path} cannot be read: {error.strerror}") from error


def write_note(note: Path, record: dict[str, object]) -> None:
    """Write a cache's record so that readers see a whole one or none."""
    with tempfile.NamedTemporaryFile("w", dir=note.parent, prefix=".corpus-", delete=False) as file:
        json.dump(record, file)
    os.replace(file.name, note)
