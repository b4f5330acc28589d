"""An evidence bundle on disk: what a disputed computation takes to be run again, whole and hashed, or else refused.

A bundle is a folder: evidence.json says what was computed, by whom and from what; beside it lie the tensors.
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

SCHEMA = "assay.evidence/1"
NAME = "evidence.json"
#: What is being written has a name that no reader looks at, until one rename.
ASIDE = ".writing-"
_NAMED = re.compile(r"step-(\d{8})-rank-(\d+)-generation-(\d+)-attempt-(\d+)")
_DIGEST_BYTES = 16

Tensors = dict[str, NDArray[np.generic]]


class BundleRefused(ValueError):
    """A bundle that is not there, or not as it was written; the message says which part."""


@dataclass(frozen=True, slots=True)
class Coordinates:
    """Which computation: the attempt counts from 1 within its generation."""

    step: int
    rank: int
    generation: int
    attempt: int

    def __str__(self) -> str:
        return f"step-{self.step:08d}-rank-{self.rank}-generation-{self.generation}-attempt-{self.attempt}"

    @classmethod
    def parse(cls, name: str) -> "Coordinates | None":
        """Those in a bundle's name; None if it is no bundle's."""
        match = _NAMED.fullmatch(name)
        return None if match is None else cls(*(int(group) for group in match.groups()))


@dataclass(frozen=True, slots=True)
class Bundle:
    """`facts` is the document, of JSON's types only; `parts` are tensors by the file that holds them."""

    facts: dict[str, Any]
    parts: dict[str, Tensors] = field(default_factory=dict)


def write(folder: Path, name: str, bundle: Bundle) -> int:
    """Write a bundle aside, force it to storage and give it its name by one rename; its size in bytes.

    Raises OSError; nothing is left then.
    """
    aside = folder / f"{ASIDE}{name}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        files = {f"{part}.safetensors": _save(tensors, aside, part) for part, tensors in bundle.parts.items()}
        document = {"schema": SCHEMA, **bundle.facts, "files": files}
        (aside / NAME).write_text(json.dumps({**document, "check": _check(document)}, indent=1) + "\n")
        for path in (aside / NAME, aside):
            _sync(path)
        aside.rename(folder / name)
        _sync(folder)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return sum(int(entry["bytes"]) for entry in files.values())


def read(path: Path) -> Bundle:
    """A bundle whose document and files all are as they were written. Raises BundleRefused."""
    facts = _document(path)
    files = facts.pop("files")
    return Bundle(facts, {file.removesuffix(".safetensors"): _load(path / file, files[file]) for file in files})


def _document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads((path / NAME).read_text())
    except FileNotFoundError:
        raise BundleRefused(f"{path} is no evidence bundle: it has no {NAME}") from None
    except (OSError, ValueError) as error:
        raise BundleRefused(f"{path}: {NAME} cannot be read: {error}") from error
    if not isinstance(document, dict) or document.pop("check", None) != _check(document):
        raise BundleRefused(f"{path}: {NAME} is not as it was written")
    if document.pop("schema", None) != SCHEMA:
        raise BundleRefused(f"{path}: {NAME} is not {SCHEMA}")
    return document


def _save(tensors: Tensors, folder: Path, part: str) -> dict[str, Any]:
    path = folder / f"{part}.safetensors"
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # the library's own error is no OSError, whatever stopped it
        raise OSError(f"{path.name}: {error}") from error
    _sync(path)
    return {"bytes": path.stat().st_size, "digest": _digest(path)}


def _load(path: Path, entry: dict[str, Any]) -> Tensors:
    try:
        if (size := path.stat().st_size) != entry["bytes"]:
            raise BundleRefused(f"{path} has {size} bytes, {NAME} says {entry['bytes']}")
        if (found := _digest(path)) != entry["digest"]:
            raise BundleRefused(f"{path} has digest {found}, {NAME} says {entry['digest']}")
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise BundleRefused(f"{path} cannot be read: {error}") from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=_DIGEST_BYTES)).hexdigest()


def _check(document: dict[str, Any]) -> str:
    """32 hex digits over the document's values, whatever its layout."""
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=_DIGEST_BYTES).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
