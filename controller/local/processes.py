"""Linux process trees: become a subreaper, list descendants, and end all of them."""

import ctypes
import os
import signal
import time
from collections import defaultdict
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
#: Between two looks at /proc while processes die.
_POLL_S = 0.02


def become_subreaper() -> None:
    """Orphaned descendants become our children instead of init's, so none of them escapes."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def descendants(root: int) -> list[int]:
    """Every living process below `root`, without it."""
    children = defaultdict(list)
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (parent := _parent(int(entry))) is not None:
            children[parent].append(int(entry))
    found: list[int] = []
    ahead = [root]
    while ahead:
        below = children.get(ahead.pop(), [])
        found += below
        ahead += below
    return found


def named_below(root: int, name: str) -> int | None:
    """The pid of the first descendant of `root` whose command name is `name`."""
    for pid in descendants(root):
        try:
            if Path(f"/proc/{pid}/comm").read_text().strip() == name:
                return pid
        except OSError:
            continue
    return None


def end_descendants(root: int, patience: float) -> list[int]:
    """SIGKILL everything below `root` until nothing is left or `patience` seconds passed; returns what is left.

    Asked again and again because a process that is being ended may still start another.
    """
    deadline = time.monotonic() + patience
    while left := descendants(root):
        for pid in left:
            signal_quietly(pid, signal.SIGKILL)
        reap()
        if time.monotonic() > deadline:
            return descendants(root)
        time.sleep(_POLL_S)
    return []


def reap() -> dict[int, int]:
    """Collect every child that has ended: pid -> wait status."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended[pid] = status


def signal_quietly(pid: int, number: int) -> None:
    """Send a signal to a process that may be gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _parent(pid: int) -> int | None:
    """Parent of a process that is alive; None for zombies, which need no ending, and for what is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, parent = stat.rpartition(")")[2].split()[:2]
    return None if state == "Z" else int(parent)
