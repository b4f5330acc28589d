"""The daemon as a whole: real sockets and processes, a gang without Ray, a controller that says what the test wants."""

import asyncio
import hashlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import fake_gang
import pytest
from fake_controller import FakeController
from fake_gang import eventually

from agent import config as configuration
from agent.daemon import Daemon
from agent.folders import StartError
from agent.slots import SlotRecord, Slots
from assay.v1 import agent_pb2 as pb

SPEC = json.dumps({"schema": "assay.job/1", "job": "j", "world": 2})


class Site:
    """A node with its controller: orders actions and looks at what came of them."""

    def __init__(self, folder: Path, controller: FakeController) -> None:
        self.folder = folder
        self.controller = controller
        self._numbers = itertools.count(1)

    def document(self, **changes: Any) -> dict[str, Any]:
        paths = {key: str(self.folder / key) for key in ("runtime", "state", "logs")}
        known = {"node": "n0", "controller": self.controller.endpoint, "node_ip": "127.0.0.1"}
        gang = [sys.executable, fake_gang.__file__]
        trace = {"trace": str(self.folder / "trace.jsonl")}
        return {**known, "ray_address": "127.0.0.1:1", "gang_command": gang, **paths, **trace, **changes}

    @asynccontextmanager
    async def daemon(self, **changes: Any) -> AsyncIterator[Daemon]:
        daemon = Daemon(configuration.parse(self.document(**changes)))
        task = asyncio.create_task(daemon.run())
        try:
            yield daemon
        finally:
            daemon.stop()
            await task

    async def order(self, **fields: Any) -> pb.ActionResult:
        """Order something and wait for its result."""
        action = pb.Action(**{"id": f"a{next(self._numbers)}", "controller_epoch": 1, "job": "j", **fields})
        await self.controller.order(action)
        return await self.controller.result(action.id)

    async def standby(self, number: int) -> pb.WorkerReady:
        """Order a standby the first time; wait for the `number`th that got ready."""
        if number == 1:
            await self.controller.until(lambda: bool(self.controller.hellos))
            assert (await self.order(prepare_standby=pb.PrepareStandby(spec=SPEC))).outcome == "done"
        await self.controller.until(lambda: len(self.found("worker_ready")) >= number)
        ready: pb.WorkerReady = self.found("worker_ready")[number - 1]
        return ready

    async def start(self, generation: int, ready: pb.WorkerReady, rank: int = 1, **fields: Any) -> pb.ActionResult:
        """Order that a standby becomes a rank, and wait until it works."""
        placement = pb.Placement(rank=rank, node="n0", standby=ready.standby, pid=ready.pid)
        other = pb.Placement(rank=1 - rank, node="n1", standby="elsewhere")
        body = pb.StartGeneration(spec=SPEC, ranks=[other, placement], rendezvous="127.0.0.1:9")
        result = await self.order(generation=generation, start_generation=body, **fields)
        if result.outcome == "done":
            await self.controller.until(lambda: any(r.generation == generation for r in self.found("resumed")))
        return result

    async def tell(self, do: str) -> pb.ActionResult:
        """Have the workers do something."""
        drill = pb.Drill(id="d", kind="kill", step=2, rank=1, params={"do": do})
        return await self.order(inject_drill=pb.InjectDrill(drill=drill))

    async def exit_of(self, pid: int) -> pb.WorkerExited:
        await self.controller.until(lambda: any(e.pid == pid for e in self.found("worker_exited")))
        (exited,) = (e for e in self.found("worker_exited") if e.pid == pid)
        return exited  # type: ignore[no-any-return]

    def found(self, kind: str) -> list[Any]:
        return self.controller.found(kind)

    def processes(self) -> dict[str, list[int]]:
        """The newest report of the node's processes, pids by role."""
        newest = self.found("processes")[-1].processes
        return {role: [p.pid for p in newest if p.role == role] for role in ("agent", "gang", "worker", "standby")}


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    folder = Path(tempfile.mkdtemp(prefix="assay-", dir="/dev/shm"))  # a socket's path must be short
    controller = FakeController()
    controller.welcome = {"pid": 999_999_999, "host": "elsewhere"}
    await controller.start()
    yield Site(folder, controller)
    await controller.stop()
    shutil.rmtree(folder)


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):  # it may go between any two of these calls
        return False


