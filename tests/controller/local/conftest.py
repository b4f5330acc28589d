"""A plan that no other test shares."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.local.plan import Plan, make_plan


@pytest.fixture
def plan(tmp_path: Path) -> Iterator[Plan]:
    """Two nodes and a spare in a fresh directory."""
    made = make_plan(tmp_path / "run", f"sqlite:///{tmp_path}/run/assay.db", 2, 1, 0, None)
    yield made
    shutil.rmtree(made.runtime, ignore_errors=True)
