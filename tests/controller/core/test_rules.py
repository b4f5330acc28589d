"""Rules for generations, nodes and jobs beside their negative control: a threshold off, another thing happens."""

from dataclasses import replace

import pytest
from story import Story, started, trained

from controller.core.actions import AskHuman, PromoteCheckpoint, StartGeneration, StopGeneration
from controller.core.change import Change
from controller.core.events import Event, PolicyChanged
from controller.core.machine import decide, wants_final
from controller.core.nodes import TRANSITIONS, InvalidTransition, enter
from controller.core.policy import Policy
from controller.core.state import NodeState, Suspicion

OFF = 1e9  # seconds or counts that are never reached


def rank_0_killed() -> Event:
    """The report of it by its own agent."""
    story = trained()
    story.exit(0, "signal", 25)
    return story.fed[-1][0]


def recovered(story: Story) -> list[str]:
    """Ids of the incidents that have."""
    return [item.id for item in story.state.incidents.values() if item.recovered_at is not None]


@pytest.mark.parametrize(("wait", "generation"), [(1.0, 1), (0.0, 2)])
def test_a_victims_exit_waits_for_its_cause(wait: float, generation: int) -> None:
    story = trained(Policy(cause_wait_s=wait))
    story.exit(0, "collective", 25)
    assert story.state.jobs["run"].generation == generation


def test_no_generation_starts_without_proof() -> None:
    story = trained()
    story.stalled(1, 25, process="T")
    story.now += 30.0
    story.tick()
    assert story.state.jobs["run"].generation == 1
    story.result("StopGeneration", "n0", "failed")
    assert story.state.jobs["run"].generation == 1
    story.result("StopGeneration", "n0", "done")
    assert story.state.jobs["run"].generation == 2


def test_it_is_the_proof_that_a_restart_waits_for() -> None:
    """Negative control: with a proof put in by hand, the same hang restarts at once."""
    story = trained()
    story.state.jobs["run"].proofs[1] = "assumed"
    story.stalled(1, 25, process="T")
    assert story.state.jobs["run"].generation == 2


def test_late_news_of_a_generation_that_is_being_replaced_ends_no_outage() -> None:
    story = trained()
    story.exit(0, "signal", 25)
    story.stalled(1, 26, process="T")
    story.final(25, generation=2)
    assert not recovered(story)
    story.result("StopGeneration", "n1")
    story.ready("n0")
    story.ready("n1")
    story.final(26)
    assert recovered(story) == ["inc-0001"]
    assert len(story.state.incidents) == 1


def test_without_any_proof_a_person_is_asked_and_the_job_ends() -> None:
    story = trained()
    story.stalled(1, 25, process="T")
    story.now += 60.0
    story.tick()
    assert story.state.jobs["run"].status == "FAILED"
    assert len(story.of(AskHuman)) == 1
    assert len(story.of(StartGeneration)) == 2


def test_a_node_without_a_rank_proves_nothing() -> None:
    story = trained(spares=2)
    story.stalled(1, 25, process="T")
    story.hello("n2", new=True)
    assert story.state.jobs["run"].generation == 1
    story.hello("n0", new=True)
    assert story.state.jobs["run"].generation == 2


def test_one_node_cannot_report_the_end_of_anothers_worker() -> None:
    lied, honest = trained(), trained()
    lied.feed(replace(rank_0_killed(), node="n2"))
    honest.feed(rank_0_killed())
    assert lied.state.jobs["run"].generation == 1
    assert honest.state.jobs["run"].generation == 2


@pytest.mark.parametrize(("standby_wait", "node"), [(5.0, None), (0.0, "n2")])
def test_a_healthy_node_gets_time_for_its_next_warm_worker(standby_wait: float, node: str | None) -> None:
    story = trained(Policy(standby_wait_s=standby_wait))
    story.exit(0, "signal", 25)
    story.ready("n1")
    story.now += 1.0
    story.exit(0, "signal", 26)
    expected = [(0, node), (1, "n1")] if node else [(0, "n0"), (1, "n1")]
    assert started(story) == expected
    assert story.state.jobs["run"].generation == (3 if node else 2)


