"""What must hold before anything of a run is started; each check ends in one line and its exit code."""

import importlib.util
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from controller.cli.errors import ConditionError, UsageError
from controller.cli.presets import EXPERTS, LAYERS
from controller.local.plan import OBJECT_STORE_BYTES, port_is_free
from controller.store.errors import StoreError
from controller.store.opening import open_store

#: Checkpoints that exist at once: those that are kept and the one that is being written.
CHECKPOINTS = 5
#: Database, logs, evidence and the corpus cache.
OTHER_BYTES = 150_000_000
#: Two state slots and one replica of a rank.
SLOTS = 3
SHARED_MEMORY = Path("/dev/shm")
_SIZE = re.compile(r"[1-9][0-9]{0,5}")


def preset(name: str) -> str:
    """A preset that exists."""
    if name not in LAYERS:
        raise UsageError(f"unknown preset {name!r}; known are {', '.join(LAYERS)}")
    return name


def scale(value: float) -> float:
    """A tolerance scale that is a positive number."""
    if not (math.isfinite(value) and value > 0):
        raise UsageError(f"--tolerance-scale must be above 0, not {value}")
    return value


def share(value: float) -> float:
    """Raise UsageError unless --again is a share: NaN is within click's range."""
    if not 0 <= value <= 1:
        raise UsageError(f"--again must be a share in 0..1, not {value}")
    return value


def corpus(path: str | None) -> str | None:
    """A corpus that exists and has bytes, as an absolute path. None is Python's own sources.

    The prefix of a token file exists if one of its two files does. What lies inside is `controller.cli.corpus`'s.
    """
    if path is None:
        return None
    found = Path(path)
    try:
        if not found.exists():
            if any(Path(f"{path}{half}").exists() for half in (".bin", ".idx")):
                return str(found.absolute())
            raise UsageError(f"corpus {path} does not exist")
        if not any(file.stat().st_size for file in _files(found)):
            raise UsageError(f"corpus {path} is empty")
    except OSError as error:
        raise UsageError(f"corpus {error.filename or path} cannot be read: {error.strerror}") from error
    if not os.access(found, os.R_OK):
        raise UsageError(f"corpus {path} cannot be read")
    return str(found.absolute())


def tokenizer(path: str | None) -> str | None:
    """A tokenizer.json that can be read, as an absolute path."""
    if path is None:
        return None
    found = Path(path)
    try:
        if not found.is_file():
            raise UsageError(f"tokenizer {path} is not a file: give a tokenizer.json")
    except OSError as error:
        raise UsageError(f"tokenizer {path} cannot be read: {error.strerror}") from error
    if not os.access(found, os.R_OK):
        raise UsageError(f"tokenizer {path} cannot be read")
    return str(found.absolute())


def ray() -> None:
    """Ray can be imported; importing it here would cost a second."""
    if importlib.util.find_spec("ray") is None:
        raise ConditionError("Ray is not installed: pip install 'ray>=2.60'")


def mesh(text: str | None) -> dict[str, int] | None:
    """The sizes in `dp=4,ep=2,local=1`, of which only dp is needed. None: no mesh."""
    if text is None:
        return None
    given: dict[str, int] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in ("dp", "ep", "local") or not _SIZE.fullmatch(value):
            raise UsageError(f"--mesh {text}: {part!r} is not dp=, ep= or local= with a whole number, at least 1")
        if name in given:
            raise UsageError(f"--mesh {text}: {name} is there twice")
        given[name] = int(value)
    if "dp" not in given:
        raise UsageError(f"--mesh {text}: dp, the number of ranks, is missing")
    sizes = {"dp": given["dp"], "ep": given.get("ep", 1), "local": given.get("local", 1)}
    for inner, outer in (("ep", "dp"), ("local", "ep")):
        if sizes[outer] % sizes[inner]:
            raise UsageError(f"--mesh {text}: {inner}={sizes[inner]} does not divide {outer}={sizes[outer]}")
    return sizes


def experts(sizes: dict[str, int] | None, name: str) -> None:
    """A mesh among whose ranks the preset's experts divide."""
    if sizes is not None and EXPERTS[name] % sizes["ep"]:
        raise UsageError(f"--mesh: ep={sizes['ep']} does not divide the {EXPERTS[name]} experts of {name}")


def port(number: int | None) -> None:
    """The status page's port can be listened on."""
    if number is not None and not port_is_free(number):
        raise ConditionError(f"port {number} is in use: choose another with --port, or leave it out")


def directory(path: Path) -> None:
    """The run directory exists or can be made, and can be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConditionError(f"cannot write to {path}: {error.strerror}") from error


def database(url: str) -> None:
    """The database opens, can be written, and is not from a newer version."""
    try:
        open_store(url).close()
    except StoreError as error:
        raise ConditionError(str(error)) from error


def room(path: Path, state: int, nodes: int, spares: int) -> None:
    """There is room for the checkpoints on disk, and for slots and object stores in shared memory.

    `state` is one rank's training state, in bytes.
    """
    _free(path, CHECKPOINTS * state + OTHER_BYTES)
    _free(SHARED_MEMORY, nodes * SLOTS * state + (nodes + spares + 1) * OBJECT_STORE_BYTES)


def _free(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path).free
    if free < needed:
        raise ConditionError(f"no room in {path}: {free >> 20} MiB are free, {needed >> 20} MiB are needed")


def _files(path: Path) -> Iterator[Path]:
    """The file, or what the training would read below the folder: regular files that are not hidden."""
    if not path.is_dir():
        yield path
        return
    for folder, below, names in os.walk(path):
        below[:] = [name for name in below if not name.startswith(".") and name != "__pycache__"]
        yield from (Path(folder, name) for name in names if not name.startswith("."))
