"""Faults between ranks: nothing that was summed, exchanged or updated wrongly is committed, and they leave no trace."""

from pathlib import Path
from typing import Any

import pytest
from garble import Garble, Overflow
from ranks import SPEC, train

from agent.model import PRESETS, V3
from agent.model.parallel import Echo, ExpertParallel
from agent.training.optimizer import CHUNK
from agent.training.shards import ShardLayout
from agent.training.spec import Mesh
from diagnostics.sensors.digest import chain
from diagnostics.sensors.optimizer import drawn

Reports = list[list[dict[str, Any]]]
WHOLE = {"world": 3, "steps": 5, "checkpoint_every": 5}
MESH = {"world": 4, "steps": 15, "checkpoint_every": 15, "mesh": {"dp": 4, "ep": 2}}
PAIR = {"world": 2, "steps": 2, "checkpoint_every": 2, "sensors": False}
BARE: dict[str, dict[str, Any]] = {"whole": {}, "mesh": {"mesh": {"dp": 2, "ep": 2}}}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("between")


def end(reports: Reports) -> str:
    ends = {(r[-1]["digest"], r[-1]["chain"]) for r in reports if r[-1]["report"] == "end"}
    assert len(ends) == 1, reports
    return "/".join(ends.pop())


def kinds(reports: Reports, kind: str) -> list[dict[str, Any]]:
    return [entry for rank in reports for entry in rank if entry["report"] == kind]


@pytest.fixture(scope="module")
def whole(home: Path) -> str:
    """Undisturbed, and without sensors, which change no bit."""
    codes, reports = train(home / "whole", **WHOLE, sensors=False)
    assert codes == [0, 0, 0]
    return end(reports)


@pytest.fixture(scope="module")
def mesh(home: Path) -> str:
    codes, reports = train(home / "mesh", timeout=400, **MESH, sensors=False)
    assert codes == [0, 0, 0, 0]
    return end(reports)


#: What becomes of a sum on its way, with whom it is blamed on; tests/agent/training/test_summing.py has the other ways.
#: A step of `tiny` trades pieces to be added twice, then the sums.
OF_SUMS = [
    (Garble("trade", 1, 2, bit=0), "", "a piece changed on its way from n0 to n1"),
    (Garble("give", 2, 3, before=True, bit=0), "n2", "what n2 sent does not hash as it did"),
    (Garble("add", 0, 4, call=1, bit=0), "n0", "what n0 added up is not the sum when it adds again"),
    (Garble("trade", 1, 5, call=2, bit=0), "n1", "n1 alone does not hold the sum that its owner made"),
]


def test_wrong_sums_are_held_and_leave_no_trace(home: Path, whole: str) -> None:
    codes, reports = train(home / "sums", garbles=[garble for garble, *_ in OF_SUMS], **WHOLE)
    assert (codes, end(reports)) == ([0, 0, 0], whole)
    assert len(kinds(reports, "garbled")) == len(OF_SUMS)
    rulings = sorted(kinds(reports, "replay_result"), key=lambda ruling: ruling["step"])
    assert [(r["step"], r["blamed_node"]) for r in rulings] == [(garble.step, blamed) for garble, blamed, _ in OF_SUMS]
    for ruling, (_, blamed, reason) in zip(rulings, OF_SUMS, strict=True):
        assert ruling["verdict"] == ("CORRUPT" if blamed else "UNDECIDED")
        assert reason in ruling["reason"]
        assert "in the reduction" in ruling["reason"]
        assert not ruling["recurrent"]
    alarms = [entry for entry in kinds(reports, "gate_alarm") for _ in entry["alarms"]]
    assert {entry["step"] for entry in alarms} == {garble.step for garble, *_ in OF_SUMS}
    assert {alarm["sensor"] for entry in alarms for alarm in entry["alarms"]} == {"reduction"}
    assert {e["attempts"] for e in kinds(reports, "step") if e["step"] > 1} == {2}
    assert not kinds(reports, "digest_disagreement")


def test_who_alarms_falsely_is_not_blamed_for_a_sum_that_another_spoilt(home: Path, whole: str) -> None:
    """No replay makes the sum again, so that its alarm is not there again says nothing of the rank that has it."""
    garbles = [Garble("trade", 1, 1, bit=0)]
    codes, reports = train(home / "beside", garbles=garbles, tolerance_scale=0.001, **WHOLE)
    assert (codes, end(reports)) == ([0, 0, 0], whole)
    assert len(kinds(reports, "garbled")) == 1
    assert {entry["rank"] for entry in kinds(reports, "gate_alarm") if entry["step"] == 1} >= {1}
    assert {ruling["verdict"] for ruling in kinds(reports, "replay_result")} == {"FALSE_ALARM"}