async def test_a_standby_is_made_promoted_and_replaced_once_the_generation_trains(site: Site) -> None:
    async with site.daemon():
        first = await site.standby(1)
        assert first.device == "cpu-n0"
        await site.controller.until(lambda: site.processes()["standby"] == [first.pid])
        assert site.processes()["agent"] == [os.getpid()]
        assert len(site.processes()["gang"]) == 1
        assert (await site.start(1, first)).outcome == "done"
        await site.controller.until(lambda: site.processes()["worker"] == [first.pid])
        assert len(site.found("worker_ready")) == 1  # nothing disturbs a generation that starts
        await site.tell("steps")
        second = await site.standby(2)
        assert second.pid != first.pid
        (steps,) = site.found("steps")
        assert (steps.job, steps.generation, steps.rank, steps.records[0].loss) == ("j", 1, 1, 1.5)


async def test_a_completed_worker_exits_once_after_its_last_report(site: Site) -> None:
    async with site.daemon():
        ready = await site.standby(1)
        await site.start(1, ready)
        await site.tell("complete")
        exited = await site.exit_of(ready.pid)
        assert (exited.cause, exited.generation, exited.rank) == ("completed", 1, 1)
        assert not alive(ready.pid)
        kinds = [r.WhichOneof("body") for _, r in site.controller.reports]
        assert kinds.index("checkpoint_captured") < kinds.index("worker_exited")


async def test_a_killed_worker_is_reported_with_where_it_was(site: Site) -> None:
    async with site.daemon():
        ready = await site.standby(1)
        await site.start(3, ready)
        os.kill(ready.pid, signal.SIGKILL)
        exited = await site.exit_of(ready.pid)
        assert (exited.cause, exited.generation, exited.step, exited.phase) == ("signal", 3, 3, "forward")
        await site.standby(2)  # the generation is over: the next standby is made at once


async def test_a_worker_that_says_why_it_ends_is_believed(site: Site) -> None:
    async with site.daemon():
        ready = await site.standby(1)
        await site.start(1, ready)
        await site.tell("goodbye")
        exited = await site.exit_of(ready.pid)
        assert (exited.cause, exited.detail, exited.step) == ("error", "its own word", 77)
        second = await site.standby(2)
        await site.start(2, second)
        await site.tell("collective")
        assert (await site.exit_of(second.pid)).cause == "collective"


async def test_stopping_ends_workers_and_their_generation_never_starts_again(site: Site) -> None:
    async with site.daemon():
        ready = await site.standby(1)
        await site.start(4, ready)
        stopped = await site.order(generation=4, stop_generation=pb.StopGeneration())
        assert stopped.outcome == "done"
        assert not alive(ready.pid)
        assert (await site.exit_of(ready.pid)).cause == "stopped"
        again = await site.order(generation=4, stop_generation=pb.StopGeneration())
        assert again.outcome == "done"  # nothing runs: that is what was asked for
        late = await site.start(4, await site.standby(2))
        assert (late.outcome, late.detail) == ("failed", "generation 4 was stopped already")
        assert (await site.start(5, site.found("worker_ready")[1])).outcome == "done"


async def test_a_new_generation_ends_the_workers_of_the_old_one_first(site: Site) -> None:
    async with site.daemon():
        old = await site.standby(1)
        await site.start(1, old)
        await site.tell("steps")
        new = await site.standby(2)
        os.kill(old.pid, signal.SIGSTOP)  # even a worker that cannot listen
        assert (await site.start(2, new)).outcome == "done"
        assert not alive(old.pid)
        assert (await site.exit_of(old.pid)).cause == "stopped"
        assert alive(new.pid)
        stale = await site.start(1, new)
        assert stale.outcome == "failed"


async def test_a_standby_that_is_gone_cannot_be_promoted(site: Site) -> None:
    async with site.daemon():
        ready = await site.standby(1)
        os.kill(ready.pid, signal.SIGKILL)
        exited = await site.exit_of(ready.pid)
        assert (exited.generation, exited.rank, exited.standby) == (0, -1, ready.standby)
        result = await site.start(1, ready)
        assert (result.outcome, result.detail) == ("failed", f"standby {ready.standby} is gone")
        assert (await site.standby(2)).standby != ready.standby  # replaced without being asked


