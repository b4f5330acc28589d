"""Which evidence stays: so many bundles, so old, so many bytes in all; never fewer than open incidents need."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from agent.training.evidence.bundle import ASIDE, Coordinates
from agent.training.spec import EvidenceSettings

#: What was removed and why, one JSON object a line, for whoever asks for it later.
LEDGER = "removed.jsonl"
_DAY_S = 86400.0


@dataclass(frozen=True, slots=True)
class Removed:
    """A bundle that is gone, and the setting that it exceeded."""

    name: str
    why: str


@dataclass(frozen=True, slots=True)
class _Kept:
    name: str
    at: Coordinates
    written: float
    size: int


def prune(folder: Path, settings: EvidenceSettings, open_from: int, generation: int, now: float) -> list[Removed]:
    """Remove what exceeds the settings, the oldest first; `now` in seconds since 1970.

    Bundles of steps from `open_from` on stay whatever the settings say: such a step is not final yet, so its incident
    is open. Whatever was being written by generations before this one is removed too, and is no loss. Raises OSError.
    """
    for left in folder.glob(f"{ASIDE}*"):
        at = Coordinates.parse(left.name.removeprefix(ASIDE))
        if at is None or at.generation < generation:
            shutil.rmtree(left, ignore_errors=True)
    removed: list[Removed] = []
    kept = _bundles(folder)
    for bundle in list(kept):
        why = _exceeds(kept, bundle, settings, now)
        if why and bundle.at.step < open_from:
            shutil.rmtree(folder / bundle.name)
            kept.remove(bundle)
            removed.append(Removed(bundle.name, why))
    if removed:
        with (folder / LEDGER).open("a") as ledger:
            for gone in removed:
                ledger.write(json.dumps({"name": gone.name, "time": now, "why": gone.why}) + "\n")
    return removed


def _exceeds(kept: list[_Kept], bundle: _Kept, settings: EvidenceSettings, now: float) -> str:
    """Why the bundle has to go while these are kept; empty if it may stay."""
    if now - bundle.written > settings.days * _DAY_S:
        return f"older than days={settings.days:g}"
    if len(kept) > settings.keep:
        return f"more than keep={settings.keep}"
    if sum(other.size for other in kept) > settings.total_bytes:
        return f"more than total={settings.total_bytes} bytes"
    return ""


def _bundles(folder: Path) -> list[_Kept]:
    """All of a job, the oldest first."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        at = Coordinates.parse(path.name)
        if at is not None and path.is_dir():
            sizes = [file.stat().st_size for file in path.iterdir()]
            found.append(_Kept(path.name, at, path.stat().st_mtime, sum(sizes)))
    return sorted(found, key=lambda bundle: (bundle.written, bundle.name))
