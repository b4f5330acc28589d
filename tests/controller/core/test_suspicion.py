"""A bad device is taken out after few steps, a false alarm takes nobody out; simulated on the decisions themselves."""

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from story import Story

from controller.core.actions import AskHuman, Quarantine
from controller.core.events import AgentHello, Device, Event, ReplayResult, StepFinal, Vote
from controller.core.machine import decide
from controller.core.nodes import identity
from controller.core.policy import Policy
from controller.core.state import State, Suspicion
from controller.core.suspicion import aged, blamed, document, doubted, excused, faded, mean, merged

OFF = 1e9
DAY = 86400.0
#: Seconds: a large job's step. What follows holds for any up to four minutes: see the test of the window.
STEP_S = 10.0
#: Of the steps that the device computes, what it corrupts.
Q = 1e-2
NO_WEIGHTS = replace(Policy(), corrupt_weight=0.0, undecided_weight=0.0)


def trained(policy: Policy | None = None) -> Story:
    story = Story(policy)
    story.cluster(steps=1_000_000)
    story.now += 20.0
    return story


def verdict(step: int, now: float, what: str, rank: int = 1) -> ReplayResult:
    """What the gate reports of a step that rank's device computed; a corruption never reproduces."""
    node = f"n{rank}"
    wrong = what == "CORRUPT"
    return ReplayResult(
        time=now,
        node=f"n{1 - rank}",
        job="run",
        generation=1,
        step=step,
        rank=rank,
        votes=(Vote("original", node, f"cpu-{node}", 1, "bad" if wrong else "good", True),),
        verdict=what,
        blamed_node=node if wrong else "",
        blamed_device=f"cpu-{node}" if wrong else "",
        recurrent=False,
        reason="simulated",
        action_id="",
    )


def life(state: State, now: float, seed: int, most: int) -> int | None:
    """The step at which n1 is ordered into quarantine, of a job in which it corrupts each step with probability Q.

    The peer has one false alarm, somewhere in the first hundred steps.
    """
    chance = random.Random(seed)
    alarmed = chance.randrange(2, 100)
    for step in range(2, most):
        events: Iterator[Event] = iter(())
        at = now + step * STEP_S
        if step == alarmed:
            events = iter([verdict(step, at, "FALSE_ALARM", rank=0)])
        elif chance.random() < Q:
            events = iter([verdict(step, at, "CORRUPT")])
        for event in events:
            state, ordered = decide(state, event, at)
            targets = {action.target for action in ordered if isinstance(action, Quarantine)}
            assert "n0" not in targets, "a single false alarm took a device out"
            assert state.nodes["n0"].state == "HEALTHY"
            if "n1" in targets:
                return step
            final = StepFinal(
                time=at, job="run", generation=1, step=step, digest=f"d{step}", chain=f"c{step}", loss=3.0
            )
            state, _ = decide(state, final, at)
    return None


def test_a_device_that_corrupts_a_hundredth_of_its_steps_is_out_after_two_of_them() -> None:
    """Two hundred steps in the mean: two corruptions, a hundred steps apart. docs/incidents.md states these figures."""
    story = trained()
    steps = sorted(life(story.state, story.now, seed, most=3000) or 3000 for seed in range(1000))
    assert sum(steps) / len(steps) == pytest.approx(2 / Q, rel=0.1)
    assert (steps[500], steps[950]) == (pytest.approx(168, rel=0.1), pytest.approx(474, rel=0.1))
    assert steps[-1] < 3000


def test_with_its_weight_switched_off_it_stays() -> None:
    """The negative control."""
    story = trained(NO_WEIGHTS)
    assert [life(story.state, story.now, seed, most=2000) for seed in range(20)] == [None] * 20


