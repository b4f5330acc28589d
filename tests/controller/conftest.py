"""What the controller's tests share: a database of either kind, and a controller to talk to."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from private_postgresql import MissingServerError, create_database, private_postgresql
from sqlalchemy.engine import URL

from controller.store.opening import Store, database_url, open_store

_NUMBERS = itertools.count(1)


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[URL]:
    """A private server; without one installed the test fails, and says what to install."""
    try:
        with private_postgresql() as url:
            yield url
    except MissingServerError as error:
        pytest.fail(str(error))


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a database that holds nothing yet, of each kind in turn."""
    if request.param == "sqlite":
        return database_url(tmp_path)
    server: URL = request.getfixturevalue("postgresql_server")
    return create_database(server, f"assay_{next(_NUMBERS)}").render_as_string(hide_password=False)


@pytest.fixture
def any_store(empty_url: str) -> Iterator[Store]:
    """An open store on each kind of database in turn."""
    store = open_store(empty_url)
    yield store
    store.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """An open store on SQLite."""
    opened = open_store(database_url(tmp_path))
    yield opened
    opened.close()