async def test_a_stopped_worker_is_noticed(site: Site) -> None:
    async with site.daemon():
        ready = await site.standby(1)
        await site.start(1, ready)
        os.kill(ready.pid, signal.SIGSTOP)
        await site.controller.until(lambda: bool(site.found("progress_stalled")))
        (stall,) = site.found("progress_stalled")
        assert (stall.pid, stall.process_state, stall.step, stall.phase) == (ready.pid, "T", 3, "forward")
        assert (stall.generation, stall.rank, stall.waiting) == (1, 1, False)


async def test_an_action_is_done_once_and_answered_as_often_as_it_is_asked(site: Site) -> None:
    async with site.daemon():
        ready = await site.standby(1)
        assert (await site.start(1, ready, id="once")).outcome == "done"
        placement = pb.Placement(rank=1, node="n0", standby=ready.standby)
        body = pb.StartGeneration(spec=SPEC, ranks=[placement])
        again = pb.Action(id="once", controller_epoch=1, job="j", generation=1, start_generation=body)
        await site.controller.order(again)
        await site.controller.until(lambda: sum(r.action_id == "once" for r in site.found("action_result")) == 2)
        assert {r.outcome for r in site.found("action_result") if r.action_id == "once"} == {"done"}
        assert alive(ready.pid)
        # The same order under another id is not a repetition, and fails: the id made the difference.
        assert (await site.start(1, ready, id="twice")).outcome == "failed"


async def test_an_action_after_its_deadline_is_not_done(site: Site) -> None:
    async with site.daemon():
        ready = await site.standby(1)
        late = await site.start(1, ready, deadline=time.time() - 1)
        assert (late.outcome, late.detail) == ("failed", "it came after its deadline")
        assert (await site.start(1, ready, deadline=time.time() + 60)).outcome == "done"


async def test_a_replay_reads_a_peers_slot_and_keeps_the_standby(site: Site) -> None:
    async with site.daemon():
        ready = await site.standby(1)
        slots = Slots.create(site.folder / "runtime/slots/j-0.slots", 3_000_000)
        with slots.state(0) as state:
            state[:] = b"\7" * 3_000_000
        slots.write_record(0, SlotRecord(1, 11, 1, 2))
        slots.commit(0)
        await site.controller.until(lambda: bool(site.controller.hellos[0].peer_endpoint))
        source = site.controller.hellos[0].peer_endpoint
        replay = pb.Replay(spec=SPEC, step=12, rank=1, source_rank=0, source=source)
        assert (await site.order(id="r1", replay=replay)).outcome == "done"
        (body,) = site.found("replay_result")
        assert body.votes[0].digest == hashlib.sha256(b"\7" * 3_000_000).hexdigest()
        assert (body.action_id, body.job, body.step, body.rank) == ("r1", "j", 12, 1)
        assert list((site.folder / "runtime/replay").iterdir()) == []
        missing = await site.order(replay=pb.Replay(spec=SPEC, step=99, rank=1, source=source))
        assert missing.outcome == "failed"
        assert "no slot holds step 98" in missing.detail
        assert (await site.start(1, ready)).outcome == "done"  # the standby is still there
        slots.close()


async def test_votes_reach_the_held_gate(site: Site) -> None:
    async with site.daemon():
        ready = await site.standby(1)
        vote = pb.DeliverVote(step=12, rank=1, votes=[pb.Vote(role="third", digest="abc", pid=5)])
        nobody = await site.order(deliver_vote=vote)
        assert (nobody.outcome, nobody.detail) == ("failed", "no worker of job j runs here")
        await site.start(1, ready)
        assert (await site.order(generation=1, deliver_vote=vote)).outcome == "done"
        await site.controller.until(lambda: bool(site.found("audit_result")))
        votes = json.loads(site.found("audit_result")[0].found)
        assert (votes[0]["role"], votes[0]["digest"], votes[0]["pid"], votes[0]["alarm"]) == ("third", "abc", 5, False)


async def test_the_end_of_a_job_leaves_nothing_of_it(site: Site) -> None:
    async with site.daemon():
        first = await site.standby(1)
        await site.start(1, first)
        await site.tell("steps")
        second = await site.standby(2)
        slots = site.folder / "runtime/slots/j-1.slots"
        assert slots.exists()
        assert (await site.order(end_job=pb.EndJob(outcome="completed"))).outcome == "done"
        assert eventually(lambda: not alive(first.pid) and not alive(second.pid))
        assert not slots.exists()
        await site.controller.until(lambda: site.processes()["standby"] == site.processes()["worker"] == [])