@given(st.lists(st.tuples(st.sampled_from([0, 1]), st.floats(0.0, 30 * DAY)), min_size=1, max_size=30))
def test_no_number_of_false_alarms_is_held_against_anybody(alarms: list[tuple[int, float]]) -> None:
    story = BASE
    state, now = story.state, story.now
    for step, (rank, later) in enumerate(alarms, 2):
        now += later
        state, ordered = decide(state, verdict(step, now, "FALSE_ALARM", rank), now)
        assert not [action for action in ordered if isinstance(action, Quarantine | AskHuman)]
    assert {node.state for node in state.nodes.values()} == {"HEALTHY"}
    counted = {key: held.false_alarms for key, held in state.suspicion.items()}
    assert counted == {
        f"serial-n{rank}": sum(one == rank for one, _ in alarms) for rank in {rank for rank, _ in alarms}
    }
    assert all(mean(held, now, state.policy) == pytest.approx(0.05) for held in state.suspicion.values())


BASE = trained()


@pytest.mark.parametrize(("apart", "faults"), [(1.0 * DAY, 2), (1.3 * DAY, 2), (1.4 * DAY, 3), (3.4 * DAY, 3)])
def test_how_many_it_takes_depends_on_how_far_apart_they_are(apart: float, faults: int) -> None:
    story = trained()
    for count in range(1, 6):
        story.verdict("CORRUPT", rank=1, step=10 * count, blamed="n1")
        if story.of(Quarantine):
            break
        story.final(10 * count)
        story.now += apart
    assert count == faults


def test_nobody_else_can_tell_is_held_against_a_device_by_a_quarter_and_never_takes_it_out() -> None:
    story = trained()
    for count in range(1, 31):
        step = 10 * count
        story.feed(verdict(step, story.now, "UNDECIDED"))
        story.final(step)
        held = story.state.suspicion["serial-n1"]
        assert held.bad == pytest.approx(min(0.25 * count, 1.0))
        assert story.state.nodes["n1"].state == ("SUSPECT" if count >= 3 else "HEALTHY")
    assert held.undecided == 30
    assert not story.of(Quarantine)
    assert len(story.of(AskHuman)) == 30


def test_a_device_that_contradicts_itself_is_held_to_it_even_where_nobody_can_judge() -> None:
    """It did not reproduce: the run gave one result and the replay another."""
    story = trained()
    story.verdict("UNDECIDED", rank=1, step=12)
    assert story.state.suspicion["serial-n1"] == Suspicion(1.0, story.now, faults=1, last=story.now)
    assert story.state.nodes["n1"].state == "SUSPECT"


def test_one_device_is_one_in_another_job_on_another_node_and_under_another_name() -> None:
    """The same board, moved to a new host: its serial goes along, its uuid does not."""
    story = trained()
    story.verdict("CORRUPT", rank=1, step=12, blamed="n1")
    story.final(12)
    story.cancel()
    story.link_lost("n1")
    story.hello("n3")
    hello = story.fed[-1][0]
    assert isinstance(hello, AgentHello)
    story.feed(replace(hello, devices=(Device("cpu-n3", "serial-n1", "cpu"),)))
    story.job = "next"
    story.submit()
    for node in ("n0", "n2", "n3"):
        story.ready(node)
    assert story.home(1) == "n3"
    assert story.state.nodes["n3"].state == "SUSPECT"
    assert not story.of(Quarantine)
    story.verdict("CORRUPT", rank=1, step=3, blamed="n3")
    assert [action.target for action in story.of(Quarantine)] == ["n3"]  # type: ignore[attr-defined]


def test_two_devices_that_claim_one_serial_are_told_apart() -> None:
    """A maker's blank, or a node that lies: what is held against one is not held against the other."""
    story = trained()
    story.verdict("CORRUPT", rank=1, step=12, blamed="n1")
    assert story.state.suspicion.keys() == {"serial-n1"}
    hello = next(event for event, _ in story.fed if isinstance(event, AgentHello) and event.node == "n0")
    liar = Device("cpu-n0", "serial-n1", "cpu")
    story.feed(replace(hello, devices=(liar,)))
    assert story.state.suspicion.keys() == {"cpu-n1"}
    assert (story.state.nodes["n0"].state, story.state.nodes["n1"].state) == ("HEALTHY", "SUSPECT")
    assert identity(story.state, liar) == "cpu-n0"
    story.link_lost("n1")
    story.feed(replace(hello, devices=(liar,)))  # and for good: the other may be back at any time
    assert identity(story.state, liar) == "cpu-n0"


