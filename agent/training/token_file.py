"""Token files in the memory-mapped .bin/.idx layout that Megatron reads and writes: a checked reader, and a writer.

PREFIX.bin holds the ids of all sequences, one after another. PREFIX.idx says what they are; all of it little-endian:

    offset  type                what
    0       9 bytes             "MMIDIDX" and two zero bytes
    9       uint64              version, 1
    17      uint8               code of the ids' type: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16
    18      uint64              S, sequences
    26      uint64              E, entries of the document index: documents + 1
    34      int32 [S]           length of each sequence, in ids
            int64 [S]           where each sequence starts in PREFIX.bin, in bytes
            int64 [E]           document d is sequences entry[d] .. entry[d + 1] - 1; the first is 0, the last is S
            int8  [S]           mode of each sequence; multimodal files only, not used here

Layout: NVIDIA/Megatron-LM, megatron/core/datasets/indexed_dataset.py, `_IndexWriter` and `_IndexReader`. Codes 6 and 7
are floating point, which are no ids. Its writers put sequences one after another, so the reader here asks for that.
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from agent.training.corpus_cache import CorpusError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
#: The codes that stand for whole numbers, as the reference has them.
DTYPES: Mapping[int, np.dtype[Any]] = MappingProxyType(
    {
        1: np.dtype("u1"),
        2: np.dtype("i1"),
        3: np.dtype("<i2"),
        4: np.dtype("<i4"),
        5: np.dtype("<i8"),
        8: np.dtype("<u2"),
    }
)
#: A sequence's length is an int32; a longer document becomes several sequences.
LONGEST = 2**31 - 1
#: Below this many ids the reference chooses uint16, else int32 (`DType.optimal_dtype`).
_UINT16_BELOW = 65500

Offsets = npt.NDArray[np.int64]
Ids = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class TokenFile:
    """A token file whose index was checked against its data."""

    data: Path  # PREFIX.bin
    index: Path  # PREFIX.idx
    dtype: np.dtype[Any]
    documents: Offsets  # int64 [documents + 1]: where each document starts, in ids; the last entry is their number

    def ids(self) -> Ids:
        """All ids, mapped, one dimension. Raises CorpusError if the file cannot be mapped."""
        try:
            return np.memmap(self.data, dtype=self.dtype, mode="r")
        except OSError as error:
            raise CorpusError(f"token file {self.data} cannot be read: {error.strerror}") from error


def paths(prefix: Path) -> tuple[Path, Path]:
    """PREFIX.bin and PREFIX.idx; a dot in the prefix is part of it."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


def read(prefix: Path) -> TokenFile:
    """Open the token file PREFIX.bin, PREFIX.idx and check that the two agree; the ids themselves are not looked at.

    Raises:
        CorpusError: one of the two is missing, unreadable, damaged or empty, or they disagree; it names file and field.
    """
    data, index = paths(prefix)
    size = _size(data)
    content = _mapped(index, _size(index))
    dtype, sequences, entries = _header(index, content)
    lengths, pointers, document_index = _arrays(index, content, sequences, entries)
    ends = _check_sequences(index, lengths, pointers, dtype.itemsize)
    _check_documents(index, document_index, sequences)
    if ends[-1] * dtype.itemsize != size:
        described = f"{ends[-1]} ids of {dtype.itemsize} bytes"
        raise CorpusError(f"{index} describes {described}, but {data} has {size} bytes: they do not belong together")
    if size == 0:
        raise CorpusError(f"token file {data} is empty")
    return TokenFile(data, index, dtype, ends[document_index])


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        raise CorpusError(f"token file {path} does not exist: a token file is PREFIX.bin and PREFIX.idx") from None
    except OSError as error:
        raise CorpusError(f"token file {path} cannot be read: {error.strerror}") from error


def _mapped(path: Path, size: int) -> npt.NDArray[np.uint8]:
    if size < _HEADER.size:
        raise CorpusError(f"{path} is cut off: {size} bytes, and the header alone has {_HEADER.size}")
    try:
        return np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise CorpusError(f"token file {path} cannot be read: {error.strerror}") from error


