"""Drills in a worker: faults injected on purpose, by coordinates, each at most once, and reported after the fact."""

import importlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from torch import nn

from diagnostics.faults.inject import Injector
from diagnostics.faults.spec import FaultSpec

#: The phase in which a drill strikes unless it says otherwise: gradients are half made, nothing is committed.
PHASE = "forward"
#: Longest wait for the daemon to take a report before a worker ends itself.
FLUSH_S = 0.5
#: Longest wait of the other ranks for the damaged checkpoint before they end themselves.
DAMAGE_S = 10.0
_KEYS = {"rank", "node", "layer", "op", "fault", "bit", "persistent", "phase"}


class DrillError(ValueError):
    """A drill that cannot be carried out; names the key."""


@dataclass(frozen=True, slots=True)
class Drill:
    """One fault at (`step`, `rank`, phase), as assay.v1.Drill carries it; `node` is set where it names one."""

    id: str
    kind: str
    step: int
    rank: int = 0
    node: str = ""
    params: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, body: Mapping[str, Any]) -> "Drill":
        """From the wire's fields. Raises DrillError."""
        params = dict(body.get("params") or {})
        if unknown := params.keys() - _KEYS:
            raise DrillError(f"drill {body.get('id')}: unknown key {sorted(unknown)[0]!r}")
        rank = int(body.get("rank", -1))
        return cls(
            id=str(body["id"]),
            kind=str(body["kind"]),
            step=int(body["step"]),
            rank=max(rank, 0),
            node=str(body.get("node") or ""),
            params=params,
        )

    @property
    def phase(self) -> str:
        """Where in the step it strikes."""
        return self.params.get("phase", PHASE)

    @property
    def persistent(self) -> bool:
        """True for a fault that stays with its device."""
        return self.params.get("persistent", "") in ("1", "true", "yes")

    def fault(self, seed: int) -> FaultSpec:
        """The fault of an sdc drill; which element it hits follows from the job's seed and the step."""
        layer = self.params.get("layer")
        return FaultSpec(
            layer=int(layer) if layer is not None else None,
            op=self.params.get("op", "fprop"),  # type: ignore[arg-type]  # FaultSpec checks it
            fault=self.params.get("fault", "bitflip"),  # type: ignore[arg-type]
            bit=int(self.params.get("bit", "30")),
            seed=seed * 1_000_003 + self.step,
        )


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a drill may end: the processes of this node, and where the checkpoints are."""

    node: str
    agent_pid: int
    gang_pid: int
    raylet_pid: int
    storage: Path
    job: str
    seed: int


class Speaker(Protocol):
    """What drills say to the daemon."""

    def report(self, kind: str, body: dict[str, Any], urgent: bool = False) -> None:
        """Queue an event."""

    def flush(self, timeout: float) -> bool:
        """Wait until what was queued has been handed over."""

    def kill_controller(self) -> None:
        """Ask the daemon to end the controller, where it runs on this machine."""


class Drills:
    """The drills of one rank. Markers on the shared storage make each strike once, whatever restarts it causes."""

    def __init__(self, drills: Iterable[Drill], rank: int, around: Surroundings, daemon: Speaker) -> None:
        self._drills = list(drills)
        self._rank = rank
        self._around = around
        self._daemon = daemon
        self._markers = around.storage / "drills"
        self._load_early(self._drills)

    def add(self, drill: Drill) -> None:
        """Arm another one in the running worker."""
        self._drills.append(drill)
        self._load_early([drill])

    def _load_early(self, drills: Iterable[Drill]) -> None:
        """Load beside the first steps what torch loads when an injector joins the guard.

        Two function modes at once make it import its compiler: 0.7 s, and 5 s on a crowded machine, in which the step
        that is struck would look like a hang.
        """
        if any(drill.kind == "sdc" and self._is_mine(drill) for drill in drills):
            threading.Thread(target=importlib.import_module, args=("torch._dynamo",), daemon=True).start()

    def tell_past(self) -> None:
        """Report drills that struck before this worker was promoted: the one that struck may not have lived to."""
        for drill in self._drills:
            if (mark := self._mark(drill)) is not None:
                self._tell(drill, mark)

    def strike(self, step: int, phase: str) -> None:
        """Carry out what is due at (step, phase) on this rank."""
        for drill in self._drills:
            if drill.kind == "sdc" or drill.step != step or drill.phase != phase:
                continue
            if drill.kind == "checkpoint":
                self._checkpoint(drill)
            elif self._is_mine(drill) and self._claim(drill):
                self._daemon.flush(FLUSH_S)
                self._end(drill)

    def surround(self, model: nn.Module, step: int, attempt: int) -> AbstractContextManager[object]:
        """The context of one forward and backward: an injector, if an sdc drill strikes in it."""
        for drill in self._drills:
            if drill.kind == "sdc" and self._corrupts(drill, step, attempt):
                return self._injecting(drill, model)
        return nullcontext()

    def _is_mine(self, drill: Drill) -> bool:
        return drill.node == self._around.node if drill.node else drill.rank == self._rank

    def _corrupts(self, drill: Drill, step: int, attempt: int) -> bool:
        """A transient fault strikes the step's own computation once; a persistent one whatever its device computes."""
        mark = self._mark(drill)
        if drill.persistent and mark is not None:
            return bool(mark["node"] == self._around.node) and step >= drill.step
        due = step >= drill.step if drill.persistent else step == drill.step
        return mark is None and attempt > 0 and due and self._is_mine(drill)

    def _injecting(self, drill: Drill, model: nn.Module) -> AbstractContextManager[object]:
        return _Injection(Injector(model, drill.fault(self._around.seed)), lambda fired: self._fired(drill, fired))

    def _fired(self, drill: Drill, fired: Mapping[str, Any]) -> None:
        self._claim(drill, str(dict(fired)))

    def _claim(self, drill: Drill, detail: str = "") -> bool:
        """True for the one caller that strikes; leaves the marker and reports."""
        self._markers.mkdir(parents=True, exist_ok=True)
        mark = {"node": self._around.node, "rank": self._rank, "time": time.time(), "detail": detail}
        aside = self._markers / f"{drill.id}.{os.getpid()}"
        aside.write_text(json.dumps(mark))
        try:
            os.link(aside, self._markers / drill.id)
        except FileExistsError:
            return False
        finally:
            aside.unlink()
        self._tell(drill, mark)
        return True

    def _mark(self, drill: Drill) -> dict[str, Any] | None:
        try:
            mark: dict[str, Any] = json.loads((self._markers / drill.id).read_text())
        except FileNotFoundError:
            return None
        return mark

    def _tell(self, drill: Drill, mark: Mapping[str, Any]) -> None:
        self._daemon.report(
            "drill_fired",
            {
                "drill": drill.id,
                "job": self._around.job,
                "kind": drill.kind,
                "step": drill.step,
                "rank": int(mark["rank"]),
                "node": str(mark["node"]),
                "time": float(mark["time"]),
                "detail": str(mark["detail"]),
            },
            urgent=True,
        )

    def _end(self, drill: Drill) -> None:
        if drill.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif drill.kind == "hang":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif drill.kind == "node":
            _kill(self._around.agent_pid, self._around.raylet_pid, self._around.gang_pid, os.getpid())
        elif drill.kind == "controller":
            self._daemon.kill_controller()

    def _checkpoint(self, drill: Drill) -> None:
        """One rank damages the newest checkpoint; then every rank ends its agent and itself."""
        if self._rank == drill.rank:
            if not self._claim(drill):
                return
            damage_newest(self._around.storage / self._around.job)
            (self._markers / f"{drill.id}.done").touch()
        elif not self._await_damage(drill):
            return
        self._daemon.flush(FLUSH_S)
        _kill(self._around.agent_pid, self._around.gang_pid, os.getpid())

    def _await_damage(self, drill: Drill) -> bool:
        """False if the drill struck in an earlier life, or its rank never came."""
        if (self._markers / f"{drill.id}.done").exists():
            mark = self._mark(drill)
            if mark is not None and time.time() - float(mark["time"]) > DAMAGE_S:
                return False
            return not self._struck_here(drill)
        deadline = time.monotonic() + DAMAGE_S
        while time.monotonic() < deadline:
            if (self._markers / f"{drill.id}.done").exists():
                return not self._struck_here(drill)
            time.sleep(0.005)
        return False

    def _struck_here(self, drill: Drill) -> bool:
        """Whether this rank has already ended itself for the drill; says so for its next life."""
        mine = self._markers / f"{drill.id}.rank{self._rank}"
        try:
            mine.touch(exist_ok=False)
        except FileExistsError:
            return True
        return False


def damage_newest(folder: Path) -> Path | None:
    """Flip one bit in the middle of the newest published checkpoint's shard; None if there is no checkpoint."""
    published = sorted(folder.glob("step-????????"), reverse=True)
    if not published:
        return None
    shard = next(iter(sorted(published[0].glob("*.safetensors"))))
    with shard.open("r+b") as file:
        file.seek(shard.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))
    return shard


def _kill(*pids: int) -> None:
    """SIGKILL, this process last."""
    for pid in pids:
        if pid > 1:
            _kill_one(pid)


def _kill_one(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


class _Injection:
    """An injector that says what it changed when its context closes."""

    def __init__(self, injector: Injector, fired: Any) -> None:
        self._injector = injector
        self._fired = fired

    def __enter__(self) -> Injector:
        return self._injector.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._injector.__exit__(kind, error, tb)
        if self._injector.fired is not None:
            self._fired(self._injector.fired)
