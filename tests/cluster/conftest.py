"""One clean reference run for the module, and a check that nothing of a run is left behind."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cluster import BASE, Document, Run, ours, wait_for


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Start runs; afterwards nothing of them may be alive."""
    started: list[Run] = []

    def start(*arguments: str, name: str = "run") -> Run:
        one = Run(tmp_path / name, *arguments)
        started.append(one)
        return one

    yield start
    for one in started:
        one.kill()
        wait_for(lambda one=one: not ours(one.directory), f"the processes of {one.directory} to end", 6.0)


@pytest.fixture(scope="session")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Document:
    """The document of the undisturbed reference run."""
    return Run(tmp_path_factory.mktemp("reference") / "run", *BASE).finish()