async def test_slots_of_a_rank_that_moved_away_are_deleted_once_the_generation_trains(site: Site) -> None:
    async with site.daemon():
        first = await site.standby(1)
        await site.start(1, first, rank=1)
        await site.tell("steps")
        await site.start(2, await site.standby(2), rank=0)
        folder = site.folder / "runtime/slots"
        assert {path.name for path in folder.iterdir()} == {"j-0.slots", "j-1.slots"}  # still of use to the start
        await site.tell("steps")
        await site.standby(3)
        assert {path.name for path in folder.iterdir()} == {"j-0.slots"}


async def test_a_dead_gang_is_replaced_and_takes_its_workers_along(site: Site) -> None:
    async with site.daemon():
        ready = await site.standby(1)
        await site.start(1, ready)
        (gang,) = site.processes()["gang"]
        os.kill(gang, signal.SIGKILL)
        assert (await site.exit_of(ready.pid)).cause == "signal"
        assert not alive(ready.pid)
        second = await site.standby(2)
        assert alive(second.pid)
        assert site.processes()["gang"] != [gang]


async def test_a_standby_that_cannot_be_made_is_reported(site: Site) -> None:
    async with site.daemon():
        await site.controller.until(lambda: bool(site.controller.hellos))
        broken = json.dumps({"job": "j", "world": 1, "broken": True})
        await site.order(prepare_standby=pb.PrepareStandby(spec=broken))
        await site.controller.until(lambda: len(site.found("worker_exited")) >= 2)  # and tried again
        exited = site.found("worker_exited")[0]
        assert (exited.cause, exited.detail, exited.generation) == ("error", "cannot be built", 0)


async def test_the_controllers_own_work_is_noted_and_the_unknown_refused(site: Site) -> None:
    async with site.daemon():
        await site.controller.until(lambda: bool(site.controller.hellos))
        assert (await site.order(quarantine=pb.Quarantine(node="n0"))).outcome == "done"
        probes = await site.order(run_probes=pb.RunProbes())
        assert (probes.outcome, probes.detail) == ("failed", "this agent cannot carry out run_probes")
        assert (await site.order(prepare_standby=pb.PrepareStandby(spec="{}"), job="")).outcome == "failed"


async def test_training_goes_on_without_a_controller_and_nothing_is_lost(site: Site) -> None:
    async with site.daemon():
        ready = await site.standby(1)
        await site.start(1, ready)
        await site.controller.stop()
        os.kill(ready.pid, signal.SIGKILL)
        assert eventually(lambda: not alive(ready.pid))
        await site.controller.start(site.controller.port)
        assert (await site.exit_of(ready.pid)).cause == "signal"
        hello = site.controller.hellos[-1]
        assert hello.completed_actions[-1].startswith("a")
        assert hello.epoch == site.controller.hellos[0].epoch


@pytest.mark.parametrize("here", [True, False])
async def test_a_drill_ends_the_controller_only_on_this_host(site: Site, here: bool) -> None:
    with subprocess.Popen(["sleep", "600"]) as victim:
        host = socket.gethostname() if here else "elsewhere"
        site.controller.welcome = {"pid": victim.pid, "host": host}
        async with site.daemon():
            await site.start(1, await site.standby(1))
            await site.tell("kill_controller")
            await site.tell("steps")  # behind it on the same socket
            await site.controller.until(lambda: bool(site.found("steps")))
            if here:
                assert victim.wait(10) == -signal.SIGKILL
            assert (victim.poll() is None) != here
        victim.kill()


async def test_a_trace_joins_the_order_and_the_worker(site: Site) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    async with site.daemon():
        parent = f"00-{trace}-b7ad6b7169203331-01"
        await site.start(1, await site.standby(1), traceparent=parent)
        resumed = next(r for _, r in site.controller.reports if r.WhichOneof("body") == "resumed")
        assert resumed.traceparent.split("-")[1] == trace
    spans = [json.loads(line) for line in (site.folder / "trace.jsonl").read_text().splitlines()]
    (span,) = (span for span in spans if span["name"] == "assay.agent.start_generation")
    assert (span["trace_id"], span["parent_id"]) == (trace, "b7ad6b7169203331")
    assert resumed.traceparent.split("-")[2] == span["span_id"]


