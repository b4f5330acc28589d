"""Models between Hugging Face folders, our model files and a run's checkpoints; any of them can be the source."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from agent.checkpoint import manifest, storage
from agent.model import huggingface
from agent.model.config import V3Config
from agent.model.files.own import open_own, save, shapes
from agent.model.files.reading import INDEX, FileError, open_folder, read_json
from agent.model.files.writing import Entry, aside, write, write_json
from agent.model.presets import PRESETS
from agent.model.v3 import V3

CONFIG = "config.json"


@dataclass(frozen=True, slots=True)
class Source:
    """A model on disk: its configuration, and an fp32 tensor by our name."""

    config: V3Config
    read: Callable[[str], Tensor]


@dataclass(frozen=True, slots=True)
class Written:
    """What was written."""

    path: Path
    files: int
    tensors: int
    nbytes: int


def import_folder(folder: Path, out: Path, mtp: int | None = None) -> Written:
    """Make a model file of ours from a Hugging Face folder; FP8 blocks are made whole.

    ``mtp`` MTP modules must be in the weights; None: as many as there are.

    Raises:
        FileError, WeightsError, ConfigError: the folder is not a whole model that we can compute.
        OSError: the file cannot be written.
    """
    source = _published(folder, mtp)
    total = save(out, source.config, source.read)
    return Written(out, 1, len(shapes(source.config)), total)


def export_folder(source: Path, out: Path, shard_size: int, dtype: torch.dtype) -> Written:
    """Write the published layout: config.json, an index, and shards of at most ``shard_size`` bytes of weights.

    A tensor larger than that has a shard of its own. Router biases stay fp32 whatever ``dtype``, as published.

    Raises:
        FileError, ShardRefused: the source is not what it should be, or ``out`` exists.
        OSError: the folder cannot be written.
    """
    model = open_source(source)
    names = huggingface.keys(model.config)
    sizes = shapes(model.config)
    entries = [Entry(key, _dtype(key, dtype), sizes[name]) for key, name in names.items()]
    shards = list(divided(entries, shard_size))
    total = sum(entry.nbytes for entry in entries)
    with aside(out, total) as beside:
        beside.mkdir()
        placed: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write(beside / file, shard, lambda e: model.read(names[e.key]).to(e.dtype), {"format": "pt"})
            placed |= dict.fromkeys((entry.key for entry in shard), file)
        write_json(beside / INDEX, {"metadata": {"total_size": total}, "weight_map": placed})
        write_json(beside / CONFIG, huggingface.document(model.config, str(dtype).removeprefix("torch.")))
    return Written(out, len(shards), len(entries), total)


def divided(entries: list[Entry], shard_size: int) -> Iterator[list[Entry]]:
    """Entries in their order, cut whenever the next one would not fit."""
    shard: list[Entry] = []
    for entry in entries:
        if shard and sum(e.nbytes for e in shard) + entry.nbytes > shard_size:
            yield shard
            shard = []
        shard.append(entry)
    yield shard


def read_model(path: Path, compute_dtype: torch.dtype = torch.float32) -> V3:
    """A model from a model file of ours, a run's checkpoint or a Hugging Face folder.

    Raises:
        FileError, ShardRefused, WeightsError, ConfigError: it is none of these, or not whole.
    """
    source = open_source(path)
    model = V3(source.config, compute_dtype)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():  # these share the model's memory
            tensor.copy_(source.read(name))
    return model


def open_source(path: Path) -> Source:
    """What there is to read at a path; of a checkpoint every digest has been verified.

    Raises:
        As :func:`read_model`.
    """
    if (path / manifest.NAME).is_file():
        return _checkpoint(path)
    if path.is_dir() and (path / CONFIG).is_file():
        return _published(path, None)
    if path.is_dir():
        raise FileError(f"{path}: holds neither {manifest.NAME}, as a checkpoint does, nor {CONFIG}")
    config, files = open_own(path)
    return Source(config, files.read)


def _published(folder: Path, mtp: int | None) -> Source:
    if not folder.is_dir():
        raise FileError(f"{folder}: is not a folder")
    config = huggingface.config(read_json(folder / CONFIG))
    files = open_folder(folder)
    found = files.described
    config = replace(config, mtp_depth=huggingface.modules_in(found, config) if mtp is None else mtp)
    huggingface.check(config, found, shapes(config))
    huggingface.refuse_other_copies(config, files.read, found)
    published: dict[str, str] = {}
    for key, name in huggingface.keys(config).items():
        published.setdefault(name, key)  # of a shared tensor the original comes first, the copies after it
    return Source(config, lambda name: huggingface.value(published[name], files.read, found))


def _checkpoint(folder: Path) -> Source:
    described, arrays = storage.read(folder)
    if described.preset not in PRESETS:
        raise FileError(f"{folder}: was trained as {described.preset!r}, a preset that is not known here")
    config = replace(PRESETS[described.preset].config, vocab_size=described.vocab_size)
    held = {name.partition(".")[2]: array for name, array in arrays.items() if name.startswith(_WEIGHTS)}
    for name, shape in shapes(config).items():
        if name not in held or held[name].shape != shape:
            raise FileError(f"{folder}: {name} of shape {list(shape)} is not in it")
    return Source(config, lambda name: torch.from_numpy(held[name]))


#: A checkpoint's tensors are named after what they are and whose they are; these are the weights, the rest moments.
_WEIGHTS = ("master.", "router_bias.")


def _dtype(key: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if key.endswith(huggingface.BIAS) else dtype
