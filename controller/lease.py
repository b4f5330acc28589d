"""Becomes the one active controller: waits for, or recognises the death of, the one that held the lease before."""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from controller.store.errors import StoreError
from controller.store.leases import LeaseRow, read_lease, take_lease
from controller.store.opening import Store

NAME = "controller"
# A holder is given up when it was not heard for so long. Five missed heartbeats: an fsync on a busy disk takes up to
# a second, and a controller that is slower than that must not be deposed for it.
TTL_S = 5.0
HEARTBEAT_S = 1.0
# Between two looks at a lease that another controller holds.
LOOK_S = 0.2


@dataclass(frozen=True, slots=True)
class Lease:
    """A lease that is ours. `unclean`: the holder before did not resign; `last_seen` is its last heartbeat."""

    epoch: int
    unclean: bool
    last_seen: float


def acquire(store: Store, sleep: Callable[[float], None], proc: Path = Path("/proc")) -> Lease:
    """Take the lease, waiting with `sleep` for at most one TTL; raises StoreError if another controller keeps it.

    A holder on this machine whose process is gone is succeeded at once: a restart after kill -9 need not wait.
    """
    holder = identity(proc)
    waited = 0.0
    while True:
        row = read_lease(store, NAME)
        if row is None or row.resigned or row.age_s > TTL_S or _gone(row.holder, proc):
            epoch = take_lease(store, NAME, holder, row)
            if epoch is not None:
                return _lease(epoch, row)
        if waited > TTL_S + HEARTBEAT_S:
            raise StoreError(f"another controller is active ({row.holder if row else 'unknown'}): stop it first")
        sleep(LOOK_S)
        waited += LOOK_S


def identity(proc: Path = Path("/proc")) -> str:
    """Name this process so that another one on the same machine can tell whether it still lives.

    "HOST BOOT PIDNAMESPACE PID STARTTIME"; the start time tells a pid that was given anew.
    """
    pid = os.getpid()
    return " ".join((socket.gethostname(), *_machine(proc), str(pid), _start_time(proc, pid) or "0"))


def _lease(epoch: int, before: LeaseRow | None) -> Lease:
    if before is None:
        return Lease(epoch, False, 0.0)
    return Lease(epoch, not before.resigned, before.heartbeat)


def _gone(holder: str, proc: Path) -> bool:
    """Say whether the holder ran on this machine and has ended. What cannot be known counts as alive."""
    parts = holder.split(" ")
    if len(parts) != 5 or tuple(parts[1:3]) != _machine(proc) or not parts[3].isdecimal():
        return False
    return _start_time(proc, int(parts[3])) != parts[4]


def _machine(proc: Path) -> tuple[str, str]:
    """Identify what a pid is valid in: this boot of this machine, and this pid namespace."""
    boot = (proc / "sys/kernel/random/boot_id").read_text().strip()
    return boot, os.readlink(proc / "self/ns/pid")


def _start_time(proc: Path, pid: int) -> str | None:
    """Read when a process started, in ticks since boot (proc(5), field 22); None if it is gone or a zombie."""
    try:
        stat = (proc / str(pid) / "stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else fields[19]
