"""The run directory as its commands see it: run.json says where the controller and the database are."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from controller.cli.errors import ConditionError, UsageError

SCHEMA = "assay.rundir/1"
FILE = "run.json"
#: Locked for as long as an `assay run` lives; the kernel lets go of it however that ends.
LOCK = ".lock"
#: The database's URL may hold a password.
_MODE = 0o600

dir_option = click.option(
    "--dir",
    "directory",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="The run's directory, as `assay run` named it.",
)


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """What run.json holds. `spec` is the job's, "assay.job/1"; `ended_at` is None until `assay run` has stopped it."""

    job: str
    spec: dict[str, Any]
    nodes: int
    spares: int
    status_url: str
    grpc: str
    database: str
    supervisor_pid: int
    started_at: float
    ended_at: float | None = None

    @property
    def running(self) -> bool:
        """Whether its supervisor is there. A recycled pid of another program does not count."""
        if self.ended_at is not None or self.supervisor_pid <= 0:
            return False
        try:
            command = Path(f"/proc/{self.supervisor_pid}/cmdline").read_bytes()
        except OSError:
            return False
        return b"controller.local.supervisor" in command

    def save(self, directory: Path) -> None:
        """Write run.json so that readers see the old one or the new one. Raises ConditionError."""
        text = json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1)
        aside = directory / f".{FILE}.{os.getpid()}"
        try:
            with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, _MODE), "w") as file:
                file.write(text)
            aside.rename(directory / FILE)
        except OSError as error:
            raise ConditionError(f"cannot write {directory / FILE}: {error.strerror}") from error

    def end(self, directory: Path, now: float) -> None:
        """Note that nothing of it runs any more."""
        replace(self, ended_at=now).save(directory)


def unused(directory: Path) -> None:
    """Refuse a directory that holds a run. Raises UsageError."""
    if (directory / FILE).exists():
        raise UsageError(f"{directory} holds a run already: go on with --resume {directory}, or name another --dir")


@contextmanager
def claimed(directory: Path) -> Iterator[None]:
    """Hold the directory for one `assay run`, from before anything is started. Raises ConditionError if it is held."""
    path = directory / LOCK
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _MODE)
    except OSError as error:
        raise ConditionError(f"cannot write {path}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ConditionError(f"another run is active in {directory}") from None
    finally:
        os.close(lock)


def load(directory: Path) -> RunDirectory:
    """Read DIR/run.json. Raises UsageError if there is none or it is not ours."""
    path = directory / FILE
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"{directory} is not the directory of a run: it has no {FILE}") from None
    except OSError as error:
        raise ConditionError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path} is damaged: {error}") from error
    if not isinstance(document, dict) or document.pop("schema", None) != SCHEMA:
        raise UsageError(f"{path} is not {SCHEMA}")
    try:
        return RunDirectory(**document)
    except TypeError as error:
        raise UsageError(f"{path} is not {SCHEMA}: {error}") from error


def local_processes(directory: Path) -> list[dict[str, Any]]:
    """What the supervisor runs by itself, from DIR/processes.json; nothing if it is not there."""
    try:
        document = json.loads((directory / "processes.json").read_text())
    except (OSError, ValueError):
        return []
    listed = document.get("processes") if isinstance(document, dict) else None
    return [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
