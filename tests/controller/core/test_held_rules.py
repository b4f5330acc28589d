"""Rules for held steps and verdicts: votes, blame, quarantine, suspicion; each beside its negative control."""

from dataclasses import replace

import pytest
from story import started, trained

from controller.core.actions import Quarantine, Replay
from controller.core.events import FindingRaised, GateAlarm, ProbeResult
from controller.core.incidents import incident_document
from controller.core.policy import Policy


@pytest.mark.parametrize(("steps", "quarantined"), [(100, True), (10, False)])
def test_a_second_corruption_within_the_window_takes_the_node_out(steps: int, quarantined: bool) -> None:
    story = trained(Policy(recurrence_steps=steps, quarantine_at=1.0))
    for step in (12, 30):
        story.alarm(1, step)
        story.verdict("CORRUPT", rank=1, step=step, blamed="n1")
        story.final(step)
    assert bool(story.of(Quarantine)) == quarantined
    assert (story.state.jobs["run"].status == "RESTARTING") == quarantined


@pytest.mark.parametrize(("line", "quarantined"), [(0.25, True), (1.0, False)])
def test_suspicion_adds_up_over_any_number_of_steps(line: float, quarantined: bool) -> None:
    story = trained(Policy(quarantine_at=line, recurrence_steps=1))
    for step in (5, 15, 35):
        story.alarm(1, step)
        story.verdict("CORRUPT", rank=1, step=step, blamed="n1")
        story.final(step)
    assert bool(story.of(Quarantine)) == quarantined


def test_blame_may_fall_on_the_peer() -> None:
    story = trained()
    story.alarm(1, 12)
    story.verdict("CORRUPT", rank=1, step=12, blamed="n0", recurrent=True)
    story.result("StopGeneration", "n1")
    assert started(story) == [(0, "n2"), (1, "n1")]
    assert story.state.nodes["n0"].state == "QUARANTINED"


def test_a_bad_spare_is_taken_out_without_a_restart() -> None:
    story = trained()
    story.alarm(1, 12)
    story.verdict("CORRUPT", rank=1, step=12, blamed="n2", recurrent=True)
    assert story.state.nodes["n2"].state == "QUARANTINED"
    assert story.state.jobs["run"].status == "RUNNING"


def test_a_verdict_from_outside_the_gang_counts_for_nothing() -> None:
    story = trained()
    story.alarm(1, 12)
    told = story.verdict("CORRUPT", rank=1, step=12, blamed="n1", recurrent=True)
    assert told
    other = trained()
    other.alarm(1, 12)
    assert other.feed(replace(story.fed[-1][0], node="n2")) == []


def test_only_the_asked_spares_vote_counts() -> None:
    story = trained(spares=2)
    story.alarm(1, 12, third=True)
    replay = story.of(Replay)[0]
    assert replay.node == "n2"
    assert story.voted("n3", 12, 1, replay.id) == []
    assert len(story.voted("n2", 12, 1, replay.id)) == 2
    assert story.voted("n2", 12, 1, replay.id) == []


@pytest.mark.parametrize(("outcome", "delivered"), [("failed", 2), ("unknown", 2), ("done", 0)])
def test_a_replay_that_fails_is_given_up_at_once(outcome: str, delivered: int) -> None:
    story = trained()
    story.alarm(1, 12, third=True)
    assert len(story.result("Replay", "n2", outcome)) == delivered


def test_the_incident_document_has_the_keys_that_people_rely_on() -> None:
    story = trained(drills="sdc@12:1")
    story.alarm(1, 12)
    story.verdict("CORRUPT", rank=1, step=12, blamed="n1")
    story.final(12)
    document = incident_document(story.state.incidents["inc-0001"])
    keys = "id kind job rank injected_step detected_step before_commit verdict votes node device actions"
    assert list(document) == [*keys.split(), "detect_s", "recovery_s", "resumed_from", "caught", "timeline", "evidence"]
    assert document["votes"][0].keys() == {"node", "device", "pid", "digest", "role", "number"}
    assert document["before_commit"] is True