async def test_a_new_life_has_a_higher_epoch_and_a_clean_runtime(site: Site) -> None:
    async with site.daemon():
        await site.start(1, await site.standby(1))
        (site.folder / "runtime/keep").touch()
    assert not (site.folder / "runtime/slots").exists()
    (site.folder / "runtime/slots").mkdir()
    (site.folder / "runtime/slots/j-9.slots").touch()
    async with site.daemon():
        await site.controller.until(lambda: len({hello.epoch for hello in site.controller.hellos}) == 2)
        first, second = site.controller.hellos[0], site.controller.hellos[-1]
        assert second.epoch > first.epoch
        assert list((site.folder / "runtime/slots").iterdir()) == []
    assert (site.folder / "runtime/keep").exists()  # what is not the agent's own is not touched


async def test_two_agents_do_not_share_a_folder(site: Site) -> None:
    async with site.daemon():
        with pytest.raises(StartError, match="another agent runs"):
            Daemon(configuration.parse(site.document()))


async def start_process(site: Site) -> "subprocess.Popen[bytes]":
    path = site.folder / "agent.json"
    path.write_text(json.dumps(site.document()))
    process = subprocess.Popen([sys.executable, "-m", "agent.daemon", "--config", path], stderr=subprocess.PIPE)
    await site.controller.until(lambda: bool(site.controller.hellos))
    return process


async def test_sigterm_drains_and_leaves_nothing_running(site: Site) -> None:
    process = await start_process(site)
    ready = await site.standby(1)
    await site.start(1, ready)
    await site.controller.until(lambda: site.processes()["gang"] != [])
    (gang,) = site.processes()["gang"]
    process.terminate()
    assert (await site.exit_of(ready.pid)).cause == "stopped"
    assert await asyncio.to_thread(process.wait, 10) == 0
    assert not alive(gang)
    assert not alive(ready.pid)
    assert list((site.folder / "state/outbox").iterdir()) == []
    assert process.stderr is not None
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()


async def test_a_killed_agent_takes_its_gang_and_workers_along_and_its_reports_survive(site: Site) -> None:
    process = await start_process(site)
    ready = await site.standby(1)
    await site.start(1, ready)
    (gang,) = site.processes()["gang"]
    site.controller.acknowledges = False
    await site.tell("steps")
    await site.controller.until(lambda: bool(site.found("steps")))
    process.kill()
    await asyncio.to_thread(process.wait, 10)
    assert eventually(lambda: not alive(gang) and not alive(ready.pid))
    site.controller.acknowledges = True
    heard = len(site.controller.reports)
    async with site.daemon():
        await site.controller.until(lambda: len({h.epoch for h in site.controller.hellos}) == 2)
        old = site.controller.hellos[0].epoch
        repeated = [(epoch, r.seq) for epoch, r in site.controller.reports[heard:] if r.WhichOneof("body") == "steps"]
        assert repeated == [(e, r.seq) for e, r in site.controller.reports[:heard] if r.WhichOneof("body") == "steps"]
        assert repeated[0][0] == old
    assert process.stderr is not None
    process.stderr.close()


async def test_the_daemon_is_small_and_loads_neither_torch_nor_ray(site: Site) -> None:
    process = await start_process(site)
    await site.standby(1)
    maps = Path(f"/proc/{process.pid}/maps").read_text()
    assert "grpc" in maps  # the maps do show what is loaded
    assert "/torch/" not in maps
    assert "/ray/" not in maps
    status = Path(f"/proc/{process.pid}/status").read_text()
    resident_kib = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))
    assert resident_kib < 120 * 1024
    process.terminate()
    assert await asyncio.to_thread(process.wait, 10) == 0
    assert process.stderr is not None
    process.stderr.close()


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"node": 3}, 2, "node must be a string"),
        ({"runtime": None}, 2, "runtime must be a string"),
        ({"state": "/proc/none"}, 5, "cannot use /proc/none"),
        ({"node_ip": "192.0.2.1"}, 5, "cannot listen on 192.0.2.1"),
    ],
)
async def test_bad_input_gets_one_line_and_its_exit_code(
    site: Site, change: dict[str, Any], code: int, message: str
) -> None:
    path = site.folder / "agent.json"
    path.write_text(json.dumps(site.document(**change)))
    command = [sys.executable, "-m", "agent.daemon", "--config", str(path)]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=20)
    assert done.returncode == code
    assert done.stderr.splitlines()[-1].startswith(f"assay-agent: {message}")
    assert "Traceback" not in done.stderr
