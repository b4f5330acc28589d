"""Checkpoints on disk: one flipped bit anywhere is refused, whatever it says of the state."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.checkpoint.manifest import NAME, Manifest, TensorEntry
from agent.checkpoint.storage import SHARD, Fenced, ShardRefused, Storage, read, tensor_digest

TENSORS = {"master.a": np.arange(24, dtype=np.float32).reshape(4, 6), "meta": np.array([7, 6, 48], np.int64)}


def manifest(step: int = 6, generation: int = 1) -> Manifest:
    entries, word = [], 0
    for name, array in TENSORS.items():
        digest = f"{tensor_digest(array, word):016x}"
        entries.append(TensorEntry(name, str(array.dtype), array.shape, word, digest, SHARD))
        word += array.nbytes // 4
    total = sum(int(entry.digest, 16) for entry in entries) & (2**64 - 1)
    return Manifest(
        job="job",
        generation=generation,
        step=step,
        parent_step=0,
        digest=f"{total:016x}",
        chain="00000000000000c6",
        preset="tiny",
        seed=7,
        world=2,
        precision="fp32",
        threads=1,
        corpus="c",
        fingerprint="{}",
        created=1.5,
        tensors=tuple(entries),
        vocab_size=264,
        pack="stream",
    )


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    storage = Storage(tmp_path_factory.mktemp("storage"), "job")
    return storage.publish(storage.write(manifest(), TENSORS), manifest())


def test_what_was_written_is_read(published: Path) -> None:
    """The control: without a flip nothing is refused."""
    found, arrays = read(published)
    assert found == manifest()
    assert all(np.array_equal(arrays[name], array) for name, array in TENSORS.items())


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from([NAME, SHARD]), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_one_flipped_bit_anywhere_is_refused(published: Path, name: str, place: float, bit: int) -> None:
    path = published / name
    whole = path.read_bytes()
    at = int(place * len(whole))
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
    try:
        found, arrays = read(published)
    except ShardRefused:
        return
    finally:
        path.write_bytes(whole)
    # A space between two words of JSON, or padding of a header, says nothing; all that is said must be as it was.
    assert found == manifest()
    assert all(np.array_equal(arrays[key], array) for key, array in TENSORS.items())


@pytest.mark.parametrize(("old", "new"), [('"step": 6', '"step": 4'), ("c6", "c7"), ('"seed": 7', '"seed": 3')])
def test_a_manifest_that_says_something_else_is_refused(published: Path, old: str, new: str) -> None:
    path = published / NAME
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    try:
        with pytest.raises(ShardRefused, match="over contents that give"):
            read(published)
    finally:
        path.write_text(text)


def test_a_checkpoint_under_another_ones_name_is_refused(published: Path) -> None:
    other = published.with_name("step-00000008")
    published.rename(other)
    try:
        with pytest.raises(ShardRefused, match="the name of step 8"):
            read(other)
    finally:
        other.rename(published)


def test_a_damaged_fence_is_noted_anew_and_holds_again(tmp_path: Path) -> None:
    storage = Storage(tmp_path, "job")
    storage.fence(3)
    (tmp_path / "job" / "generation").write_text("garbage")
    storage.fence(4)
    with pytest.raises(Fenced, match="generation 4 owns"):
        storage.fence(3)
