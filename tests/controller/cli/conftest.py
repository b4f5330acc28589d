"""Run directories as an ended run leaves them."""

import time
from pathlib import Path

import pytest
from rundirs import record

from controller.store.opening import database_url, open_store


@pytest.fixture
def ended(tmp_path: Path) -> Path:
    """A run that was stopped before its controller took the job: run.json and an empty database."""
    directory = tmp_path / "run"
    directory.mkdir()
    open_store(database_url(directory)).close()
    record(directory, ended_at=time.time()).save(directory)
    return directory