def test_a_device_moved_to_another_slot_keeps_its_serial_if_the_old_one_is_gone() -> None:
    story = trained()
    hello = next(event for event, _ in story.fed if isinstance(event, AgentHello) and event.node == "n1")
    story.verdict("CORRUPT", rank=1, step=12, blamed="n1")
    story.feed(replace(hello, devices=(Device("cpu-other", "serial-n1", "cpu"),)))
    assert {key: held.faults for key, held in story.state.suspicion.items()} == {"serial-n1": 1}
    assert identity(story.state, Device("cpu-other", "serial-n1", "cpu")) == "serial-n1"


def test_what_was_held_against_a_uuid_goes_to_the_serial_once_it_is_known() -> None:
    story = trained()
    hello = next(event for event, _ in story.fed if isinstance(event, AgentHello) and event.node == "n1")
    story.feed(replace(hello, devices=(Device("cpu-n1", "", "cpu"),)))
    story.verdict("CORRUPT", rank=1, step=12, blamed="n1")
    assert story.state.suspicion.keys() == {"cpu-n1"}
    assert identity(story.state, Device("cpu-n1", "", "cpu")) == "cpu-n1"
    story.feed(hello)
    assert {key: held.bad for key, held in story.state.suspicion.items()} == {"serial-n1": 1.0}


def test_suspicion_halves_with_its_half_life_and_never_grows_backwards() -> None:
    policy = Policy()
    once = blamed(None, 0.0, policy)
    assert mean(None, 0.0, policy) == pytest.approx(0.05)
    assert mean(once, 0.0, policy) == pytest.approx(1.5 / 11.0)
    assert mean(once, policy.suspicion_half_life_s, policy) == pytest.approx(1.0 / 10.5)
    assert mean(once, -1e6, policy) == mean(once, 0.0, policy)
    assert mean(once, OFF, replace(policy, suspicion_half_life_s=0.0)) == mean(once, 0.0, policy)


kinds = st.sampled_from([blamed, doubted, excused])


@given(st.lists(st.tuples(kinds, st.floats(-DAY, 30 * DAY)), max_size=20), st.floats(0.0, 60 * DAY))
def test_whatever_is_learnt_only_time_lowers_suspicion(verdicts: list[tuple[object, float]], later: float) -> None:
    policy, held, now = Policy(), None, 0.0
    for weigh, passed in verdicts:
        now += passed
        before = faded(held, now, policy)
        held = weigh(held, now, policy)  # type: ignore[operator]
        assert faded(held, now, policy) >= before - 1e-12
    assert 0.0 < mean(held, now, policy) < 1.0
    assert faded(held, now + later, policy) <= faded(held, now, policy)
    told = aged(document(Device("u", "s", "cpu"), held, policy), now + later)
    assert told["mean"] == pytest.approx(mean(held, now + later, policy), abs=5e-4)
    assert told["faults"] + told["undecided"] + told["false_alarms"] == len(verdicts)
    assert (told["last_at"] is None) == (not verdicts or held is None or held.last == 0.0)


def test_two_names_of_one_device_have_the_sum_against_them() -> None:
    policy = Policy()
    one, other = blamed(None, 0.0, policy), excused(blamed(None, 7 * DAY, policy), 7 * DAY, policy)
    both = merged(one, other, 7 * DAY, policy)
    assert (both.bad, both.faults, both.false_alarms, both.last) == (pytest.approx(1.5), 2, 1, 7 * DAY)
