"""Who this agent is: the facts by which the controller tells one life, and one machine, from another."""

import hashlib
import platform
import time
from importlib import metadata
from pathlib import Path

#: Libraries whose version decides which bits a computation gives.
_LIBRARIES = ("torch", "numpy")


def next_epoch(folder: Path) -> int:
    """Give this life of the agent its number, greater than any before, and remember it in `folder`.

    Microseconds since 1970 keep it growing when the folder was lost, the stored number when the clock was set back.
    """
    path = folder / "epoch"
    try:
        stored = int(path.read_text())
    except (FileNotFoundError, ValueError):
        stored = 0
    epoch = max(stored + 1, time.time_ns() // 1_000)
    temporary = path.with_name("epoch.new")
    temporary.write_text(str(epoch))
    temporary.rename(path)
    return epoch


def boot_id() -> str:
    """This boot of the kernel, or "" where the system does not say (proc(5), /proc/sys/kernel/random/boot_id)."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def version() -> str:
    """Assay's own version, or "0" in a tree that is not installed."""
    return _version("assay") or "0"


def fingerprint() -> str:
    """What bits depend on, as far as it can be told without loading torch: 16 hex digits over CPU and libraries."""
    facts = [platform.machine(), _cpu(), *(f"{name}={_version(name)}" for name in _LIBRARIES)]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def _cpu() -> str:
    """The CPU's model and its instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    wanted = ("model name", "flags", "Features")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
