"""A job's checkpoints on storage: written aside, published by one rename, fenced by generation, else refused."""

import fcntl
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from agent.checkpoint.manifest import NAME, Manifest, ManifestError, TensorEntry, entries_from_json, entries_to_json
from diagnostics.sensors.multilinear import MASK, digest_bytes

SHARD = "shard-0.safetensors"
#: What a rank's shard holds, until the manifest of the whole says it.
_LISTED = "shard-{}.json"
#: Published checkpoints that stay: the newest may turn out damaged, so may the one before it.
KEEP = 4


class ShardRefused(ValueError):
    """A checkpoint whose contents are not what its manifest says."""

    def __init__(self, path: Path, step: int, shard: str, expected: str, found: str) -> None:
        super().__init__(f"{path.name}: {shard} has {found}, its manifest says {expected}")
        self.path = path
        self.step = step
        self.shard = shard
        self.expected = expected
        self.found = found


class Fenced(RuntimeError):
    """A newer generation owns the storage; this one must not publish."""


class Storage:
    """The folder of one job's checkpoints, shared by its nodes."""

    def __init__(self, root: Path, job: str) -> None:
        self.folder = root / job

    def published(self) -> list[Path]:
        """Published checkpoints, the newest first."""
        return sorted((p for p in self.folder.glob("step-????????") if p.is_dir()), reverse=True)

    def fence(self, generation: int) -> None:
        """Refuse every older generation from now on. Raises Fenced if a newer one was here."""
        with self._locked() as highest:
            if highest > generation:
                raise Fenced(f"generation {highest} owns {self.folder}; this is {generation}")
            self._fence_file.write_text(str(generation))
            for left in self.folder.glob("writing-*"):  # by generations that can publish no more
                if left.name != f"{left.name.rpartition('-')[0]}-{generation}":
                    shutil.rmtree(left, ignore_errors=True)

    def write(self, manifest: Manifest, tensors: Mapping[str, NDArray[np.generic]]) -> Path:
        """Write everything aside and force it to storage; `publish` makes it a checkpoint."""
        aside = self._aside(manifest.step, manifest.generation)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        _save(tensors, aside / SHARD)
        (aside / NAME).write_text(manifest.to_json())
        for path in (aside / SHARD, aside / NAME, aside):
            _sync(path)
        return aside

    def write_shard(
        self,
        step: int,
        generation: int,
        rank: int,
        entries: Sequence[TensorEntry],
        tensors: Mapping[str, NDArray[np.generic]],
    ) -> None:
        """Write one rank's shard aside, with a list of what it holds, and force both to storage."""
        aside = self._aside(step, generation)
        aside.mkdir(parents=True, exist_ok=True)
        _save(tensors, aside / shard_name(rank))
        listed = aside / _LISTED.format(rank)
        listed.write_text(entries_to_json(entries))
        for path in (aside / shard_name(rank), listed, aside):
            _sync(path)

    def assemble(self, manifest: Manifest, ranks: int) -> tuple[Path, Manifest]:
        """The manifest of shards that lie aside, written beside them; `publish` makes them a checkpoint.

        Raises ShardRefused if the shards' digests are not those of the state that the ranks agreed on.
        """
        aside = self._aside(manifest.step, manifest.generation)
        lists = [aside / _LISTED.format(rank) for rank in range(ranks)]
        try:
            entries = [entry for path in lists for entry in entries_from_json(path.read_text())]
        except (OSError, UnicodeDecodeError, ManifestError) as error:
            raise ShardRefused(aside, manifest.step, "the shards' lists", "what was written", str(error)) from error
        total = sum(int(entry.digest, 16) for entry in entries) & MASK
        if f"{total:016x}" != manifest.digest:
            raise ShardRefused(aside, manifest.step, "shards", manifest.digest, f"{total:016x}")
        whole = replace(manifest, tensors=tuple(entries))
        (aside / NAME).write_text(whole.to_json())
        for path in lists:
            path.unlink()
        for path in (aside / NAME, aside):
            _sync(path)
        return aside, whole

    def abandon(self, step: int, generation: int) -> None:
        """Remove what was written aside of a checkpoint that there will not be."""
        shutil.rmtree(self._aside(step, generation), ignore_errors=True)

    def _aside(self, step: int, generation: int) -> Path:
        return self.folder / f"writing-{step:08d}-{generation}"

    def publish(self, aside: Path, manifest: Manifest) -> Path:
        """Give a written checkpoint its name, by one rename under the fence. Raises Fenced."""
        final = self.folder / f"step-{manifest.step:08d}"
        with self._locked() as highest:
            if highest > manifest.generation:
                shutil.rmtree(aside, ignore_errors=True)
                raise Fenced(f"generation {highest} owns {self.folder}; this is {manifest.generation}")
            if final.exists():  # the same step again, after a restart from before it
                shutil.rmtree(final)
            aside.rename(final)
            _sync(self.folder)
        for old in self.published()[KEEP:]:
            shutil.rmtree(old, ignore_errors=True)
        return final

    def set_aside(self, path: Path, generation: int) -> None:
        """Rename a refused checkpoint, keeping it as evidence. Harmless if another rank was first."""
        try:
            path.rename(path.with_name(f"refused-{path.name}-{generation}"))
        except FileNotFoundError:
            return

    @property
    def _fence_file(self) -> Path:
        return self.folder / "generation"

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """The storage's lock; yields the highest generation seen."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield self._highest()

    def _highest(self) -> int:
        """The highest generation noted; 0 if there is none, or none that can be read: the next one notes its own."""
        try:
            return int(self._fence_file.read_text())
        except (FileNotFoundError, ValueError):
            return 0


def shard_name(rank: int) -> str:
    """The file of a rank's shard; a state that is not divided is shard 0."""
    return f"shard-{rank}.safetensors"


