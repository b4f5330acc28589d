"""The checks can fail: every broken promise is put into a state by hand, and found."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import pytest
from story import Story

from controller.core.invariants import broken_steps, invariants
from controller.core.state import JobStatus, NodeState, Restart, Standby, State


def sound() -> State:
    story = Story()
    story.cluster()
    story.exit(0, "signal", 25)
    return deepcopy(story.state)


def test_a_sound_state_keeps_every_promise() -> None:
    assert invariants(sound()) == []
    assert broken_steps(sound(), sound()) == []


def _rank_twice(state: State) -> None:
    job = state.jobs["run"]
    job.placements = (job.placements[0], job.placements[0])


def _quarantined_member(state: State) -> None:
    state.nodes["n0"].state = NodeState.QUARANTINED


def _no_proof(state: State) -> None:
    state.jobs["run"].proofs.clear()


def _restart_without_restarting(state: State) -> None:
    state.jobs["run"].restart = Restart("inc-0001", 0.0, 0.0, 0.0, True)


def _open_incident_of_an_ended_job(state: State) -> None:
    state.jobs["run"].status = JobStatus.COMPLETED


def _two_incidents_of_one_outage(state: State) -> None:
    state.incidents["inc-0002"] = replace(state.incidents["inc-0001"], id="inc-0002")


def _verdict_on_a_crash(state: State) -> None:
    state.incidents["inc-0001"].verdict = "CORRUPT"


def _recovered_and_open(state: State) -> None:
    state.incidents["inc-0001"].recovered_at = 1.0


def _linked_and_unknown(state: State) -> None:
    state.nodes["n2"].state = NodeState.UNKNOWN


def _healthy_without_link(state: State) -> None:
    state.nodes["n2"].linked = False


def _used_standby(state: State) -> None:
    state.nodes["n0"].standbys["n0-s1"] = Standby("n0-s1", "run", 1, "d", "r", "f")


def _future_action(state: State) -> None:
    state.next_action = 1


@pytest.mark.parametrize(
    "breaks",
    [
        _rank_twice,
        _quarantined_member,
        _no_proof,
        _restart_without_restarting,
        _open_incident_of_an_ended_job,
        _two_incidents_of_one_outage,
        _verdict_on_a_crash,
        _recovered_and_open,
        _linked_and_unknown,
        _healthy_without_link,
        _used_standby,
        _future_action,
    ],
)
def test_a_broken_promise_is_found(breaks: Callable[[State], None]) -> None:
    state = sound()
    breaks(state)
    assert invariants(state)


def _generation_back(state: State) -> None:
    state.jobs["run"].generation = 1


def _generation_leaps(state: State) -> None:
    state.jobs["run"].generation = 4


def _started_without_proof(state: State) -> None:
    state.jobs["run"].generation = 3


def _step_back(state: State) -> None:
    state.jobs["run"].committed_step = 0


def _epoch_back(state: State) -> None:
    state.nodes["n0"].epoch = 0


def _counter_back(state: State) -> None:
    state.next_incident = 1


def _forgotten(state: State) -> None:
    state.incidents.clear()


@pytest.mark.parametrize(
    "breaks",
    [_generation_back, _generation_leaps, _started_without_proof, _step_back, _epoch_back, _counter_back, _forgotten],
)
def test_a_step_back_is_found(breaks: Callable[[State], None]) -> None:
    after = sound()
    breaks(after)
    assert broken_steps(sound(), after)
