"""Following a job: each thing is said once, and the end ends it."""

from controller.cli.follow import Display, describe, follow, last_loss, news


class Script:
    """Answers like Queries, one job document after the other."""

    def __init__(self, jobs: list[dict], incidents: list[dict]) -> None:
        self._jobs = iter(jobs)
        self._incidents = incidents

    def job(self, job: str) -> dict:
        return next(self._jobs)

    def incidents(self, job: str) -> dict:
        return {"incidents": self._incidents}


INCIDENT = {
    "id": "inc-1",
    "kind": "sdc",
    "node": "n1",
    "detected_step": 12,
    "verdict": "CORRUPT",
    "recovery_s": 0.25,
    "resumed_from": "live",
}


def test_says_everything_once_and_stops_at_the_end(capsys, monkeypatch) -> None:
    monkeypatch.setattr("controller.cli.follow.POLL_S", 0.0)
    running = {"status": "RUNNING", "generation": 1, "committed_steps": 3, "loss": [[3, 4.25]]}
    looks: list[int] = []
    with Display(40) as display:
        last = follow(
            Script([running, running, {**running, "status": "COMPLETED"}], [INCIDENT]),  # type: ignore[arg-type]
            "job-1",
            display,
            lambda: looks.append(1),
        )
    assert last["status"] == "COMPLETED"
    assert len(looks) == 3
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "training, generation 1 step 3/40 loss 4.2500",
        "incident inc-1: sdc on n1, step 12",
        "incident inc-1: sdc on n1: CORRUPT",
        "incident inc-1: sdc on n1: recovered after 250 ms from live",
        "completed step 3/40 loss 4.2500",
    ]


def test_says_once_whose_sensors_fail_and_again_when_there_is_another_reason(capsys, monkeypatch) -> None:
    monkeypatch.setattr("controller.cli.follow.POLL_S", 0.0)
    running = {"status": "RUNNING", "generation": 1, "committed_steps": 3, "loss": []}
    first = {"rank": 1, "device": "cpu-1", "text": "sensors of cpu-1 fail: one", "reasons": ["one"]}
    later = {**first, "text": "sensors of cpu-1 fail: one; two", "reasons": ["one", "two"]}
    ill, worse = ({**running, "lost_coverage": [entry]} for entry in (first, later))
    with Display(40) as display:
        script = Script([running, ill, ill, worse, {**worse, "status": "COMPLETED"}], [])
        follow(script, "job-1", display, lambda: None)  # type: ignore[arg-type]
    said = capsys.readouterr().err.splitlines()
    assert said == ["training, generation 1 step 3/40", first["text"], later["text"], "completed step 3/40"]


def test_an_open_incident_is_not_called_recovered() -> None:
    assert [key for key, _ in news({**INCIDENT, "recovery_s": None, "verdict": None})] == ["detected"]


def test_describes_each_state() -> None:
    assert describe({"status": "PENDING"}) == "starting Ray and workers"
    assert describe({"status": "RESTARTING"}) == "restarting"
    assert last_loss({"loss": []}) == ""