def read(path: Path, names: Collection[str] | None = None) -> tuple[Manifest, dict[str, NDArray[np.generic]]]:
    """Load a checkpoint, or the tensors of these names, and verify each of them, and the whole by their digests.

    Raises ShardRefused; nothing unverified is returned.
    """
    manifest = read_manifest(path)
    total = sum(int(entry.digest, 16) for entry in manifest.tensors) & MASK
    if f"{total:016x}" != manifest.digest:
        raise ShardRefused(path, manifest.step, "state", manifest.digest, f"{total:016x}")
    wanted = [entry for entry in manifest.tensors if names is None or entry.name in names]
    found: dict[str, NDArray[np.generic]] = {}
    for shard in sorted({entry.shard for entry in wanted}):
        _read_shard(path, manifest, shard, [entry for entry in wanted if entry.shard == shard], found)
    if lacking := sorted(set(names or ()) - found.keys()):
        raise ShardRefused(path, manifest.step, lacking[0], "no such tensor", "it is needed")
    return manifest, found


def _read_shard(
    path: Path, manifest: Manifest, shard: str, wanted: list[TensorEntry], found: dict[str, NDArray[np.generic]]
) -> None:
    """Add a shard's tensors to those found, each of them verified."""
    try:
        with safe_open(path / shard, framework="numpy") as file:
            present = set(file.keys())
            for entry in wanted:
                array = file.get_tensor(entry.name) if entry.name in present else None
                if array is None or tuple(array.shape) != entry.shape:
                    raise ShardRefused(path, manifest.step, entry.name, f"shape {entry.shape}", "no such tensor")
                value = tensor_digest(array, entry.word)
                if f"{value:016x}" != entry.digest:
                    raise ShardRefused(path, manifest.step, entry.name, entry.digest, f"{value:016x}")
                found[entry.name] = array
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, ShardRefused):
            raise
        raise ShardRefused(path, manifest.step, shard, "a readable shard", f"an unreadable one ({error})") from error


def read_manifest(path: Path) -> Manifest:
    """The manifest alone. Raises ShardRefused if it is missing, damaged, or another checkpoint's."""
    named = path.name.rpartition("-")[2] if path.name.startswith("step-") else ""
    step = int(named) if named.isdigit() else 0
    try:
        manifest = Manifest.from_json((path / NAME).read_text())
    except (OSError, UnicodeDecodeError, ManifestError) as error:
        raise ShardRefused(path, step, NAME, "what was written", str(error)) from error
    if named.isdigit() and manifest.step != step:
        raise ShardRefused(path, step, NAME, f"step {manifest.step}", f"the name of step {step}")
    return manifest


def tensor_digest(array: NDArray[np.generic], word: int) -> int:
    """The tensor's part of the state's digest; `word` is where it starts, in 32-bit words."""
    return digest_bytes(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, word)


def _save(tensors: Mapping[str, NDArray[np.generic]], path: Path) -> None:
    """Write a safetensors file. Raises OSError, whatever stopped it: the library's own error is none."""
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
