"""Watches workers from outside: sees their end through pidfds, and their standing still by the progress word."""

import asyncio
import logging
import os
import select
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from agent.slots import WAITING, Progress, Slots, SlotsError

log = logging.getLogger(__name__)

#: A look at a worker costs 11 us (measured), a turn of the loop more: 0.6 % of a core in all with this period.
PERIOD_S = 0.05
#: Time that the monitor did not see does not count: when it was not scheduled itself, workers perhaps were not either.
SEEN_AT_MOST_S = 4 * PERIOD_S
#: The name in /proc/pid/stat has at most 64 bytes; the whole line about 350.
STAT_BYTES = 1024
#: A debugger's step or a shell's job control may stop a process for an instant; a stop this long is a fault.
STOPPED_S = 0.5
#: A deadline is this multiple of the longest that the phase took lately...
MARGIN = 8.0
#: ...over so many of its passes: minutes of training, enough to have met the slow ones.
REMEMBERED = 64
#: The first steps of a generation touch memory for the first time, load code and meet their peers.
FIRST_STEPS = 2
FIRST_FLOOR_S = 60.0
#: Least deadlines, in seconds. Computing is not disturbed for 5 s by anything but a fault, even with every core taken
#: twice. A verdict waits up to 30 s for a third vote, or for another rank's replay; a replay recomputes a step; a
#: restore reads checkpoints from storage and a rendezvous waits for workers that are still being promoted.
FLOORS_S = {"verdict": 45.0, "replay": 30.0, "restore": FIRST_FLOOR_S, "rendezvous": FIRST_FLOOR_S, "capture": 15.0}
FLOOR_S = 5.0


@dataclass(frozen=True, slots=True)
class Watched:
    """A worker to watch; its slots file may not exist yet."""

    job: str
    generation: int
    rank: int
    pid: int
    slots: Path


@dataclass(frozen=True, slots=True)
class Stall:
    """A worker that did not move for `stalled_s`, longer than `deadline_s`."""

    worker: Watched
    step: int
    phase: str
    stalled_s: float
    deadline_s: float
    process_state: str
    waiting: bool


#: A worker in one of these is past its start.
STEPPING = frozenset({"forward", "reduce", "gate", "commit"})


class Deadlines:
    """How long each phase may take, learned from how long it took."""

    def __init__(self) -> None:
        self._durations: dict[str, deque[float]] = {}

    def learn(self, phase: str, seconds: float) -> None:
        """Note a pass of `phase`; an upper bound will do."""
        self._durations.setdefault(phase, deque(maxlen=REMEMBERED)).append(seconds)

    def of(self, phase: str, steps_done: int) -> float:
        """The deadline of `phase`, in seconds, for a worker that has done `steps_done` steps of its generation."""
        floor = FLOORS_S.get(phase, FLOOR_S)
        if steps_done < FIRST_STEPS:
            floor = max(floor, FIRST_FLOOR_S)
        return max([floor, *(MARGIN * seconds for seconds in self._durations.get(phase, ()))])


class Watch:
    """One worker's stillness. Pure: fed with what was seen and the seen time, it says when that is a stall.

    Invariants: a stall is said once for each time the worker stands still; "idle" is never a stall unless stopped.
    """

    def __init__(self, worker: Watched, deadlines: Deadlines) -> None:
        self.worker = worker
        self.progress = Progress(worker.generation, 0, "load", 0, worker.pid)
        self.worked = self.progress
        self._deadlines = deadlines
        self._first_step: int | None = None
        self._still_s = 0.0
        self._stopped_s = 0.0
        self._said = False
        self._said_stopped = False

    def observe(self, passed_s: float, progress: Progress | None, state: str) -> Stall | None:
        """Take in what the worker's word and /proc say, `passed_s` after the last time."""
        if progress is not None and progress.generation == self.worker.generation and progress != self.progress:
            self._move(progress)
        else:
            self._still_s += passed_s
        self._stopped_s = self._stopped_s + passed_s if state in ("T", "t") else 0.0
        if self._stopped_s == 0.0:
            self._said_stopped = False
        return self._stopped(state) or self._stalled(state)

    def _move(self, progress: Progress) -> None:
        if self.progress.monotonic_ns:
            took_s = (progress.monotonic_ns - self.progress.monotonic_ns) / 1e9
            self._deadlines.learn(self.progress.phase, max(0.0, took_s))
        if self._first_step is None and progress.phase in STEPPING:
            self._first_step = progress.step
        if progress.phase != "idle":
            self.worked = progress
        self.progress = progress
        self._still_s = 0.0
        self._said = False

    def _stopped(self, state: str) -> Stall | None:
        if self._stopped_s < STOPPED_S or self._said_stopped:
            return None
        self._said_stopped = self._said = True
        return self._stall(self._stopped_s, STOPPED_S, state, waiting=False)

    def _stalled(self, state: str) -> Stall | None:
        phase = self.progress.phase
        steps_done = 0 if self._first_step is None else self.progress.step - self._first_step
        deadline = self._deadlines.of(phase, steps_done)
        if self._said or phase == "idle" or self._still_s <= deadline:
            return None
        self._said = True
        return self._stall(self._still_s, deadline, state, waiting=phase in WAITING)

    def _stall(self, stalled_s: float, deadline_s: float, state: str, *, waiting: bool) -> Stall:
        seen = self.progress
        return Stall(self.worker, seen.step, seen.phase, stalled_s, deadline_s, state, waiting)