@pytest.mark.parametrize("attempt", [1, 2])
def test_one_corruption_that_reached_two_ranks_is_held_against_its_device_once(attempt: int) -> None:
    """Of the same attempt; that the redo is corrupted as well is a fault that stayed."""
    story = trained()
    story.alarm(0, 12)
    story.verdict("CORRUPT", rank=0, step=12, blamed="n1")
    level = dict(story.state.suspicion)
    story.alarm(1, 12)
    if attempt == 2:
        story.verdict("FALSE_ALARM", rank=1, step=12)
        story.alarm(1, 12, attempt=2)
    story.verdict("CORRUPT", rank=1, step=12, blamed="n1")
    assert bool(story.of(Quarantine)) is (attempt == 2)
    assert (story.state.suspicion == level) is (attempt == 1)
    assert [incident.verdict for incident in story.state.incidents.values()] == ["CORRUPT", "CORRUPT"]


@pytest.mark.parametrize("held", [False, True])
def test_what_was_committed_wrong_was_not_caught_before_the_commit(held: bool) -> None:
    """Whether or not the same step had been held before."""
    story = trained()
    if held:
        story.alarm(1, 12)
        story.verdict("FALSE_ALARM", rank=1, step=12)
    story.disagreement(12, blamed=1)
    (incident,) = story.state.incidents.values()
    assert (incident.verdict, incident.before_commit) == ("CORRUPT", False)
    story.alarm(1, 12, attempt=3 if held else 2)  # the redo, whose attempts go on
    story.verdict("CORRUPT", rank=1, step=12, blamed="n1")
    assert story.of(Quarantine)


@pytest.mark.parametrize(
    ("alarmed", "reason", "told"),
    [
        (False, "reduced gradient is not finite", "reduced gradient is not finite at step 12, rank 1 is asked"),
        (False, "", "rank 1 alarmed at step 12"),  # an older agent's
        (True, "sensor alarm", "rank 1 alarmed at step 12: gemm of layers.1.moe.experts.3.gate fprop reads 41.5"),
    ],
)
def test_a_step_that_is_held_without_an_alarm_is_told_by_the_gates_reason(
    alarmed: bool, reason: str, told: str
) -> None:
    known = trained()
    known.alarm(1, 12)
    event = known.fed[-1][0]
    assert isinstance(event, GateAlarm)
    story = trained()
    story.feed(replace(event, reason=reason, alarms=event.alarms if alarmed else ()))
    assert story.state.incidents["inc-0001"].timeline[0].text == f"detected: {told}; the gate holds the step"


@pytest.mark.parametrize("times", [0, 1, 2])
@pytest.mark.parametrize("first", [-1, 1])
def test_states_that_differ_again_after_their_redo_are_another_corruption(first: int, times: int) -> None:
    """The record's comparison and a report that comes twice are echoes of the first; the redo's own states are not."""
    story = trained()
    story.disagreement(12, blamed=first, times=1)
    told = list(story.state.suspicion.values())
    story.disagreement(12, blamed=-1)
    assert list(story.state.suspicion.values()) == told
    story.disagreement(12, blamed=1, times=times)
    verdicts = [incident.verdict for incident in story.state.incidents.values()]
    assert verdicts == (["CORRUPT"] if first == 1 or times < 2 else ["UNDECIDED", "CORRUPT"])
    assert bool(story.of(Quarantine)) is (first == 1 and times == 2)


@pytest.mark.parametrize(
    ("before", "first", "ended"),
    [
        ("UNDECIDED", 1, True),
        ("UNDECIDED", 0, True),  # an older agent's
        ("UNDECIDED", 2, False),  # rolled back in between
        ("CORRUPT", 1, False),
        ("FALSE_ALARM", 1, False),
    ],
)
def test_only_what_stays_undecided_ends_the_job(before: str, first: int, ended: bool) -> None:
    story = trained()
    story.alarm(1, 12)
    story.verdict(before, rank=1, step=12, blamed="n1" if before == "CORRUPT" else "", attempt=1, first=1)
    story.alarm(1, 12, attempt=2)
    story.verdict("UNDECIDED", rank=1, step=12, attempt=2, first=first)
    job = story.state.jobs["run"]
    assert (job.status == "FAILED") is ended
    if ended:
        assert job.explanation == "step 12 keeps failing its checks: there is no second device to compare on"
    else:
        story.verdict("UNDECIDED", rank=1, step=12, attempt=3, first=first)
        assert story.state.jobs["run"].status == "FAILED"


