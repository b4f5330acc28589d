"""Controllers and streams that end with their test."""

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from running import Controller, Wire


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Controller]]:
    """Start controllers on a database's URL."""
    started: list[Controller] = []
    numbers = itertools.count()

    def begin(database: str) -> Controller:
        folder = tmp_path / f"controller-{next(numbers)}"
        folder.mkdir()
        started.append(Controller(folder, database))
        return started[-1]

    yield begin
    for one in started:
        one.kill()


@pytest.fixture
def connect() -> Iterator[Callable[[Controller], Wire]]:
    """Open streams."""
    opened: list[Wire] = []

    def begin(controller: Controller) -> Wire:
        opened.append(Wire(controller.address))
        return opened[-1]

    yield begin
    for one in opened:
        one.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Controller]:
    """One controller on SQLite for the tests that leave no trace in it."""
    folder = tmp_path_factory.mktemp("shared")
    controller = Controller(folder, f"sqlite:///{folder}/assay.db")
    yield controller
    controller.kill()
