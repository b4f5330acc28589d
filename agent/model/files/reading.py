"""Reads safetensors, one file or a folder with its index, and refuses whatever is not whole before reading a tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from agent.model.huggingface import Description

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

#: The format's names of types. Those we cannot use are here too: they are refused by the key that has them.
_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class FileError(ValueError):
    """A file that is missing, damaged or not what it should be; the message begins with its path."""


class WeightFiles:
    """The tensors of some safetensors files by key; descriptions come from the headers, tensors are read when asked.

    Raises:
        FileError: a file is missing or not whole, or two of them hold the same key.
    """

    def __init__(self, paths: list[Path]) -> None:
        self._home: dict[str, Any] = {}
        self.described: dict[str, Description] = {}
        self.metadata: dict[str, str] = {}
        self.held: dict[str, Path] = {}  # which file holds a key
        for path in paths:
            self._add(path)

    def read(self, key: str) -> Tensor:
        """One tensor. Raises FileError if it cannot be read."""
        try:
            tensor: Tensor = self._home[key].get_tensor(key)
        except SafetensorError as error:
            raise FileError(f"{self.held[key]}: {key} cannot be read: {error}") from error
        return tensor

    def _add(self, path: Path) -> None:
        for key, dtype, shape, handle in _contents(path):
            if key in self.held:
                raise FileError(f"{path}: holds {key}, as {self.held[key].name} does")
            if dtype not in _DTYPES:
                raise FileError(f"{path}: {key} has the type {dtype}, which is not known here")
            self._home[key], self.held[key] = handle, path
            self.described[key] = Description(_DTYPES[dtype], shape)
            self.metadata = dict(handle.metadata() or {})


def open_folder(folder: Path) -> WeightFiles:
    """The weights of a Hugging Face folder: model.safetensors, else the shards that its index names.

    Raises:
        FileError: also when the index is damaged or disagrees with the shards.
    """
    if (folder / SINGLE).exists():
        return WeightFiles([folder / SINGLE])
    index = folder / INDEX
    if not index.exists():
        raise FileError(f"{folder}: neither {SINGLE} nor {INDEX} is there")
    placed = _weight_map(index)
    files = WeightFiles([folder / name for name in dict.fromkeys(placed.values())])
    for key, name in placed.items():
        if key not in files.held or files.held[key].name != name:
            raise FileError(f"{index}: says that {name} holds {key}, which it does not")
    if unnamed := files.held.keys() - placed.keys():
        key = min(unnamed)
        raise FileError(f"{index}: does not name {key}, which {files.held[key].name} holds")
    return files


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises FileError."""
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileError(f"{path}: does not exist") from None
    except ValueError as error:
        raise FileError(f"{path}: is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise FileError(f"{path}: is not a JSON object")
    return document


def _weight_map(index: Path) -> Mapping[str, str]:
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise FileError(f"{index}: has no weight_map")
    for key, name in placed.items():
        # The files lie beside the index: a name that leads elsewhere is no shard of this model.
        if not isinstance(name, str) or Path(name).name != name:
            raise FileError(f"{index}: {key} is said to lie in {name!r}, which is not the name of a file")
        if not (index.parent / name).is_file():
            raise FileError(f"{index}: names {name}, which is not there")
    return placed


def _contents(path: Path) -> Iterator[tuple[str, str, tuple[int, ...], Any]]:
    """(key, type, shape, handle) of each tensor; opening compares the header with the file's length."""
    if not path.is_file():
        raise FileError(f"{path}: does not exist, or is no file")
    try:
        handle: Any = safe_open(path, framework="pt")
        for key in handle.keys():  # noqa: SIM118  # a handle is no mapping
            part = handle.get_slice(key)
            yield key, part.get_dtype(), tuple(part.get_shape()), handle
    except SafetensorError as error:
        raise FileError(f"{path}: is not a whole safetensors file: {error}") from error
