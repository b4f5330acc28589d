"""An agent's folders on its node: made, claimed for one agent at a time, and cleared of what a former life left."""

import fcntl
import shutil
from typing import IO

from agent.config import AgentConfig


class StartError(RuntimeError):
    """The agent cannot run here and now; one line that says why."""


def claim(config: AgentConfig) -> IO[bytes]:
    """Make the folders, take the lock that keeps other agents out, and clear the runtime folder.

    The lock is the returned file; it ends with the process, however that ends. Raises StartError.
    """
    try:
        for folder in (config.runtime, config.state, config.logs):
            folder.mkdir(parents=True, exist_ok=True)
        config.runtime.chmod(0o700)
        lock = (config.state / "lock").open("wb")
    except OSError as error:
        raise StartError(f"cannot use {error.filename}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise StartError(f"another agent runs with {config.state}") from error
    clear(config)
    config.slots.mkdir(mode=0o700, exist_ok=True)
    return lock


def clear(config: AgentConfig) -> None:
    """Remove what an agent puts into its runtime folder, and nothing else."""
    config.socket.unlink(missing_ok=True)
    for folder in (config.slots, config.runtime / "replay"):
        shutil.rmtree(folder, ignore_errors=True)
