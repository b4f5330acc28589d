"""Our own model file: one safetensors file of our parameter names, fp32, with the configuration in its metadata."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from agent.model.config import ConfigError, V3Config, Yarn
from agent.model.files.reading import FileError, WeightFiles
from agent.model.files.writing import Entry, aside, write
from agent.model.huggingface import Description
from agent.model.v3 import V3

SCHEMA = "assay.model/1"


def shapes(config: V3Config) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a model by its name, from the meta device: nothing is allocated."""
    with torch.device("meta"):
        model = V3(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def save(path: Path, config: V3Config, read: Callable[[str], Tensor]) -> int:
    """Write a model file; ``read`` gives an fp32 tensor by our name, one at a time. Returns its bytes of weights.

    Raises:
        FileError: the file exists.
        OSError: it cannot be written.
    """
    entries = [Entry(name, torch.float32, shape) for name, shape in shapes(config).items()]
    total = sum(entry.nbytes for entry in entries)
    metadata = {"schema": SCHEMA, "config": json.dumps(asdict(config))}
    with aside(path, total) as beside:
        write(beside, entries, lambda entry: read(entry.key), metadata)
    return total


def open_own(path: Path) -> tuple[V3Config, WeightFiles]:
    """The configuration of a model file and its tensors, all of which are there.

    Raises:
        FileError: not a model file, or damaged.
    """
    files = WeightFiles([path])
    if files.metadata.get("schema") != SCHEMA:
        raise FileError(f"{path}: is not a model file of ours ({SCHEMA}); `assay model import` makes one")
    config = _parse(path, files.metadata.get("config", ""))
    wanted = {name: Description(torch.float32, shape) for name, shape in shapes(config).items()}
    if differing := {name for name, _ in wanted.items() ^ files.described.items()}:
        raise FileError(f"{path}: {len(differing)} tensors are not those of its configuration: {min(differing)}, ...")
    return config, files


def _parse(path: Path, text: str) -> V3Config:
    try:
        document = json.loads(text)
        yarn = document.pop("yarn")
        return V3Config(**document, yarn=Yarn(**yarn) if yarn else None)
    except ConfigError as error:
        raise FileError(f"{path}: its configuration cannot be: {error}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FileError(f"{path}: its configuration cannot be read: {error!r}") from error