def test_what_was_undecided_before_states_differed_is_another_try() -> None:
    story = trained()
    story.verdict("UNDECIDED", rank=1, step=12, attempt=1)
    story.disagreement(12, blamed=0, times=1)
    story.verdict("UNDECIDED", rank=1, step=12, attempt=3)
    assert story.state.jobs["run"].status == "RUNNING"


def test_a_state_that_changed_in_memory_is_not_told_as_states_that_differ() -> None:
    """Its digest was that of all; what it hashes to now stands in the reason."""
    story = trained()
    story.disagreement(12, blamed=1, times=1, memory=True)
    (incident,) = story.state.incidents.values()
    assert (incident.verdict, incident.node, incident.before_commit) == ("CORRUPT", "n1", False)
    assert [note.text for note in incident.timeline] == [
        "detected: the state of rank 1 after step 12 changed in memory",
        "decided: CORRUPT: in memory: its state hashes to b, it was a",
    ]
    other = trained()
    other.disagreement(12, blamed=1, times=1)
    assert "differ: rank 0 good, rank 1 bad" in other.state.incidents["inc-0001"].timeline[0].text


@pytest.mark.parametrize(
    ("step", "rank", "faults"),
    [
        (12, 1, 1),
        (11, 1, 1),  # the ranks found it when they compared the state after it
        (10, 1, 2),
        (12, 0, 1),  # of another device
    ],
)
@pytest.mark.parametrize("restarted", [True, False])
def test_memory_that_is_found_again_after_a_restart_is_held_against_its_device_once(
    step: int, rank: int, faults: int, restarted: bool
) -> None:
    story = trained()
    story.disagreement(12, blamed=1, times=1, memory=True)
    if restarted:
        story.exit(0, "error", 13)
        assert story.state.jobs["run"].generation == 2
    story.disagreement(step, blamed=rank, times=1, memory=True)
    echo = step == 12 and not restarted
    expected = {"serial-n1": 1} if rank == 0 else {"serial-n1": faults if restarted or echo else 2}
    if rank == 0:
        expected["serial-n0"] = 1
    assert {key: held.faults for key, held in story.state.suspicion.items()} == expected


@pytest.mark.parametrize("blamed", [0, 1])
def test_memory_that_changed_on_two_ranks_is_held_against_both(blamed: int) -> None:
    story = trained()
    story.disagreement(12, blamed=1, times=1, memory=True)
    story.disagreement(12, blamed=blamed, times=1, memory=True)
    assert len(story.state.incidents) == len(story.state.suspicion) == 2 - blamed


def test_the_redo_of_a_state_whose_blame_came_late_is_judged() -> None:
    story = trained()
    story.disagreement(12, blamed=-1)
    story.disagreement(12, blamed=1, times=1)
    story.alarm(1, 12, attempt=2)
    story.verdict("CORRUPT", rank=1, step=12, blamed="n1", attempt=2)
    assert story.of(Quarantine)


@pytest.mark.parametrize(
    ("second", "blamed", "held"),
    [("CORRUPT", "n0", 1), ("CORRUPT", "n1", 0), ("UNDECIDED", "", 1), ("FALSE_ALARM", "", 0)],
)
@pytest.mark.parametrize("recurrent", [False, True])
def test_verdicts_on_the_same_attempt_are_kept_though_the_first_ends_the_generation(
    second: str, blamed: str, held: int, recurrent: bool
) -> None:
    """They are weighed as at any time, and order no second restart, no end of the job and no node that is not there."""
    story = trained()
    story.verdict("CORRUPT", rank=1, step=12, blamed="n1", recurrent=True, attempt=1)
    job = story.state.jobs["run"]
    assert (job.status, job.generation) == ("RESTARTING", 1)
    ordered = story.verdict(second, rank=0, step=12, blamed=blamed, recurrent=recurrent, attempt=1)
    assert [type(action).__name__ for action in ordered] == (["AskHuman"] if second == "UNDECIDED" else [])
    incident = story.state.incidents["inc-0002"]
    assert (incident.verdict, len(incident.votes)) == (second, 2)
    against = story.state.suspicion.get("serial-n0")
    assert (against.faults + against.undecided if against else 0) == held
    assert story.state.suspicion["serial-n1"].faults == 1 + (blamed == "n1" and recurrent)
    story.result("StopGeneration", "n1")
    assert (story.state.jobs["run"].status, story.state.jobs["run"].generation) == ("RUNNING", 2)
    told = story.verdict("CORRUPT", rank=0, step=12, blamed="n0", recurrent=True, attempt=2)
    assert told  # of the new generation
    assert story.feed(replace(story.fed[-1][0], generation=1)) == []  # the negative control: of one that is over