@pytest.mark.parametrize(("grace", "moved"), [(1.0, False), (0.0, True)])
def test_a_hiccup_of_a_link_costs_no_node_its_rank(grace: float, moved: bool) -> None:
    story = trained(Policy(link_grace_s=grace))
    story.link_lost("n1")
    story.now += 0.2
    story.exit(0, "signal", 25)
    story.now += 0.2
    story.hello("n1")
    assert started(story) == [(0, "n0"), (1, "n2" if moved else "n1")]
    assert story.state.jobs["run"].generation == 2


@pytest.mark.parametrize(("limit", "status"), [(5, "FAILED"), (100, "RUNNING")])
def test_restarts_without_progress_end_the_job(limit: int, status: str) -> None:
    story = trained(Policy(fruitless_restarts=limit))
    for _ in range(6):
        story.exit(0, "error", 2)
        story.ready("n0")
        story.ready("n1")
    assert story.state.jobs["run"].status == status


def test_progress_forgives_restarts() -> None:
    story = trained()
    for step in range(2, 12):
        story.exit(0, "error", step)
        story.final(step)
        story.ready("n0")
        story.ready("n1")
    assert story.state.jobs["run"].status == "RUNNING"
    assert len(story.state.incidents) == 10


def test_a_spare_with_another_fingerprint_does_not_take_a_rank() -> None:
    story = Story()
    for index in range(3):
        story.hello(f"n{index}", spare=index == 2)
    story.submit()
    story.ready("n0")
    story.ready("n1")
    story.ready("n2", fingerprint="another")
    story.hello("n1", new=True)
    assert story.state.jobs["run"].status == "RESTARTING"
    story.ready("n2")
    story.ready("n0")
    assert started(story) == [(0, "n0"), (1, "n2")]


def test_a_start_that_fails_is_an_outage_and_its_own_proof() -> None:
    story = Story()
    story.lease(1)
    story.hello("n0")
    story.submit(world=1)
    story.ready("n0")
    story.result("StartGeneration", "n0", "failed")
    story.ready("n0")
    assert story.state.jobs["run"].generation == 2
    assert story.state.incidents["inc-0001"].kind == "crash"


def test_a_start_that_is_not_answered_proves_nothing() -> None:
    story = trained()
    story.exit(0, "signal", 25)
    story.ready("n0")
    story.ready("n1")
    story.result("StartGeneration", "n1", "unknown")
    assert story.state.jobs["run"].status == "RESTARTING"
    story.result("StopGeneration", "n0")
    assert story.state.jobs["run"].generation == 3
    assert started(story) == [(0, "n0"), (1, "n2")]


def test_an_unreachable_gang_is_noticed_when_all_who_can_be_heard_wait() -> None:
    story = trained()
    story.link_lost("n1")
    story.stalled(0, 25, phase="reduce", waiting=True)
    incident = story.state.incidents["inc-0001"]
    assert (incident.kind, incident.node) == ("node", "n1")
    story.result("StopGeneration", "n0")
    assert started(story) == [(0, "n0"), (1, "n2")]


def test_a_job_is_extended_while_it_runs() -> None:
    story = trained()
    story.submit(steps=60)
    story.final(40)
    story.exit(0, "completed", 40)
    story.exit(1, "completed", 40)
    job = story.state.jobs["run"]
    assert (job.status, job.generation, job.steps) == ("RUNNING", 2, 60)
    assert story.state.incidents == {}


def test_ranks_that_left_after_the_closing_gate_complete_the_job_even_if_records_were_lost() -> None:
    story = trained()
    story.exit(0, "completed", 40)
    story.exit(1, "completed", 40)
    assert story.state.jobs["run"].status == "RUNNING"
    story.now += 30.0
    story.tick()
    job = story.state.jobs["run"]
    assert (job.status, job.committed_step) == ("COMPLETED", 40)
    assert "records of some ranks are missing" in job.explanation


def test_a_rank_that_still_runs_on_a_linked_node_is_waited_for() -> None:
    """The negative control."""
    story = trained()
    story.exit(0, "completed", 40)
    story.now += 300.0
    story.tick()
    assert story.state.jobs["run"].status == "RUNNING"


def test_a_cancelled_job_is_stopped_everywhere() -> None:
    story = trained()
    told = story.cancel()
    assert [action.node for action in told if isinstance(action, StopGeneration)] == ["n0", "n1"]
    assert story.state.jobs["run"].status == "CANCELLED"


