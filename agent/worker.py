"""The Ray actor: warm until promoted, then one rank of one generation until the job or the generation ends."""

import os
import queue
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agent.client import DaemonClient
from agent.drills import Drill, Drills, Surroundings
from agent.slots import Slots, SlotsError
from agent.telemetry import Telemetry, traceparent
from agent.training.collective import Group, PeerLost, serve_rendezvous
from agent.training.engine import Engine
from agent.training.fingerprint import fingerprint
from agent.training.held import Member, vote_body
from agent.training.replay import recompute
from agent.training.spec import JobSpec
from agent.training.trainer import Seat, Trainer
from diagnostics.sensors.digest import digest


class Worker:
    """One warm process with torch imported, the model built and the data opened, waiting to become a rank.

    Created by the node's gang with max_restarts=0: a worker never comes back, another takes its seat.
    """

    def __init__(self, sock: str, standby: str, node_ip: str) -> None:
        self._inbox: queue.Queue[dict[str, Any]] = queue.Queue()
        self._listeners: list[Callable[[dict[str, Any]], None]] = []
        self._client = DaemonClient(
            Path(sock), "worker", standby=standby, on_message=self._on_message, on_lost=_exit_without_agent
        )
        welcome = self._client.welcome
        trace = Path(welcome["trace"]) if welcome["trace"] else None
        self._telemetry = Telemetry("worker", trace, welcome["otlp_endpoint"] or None)
        self._node_ip = node_ip
        self._engine: Engine | None = None
        self._store: object | None = None

    def prepare(self, spec: str) -> dict[str, Any]:
        """Build and warm everything a rank of this job needs; returns what WorkerReady reports."""
        parsed = JobSpec.from_json(spec)
        engine = Engine(parsed)
        engine.warm_up()
        self._engine = engine
        self._store, endpoint = serve_rendezvous(self._node_ip)
        return {"pid": os.getpid(), "rendezvous": endpoint, "fingerprint": fingerprint(parsed.threads)}

    def run(self, assignment: dict[str, Any]) -> dict[str, str]:
        """Take the seat and train to the end; returns the cause and detail of WorkerExited.

        The daemon hears of the end from this worker first: what the gang says of it comes on another socket, and may
        come after the news that this process is gone.
        """
        ended = self._run(assignment)
        self._client.report("worker_exited", ended, urgent=True)
        self._client.flush(2.0)
        return ended

    def _run(self, assignment: dict[str, Any]) -> dict[str, str]:
        engine = self._ready(assignment["spec"])
        seat = Seat(
            assignment["job"],
            int(assignment["generation"]),
            int(assignment["rank"]),
            str(assignment.get("traceparent", "")),
        )
        slots = self._slots(Path(assignment["slots"]), engine.layout.nbytes)
        slots.enter(seat.generation, 0, "rendezvous")
        try:
            group = Group(
                assignment["rendezvous"], f"{seat.job}/{seat.generation}", seat.rank, int(assignment["world"])
            )
            self._train(engine, group, slots, seat, assignment)
        except PeerLost as error:
            return {"cause": "collective", "detail": str(error)[:500]}
        except Exception as error:  # noqa: BLE001  # whatever ended this rank, the controller must hear of it
            return {"cause": "error", "detail": f"{type(error).__name__}: {error}"[:500]}
        finally:
            slots.enter(seat.generation, 0, "idle")
        return {"cause": "completed", "detail": ""}

    def replay(self, request: dict[str, Any]) -> dict[str, Any]:
        """Cast a spare's vote: recompute a suspect's gradients from a state file; returns ReplayResult's fields."""
        engine = self._ready(request["spec"])
        step, rank = int(request["step"]), int(request["rank"])
        buffer = memoryview(bytearray(Path(request["state"]).read_bytes()))
        state = engine.layout.view(buffer)
        if (found := f"{digest(state.words):016x}") != request["digest"]:
            raise ValueError(f"the state fetched for step {step} has digest {found}, not {request['digest']}")
        engine.bind(state)
        vote = recompute(engine, engine.gradients, step, rank, self._here(), "third")
        return {
            "job": engine.spec.job,
            "step": step,
            "rank": rank,
            "votes": [vote_body(vote)],
            "action_id": request["action_id"],
        }

    def _train(self, engine: Engine, group: Group, slots: Slots, seat: Seat, assignment: dict[str, Any]) -> None:
        daemon = _Reports(self._client, seat, self._inbox, self._telemetry)
        drills = self._drills(engine, seat, assignment, daemon)
        engine.surround = drills.surround
        self._listeners.append(lambda message: _arm(message, drills))
        if seat.rank == 0:
            drills.tell_past()
        Trainer(engine, group, slots, seat, daemon, self._here(), drills.strike).run()
        group.barrier()  # nobody leaves while another still exchanges its last message
        group.close()

    def _drills(self, engine: Engine, seat: Seat, assignment: dict[str, Any], daemon: "_Reports") -> Drills:
        welcome = self._client.welcome
        around = Surroundings(
            node=str(welcome["node"]),
            agent_pid=int(welcome["agent_pid"]),
            gang_pid=int(welcome["gang_pid"]),
            raylet_pid=os.getppid(),
            storage=Path(engine.spec.storage),
            job=seat.job,
            seed=engine.spec.seed,
        )
        return Drills((Drill.parse(body) for body in assignment.get("drills", ())), seat.rank, around, daemon)

    def _ready(self, spec: str) -> Engine:
        """The engine for `spec`, made again if this worker was warmed for an older version of the job."""
        parsed = JobSpec.from_json(spec)
        if self._engine is None or self._engine.spec != parsed:
            self._engine = Engine(parsed)
        return self._engine

    def _slots(self, path: Path, nbytes: int) -> Slots:
        """This rank's slots: those an earlier worker left on this node, or new ones."""
        try:
            slots = Slots.open(path)
        except (FileNotFoundError, SlotsError):
            return Slots.create(path, nbytes)
        return slots if slots.nbytes == nbytes else Slots.create(path, nbytes)

    def _here(self) -> Member:
        welcome = self._client.welcome
        return Member(str(welcome["node"]), str(welcome["device"]), os.getpid())

    def _on_message(self, message: dict[str, Any]) -> None:
        if message.get("t") == "vote":
            self._inbox.put(message)
        for listener in self._listeners:
            listener(message)


