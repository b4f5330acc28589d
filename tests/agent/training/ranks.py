"""Runs the ranks of a generation as plain processes, with a daemon that only writes down what it is told."""

import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from garble import Garble, Overflow

SPEC = {
    "schema": "assay.job/1",
    "job": "job",
    "preset": "tiny",
    "seed": 7,
    "steps": 6,
    "world": 2,
    "precision": "fp32",
    "corpus": None,
    "sensors": True,
    "tolerance_scale": 1.0,
    "checkpoint_every": 3,
    "threads": 1,
}


class Recorder:
    """A daemon that appends every report to a file, and answers votes from a list."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._spans = 0

    def _write(self, entry: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def report(self, kind: str, body: dict[str, Any], urgent: bool = False) -> None:
        self._write({"report": kind, **body})

    def step(self, record: dict[str, Any]) -> None:
        self._write({"report": "step", **record})

    def flush(self, timeout: float) -> bool:
        return True

    @contextmanager
    def span(self, name: str, parent: str, **attributes: Any) -> Iterator[str]:
        self._spans += 1
        own = f"{parent.partition('/')[0] or f'{self.path.stem}.{self._spans}'}/{name}"
        self._write({"report": "span", "name": name, "traceparent": own, "parent": parent, **attributes})
        yield own

    def kill_controller(self) -> None:
        self._write({"report": "kill_controller"})

    def wait_vote(self, step: int, rank: int, timeout: float) -> list[dict[str, Any]]:
        if step == -1:
            os._exit(3)  # the controller replaces this generation
        return []


def flip_state(path: Path, byte: int = 4096) -> None:
    """Flip one bit of the committed state in a slots file: memory that changed with no error."""
    from agent.slots import Slots

    slots = Slots.open(path)
    assert slots.committed is not None
    state = slots.state(slots.committed)
    state[byte] ^= 0x40


def _rank(
    folder: str,
    spec: dict[str, Any],
    generation: int,
    rank: int,
    endpoint: Any,
    drills: list[Any],
    flip: tuple[int, int, str] | None,
    byte: int,
    garbles: Sequence[Garble | Overflow],
) -> None:
    from agent.drills import Drill, Drills, Surroundings
    from agent.slots import Slots
    from agent.training.collective import Group, serve_rendezvous
    from agent.training.engine import Engine
    from agent.training.held import Member
    from agent.training.spec import JobSpec
    from agent.training.trainer import Seat, Trainer

    root = Path(folder)
    parsed = JobSpec.from_json(json.dumps(spec))
    engine = Engine(parsed)
    if rank == 0:
        _store, address = serve_rendezvous("127.0.0.1")
        for _ in range(parsed.world):
            endpoint.put(address)
    address = endpoint.get()
    group = Group(address, f"job/{generation}", rank, parsed.world)
    path = root / f"n{rank}" / "job.slots"
    slots = Slots.open(path) if path.exists() else Slots.create(path, engine.layout.nbytes)
    recorder = Recorder(root / f"rank{rank}.jsonl")
    around = Surroundings(f"n{rank}", 0, 0, 0, Path(parsed.storage), "job", parsed.seed)
    armed = Drills((Drill.parse(body) for body in drills), rank, around, recorder)
    engine.surround = armed.surround

    flips = [flip]
    for garble in garbles:
        garble.install(rank)

    def strike(step: int, phase: str) -> None:
        for garble in garbles:
            garble.strike(step, phase)
        if (rank, step, phase) in flips:
            flips.clear()
            flip_state(path, byte)
        armed.strike(step, phase)

    here = Member(f"n{rank}", f"cpu-n{rank}", os.getpid())
    try:
        record = Trainer(engine, group, slots, Seat("job", generation, rank), recorder, here, strike).run()
    except Exception as error:  # noqa: BLE001  # the test reads how it ended
        recorder._write({"report": "error", "error": f"{type(error).__name__}: {error}"})
        os._exit(4)  # an orderly exit destroys gloo's threads while they still wait for the lost peer, and may abort
    group.barrier()
    for garble in garbles:
        if garble.struck:
            recorder._write({"report": "garbled", "what": garble.what, "step": garble.step, "times": garble.struck})
    recorder._write(
        {"report": "end", "step": record.step, "digest": f"{record.digest:016x}", "chain": f"{record.chain:016x}"}
    )
    group.close()
    os._exit(0)  # as Ray ends its workers: an interpreter's orderly end has been seen to abort in gloo's threads


def train(
    folder: Path,
    generation: int = 1,
    drills: list[dict[str, Any]] | None = None,
    flip: tuple[int, int, str] | None = None,
    byte: int = 4096,
    garbles: Sequence[Garble | Overflow] = (),
    timeout: float = 120,
    **changes: Any,
) -> tuple[list[int | None], list[list[dict[str, Any]]]]:
    """Run one generation; returns exit codes and every rank's reports of that generation."""
    spec = {**SPEC, "storage": str(folder / "checkpoints"), "cache": str(folder.parent / "cache"), **changes}
    context = multiprocessing.get_context("spawn")
    endpoint = context.Queue()
    for rank in range(spec["world"]):
        (folder / f"rank{rank}.jsonl").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    ranks = [
        context.Process(
            target=_rank, args=(str(folder), spec, generation, rank, endpoint, drills or [], flip, byte, garbles)
        )
        for rank in range(spec["world"])
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
    reports = []
    for rank in range(spec["world"]):
        path = folder / f"rank{rank}.jsonl"
        reports.append([json.loads(line) for line in path.read_text().splitlines()] if path.exists() else [])
    return [process.exitcode for process in ranks], reports