OVERFLOWED: list[tuple[bool, dict[str, Any]]] = [
    (True, {}),
    (False, {}),
    (True, {"sensors": False}),
    (False, {"sensors": False}),
]


@pytest.mark.parametrize(("once", "how"), OVERFLOWED)
def test_a_sum_that_is_not_finite_though_no_rank_alarmed_is_the_softwares_if_its_redo_is_not_either(
    home: Path, whole: str, once: bool, how: dict[str, Any]
) -> None:
    """No tolerance was too tight, for there was no alarm; and no device is to blame for what all of them make."""
    folder = home / f"overflow-{once}-{len(how)}"
    codes, reports = train(folder, garbles=[Overflow(3, once)], **WHOLE, **how)
    verdicts = [(r["attempt"], r["verdict"]) for r in kinds(reports, "replay_result")]
    first, last = [(1, "UNDECIDED")] * 3, [(2, "SOFTWARE")] * 3
    assert sorted(verdicts) == (first if once else first + last)
    assert {"sum over ranks is not finite" in r["reason"] for r in kinds(reports, "replay_result")} == {True}
    assert not any(r["widened"] for r in kinds(reports, "replay_result"))
    if once:
        assert (codes, end(reports)) == ([0, 0, 0], whole)
    else:
        assert codes == [4, 4, 4]
        assert all("StepRefused: step 3: every device computes the same" in rank[-1]["error"] for rank in reports)


def test_a_loss_that_was_finite_again_is_its_own_devices_though_nothing_alarmed(home: Path) -> None:
    """What the sum was made of is overwritten, but not the loss: without sensors the gate holds the step too."""
    codes, reports = train(home / "overflow-loss", garbles=[Overflow(2, once=True, loss=True)], **PAIR)
    assert codes == [0, 0]
    found = {r["rank"]: (r["verdict"], r["blamed_node"], r["recurrent"]) for r in kinds(reports, "replay_result")}
    assert found == {0: ("CORRUPT", "n0", False), 1: ("UNDECIDED", "", False)}


def test_a_wrong_update_is_held_and_the_majority_says_whose(home: Path, whole: str) -> None:
    """An element of a parameter, by one low bit, on one of three ranks."""
    garbles = [Garble("adamw", 2, 2, call=3, element=77, bit=3), Garble("adamw", 0, 4, element=9, bit=0)]
    codes, reports = train(home / "updates", garbles=garbles, **WHOLE)
    assert (codes, end(reports)) == ([0, 0, 0], whole)
    assert len(kinds(reports, "garbled")) == 2
    rulings = sorted(kinds(reports, "replay_result"), key=lambda ruling: ruling["step"])
    found = [(r["step"], r["verdict"], r["blamed_node"], r["recurrent"]) for r in rulings]
    assert found == [(2, "CORRUPT", "n2", False), (4, "CORRUPT", "n0", False)]
    assert "3 of 3 devices make another update than n2: did not reproduce" in rulings[0]["reason"]
    alarms = [alarm["sensor"] for entry in kinds(reports, "gate_alarm") for alarm in entry["alarms"]]
    assert alarms == ["optimizer", "optimizer"]
    assert not kinds(reports, "digest_disagreement")


