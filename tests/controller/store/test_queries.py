"""The documents of a job that lost a worker at step 4 and went on: told once, from history, on both databases."""

from collections.abc import Iterator

import pytest
from making import exited, hello, ready, record, recorder, report, resumed, steps, submitted, summary
from sqlalchemy import text

from controller.core import events
from controller.loading import load_state, replay
from controller.recorder import Recorder
from controller.store import rundocument
from controller.store.errors import UnknownIdError
from controller.store.leases import take_lease
from controller.store.opening import Store
from controller.store.queries import Queries
from controller.store.writer import Unit, Writer


class Story:
    """Tells a recorder what happens, report by report, and stores it at the end."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.recorder: Recorder = recorder()
        self.unit = Unit()
        self.seqs: dict[str, int] = {}

    def hear(self, node: str, *bodies: object) -> None:
        """Reports of one node, in one batch."""
        first = self.seqs.get(node, 0) + 1
        self.seqs[node] = first + len(bodies) - 1
        batch = [report(seq, body) for seq, body in enumerate(bodies, start=first)]
        self.recorder.reports(self.unit, node, 1, batch)

    def see(self, event: events.Event) -> None:
        """An event of the controller itself."""
        self.recorder.decide(self.unit, event)

    def store_all(self) -> Queries:
        epoch = take_lease(self.store, "controller", "tests", None)
        assert epoch is not None
        writer = Writer(self.store, "controller", epoch, lambda *_: None)
        writer.submit(self.unit).result(10)
        writer.close()
        return Queries(self.store)


@pytest.fixture
def story(any_store: Store) -> Iterator[Story]:
    told = Story(any_store)
    told.see(submitted(steps=5, world=2))
    for node in ("n0", "n1", "n2"):
        told.see(hello(node, spare=node == "n2"))
        told.hear(node, ready(node, f"{node}-a"))
    assert told.recorder.state.jobs["main"].generation == 1
    for rank, node in ((0, "n0"), (1, "n1")):
        told.hear(node, resumed(rank, 1, 0, "init"), steps(rank, [record(1), record(2), record(3, attempts=2)]))
    # Rank 1 is killed in step 4 and rank 0 finds its collective broken.
    told.hear("n1", exited(1, 1, "signal", 4, node="n1"))
    told.hear("n0", exited(0, 1, "collective", 4, phase="reduce", node="n0"))
    for node in ("n0", "n1"):
        told.hear(node, ready(node, f"{node}-b"))
    return told


def finish(told: Story) -> Queries:
    end(told)
    return told.store_all()


def end(told: Story) -> None:
    job = told.recorder.state.jobs["main"]
    assert job.generation == 2
    for place in job.placements:
        told.hear(
            place.node,
            resumed(place.rank, 2, 3, "live"),
            events.CheckpointCaptured(time=1.0, job="main", generation=2, step=5, digest="full", stall_s=0.1),
            steps(place.rank, [record(4, loss=0.5), record(5, loss=0.25 + place.rank)], generation=2),
        )
    told.hear(
        job.placements[0].node,
        events.CheckpointDurable(
            time=1.0,
            job="main",
            generation=2,
            step=5,
            digest="full",
            chain="c5",
            path="/checkpoints/main/step-5",
            bytes=7,
            parent_step=0,
            write_s=0.2,
        ),
    )
    for place in job.placements:
        told.hear(place.node, exited(place.rank, 2, "completed", 5, node=place.node))
    assert told.recorder.state.jobs["main"].status == "COMPLETED"


KEYS = """schema job steps committed_steps executed_steps tokens_per_s loss_first loss_last state_digest chain_digest
generations checkpoints placement incidents dir status_url""".split()  # noqa: SIM905


def test_run_document(story: Story) -> None:
    document = finish(story).run(directory="/d", status_url="http://x")
    assert set(KEYS) <= set(document)
    assert document["schema"] == "assay.run/1"
    assert (document["job"], document["steps"], document["committed_steps"]) == ("main", 5, 5)
    # Five committed, step 3 attempted twice, and step 4 begun and lost with generation 1.
    assert document["executed_steps"] == 7
    assert (document["state_digest"], document["chain_digest"]) == ("full", "c5")
    assert (document["loss_first"], document["loss_last"]) == (1.0, 0.75)
    assert document["tokens_per_s"] == pytest.approx(2 * 5 * 100 / 4.1)
    assert [(g["generation"], g["first_step"], g["last_step"], g["resumed_from"]) for g in document["generations"]] == [
        (1, 1, 3, "init"),
        (2, 4, 5, "live"),
    ]
    assert [(p["generation"], p["rank"], p["node"]) for p in document["placement"]] == [
        (1, 0, "n0"),
        (1, 1, "n1"),
        (2, 0, "n0"),
        (2, 1, "n1"),
    ]
    assert [(c["step"], c["digest"], c["trust"], c["bytes"]) for c in document["checkpoints"]] == [
        (5, "full", "verified", 7)
    ]
    assert (document["dir"], document["status_url"]) == ("/d", "http://x")


def test_incident_of_the_killed_worker(story: Story) -> None:
    queries = finish(story)
    [incident] = queries.run()["incidents"]
    wanted = "id kind injected_step detected_step before_commit verdict votes node device actions detect_s recovery_s resumed_from"  # noqa: E501
    assert set(wanted.split()) <= set(incident)
    assert (incident["kind"], incident["node"], incident["verdict"], incident["resumed_from"]) == (
        "crash",
        "n1",
        None,
        "live",
    )
    shown = queries.incident(incident["id"])
    assert {"StopGeneration", "StartGeneration"} & {action["type"] for action in shown["executed"]}
    assert shown["timeline"]
    assert queries.incidents()["incidents"] == queries.incidents("main")["incidents"]
    assert queries.status()["open_incidents"] == []


def test_each_rank_and_step_once(story: Story) -> None:
    """A late record of the old generation, and a repeat in the new one, change nothing."""
    story.hear("n0", steps(0, [record(4, digest="old")], generation=1))
    found = finish(story).steps()["steps"]
    assert [(entry["step"], entry["rank"]) for entry in found] == [
        (step, rank) for step in range(1, 6) for rank in (0, 1)
    ]
    assert {entry["step"]: entry["generation"] for entry in found} == {1: 1, 2: 1, 3: 1, 4: 2, 5: 2}
    assert "old" not in {entry["digest"] for entry in found}
    assert {tuple(entry["fp8"]) for entry in found} == {()}


def test_steps_show_fp8_statistics_under_the_wire_s_names(story: Story) -> None:
    story.hear("n0", steps(0, [record(6, fp8=(summary(),))], generation=2))
    (found,) = [entry for entry in finish(story).steps()["steps"] if (entry["step"], entry["rank"]) == (6, 0)]
    assert [(part["tensor"], part["pass"], part["amax"]) for part in found["fp8"]] == [("activation", "fprop", 3.0)]


def test_a_commit_whose_report_was_lost_still_counts(any_store: Store, story: Story) -> None:
    """Generation 2 goes on after step 4, of which no record ever came: it is committed and not executed again."""
    job = story.recorder.state.jobs["main"]
    for place in job.placements:
        story.hear(place.node, resumed(place.rank, 2, 4, "live"))
    document = story.store_all().run()
    assert (document["committed_steps"], document["executed_steps"]) == (4, 5)


def test_a_completed_job_counts_all_its_steps_though_a_node_took_its_records_along(story: Story) -> None:
    told = story.recorder
    first, last = told.state.jobs["main"].placements
    for place in (first, last):
        story.hear(place.node, resumed(place.rank, 2, 3, "live"))
    story.hear(first.node, steps(first.rank, [record(4), record(5)], generation=2))
    story.see(events.LinkLost(time=1.0, node=last.node, epoch=1))
    story.hear(first.node, exited(first.rank, 2, "completed", 5, node=first.node))
    assert told.state.jobs["main"].status == "RUNNING"
    told.state.jobs["main"].finish_due = 1.0
    story.see(events.Tick(time=1.0))
    document = story.store_all().run()
    assert (document["status"], document["committed_steps"]) == ("COMPLETED", 5)


@pytest.mark.parametrize(
    ("under_way", "resumed_step", "again"),
    [({1: 25}, 24, 1), ({1: 25}, 20, 5), ({}, 24, 0), ({1: 25}, None, 0), ({1: 24}, 24, 0), ({1: 3}, 24, 0)],
)
def test_steps_executed_again(under_way: dict[int, int], resumed_step: int | None, again: int) -> None:
    generations = [
        {"generation": 1, "last_step": 24, "resumed_step": 0},
        {"generation": 2, "last_step": 40, "resumed_step": resumed_step},
    ]
    assert rundocument.executed_again(generations, under_way) == again


def test_unknown_ids(any_store: Store) -> None:
    queries = Queries(any_store)
    assert queries.newest_job() is None
    assert queries.status()["job"] is None
    for kind, wanted in (("job", ""), ("steps", "x"), ("incident", "inc-1"), ("run", ""), ("nonsense", "")):
        with pytest.raises(UnknownIdError):
            queries.read(kind, wanted)


def test_state_comes_back_from_events(story: Story) -> None:
    finish(story)
    state, seq = load_state(story.store)
    assert state == story.recorder.state
    assert seq == story.recorder.seq


def test_replay_finds_the_very_actions(story: Story) -> None:
    finish(story)
    outcome = replay(story.store)
    assert outcome.difference is None
    assert outcome.events == story.recorder.seq
    assert outcome.actions > 6


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("UPDATE actions SET body = replace(body, 'rank 0', 'rank 9') WHERE type = 'StartGeneration'", "reason"),
        ("DELETE FROM actions WHERE type = 'EndJob'", "0 actions are stored"),
        ("UPDATE events SET recorded = recorded + 100 WHERE type = 'WorkerReady'", "deadline"),
    ],
)
def test_replay_finds_what_was_tampered_with(story: Story, change: str, said: str) -> None:
    finish(story)
    with story.store.engine.begin() as connection:
        assert connection.execute(text(change)).rowcount
    outcome = replay(story.store)
    assert outcome.difference is not None
    assert said in outcome.difference


def test_revoked_checkpoints_lend_no_digest(story: Story) -> None:
    queries = finish(story)
    with story.store.engine.begin() as connection:
        connection.execute(text("UPDATE checkpoints SET trust = 'revoked'"))
    assert queries.run()["state_digest"] == "d5"


@pytest.mark.parametrize(("generation", "trust"), [(2, "verified"), (3, "revoked")])
def test_a_late_refusal_is_not_of_what_its_generation_wrote_itself(story: Story, generation: int, trust: str) -> None:
    """A generation refuses what it finds at its start. The one in the story wrote the step itself."""
    end(story)
    refused = events.ShardRefused(
        time=1.0,
        job="main",
        generation=generation,
        step=5,
        path="step-00000005",
        shard="state",
        expected="a",
        found="b",
        reason="",
    )
    story.hear("n0", refused)
    assert [entry["trust"] for entry in story.store_all().run()["checkpoints"]] == [trust]


def judged(story: Story, verdict: str, node: str, step: int, widened: int = 0) -> events.ReplayResult:
    """What a gate says of a step of `node`, in the generation that runs."""
    job = story.recorder.state.jobs["main"]
    rank = next(place.rank for place in job.placements if place.node == node)
    place = job.placed(rank)
    assert place is not None
    return events.ReplayResult(
        time=1.0,
        node=node,
        job="main",
        generation=job.generation,
        step=step,
        rank=rank,
        votes=(),
        verdict=verdict,
        blamed_node=node if verdict == "CORRUPT" else "",
        blamed_device=place.device if verdict == "CORRUPT" else "",
        recurrent=False,
        reason="told so",
        action_id="",
        widened=widened,
    )


def test_a_nodes_devices_are_doubted_as_they_stand_now(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is stored at a verdict fades until it is read, though nothing is written meanwhile."""
    story.see(judged(story, "CORRUPT", "n0", 6))
    story.see(judged(story, "FALSE_ALARM", "n0", 7))  # changes nothing of the node itself, and shows all the same
    now = story.recorder.now()
    queries = story.store_all()

    def shown(later: float) -> dict[str, object]:
        monkeypatch.setattr("controller.store.queries.time.time", lambda: now + later)
        nodes = {node["node"]: node["suspicion"] for node in queries.status()["nodes"]}
        assert all(entry["mean"] == 0.05 and entry["last_at"] is None for entry in nodes["n2"])
        (entry,) = nodes["n0"]
        return dict(entry)

    at_once, faded = shown(0.0), shown(7 * 86400.0)
    assert (at_once["mean"], at_once["evidence"]) == (0.136, 1.0)
    assert (faded["mean"], faded["evidence"]) == (0.095, 0.5)
    assert (faded["faults"], faded["undecided"], faded["false_alarms"]) == (1, 0, 1)
    assert faded["last_at"] == pytest.approx(now)


def test_verdicts_and_widened_tolerances_are_counted_once(story: Story) -> None:
    for _ in range(2):  # every rank's word on a judged gate
        story.see(judged(story, "FALSE_ALARM", "n0", 6, widened=2))
    story.see(judged(story, "CORRUPT", "n0", 7))
    told = story.recorder._metrics.text().decode()
    assert 'assay_verdicts_total{verdict="FALSE_ALARM"} 1.0' in told
    assert 'assay_verdicts_total{verdict="CORRUPT"} 1.0' in told
    assert "assay_tolerances_widened_total 2.0" in told
    notes = [note["text"] for note in story.store_all().incidents()["incidents"][-2]["timeline"]]
    assert "recalibrated: 2 tolerances widened or checks muted on rank 0" in notes
