"""Where finished work is kept, so that an interrupted campaign goes on: one file a block, one line a fault."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

#: What the outcome of a fault depends on, below the repository's root.
_CODE = ("agent/model", "agent/training", "diagnostics", "benchmarks/campaign", "benchmarks/_fp8_training.py")


def folder_for(keep: Path, name: str, *settings: object) -> Path:
    """A folder within `keep`, made if it is missing, named by everything that a line depends on, the code included."""
    root = Path(__file__).parents[2]
    state = hashlib.blake2b(repr((torch.__version__, *settings)).encode(), digest_size=8)
    for part in _CODE:
        below = sorted((root / part).rglob("*")) or [root / part]
        for path in below:
            if path.suffix in (".py", ".json"):
                state.update(path.read_bytes())
    folder = keep / f"{name}-{state.hexdigest()}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def append(path: Path, line: dict[str, Any]) -> None:
    """Add one line, at once."""
    with path.open("a") as file:
        file.write(json.dumps(line, separators=(",", ":")) + "\n")


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; what a killed process left of one is cut off. Nothing if there is no file."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        path.write_bytes(whole)
    return [json.loads(line) for line in whole.splitlines()]


def path_of(folder: Path, block: int) -> Path:
    """The file of a block."""
    return folder / f"block-{block:06d}.jsonl"


def missing(folder: Path, block: int, indices: Sequence[int]) -> list[int]:
    """Those of a block's faults that have no line yet."""
    done = {line["index"] for line in lines_of(path_of(folder, block))}
    return [index for index in indices if index not in done]


def collected(folder: Path, blocks: Iterable[int]) -> list[dict[str, Any]]:
    """All lines of these blocks, by index."""
    lines = [line for block in blocks for line in lines_of(path_of(folder, block))]
    return sorted(lines, key=lambda line: int(line["index"]))