def in_the_drawn_block(step: int, rank: int) -> Garble:
    """One bit of one parameter, as the optimizer makes it, where the step's block lies."""
    layout = ShardLayout(
        V3(PRESETS["tiny"].config, parallel=ExpertParallel(rank % 2, Echo(2), Echo(1))), Mesh(4, 2), rank
    )
    sizes = [piece.stop - piece.start for piece in layout.pieces]
    block = drawn(chain(SPEC["seed"], step, 1), rank, sizes)
    before = sum(-(-size // CHUNK) for size in sizes[: block.piece])
    call, element = before + block.start // CHUNK, block.start % CHUNK + 77
    return Garble("adamw", rank, step, call=call, element=element, bit=3)


def test_what_holds_a_step_on_a_mesh(home: Path, mesh: str) -> None:
    """A piece that is summed; a gradient's row on its way, by one bit of its mantissa; a token lost; one misdirected; a
    copy of the parameters; a replica; a gradient lent for the repetition; an element of an owner's update; a count of
    rows; a number that is none of an expert; a token that its own rank sends to another expert, and one to none; a
    slice of the sum, after it was checked, and one after the gate."""
    garbles = [
        Garble("trade", 2, 2, bit=0),
        Garble("exchange", 3, 3, call=14, bit=1),
        Garble("exchange", 1, 4, call=1, how="lose"),
        Garble("exchange", 0, 5, call=3, how="off"),
        Garble("all_gather", 2, 6),
        Garble("exchange", 2, 10, call=0, how="off", element=1),
        Garble("exchange", 2, 11, call=3, element=6),
        Garble("dispatch", 1, 12, how="other", before=True),
        Garble("dispatch", 3, 13, call=2, how="none", before=True),
        Garble("shift", 1, 7, call=1),
        Garble("shift", 0, 8),
        in_the_drawn_block(9, 3),
        Garble("slice at rest", 1, 14, before=True, bit=0),
        Garble("slice in use", 2, 15, before=True, bit=0),
    ]
    codes, reports = train(home / "held", garbles=garbles, timeout=400, **MESH)
    assert (codes, end(reports)) == ([0, 0, 0, 0], mesh)
    assert len(kinds(reports, "garbled")) == 14
    rulings = sorted(kinds(reports, "replay_result"), key=lambda ruling: ruling["step"])
    assert [(r["step"], r["rank"]) for r in rulings] == [
        (2, 2),
        (3, 3),
        (4, 1),
        (5, 0),
        (6, 2),
        (7, 1),
        (8, 0),
        (9, 3),
        (10, 2),
        (11, 2),
        (12, 1),
        (13, 3),
        (14, 1),
        (15, 2),
    ]
    assert all(r["verdict"] in ("UNDECIDED", "CORRUPT") for r in rulings)
    assert "in the reduction: a piece changed on its way from n0 to n2" in rulings[0]["reason"]
    assert "in the reduction: the part of the sum that n1 made changed in its memory" in rulings[12]["reason"]
    assert all("a piece changed on its way" in ruling["reason"] for ruling in (*rulings[1:4], *rulings[8:10]))
    assert [(r["verdict"], r["blamed_node"]) for r in rulings[4:8]] == [
        ("CORRUPT", "n2"),
        ("UNDECIDED", ""),
        ("UNDECIDED", ""),
        ("CORRUPT", "n3"),
    ]
    assert "3 of 4" in rulings[7]["reason"] or "4 of 4" in rulings[7]["reason"]
    assert [(r["verdict"], r["blamed_node"]) for r in rulings[10:]] == [
        ("CORRUPT", "n1"),
        ("CORRUPT", "n3"),
        ("CORRUPT", "n1"),
        ("CORRUPT", "n2"),
    ]
    assert "in memory: the sum of n2" in rulings[13]["reason"]
    assert "tokens went astray" in rulings[10]["reason"]
    assert not kinds(reports, "digest_disagreement")
    alarms = {alarm["step"]: alarm["alarms"][0] for alarm in kinds(reports, "gate_alarm") if alarm["alarms"]}
    assert [alarms[step]["sensor"] for step in (2, 3, 4, 5)] == ["reduction", "exchange", "exchange", "exchange"]
    assert alarms[4]["module"] == "exchange 1"
    assert alarms[4]["location"] in ("from rank 0 to rank 1", "from rank 1 to rank 1")


@pytest.fixture(scope="module")
def bare(home: Path) -> dict[str, str]:
    """Two steps without sensors, of whole copies and of two ranks on a mesh."""
    return {kind: end(train(home / f"bare-{kind}", **PAIR, **changes)[1]) for kind, changes in BARE.items()}


@pytest.mark.parametrize(
    ("kind", "garble"),
    [
        ("whole", Garble("give", 1, 2, before=True)),
        ("mesh", Garble("trade", 1, 2)),
        ("mesh", Garble("exchange", 1, 2, call=1, how="lose")),
        ("mesh", Garble("adamw", 0, 2, bit=3)),
        ("mesh", Garble("dispatch", 0, 2, how="other", before=True)),
    ],
)
def test_without_the_checks_they_are_committed(home: Path, bare: dict[str, str], kind: str, garble: Garble) -> None:
    """The negative control."""
    _, reports = train(home / f"unchecked-{kind}-{garble.what}", garbles=[garble], **PAIR, **BARE[kind])
    assert kinds(reports, "garbled")
    assert not kinds(reports, "digest_disagreement")
    assert end(reports) != bare[kind]
