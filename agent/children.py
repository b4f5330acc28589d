"""The daemon's one child, the gang: started, watched, started again with growing waits, and ended with the daemon."""

import asyncio
import contextlib
import logging
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from agent.config import AgentConfig
from agent.monitor import Pidfd

log = logging.getLogger(__name__)

#: The first restart is quick, since a standby is missing meanwhile; a gang that cannot live must not eat a core.
RESTART_FIRST_S = 0.1
RESTART_CAP_S = 5.0
#: A gang that lived so long was a good one.
STABLE_S = 10.0
#: Ray's own farewell takes 0.2-0.8 s; after this long the gang is killed, which loses nothing.
FAREWELL_S = 1.0


def gang_command(config: AgentConfig) -> list[str]:
    """The gang's command line."""
    command = config.gang_command or (sys.executable, "-m", "agent.gang")
    return [
        *command,
        *("--runtime", str(config.runtime), "--ray-address", config.ray_address),
        *("--node-ip", config.node_ip, "--node", config.node),
    ]


class GangChild:
    """Keeps a gang running. `on_change` is called when one was started, `on_exit` when one ended.

    The gang ends itself when the daemon's socket closes, and asks the kernel to end it with its parent.
    """

    def __init__(
        self, command: Sequence[str], log_file: Path, on_change: Callable[[], None], on_exit: Callable[[], None]
    ) -> None:
        self._command = list(command)
        self._log_file = log_file
        self._on_change = on_change
        self._on_exit = on_exit
        self._process: subprocess.Popen[bytes] | None = None
        self._handle: Pidfd | None = None
        self._wait_s = RESTART_FIRST_S
        self._started = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._stopping = False

    @property
    def pid(self) -> int:
        """The gang's process id, 0 while there is none."""
        return self._process.pid if self._process is not None else 0

    def start(self) -> None:
        """Start a gang now. A command that cannot be run counts as one that ended at once."""
        self._started = asyncio.get_running_loop().time()
        try:
            with self._log_file.open("ab") as output:
                self._process = subprocess.Popen(
                    self._command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
                )
            self._handle = Pidfd(self._process.pid, self._ended)
        except OSError as error:
            log.error("cannot start the gang: %s", error)
            self._again()
            return
        self._on_change()

    async def stop(self, farewell: Callable[[], bool]) -> None:
        """End the gang: say `farewell` and give it a moment, if it can hear that; then kill it."""
        self._stopping = True
        if self._timer is not None:
            self._timer.cancel()
        if self._handle is None:
            return
        handle = self._handle
        if farewell():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FAREWELL_S):
                    await handle.gone.wait()
        handle.signal(signal.SIGKILL)
        await handle.gone.wait()

    def _ended(self) -> None:
        assert self._process is not None
        code = self._process.wait()  # it has ended: this only reaps it
        self._process = self._handle = None
        if not self._stopping:
            log.warning("the gang ended with %d", code)
            self._again()
        self._on_exit()

    def _again(self) -> None:
        loop = asyncio.get_running_loop()
        if loop.time() - self._started > STABLE_S:
            self._wait_s = RESTART_FIRST_S
        self._timer = loop.call_later(self._wait_s, self.start)
        self._wait_s = min(2 * self._wait_s, RESTART_CAP_S)