@pytest.mark.parametrize(("chain", "promoted"), [("", 1), ("another", 0)])
def test_a_checkpoint_is_verified_only_if_it_continues_the_chain(chain: str, promoted: int) -> None:
    story = trained()
    story.captured(10)
    story.durable(10, chain)
    assert story.of(PromoteCheckpoint) == []
    story.final(10)
    assert len(story.of(PromoteCheckpoint)) == promoted
    assert len(story.of(AskHuman)) == 1 - promoted


def test_a_refused_checkpoint_that_is_written_anew_counts_like_any_other() -> None:
    """By the generation that refused it; what another rank says of the refused one may come later still."""
    story = trained()
    story.durable(10)
    story.final(10)
    story.exit(0, "signal", 12)
    story.refused(10)
    assert story.state.jobs["run"].checkpoints[10].trust == "revoked"
    story.durable(10)
    assert len(story.of(PromoteCheckpoint)) == 1  # its step has to be final anew
    story.final(10)
    assert len(story.of(PromoteCheckpoint)) == 2
    story.refused(10, rank=1)
    assert story.state.jobs["run"].checkpoints[10].trust == "verified"


def test_wanted_final_steps() -> None:
    story = trained()
    job = "run"
    assert not wants_final(story.state, job, 1, 17)
    assert wants_final(story.state, job, 1, 40)
    story.captured(20)
    assert wants_final(story.state, job, 1, 20)
    story.final(20)
    assert not wants_final(story.state, job, 1, 20)
    story.exit(0, "signal", 25)
    assert wants_final(story.state, job, 2, 21)
    assert not wants_final(story.state, job, 1, 24)
    story.final(21)
    assert not wants_final(story.state, job, 2, 22)
    assert not wants_final(story.state, "another", 1, 1)


def test_a_persistent_fault_stays_through_a_restart_and_a_transient_one_does_not() -> None:
    story = trained(drills="sdc@30:0+persistent,sdc@30:1")
    for drill in ("sdc@30:0+persistent", "sdc@30:1"):
        story.drill_fired(drill)
    told = story.exit(0, "signal", 31)
    starts = [action for action in told if isinstance(action, StartGeneration)]
    assert [[drill.id for drill in action.drills] for action in starts] == [["sdc@30:0+persistent"]] * 2


def test_both_drills_of_one_outage_are_found_and_a_later_one_is_not() -> None:
    story = trained(drills="kill@25:0,kill@25:1,kill@39:0")
    story.exit(0, "signal", 25)
    story.final(25)
    for drill in ("kill@25:0", "kill@25:1"):
        story.drill_fired(drill, at=20.0)
    story.now += 5.0
    story.drill_fired("kill@39:0")
    story.final(40)
    story.exit(0, "completed", 40)
    story.exit(1, "completed", 40)
    caught = [(item.injected_step, item.caught) for item in story.state.incidents.values()]
    assert caught == [(25, True), (39, False)]


def test_traces_follow_an_incident_through_its_actions() -> None:
    story = trained()
    story.feed(replace(rank_0_killed(), traceparent="00-aa-bb-01"))
    traced = [action for action in story.actions if action.incident]
    assert traced
    assert {action.traceparent for action in traced} == {"00-aa-bb-01"}


def test_policy_changes_are_events_and_nonsense_is_left_out() -> None:
    story = trained()
    story.feed(
        PolicyChanged(time=0.0, policy={"cause_wait_s": 0.0, "x": 1.0, "suspect_at": -1.0}, actor="a", reason="r")
    )
    assert story.state.policy == replace(Policy(), cause_wait_s=0.0)
    story.exit(0, "collective", 25)
    assert story.state.jobs["run"].generation == 2


def test_an_invalid_transition_tells_the_whole_story_and_changes_nothing() -> None:
    story = trained()
    change = Change(story.state, story.fed[-1][0], story.now)
    with pytest.raises(InvalidTransition, match=r"n0 cannot go from HEALTHY to QUARANTINED \(a test\).*while deciding"):
        enter(change, "n0", NodeState.QUARANTINED, "a test")
    assert story.state.nodes["n0"].state == "HEALTHY"
    assert set(TRANSITIONS) == set(NodeState)


def test_a_stale_clock_or_epoch_changes_nothing() -> None:
    story = trained()
    old = story.fed[1][0]
    story.hello("n0", new=True)
    before = story.state
    assert decide(before, old, story.now)[0] == before
    assert Suspicion(1.0, 0.0) == Suspicion(1.0, 0.0)
