"""Shards of a checkpoint: assembled when all are there and unharmed, refused and cleared away otherwise."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_storage import TENSORS, manifest

from agent.checkpoint.manifest import ManifestError, entries_from_json, entries_to_json
from agent.checkpoint.storage import ShardRefused, Storage, read, shard_name


def written(root: Path, ranks: int = 2) -> Storage:
    """The two tensors of `manifest()`, a shard each; the last ranks are missing if fewer are asked for."""
    storage = Storage(root, "job")
    for rank, entry in enumerate(manifest().tensors[:ranks]):
        placed = replace(entry, shard=shard_name(rank))
        storage.write_shard(6, 1, rank, [placed], {entry.name: TENSORS[entry.name]})
    return storage


def aside(storage: Storage) -> Path:
    return storage.folder / "writing-00000006-1"


def test_shards_become_one_checkpoint(tmp_path: Path) -> None:
    storage = written(tmp_path)
    path = storage.publish(*storage.assemble(manifest(), 2))
    found, arrays = read(path)
    assert {entry.name: entry.shard for entry in found.tensors} == {"master.a": shard_name(0), "meta": shard_name(1)}
    assert all(np.array_equal(arrays[name], array) for name, array in TENSORS.items())
    some, one = read(path, ["meta"])
    assert (some, list(one)) == (found, ["meta"])
    assert not list(storage.folder.glob("writing-*"))


def test_a_shard_that_is_missing_or_another_is_refused(tmp_path: Path) -> None:
    storage = written(tmp_path, ranks=1)
    with pytest.raises(ShardRefused, match="the shards' lists"):
        storage.assemble(manifest(), 2)
    with pytest.raises(ShardRefused, match="shards has"):
        storage.assemble(manifest(), 1)
    storage.abandon(6, 1)
    assert not list(storage.folder.glob("writing-*"))


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"tensors": [], "check": "0"}', '{"tensors": 3}'])
def test_a_damaged_list_is_refused_and_not_believed(tmp_path: Path, damage: str) -> None:
    storage = written(tmp_path)
    (aside(storage) / "shard-1.json").write_text(damage)
    with pytest.raises(ShardRefused, match="the shards' lists"):
        storage.assemble(manifest(), 2)


def test_a_list_whose_name_changed_is_seen_though_the_digests_add_up() -> None:
    text = entries_to_json(manifest().tensors)
    assert entries_from_json(text) == manifest().tensors
    with pytest.raises(ManifestError, match="check"):
        entries_from_json(text.replace("master.a", "master.b"))


def test_a_shard_that_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    """safetensors has an error of its own, which nobody above would catch."""
    storage = Storage(tmp_path, "job")
    (entry, _) = manifest().tensors
    (aside(storage) / shard_name(0)).mkdir(parents=True)
    with pytest.raises(OSError, match="shard-0"):
        storage.write_shard(6, 1, 0, [entry], {entry.name: TENSORS[entry.name]})


def test_a_new_generation_clears_away_what_older_ones_left(tmp_path: Path) -> None:
    storage = written(tmp_path)
    (storage.folder / "writing-00000009-2").mkdir()
    storage.fence(2)
    assert [path.name for path in storage.folder.glob("writing-*")] == ["writing-00000009-2"]
