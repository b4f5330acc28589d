"""A generation of real ranks: what is committed, what is redone, and that faults leave no trace in the bits."""

from pathlib import Path
from typing import Any

import pytest
from ranks import flip_state, train

from agent.drills import damage_newest

Reports = list[list[dict[str, Any]]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def clean(home: Path) -> str:
    """The digest and chain of six undisturbed steps."""
    codes, reports = train(home / "clean")
    assert codes == [0, 0]
    return end(reports)


def end(reports: Reports) -> str:
    ends = {(r[-1]["digest"], r[-1]["chain"]) for r in reports if r[-1]["report"] == "end"}
    assert len(ends) == 1, reports
    return "/".join(ends.pop())


def kinds(reports: Reports, kind: str) -> list[dict[str, Any]]:
    return [entry for rank in reports for entry in rank if entry["report"] == kind]


def sdc(step: int = 3, rank: int = 1, **params: str) -> list[dict[str, Any]]:
    return [{"id": "drill-1", "kind": "sdc", "step": step, "rank": rank, "params": params}]


def test_the_same_seed_gives_the_same_bits_and_another_does_not(home: Path, clean: str) -> None:
    codes, again = train(home / "again")
    assert (codes, end(again)) == ([0, 0], clean)
    _, other = train(home / "other", seed=8)
    assert end(other) != clean


@pytest.mark.parametrize(
    ("rank", "params"),
    [
        (0, {"op": "fprop", "bit": "20"}),
        (1, {"op": "dgrad", "fault": "tile", "layer": "2"}),
        (1, {"op": "wgrad", "fault": "stuck", "layer": "1"}),
    ],
)
def test_a_transient_corruption_is_caught_before_it_commits(
    home: Path, clean: str, rank: int, params: dict[str, str]
) -> None:
    codes, reports = train(home / f"sdc-{rank}-{params['op']}", drills=sdc(rank=rank, **params))
    assert codes == [0, 0]
    assert end(reports) == clean
    (ruling,) = kinds(reports, "replay_result")
    assert (ruling["verdict"], ruling["blamed_node"], ruling["recurrent"]) == ("CORRUPT", f"n{rank}", False)
    assert (ruling["attempt"], ruling["first_attempt"], ruling["widened"]) == (1, 1, 0)
    assert {vote["node"] for vote in ruling["votes"]} == {"n0", "n1"}
    assert [entry["attempts"] for entry in kinds(reports, "step") if entry["step"] == 3] == [2, 2]
    spans = [(s["name"], s["traceparent"].partition("/")[0]) for s in kinds(reports, "span")]
    assert {name for name, _ in spans} == {"resume", "first_step", "alarm", "replay", "verdict", "redo"}
    assert len({trace for name, trace in spans if name in ("alarm", "replay", "verdict", "redo")}) == 1


def test_without_sensors_the_same_corruption_commits(home: Path, clean: str) -> None:
    """The negative control."""
    codes, reports = train(home / "unguarded", drills=sdc(), sensors=False)
    assert codes == [0, 0]
    assert kinds(reports, "drill_fired")
    assert not kinds(reports, "gate_alarm")
    assert end(reports) != clean


def test_sensors_change_no_bit(home: Path, clean: str) -> None:
    _, reports = train(home / "sensors-off", sensors=False)
    assert end(reports) == clean


def test_a_tight_tolerance_is_found_false_and_changes_no_bit(home: Path, clean: str) -> None:
    codes, reports = train(home / "tight", tolerance_scale=0.001)
    assert (codes, end(reports)) == ([0, 0], clean)
    rulings = kinds(reports, "replay_result")
    assert {r["verdict"] for r in rulings} == {"FALSE_ALARM"}
    assert rulings[0]["widened"] > 0


@pytest.mark.parametrize("phase", ["forward", "reduce", "gate", "commit", "capture"])
def test_killed_in_any_phase_the_next_generation_ends_in_the_same_bits(home: Path, clean: str, phase: str) -> None:
    folder = home / f"kill-{phase}"
    drill = [{"id": "k", "kind": "kill", "step": 4, "rank": 0, "params": {"phase": phase}}]
    codes, first = train(folder, drills=drill)
    assert codes == [-9, 4]
    assert "PeerLost" in first[1][-1]["error"]
    codes, second = train(folder, generation=2, drills=drill)
    assert (codes, end(second)) == ([0, 0], clean)
    resumed = kinds(second, "resumed")
    assert {entry["source"] for entry in resumed} == {"live"}
    assert {entry["step"] for entry in resumed} <= {3, 4}
    assert not kinds(second, "digest_disagreement")  # a slot that was being written says nothing of its memory


def test_memory_that_changed_while_nobody_trained_is_replaced_from_the_peer(home: Path, clean: str) -> None:
    folder = home / "flipped-between"
    train(folder, steps=3)
    flip_state(folder / "n1" / "job.slots")
    codes, reports = train(folder, generation=2)
    assert (codes, end(reports)) == ([0, 0], clean)
    assert [entry["source"] for entry in kinds(reports, "resumed")] == ["live", "replica"]
    (found,) = kinds(reports, "digest_disagreement")
    assert (found["step"], found["blamed_rank"], found["generation"], found["times"]) == (3, 1, 2, 1)
    assert "in memory: the state of n1 hashes to" in found["reason"]


@pytest.mark.parametrize("phase", ["forward", "reduce", "commit"])
def test_memory_that_changes_in_a_step_is_blamed_and_replaced_before_the_commit(
    home: Path, clean: str, phase: str
) -> None:
    """The state of a rank changes before it is used, or between its use and the update."""
    codes, reports = train(home / f"flipped-{phase}", flip=(1, 3, phase))
    assert (codes, end(reports)) == ([0, 0], clean)
    (ruling,) = kinds(reports, "replay_result")
    assert (ruling["step"], ruling["verdict"], ruling["blamed_node"]) == (3, "CORRUPT", "n1")
    assert "the state of n1 hashes to" in ruling["reason"]
    assert [alarm["sensor"] for entry in kinds(reports, "gate_alarm") for alarm in entry["alarms"]] == ["at rest"]
    assert not kinds(reports, "digest_disagreement")


@pytest.mark.parametrize("sensors", [True, False])
def test_memory_that_a_checkpoints_copy_shows_to_have_changed_is_one_incident_and_captured_anew(
    home: Path, clean: str, sensors: bool
) -> None:
    """Of a state that each rank has, no gate looks at the memory for nothing; nor is the step after held."""
    codes, reports = train(home / f"flipped-capture-{sensors}", flip=(0, 3, "capture"), sensors=sensors)
    assert (codes, end(reports)) == ([0, 0], clean)
    (found,) = kinds(reports, "digest_disagreement")
    assert (found["step"], found["blamed_rank"]) == (3, 0)
    assert "in memory: the state of n0 hashes to" in found["reason"]
    assert not kinds(reports, "shard_refused") + kinds(reports, "gate_alarm")
    (finding,) = kinds(reports, "finding_raised")
    assert "checkpoint of step 3 was not written: its copy hashes to" in finding["detail"]
    assert [entry["step"] for entry in kinds(reports, "checkpoint_durable")] == [3, 6]


def test_without_sensors_the_next_gate_sees_it_and_goes_back(home: Path) -> None:
    """The negative control: one step late, committed already."""
    codes, reports = train(home / "flipped-unguarded", flip=(1, 3, "forward"), sensors=False)
    (found,) = kinds(reports, "digest_disagreement")
    assert (codes, found["step"], found["blamed_rank"], found["times"]) == ([0, 0], 3, 1, 1)
    redone = {(span["step"], span["attempt"]) for span in kinds(reports, "span") if span["name"] == "redo"}
    assert redone == {(3, 2)}  # verdicts and evidence go by the attempt: none is taken twice
    assert not kinds(reports, "replay_result")


def test_memory_that_changed_right_after_a_restart_is_blamed_though_there_is_no_state_to_go_back_to(home: Path) -> None:
    """A restart keeps one state, and a job of one rank has no other copy of it."""
    folder = home / "flipped-alone"
    train(folder, world=1, steps=3)
    codes, reports = train(folder, world=1, generation=2, flip=(0, 4, "forward"))
    assert codes == [4]
    assert "StateLost" in reports[0][-1]["error"]
    (found,) = kinds(reports, "digest_disagreement")
    assert (found["step"], found["blamed_rank"]) == (3, 0)
    assert "in memory: the state of n0 hashes to" in found["reason"]


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_serves(home: Path, clean: str) -> None:
    folder = home / "damaged"
    train(folder, steps=4, checkpoint_every=2)
    damage_newest(folder / "checkpoints" / "job")
    for rank in range(2):
        (folder / f"n{rank}" / "job.slots").unlink()
    codes, reports = train(folder, generation=2, checkpoint_every=2)
    assert (codes, end(reports)) == ([0, 0], clean)
    assert {entry["step"] for entry in kinds(reports, "shard_refused")} == {4}
    assert {(entry["source"], entry["step"]) for entry in kinds(reports, "resumed")} == {("checkpoint", 2)}


def test_an_older_generation_is_fenced_off(home: Path) -> None:
    folder = home / "fenced"
    train(folder, generation=5, steps=1)
    codes, reports = train(folder, generation=4, steps=1)
    assert codes[0] == 4
    assert "generation 5 owns" in reports[0][-1]["error"]


def test_a_persistent_corruption_waits_for_the_device_to_be_replaced(home: Path) -> None:
    codes, reports = train(home / "persistent", drills=sdc(persistent="1"))
    assert codes == [3, 3]
    (ruling,) = kinds(reports, "replay_result")
    assert (ruling["verdict"], ruling["blamed_node"], ruling["recurrent"]) == ("CORRUPT", "n1", True)
    assert max(entry["step"] for entry in kinds(reports, "step")) == 2


@pytest.fixture(scope="module")
def clean_fp8(home: Path) -> str:
    """The same six steps in FP8, and what the step records say of it."""
    codes, reports = train(home / "clean-fp8", precision="fp8")
    assert codes == [0, 0]
    assert not kinds(reports, "gate_alarm")
    for entry in kinds(reports, "step"):
        assert [(s["tensor"], s["pass"]) for s in entry["fp8"]] == [
            ("activation", "fprop"),
            ("weight", "fprop"),
            ("gradient", "dgrad"),
        ]
        assert all(s["amax"] > 0 and 0 <= s["underflow"] <= 1 and s["amax_module"] for s in entry["fp8"])
    return end(reports)


def test_fp8_is_another_computation_and_sensors_change_no_bit_of_it(home: Path, clean: str, clean_fp8: str) -> None:
    _, reports = train(home / "sensors-off-fp8", precision="fp8", sensors=False)
    assert end(reports) == clean_fp8 != clean


def test_corrupted_fp8_products_are_caught_before_they_commit(home: Path, clean_fp8: str) -> None:
    """One product of each pass, in a step of its own."""
    ops = {2: "fprop", 3: "dgrad", 4: "wgrad"}
    drills = [{**sdc(step, op=op, bit="20")[0], "id": f"drill-{op}"} for step, op in ops.items()]
    codes, reports = train(home / "sdc-fp8", drills=drills, precision="fp8")
    assert codes == [0, 0]
    assert end(reports) == clean_fp8
    alarms = {entry["step"]: entry["alarms"][0] for entry in kinds(reports, "gate_alarm")}
    assert {step: (alarm["operation"], alarm["pass"]) for step, alarm in alarms.items()} == {
        step: ("fp8", op) for step, op in ops.items()
    }
    rulings = kinds(reports, "replay_result")
    assert [(ruling["step"], ruling["verdict"], ruling["blamed_node"]) for ruling in rulings] == [
        (step, "CORRUPT", "n1") for step in ops
    ]


def test_without_sensors_the_same_fp8_corruption_commits(home: Path, clean_fp8: str) -> None:
    """The negative control."""
    codes, reports = train(home / "unguarded-fp8", drills=sdc(op="wgrad", bit="20"), precision="fp8", sensors=False)
    assert codes == [0, 0]
    assert kinds(reports, "drill_fired")
    assert end(reports) != clean_fp8


def test_fp8_goes_on_from_its_checkpoint_and_no_other_precision_does(home: Path, clean: str, clean_fp8: str) -> None:
    """bf16 moments come back from the files bit for bit; to an fp32 job they are refused, not misread."""
    folder = home / "checkpoint-fp8"
    train(folder, steps=3, precision="fp8")
    for generation, precision, ends, source in (
        (2, "fp8", clean_fp8, ("checkpoint", 3)),
        (3, "fp32", clean, ("init", 0)),
    ):
        for rank in range(2):
            (folder / f"n{rank}" / "job.slots").unlink()
        codes, reports = train(folder, generation=generation, precision=precision)
        assert (codes, end(reports)) == ([0, 0], ends)
        assert {(entry["source"], entry["step"]) for entry in kinds(reports, "resumed")} == {source}
    assert "precision 'fp32'" in kinds(reports, "shard_refused")[0]["expected"]