class _Reports:
    """Training's and the drills' view of the daemon, with the job's coordinates filled in."""

    def __init__(
        self, client: DaemonClient, seat: Seat, inbox: "queue.Queue[dict[str, Any]]", telemetry: Telemetry
    ) -> None:
        self._client = client
        self._seat = seat
        self._inbox = inbox
        self._telemetry = telemetry
        self._traceparent = ""

    def report(self, kind: str, body: dict[str, Any], urgent: bool = False) -> None:
        self._client.report(kind, body, urgent=urgent, traceparent=self._traceparent)

    def step(self, record: dict[str, Any]) -> None:
        self._client.step(self._seat.job, self._seat.generation, self._seat.rank, record)

    def flush(self, timeout: float) -> bool:
        return self._client.flush(timeout)

    @contextmanager
    def span(self, name: str, parent: str, **attributes: str | int | float) -> Iterator[str]:
        seat = self._seat
        where: dict[str, str | int] = {"job": seat.job, "generation": seat.generation, "rank": seat.rank}
        before = self._traceparent
        with self._telemetry.span(name, parent, **where, **attributes) as span:
            self._traceparent = traceparent(span)
            try:
                yield self._traceparent
            finally:
                self._traceparent = before

    def kill_controller(self) -> None:
        self._client.send({"t": "kill_controller"})

    def wait_vote(self, step: int, rank: int, timeout: float) -> list[dict[str, Any]]:
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            try:
                message = self._inbox.get(timeout=left)
            except queue.Empty:
                break
            if (message.get("step"), message.get("rank")) == (step, rank):
                return list(message.get("votes", ()))
        return []


def _arm(message: dict[str, Any], drills: Drills) -> None:
    if message.get("t") == "drill":
        drills.add(Drill.parse(message["drill"]))


def _exit_without_agent() -> None:
    """The daemon is gone, and with it the owner of this worker's state: end at once."""
    os._exit(1)
