"""Lets the model's tests share their reference, and keeps them quick: models so small gain nothing by threads."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread: None) -> None:
    pass