class Monitor:
    """Polls the watched workers while there are any, and tells `on_stall` of a stall."""

    def __init__(self, on_stall: Callable[[Stall], None]) -> None:
        self._on_stall = on_stall
        self._deadlines: dict[str, Deadlines] = {}
        self._watches: dict[int, Watch] = {}
        self._files: dict[int, _SlotsFile] = {}
        self._states: dict[int, ProcessState] = {}
        self._some = asyncio.Event()

    def watch(self, worker: Watched) -> None:
        """Begin to watch `worker`. What a job's phases take is remembered over its generations."""
        self._watches[worker.pid] = Watch(worker, self._deadlines.setdefault(worker.job, Deadlines()))
        self._files[worker.pid] = _SlotsFile(worker.slots)
        self._states[worker.pid] = ProcessState(worker.pid)
        self._some.set()

    def forget(self, pid: int) -> Progress | None:
        """Watch a worker no more; where it was at work last, if it was watched."""
        watch = self._watches.pop(pid, None)
        if watch is None:
            return None
        self._states.pop(pid).close()
        file = self._files.pop(pid)
        last = file.progress()
        file.close()
        if last is not None and last.generation == watch.worker.generation and last.phase != "idle":
            return last
        return watch.worked

    def forget_job(self, job: str) -> None:
        """Forget what the phases of `job` take."""
        self._deadlines.pop(job, None)

    async def run(self) -> None:
        """Poll until cancelled."""
        before = time.monotonic()
        while True:
            if not self._watches:
                self._some.clear()
                await self._some.wait()
                before = time.monotonic()
            await asyncio.sleep(PERIOD_S)
            now = time.monotonic()
            self.poll(min(now - before, SEEN_AT_MOST_S))
            before = now

    def poll(self, passed_s: float) -> None:
        """Look at every watched worker once, `passed_s` seconds after the last time."""
        for pid, watch in list(self._watches.items()):
            stall = watch.observe(passed_s, self._files[pid].progress(), self._states[pid].read())
            if stall is not None:
                self._on_stall(stall)


class _SlotsFile:
    """A slots file that may not exist yet, and may be replaced by another of its name."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)
        self._slots: Slots | None = None
        self._inode = 0

    def progress(self) -> Progress | None:
        try:
            inode = os.stat(self._path).st_ino
            if self._slots is None or inode != self._inode:
                self.close()
                self._slots, self._inode = Slots.open(Path(self._path), readonly=True), inode
        except (OSError, SlotsError):
            return None
        return self._slots.progress()

    def close(self) -> None:
        if self._slots is not None:
            self._slots.close()
            self._slots = None


class Pidfd:
    """A process by a handle that no other process can inherit; `on_exit` is called in the loop when it has ended.

    Raises ProcessLookupError if there is no such process.
    """

    def __init__(self, pid: int, on_exit: Callable[[], None]) -> None:
        self.pid = pid
        self.gone = asyncio.Event()
        self._on_exit = on_exit
        self._loop = asyncio.get_running_loop()
        self._fd = os.pidfd_open(pid)
        self._loop.add_reader(self._fd, self._exited)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens to a process that has ended."""
        if self.gone.is_set():
            return
        try:
            signal.pidfd_send_signal(self._fd, number)
        except ProcessLookupError:
            return

    def ended(self) -> bool:
        """Whether the process has ended, asked of the kernel now."""
        if self.gone.is_set():
            return True
        return bool(select.select([self._fd], [], [], 0)[0])

    def close(self) -> None:
        """Watch no more."""
        if not self.gone.is_set():
            self._release()

    def _exited(self) -> None:
        self._release()
        self._on_exit()

    def _release(self) -> None:
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
        self.gone.set()


class ProcessState:
    """The state letter of one process (proc(5), /proc/pid/stat field 3), "" once there is none.

    The file stays open: reading is cheaper so, and never reads another process that was given the same pid.
    """

    def __init__(self, pid: int) -> None:
        try:
            self._file: int | None = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._file = None

    def read(self) -> str:
        """The state now."""
        if self._file is None:
            return ""
        try:
            text = os.pread(self._file, STAT_BYTES, 0)
        except OSError:
            return ""
        # The name before it is in parentheses and may itself contain any character.
        return text[text.rfind(b")") + 2 :][:1].decode("ascii", "replace")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