@pytest.mark.parametrize(
    ("spares", "voters", "taken", "told"),
    [
        (2, "n1,n2", ["n1", "n0"], ""),
        (2, "n2", ["n1", "n0"], ""),
        (1, "n1,n2", ["n1"], "and it stays: no node is left for its rank"),
        (2, "n1", ["n1"], "and it stays: only n1 speaks against it"),
        (2, "", ["n1"], "and it stays: only n1 speaks against it"),  # it brought the verdict
    ],
)
def test_two_bad_devices_of_one_attempt_go_together_if_there_are_nodes_and_another_device_speaks_against_both(
    spares: int, voters: str, taken: list[str], told: str
) -> None:
    """One wrong device must not take along the peer that it differs from."""
    story = trained(spares=spares)
    story.verdict("CORRUPT", rank=1, step=12, blamed="n1", recurrent=True, by=0, attempt=1, voters="n0,n2")
    story.verdict("CORRUPT", rank=0, step=12, blamed="n0", recurrent=True, by=1, attempt=1, voters=voters)
    assert [action.target for action in story.of(Quarantine)] == taken  # type: ignore[attr-defined]
    notes = [note.text for note in story.state.incidents["inc-0002"].timeline]
    assert any(told in text for text in notes)
    assert story.state.incidents["inc-0002"].verdict == "CORRUPT"
    story.result("StopGeneration", "n1")
    assert story.state.jobs["run"].generation == 2
    assert started(story) == ([(0, "n2"), (1, "n3")] if len(taken) == 2 else [(0, "n0"), (1, "n2")])
    assert [name for name, node in story.state.nodes.items() if node.state == "QUARANTINED"] == sorted(taken)


@pytest.mark.parametrize(("spares", "taken"), [(2, ["n1", "n2"]), (1, ["n1"])])
def test_a_bad_spare_gets_no_rank_of_the_device_that_goes_if_there_is_another(spares: int, taken: list[str]) -> None:
    story = trained(spares=spares)
    story.verdict("CORRUPT", rank=1, step=12, blamed="n1", recurrent=True, attempt=1)
    story.verdict("CORRUPT", rank=0, step=12, blamed="n2", recurrent=True, attempt=1)
    assert [action.target for action in story.of(Quarantine)] == taken  # type: ignore[attr-defined]
    story.result("StopGeneration", "n1")
    assert started(story) == [(0, "n0"), (1, "n3" if spares == 2 else "n2")]


def test_a_bad_device_whose_node_goes_already_needs_no_second_node() -> None:
    story = trained()
    story.hello("n2", new=True)
    story.hello("n1", new=True)
    assert story.state.jobs["run"].status == "RESTARTING"
    story.verdict("CORRUPT", rank=1, step=12, blamed="n1", recurrent=True, by=0, attempt=1, voters="n0,n2")
    assert [action.target for action in story.of(Quarantine)] == ["n1"]  # type: ignore[attr-defined]
    story.ready("n2")
    assert started(story) == [(0, "n0"), (1, "n2")]


@pytest.mark.parametrize("recurrent", [True, False])
def test_a_bad_device_goes_though_a_worker_ended_before_its_verdict_was_told(recurrent: bool) -> None:
    """The restart still waits for what ended the worker."""
    story = trained()
    story.exit(0, "collective", 12)
    story.verdict("CORRUPT", rank=1, step=12, blamed="n1", recurrent=recurrent, by=0, attempt=1, voters="n0,n2")
    assert story.state.jobs["run"].generation == 1
    story.now += 1.0
    story.tick()
    assert started(story) == [(0, "n0"), (1, "n2" if recurrent else "n1")]


def test_states_that_differed_are_held_to_the_device_though_a_worker_ended_before_that_was_told() -> None:
    story = trained()
    story.exit(0, "collective", 13)
    assert story.state.jobs["run"].status == "RESTARTING"
    story.disagreement(12, blamed=1, times=1, memory=True)
    assert story.state.suspicion["serial-n1"].faults == 1
    assert (story.state.jobs["run"].status, story.state.jobs["run"].generation) == ("RESTARTING", 1)


