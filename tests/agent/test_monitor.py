"""The monitor finds workers that stand still, are stopped or end, and leaves alone those that work."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_gang import eventually
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import monitor
from agent.monitor import (
    FIRST_FLOOR_S,
    FLOOR_S,
    MARGIN,
    STOPPED_S,
    Deadlines,
    Monitor,
    Pidfd,
    ProcessState,
    Stall,
    Watch,
    Watched,
)
from agent.slots import PHASES, WAITING, Progress, Slots

WORKER = Watched("j", 2, 0, 1, Path("/nowhere"))


def at(step: int, phase: str, seconds: float = 1.0, generation: int = 2) -> Progress:
    return Progress(generation, step, phase, int(seconds * 1e9), 1)


def trained(deadlines: Deadlines | None = None) -> Watch:
    """A watch on a worker that is past its first steps."""
    watch = Watch(WORKER, deadlines or Deadlines())
    for step in range(5):
        assert watch.observe(0.05, at(step, "forward", step), "R") is None
    return watch


def stalls(watch: Watch, seconds: float, progress: Progress | None, state: str = "S") -> list[Stall]:
    seen = (watch.observe(0.05, progress, state) for _ in range(round(seconds / 0.05)))
    return [stall for stall in seen if stall is not None]


def test_a_worker_that_stands_still_is_reported_once() -> None:
    watch = trained()
    assert stalls(watch, 0.05, at(7, "forward", 7)) == []
    (stall,) = stalls(watch, 10 * MARGIN, at(7, "forward", 7))
    assert (stall.step, stall.phase, stall.waiting) == (7, "forward", False)
    assert stall.stalled_s > stall.deadline_s == max(FLOOR_S, MARGIN * 3)
    stalls(watch, 0.05, at(7, "commit", 8))
    assert len(stalls(watch, 10 * MARGIN, at(7, "commit", 8))) == 1  # it stands still again: another stall


def test_a_worker_that_moves_is_left_alone() -> None:
    watch = trained()
    for step in range(5, 500):
        assert stalls(watch, 0.9 * FLOOR_S, at(step, "forward", step)) == []


def test_a_stopped_worker_is_reported_in_any_phase_and_soon() -> None:
    for phase in PHASES:
        watch = Watch(WORKER, Deadlines())
        (stall,) = stalls(watch, 3.0, at(1, phase), "T")
        assert (stall.process_state, stall.waiting) == ("T", False)
        assert STOPPED_S <= stall.stalled_s < STOPPED_S + 0.1
        assert stalls(Watch(WORKER, Deadlines()), 3.0, at(1, phase), "S") == []  # not stopped: nothing so soon


def test_a_short_stop_is_none() -> None:
    watch = trained()
    for _ in range(20):
        assert stalls(watch, STOPPED_S - 0.1, at(9, "forward", 9), "T") == []
        assert stalls(watch, 0.05, at(9, "forward", 9), "S") == []


def test_phases_that_wait_for_others_are_flagged() -> None:
    for phase in PHASES:
        if phase != "idle":
            watch = trained()
            (stall,) = stalls(watch, 100.0, at(9, phase, 9))
            assert stall.waiting == (phase in WAITING)
    assert stalls(trained(), 1000.0, at(9, "idle", 9)) == []


def test_the_first_steps_of_a_generation_have_longer() -> None:
    watch = Watch(WORKER, Deadlines())
    assert stalls(watch, FIRST_FLOOR_S - 0.1, at(1, "forward")) == []
    assert len(stalls(watch, 0.3, at(1, "forward"))) == 1
    assert len(stalls(trained(), FIRST_FLOOR_S - 0.1, at(9, "forward", 9))) == 1


def test_a_worker_that_never_enters_its_generation_is_reported() -> None:
    assert len(stalls(Watch(WORKER, Deadlines()), FIRST_FLOOR_S + 1, None)) == 1
    former = at(40, "forward", generation=1)  # the slots still show the former generation's word
    assert len(stalls(Watch(WORKER, Deadlines()), FIRST_FLOOR_S + 1, former)) == 1


def test_deadlines_follow_what_was_learned_and_forget_it() -> None:
    deadlines = Deadlines()
    assert deadlines.of("forward", 9) == FLOOR_S
    deadlines.learn("forward", 3.0)
    assert deadlines.of("forward", 9) == MARGIN * 3.0
    assert deadlines.of("commit", 9) == FLOOR_S
    for _ in range(monitor.REMEMBERED):
        deadlines.learn("forward", 0.1)
    assert deadlines.of("forward", 9) == FLOOR_S


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(PHASES), st.integers(0, 3), st.floats(0, 0.2), st.sampled_from("RSDT")), max_size=80
    )
)
def test_there_are_never_more_stalls_than_standstills(seen: list[tuple[str, int, float, str]]) -> None:
    watch = Watch(WORKER, Deadlines())
    moves, stops, found, before = 1, 0, 0, ("", "")
    for phase, step, passed, state in seen:
        stops += state == "T" and before[1] != "T"
        previous = watch.progress
        stall = watch.observe(passed * 40, at(step, phase), state)
        moves += watch.progress != previous
        found += stall is not None
        if stall is not None:
            assert stall.stalled_s >= min(stall.deadline_s, STOPPED_S)
        before = (phase, state)
    assert found <= moves + stops


def test_the_state_of_a_process_with_a_strange_name_is_read(tmp_path: Path) -> None:
    script = tmp_path / ") T (x"
    script.symlink_to("/bin/sleep")
    with subprocess.Popen([script, "60"]) as process:
        state = ProcessState(process.pid)
        assert eventually(lambda: state.read() == "S")
        process.kill()
    assert state.read() == ""
    assert ProcessState(process.pid).read() == ""
    state.close()


@pytest.fixture
def sleeper() -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        yield process
        process.kill()


async def test_a_stopped_process_is_found_and_a_running_one_is_not(
    sleeper: "subprocess.Popen[bytes]", tmp_path: Path
) -> None:
    found: asyncio.Queue[Stall] = asyncio.Queue()
    watching = Monitor(found.put_nowait)
    path = tmp_path / "j-0.slots"
    slots = Slots.create(path, 64)
    slots.enter(2, 12, "gate")
    watching.watch(Watched("j", 2, 0, sleeper.pid, path))
    with subprocess.Popen(["sleep", "600"]) as other:
        watching.watch(Watched("j", 2, 1, other.pid, tmp_path / "j-1.slots"))
        sleeper.send_signal(signal.SIGSTOP)
        task = asyncio.create_task(watching.run())
        stall = await asyncio.wait_for(found.get(), 10)
        assert (stall.worker.pid, stall.process_state, stall.step, stall.phase) == (sleeper.pid, "T", 12, "gate")
        assert found.empty()
        task.cancel()
        other.kill()
    last = watching.forget(sleeper.pid)
    assert last is not None
    assert (last.step, last.phase) == (12, "gate")
    slots.close()


def test_time_that_the_monitor_did_not_see_does_not_count(sleeper: "subprocess.Popen[bytes]", tmp_path: Path) -> None:
    found: list[Stall] = []
    watching = Monitor(found.append)
    watching.watch(Watched("j", 2, 0, sleeper.pid, tmp_path / "none"))
    watching.poll(monitor.SEEN_AT_MOST_S)
    assert found == []
    watching.poll(2 * FIRST_FLOOR_S)  # what the cap in `run` keeps from happening after a suspension
    assert len(found) == 1


def test_slots_that_are_replaced_are_followed(tmp_path: Path) -> None:
    watching = Monitor(lambda _stall: None)
    path = tmp_path / "j-0.slots"
    watching.watch(Watched("j", 2, 0, os.getpid(), path))
    watching.poll(0.05)
    for step in (1, 2):
        slots = Slots.create(path, 64 * step)
        slots.enter(2, step, "forward")
        watching.poll(0.05)
        slots.close()
    last = watching.forget(os.getpid())
    assert last is not None
    assert last.step == 2


async def test_an_ended_process_is_seen_at_once(sleeper: "subprocess.Popen[bytes]") -> None:
    ended = asyncio.Event()
    handle = Pidfd(sleeper.pid, ended.set)
    assert not handle.ended()
    handle.signal(signal.SIGKILL)
    await asyncio.wait_for(ended.wait(), 10)
    assert handle.ended()
    handle.signal(signal.SIGKILL)  # harmless
    sleeper.wait()
    with pytest.raises(ProcessLookupError):
        Pidfd(sleeper.pid, ended.set)


async def test_the_end_after_idle_still_says_where_it_worked(tmp_path: Path) -> None:
    watching = Monitor(lambda _stall: None)
    slots = Slots.create(tmp_path / "s", 64)
    watching.watch(Watched("j", 2, 0, 1, tmp_path / "s"))
    slots.enter(2, 31, "gate")
    watching.poll(0.05)
    slots.enter(2, 0, "idle")
    last = watching.forget(1)
    assert last is not None
    assert (last.step, last.phase) == (31, "gate")
    assert watching.forget(1) is None
    slots.close()
