"""A capture tells its caller when what it copied is not what was committed, and writes nothing of it."""

from pathlib import Path
from typing import Any

import pytest
from little_v3 import CONFIG
from test_storage import manifest

from agent.checkpoint.capture import Capture
from agent.checkpoint.storage import Storage
from agent.model import V3
from agent.slots import SlotRecord
from agent.training.layout import State, StateLayout
from diagnostics.sensors.digest import digest


def made() -> tuple[StateLayout, State]:
    model = V3(CONFIG)
    model.initialise(3)
    layout = StateLayout(model)
    state = layout.view(memoryview(bytearray(layout.nbytes)))
    layout.capture(model, state)
    return layout, state


@pytest.mark.parametrize("changed", [True, False])
def test_a_copy_of_something_else_is_told_once_and_its_redo_is_written(tmp_path: Path, changed: bool) -> None:
    layout, state = made()
    record = SlotRecord(1, 6, digest(state.words), 0)
    told: list[tuple[str, dict[str, Any]]] = []
    capture = Capture(
        Storage(tmp_path, "job"), layout, manifest(), lambda kind, body, urgent: told.append((kind, body))
    )
    state.words[5] ^= int(changed)
    capture.start(record, state)
    assert capture.wait_copied() is not changed
    assert capture.wait_copied()
    if changed:
        capture.discard(6)
        capture.close()
        assert [kind for kind, _ in told] == ["finding_raised"]
        assert not list(tmp_path.rglob("*.safetensors"))
        state.words[5] ^= 1
        capture.start(record, state)
        assert capture.wait_copied()
    capture.finalise(6)
    capture.close()
    assert [kind for kind, _ in told][changed:] == ["checkpoint_captured", "checkpoint_durable"]
