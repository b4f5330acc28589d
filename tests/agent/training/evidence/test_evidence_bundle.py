"""A bundle is read as it was written or refused: whatever was cut, flipped or taken away."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.training.evidence.bundle import ASIDE, NAME, Bundle, BundleRefused, Coordinates, read, write

NAMED = str(Coordinates(12, 1, 3, 2))
FACTS = {"step": 12, "votes": [{"digest": "00ff"}]}
PARTS = {
    "weights": {"master.w": np.arange(64, dtype=np.float32)},
    "samples": {"tokens": np.arange(8, dtype=np.int64).reshape(2, 4)},
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evidence")
    size = write(folder, NAMED, Bundle(FACTS, PARTS))
    assert size == sum(file.stat().st_size for file in (folder / NAMED).glob("*.safetensors"))
    return folder / NAMED


def copied(written: Path, to: Path) -> Path:
    to.mkdir()
    for file in written.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def _said(path: Path) -> Any:
    """What the document says, if it says anything."""
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


def test_what_was_written_is_read(written: Path) -> None:
    found = read(written)
    assert found.facts == FACTS
    assert found.parts.keys() == PARTS.keys()
    for part, tensors in PARTS.items():
        for name, array in tensors.items():
            assert found.parts[part][name].dtype == array.dtype
            assert (found.parts[part][name] == array).all()
    assert [entry.name for entry in written.parent.iterdir()] == [NAMED]


@given(st.sampled_from([NAME, "weights.safetensors", "samples.safetensors"]), st.data())
def test_one_changed_byte_anywhere_is_refused(
    written: Path, tmp_path_factory: pytest.TempPathFactory, file: str, data: st.DataObject
) -> None:
    whole = (written / file).read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    other = data.draw(st.integers(0, 255).filter(lambda byte: byte != whole[at]))
    damaged = copied(written, tmp_path_factory.mktemp("damaged") / NAMED)
    (damaged / file).write_bytes(whole[:at] + bytes([other]) + whole[at + 1 :])
    if file == NAME and _said(damaged / NAME) == _said(written / NAME):  # white space of the document says nothing
        assert read(damaged).facts == FACTS
        return
    with pytest.raises(BundleRefused, match=re.escape(file)):
        read(damaged)


@given(st.sampled_from([NAME, "weights.safetensors", "samples.safetensors"]), st.data())
def test_a_truncated_file_is_refused(
    written: Path, tmp_path_factory: pytest.TempPathFactory, file: str, data: st.DataObject
) -> None:
    whole = (written / file).read_bytes()
    damaged = copied(written, tmp_path_factory.mktemp("cut") / NAMED)
    # The document's last byte is the end of its last line.
    (damaged / file).write_bytes(whole[: data.draw(st.integers(0, len(whole) - 2))])
    with pytest.raises(BundleRefused, match=file):
        read(damaged)


def test_what_is_missing_is_named(written: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleRefused, match=r"is no evidence bundle: it has no evidence\.json"):
        read(tmp_path)
    lacking = copied(written, tmp_path / NAMED)
    (lacking / "samples.safetensors").unlink()
    with pytest.raises(BundleRefused, match=r"samples\.safetensors cannot be read"):
        read(lacking)


def test_a_bundle_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    """Its name is taken, so the last step, the rename, fails."""
    (tmp_path / NAMED).mkdir()
    (tmp_path / NAMED / "kept").touch()
    with pytest.raises(OSError, match="not empty"):
        write(tmp_path, NAMED, Bundle(FACTS, PARTS))
    assert [entry.name for entry in tmp_path.iterdir()] == [NAMED]
    assert not list(tmp_path.glob(f"{ASIDE}*"))


@given(st.builds(Coordinates, *[st.integers(0, 10**7)] * 4))
def test_a_name_says_where_it_is_from(at: Coordinates) -> None:
    assert Coordinates.parse(str(at)) == at
    assert Coordinates.parse(f"{ASIDE}{at}") is None


@pytest.mark.parametrize("name", ["", "..", "step-1-rank-0-generation-1-attempt-1", f"{NAMED}/..", f"{NAMED}\n"])
def test_other_names_are_no_bundles(name: str) -> None:
    assert Coordinates.parse(name) is None
