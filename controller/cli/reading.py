"""Where a command's documents come from: the run's database, which answers while the job runs and for ever after."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from controller.cli.errors import CommandError, ConditionError
from controller.cli.rundir import RunDirectory, load
from controller.store.errors import StoreError, UnknownIdError
from controller.store.opening import open_store
from controller.store.queries import Queries


@contextmanager
def queries(run: RunDirectory) -> Iterator[Queries]:
    """Open the run's database for reading. What goes wrong inside becomes one line and an exit code."""
    with told():
        store = open_store(run.database, create=False)
        try:
            yield Queries(store)
        finally:
            store.close()


@contextmanager
def told() -> Iterator[None]:
    """Turn the store's errors into the commands'."""
    try:
        yield
    except StoreError as error:
        raise ConditionError(str(error)) from error
    except UnknownIdError as error:
        raise CommandError(str(error)) from error


def read(directory: Path, kind: str, ident: str = "") -> dict[str, Any]:
    """One document of the run in `directory`.

    The database is read directly even while the controller runs: it holds all that was ever acknowledged, and it
    answers while a controller that died is being restarted.
    """
    run = load(directory)
    with queries(run) as ask:
        if kind == "run":
            return ask.run(ident or run.job, str(directory.absolute()), run.status_url)
        return ask.read(kind, ident)