def test_what_comes_out_wrong_everywhere_ends_a_job_that_is_restarted_too() -> None:
    story = trained()
    story.exit(0, "collective", 12)
    story.verdict("SOFTWARE", rank=1, step=12, attempt=1)
    assert story.state.jobs["run"].status == "FAILED"


def test_an_alarm_in_a_generation_that_is_ended_asks_for_no_vote() -> None:
    story = trained()
    story.exit(0, "collective", 12)
    assert story.alarm(1, 12, third=True) == []


def test_each_held_attempt_leaves_its_evidence_with_the_incident_or_says_why_not() -> None:
    story = trained()
    for attempt, evidence in ((1, ("first", "9 bytes")), (2, ("second", "")), (3, ("", "no room"))):
        story.alarm(1, 12, attempt=attempt)
        story.verdict("FALSE_ALARM", rank=1, step=12, evidence=evidence)
        story.verdict("FALSE_ALARM", rank=1, step=12, evidence=("late", "another rank's word on a judged attempt"))
    document = incident_document(story.state.incidents["inc-0001"])
    assert document["evidence"] == ["first", "second"]
    told = [entry["text"] for entry in document["timeline"] if entry["text"].startswith("evidence")]
    assert told == ["evidence first: 9 bytes", "evidence second", "evidence is missing: no room"]


@pytest.mark.parametrize(("attempts", "quarantined"), [((1, 2), True), ((0, 0), False)])
@pytest.mark.parametrize("alarmed", [1, 2])
def test_verdicts_count_in_whatever_order_they_and_their_alarms_come(
    attempts: tuple[int, int], quarantined: bool, alarmed: int
) -> None:
    """They come over two nodes' streams. Without the attempt one of two verdicts is lost."""
    story = trained()
    for attempt in range(1, alarmed + 1):
        story.alarm(1, 12, attempt)
    story.verdict("CORRUPT", rank=1, step=12, blamed="n1", attempt=attempts[0])
    assert not story.of(Quarantine)
    story.verdict("CORRUPT", rank=1, step=12, blamed="n1", recurrent=True, attempt=attempts[1])
    assert bool(story.of(Quarantine)) is quarantined


def test_a_verdict_told_again_counts_once() -> None:
    story = trained()
    for _ in range(2):
        story.verdict("CORRUPT", rank=1, step=12, blamed="n1", attempt=1)
    assert not story.of(Quarantine)
    assert [held.faults for held in story.state.suspicion.values()] == [1]


@pytest.mark.parametrize("first", [False, True])
def test_an_alarm_that_comes_after_its_verdict_still_tells_what_alarmed(first: bool) -> None:
    story = trained()
    if first:
        story.verdict("FALSE_ALARM", rank=1, step=12, attempt=1)
    story.alarm(1, 12)
    story.alarm(1, 12, third=True)
    story.alarm(1, 12, attempt=2)
    told = [note.text for note in story.state.incidents["inc-0001"].timeline]
    assert len([text for text in told if "gemm of layers.1.moe.experts.3.gate fprop reads 41.5" in text]) == 1
    assert len([text for text in told if text == "attempt 2 of step 12 alarmed too"]) == 1
    assert bool(story.of(Replay)) is not first  # nobody waits for a vote on what is judged


def test_a_suspect_stays_one_through_a_new_agent_and_is_cleared_by_time_and_a_probe() -> None:
    story = trained()
    story.alarm(1, 12)
    story.verdict("CORRUPT", rank=1, step=12, blamed="n1")
    story.hello("n1", new=True)
    story.ready("n1")
    assert story.state.nodes["n1"].state == "SUSPECT"
    probe = ProbeResult(time=0.0, node="n1", probe="gemm", passed=True, value=1.0, unit="", detail="")
    story.feed(probe)
    assert story.state.nodes["n1"].state == "SUSPECT"
    story.now += 30 * 86400.0
    story.feed(probe)
    assert story.state.nodes["n1"].state == "HEALTHY"


def test_a_fatal_finding_makes_a_suspect() -> None:
    story = trained()
    finding = FindingRaised(
        time=0.0, node="n1", finding="f", check="xid", severity="warning", device="d", confidence=1.0, detail="XID 79"
    )
    story.feed(finding)
    assert story.state.nodes["n1"].state == "HEALTHY"
    story.feed(replace(finding, severity="fatal"))
    assert story.state.nodes["n1"].state == "SUSPECT"
