"""Writes safetensors as a stream, aside, and gives it its name when all of it is on storage: the whole or nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from agent.model.files.reading import FileError

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
#: The header is padded so that the tensors behind it start on a multiple of this (the format's own writer does so).
_ALIGN = 8


class Entry(NamedTuple):
    """One tensor to be written."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * self.dtype.itemsize


def write(
    path: Path, entries: Sequence[Entry], produce: Callable[[Entry], Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a new file and force it to storage; ``produce`` is asked for one tensor at a time.

    Raises:
        OSError: it exists, or cannot be written.
    """
    # Wide types first: behind an odd number of bf16 an fp32 would not be aligned.
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    with path.open("xb") as file:
        file.write(_header(ordered, metadata))
        for entry in ordered:
            tensor = produce(entry)
            assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), entry
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, document: Mapping[str, object]) -> None:
    """Write a new JSON document and force it to storage."""
    with path.open("x") as file:
        json.dump(document, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def aside(target: Path, needed: int) -> Iterator[Path]:
    """A path beside ``target`` to write ``needed`` bytes to; it becomes the target if nothing is raised, else it goes.

    Raises:
        FileError: the target exists; nothing is ever written over.
        OSError: there is no room, or no folder to write to.
    """
    if target.exists():
        raise FileError(f"{target}: exists already; name another, or remove it")
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"no room: {free >> 20} MiB are free, {needed >> 20} MiB are needed", str(target))
    beside = target.with_name(f".{target.name}.writing-{os.getpid()}")
    try:
        yield beside
        if beside.is_dir():
            sync(beside)
        beside.rename(target)
        sync(target.parent)
    finally:
        _remove(beside)


def sync(folder: Path) -> None:
    """Force the names in a folder to storage."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    """Its length as eight bytes, then JSON: type, shape and range of bytes of each tensor."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for entry in entries:
        end = start + entry.nbytes
        header[entry.key] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGN)
    return struct.pack("<Q", len(text)) + text


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