def _header(path: Path, content: npt.NDArray[np.uint8]) -> tuple[np.dtype[Any], int, int]:
    """The ids' type, the number of sequences, and of entries in the document index."""
    magic, version, code, sequences, entries = _HEADER.unpack(content[: _HEADER.size].tobytes())
    if magic != MAGIC:
        raise CorpusError(f"{path} is no index of a token file: it starts with {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise CorpusError(f"{path} has version {version}; only version {VERSION} is known")
    if code not in DTYPES:
        known = ", ".join(f"{number} {dtype.name}" for number, dtype in DTYPES.items())
        raise CorpusError(f"{path} has dtype code {code}; ids have one of {known}")
    return DTYPES[code], int(sequences), int(entries)


def _arrays(
    path: Path, content: npt.NDArray[np.uint8], sequences: int, entries: int
) -> tuple[npt.NDArray[np.int32], Offsets, Offsets]:
    """Lengths, pointers and document index, copied out: they lie at odd addresses in the file."""
    needed = _HEADER.size + 12 * sequences + 8 * entries
    if content.size not in (needed, needed + sequences):  # with modes, which text has none of
        told = f"{sequences} sequences and {entries} document entries, which take {needed}"
        raise CorpusError(f"{path} has {content.size} bytes, but its header counts {told}: cut off, or not an index")
    parts = np.split(content[_HEADER.size : needed], [4 * sequences, 12 * sequences])
    lengths, pointers, document_index = (part.tobytes() for part in parts)
    return np.frombuffer(lengths, "<i4"), np.frombuffer(pointers, "<i8"), np.frombuffer(document_index, "<i8")


def _check_sequences(path: Path, lengths: npt.NDArray[np.int32], pointers: Offsets, itemsize: int) -> Offsets:
    """Where each sequence starts, in ids, and where the last one ends: int64 [S + 1]."""
    if len(lengths) and lengths.min() < 0:
        worst = int(lengths.argmin())
        raise CorpusError(f"{path}: sequence {worst} has length {lengths[worst]}; it cannot be below 0")
    ends = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=ends[1:])
    wrong = pointers != ends[:-1] * itemsize
    if wrong.any():
        first = int(wrong.argmax())
        told = f"the sequences before it end at byte {ends[first] * itemsize}"
        raise CorpusError(f"{path}: sequence {first} starts at byte {pointers[first]}, but {told}")
    return ends


def _check_documents(path: Path, index: Offsets, sequences: int) -> None:
    if len(index) == 0 or index[0] != 0 or index[-1] != sequences:
        told = f"from {index[0]} to {index[-1]}" if len(index) else "without an entry"
        raise CorpusError(f"{path}: the document index runs {told}; it must run from 0 to the {sequences} sequences")
    falls = np.diff(index) < 0
    if falls.any():
        at = int(falls.argmax())
        raise CorpusError(
            f"{path}: the document index decreases, from {index[at]} to {index[at + 1]} at entry {at + 1}"
        )


def dtype_for(vocabulary: int) -> np.dtype[Any]:
    """The type that holds ids below `vocabulary`, chosen as the reference does."""
    return DTYPES[8] if vocabulary < _UINT16_BELOW else DTYPES[4]


class Writer:
    """Writes PREFIX.bin and PREFIX.idx; neither is there under its name before `close`, and the index comes last.

    As a context manager it closes at the end, or leaves nothing behind if there was an error.
    """

    def __init__(self, prefix: Path, dtype: np.dtype[Any]) -> None:
        self._data, self._index = paths(prefix)
        self._code = next(code for code, known in DTYPES.items() if known == dtype)
        self._dtype = DTYPES[self._code]
        self._lengths: list[int] = []
        self._documents = [0]
        self._file = _aside(self._data)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            self._file.close()
            os.unlink(self._file.name)

    def add(self, ids: Iterable[int] | Ids) -> None:
        """Append one document. Raises OverflowError if an id does not fit the type."""
        document = np.fromiter(ids, np.int64)
        limits = np.iinfo(self._dtype)
        if document.size and not limits.min <= document.min() <= document.max() <= limits.max:
            raise OverflowError(f"ids {document.min()}..{document.max()} do not fit {self._dtype.name}")
        self._file.write(document.astype(self._dtype).tobytes())
        whole, rest = divmod(document.size, LONGEST)
        self._lengths += [LONGEST] * whole + ([rest] if rest or not whole else [])
        self._documents.append(len(self._lengths))

    def close(self) -> None:
        """Give both files their names."""
        lengths = np.array(self._lengths, "<i4")
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        with _aside(self._index) as index:
            index.write(_HEADER.pack(MAGIC, VERSION, self._code, len(lengths), len(self._documents)))
            index.write(lengths.tobytes() + (starts * self._dtype.itemsize).astype("<i8").tobytes())
            index.write(np.array(self._documents, "<i8").tobytes())
        self._file.close()
        os.replace(self._file.name, self._data)
        os.replace(index.name, self._index)


def _aside(path: Path) -> IO[bytes]:
    """A file beside `path` that nobody takes for it."""
    return tempfile.NamedTemporaryFile(dir=path.parent, prefix=".tokens-", delete=False)
