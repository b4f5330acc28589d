"""One `assay run`'s processes: starts the supervisor, and leaves nothing of it behind however the run ends."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from controller.cli.errors import CommandError, ConditionError
from controller.local.plan import Plan
from controller.local.processes import become_subreaper, end_descendants

#: The supervisor ends its tree within 4 s (1.5 of them are for goodbyes); 5 s are promised in all.
SUPERVISOR_S = 4.2
SWEEP_S = 0.6
_PLAN_MODE = 0o600  # it holds Ray's token
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal asked the command to stop; like KeyboardInterrupt it passes every `except Exception`."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def stoppable() -> Iterator[None]:
    """The first SIGINT, SIGTERM or SIGHUP raises Stopped; later ones are ignored until the process ends.

    They must not disturb the cleaning up, wherever it happens.
    """
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def stop(number: int, _frame: FrameType | None) -> None:
        for other in _SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(number)

    for number in _SIGNALS:
        signal.signal(number, stop)
    try:
        yield
    except Stopped:
        raise
    except BaseException:
        _restore(before)
        raise
    _restore(before)


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


class Session:
    """The supervisor and all that it starts."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The supervisor's."""
        return 0 if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the supervisor in a session of its own: the terminal's signals reach only this process.

        Its standard input is a pipe from here: when this process is gone, however it went, the pipe ends.
        """
        become_subreaper()  # a supervisor that is killed leaves its children to us
        directory = Path(self._plan.directory)
        plan = directory / "plan.json"
        try:
            with os.fdopen(os.open(plan, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, _PLAN_MODE), "w") as file:
                file.write(self._plan.to_json())
            (directory / "logs").mkdir(exist_ok=True)
            log = (directory / "logs" / "supervisor.log").open("ab")
        except OSError as error:
            raise ConditionError(f"cannot write {error.filename}: {error.strerror}") from error
        with log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "controller.local.supervisor", str(plan)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def check(self) -> None:
        """Raise CommandError if the supervisor is gone: nobody would restart what dies."""
        if self._process is not None and (code := self._process.poll()) is not None:
            how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
            raise CommandError(f"the supervisor ended ({how}); see {self._plan.directory}/logs/supervisor.log")

    def stop(self) -> None:
        """End everything; called once, after which no process and no runtime folder is left."""
        if self._process is None:
            return
        if self._process.stdin is not None:
            self._process.stdin.close()
        deadline = time.monotonic() + SUPERVISOR_S
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        left = end_descendants(os.getpid(), SWEEP_S)
        shutil.rmtree(self._plan.runtime, ignore_errors=True)
        (Path(self._plan.directory) / "plan.json").unlink(missing_ok=True)
        if left:
            raise CommandError(f"these processes could not be ended: {', '.join(map(str, left))}")
