"""A small campaign without Ray: the record says what happened, and without sensors nothing is seen."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.campaign.bench import Bench
from benchmarks.campaign.draw import AROUND, IN_STEP, Coordinates
from benchmarks.campaign.report import by_identity
from benchmarks.campaign.trial import HARMFUL, Trials, _Trial
from diagnostics.faults.models import Fault

FAULTS = 14


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Trials:
    return Trials(Bench("fp32", 3, (0,), tmp_path_factory.mktemp("corpus")), seed=3)


@pytest.fixture(scope="module")
def lines(trials: Trials) -> list[dict[str, Any]]:
    return [trials.run(index, 0) for index in range(FAULTS)]


def of(trials: Trials, operation: str, fault: Fault, **fields: Any) -> dict[str, Any]:
    """The outcome of a fault that is chosen rather than drawn, at the operation's first operator."""
    site = next(iter(trials.drawings[0].sites.get(operation, ())), None)
    drawn = Coordinates(0, "fp32", 0, operation, fault.model, fault, fields.pop("recurrent", False), site, **fields)
    return _Trial(trials.bench, trials.bench.points[0], drawn).outcome()


def test_every_operation_has_operators(trials: Trials) -> None:
    operations = set(trials.drawings[0].operations)
    assert operations == {*IN_STEP, *AROUND} - {"quantisation"}  # that one is FP8's
    products = {pass_: len(trials.drawings[0].sites[pass_]) for pass_ in ("fprop", "dgrad", "wgrad")}
    assert len(set(products.values())) == 1  # every product has both gradients


def test_a_campaign_keeps_what_it_says(lines: list[dict[str, Any]]) -> None:
    for line in lines:
        assert not (line["masked"] and line["harmful"])
        assert line["harmful"] == (line["excess"] > HARMFUL)
        assert line["caught"] >= line["before_commit"]
        assert bool(line["by"]) == line["caught"]
        assert line["changed"] >= 0
        if line["masked"]:
            assert line["excess"] == 0
        assert line["harms_state"] >= line["harmful"]
        if line.get("verdict") == "CORRUPT":
            assert line["blamed"] == "n0"
            by_votes = line["by"] not in ("reduction", "states")
            stays = line["recurrent"] or line["operation"] == "state at rest"
            assert line["replays"] == (0 if not by_votes else 3 if stays else 2)
    assert any(line["caught"] for line in lines)
    assert any(line["harmful"] for line in lines)


def test_the_same_number_is_the_same_fault(trials: Trials, lines: list[dict[str, Any]]) -> None:
    again = [trials.run(index, 0) for index in (5, 0)]
    assert again == [lines[5], lines[0]]


def test_without_sensors_nothing_in_a_step_is_seen(trials: Trials, lines: list[dict[str, Any]]) -> None:
    """The control. What ends the step, or makes the norm or a rank's state differ, is seen without them."""
    trials.bench.guard.enabled = False
    try:
        blind = [trials.run(index, 0) for index in range(FAULTS)]
    finally:
        trials.bench.guard.enabled = True
    assert {line["by"] for line in blind} <= {"", "error", "gate", "digest"}
    assert [line["excess"] for line in blind] == [line["excess"] for line in lines]  # sensors change no number
    sensed = [index for index, line in enumerate(lines) if line["sensors"]]
    assert sensed
    assert not any(blind[index]["sensors"] for index in sensed)


def test_a_fault_leaves_nothing_behind(trials: Trials) -> None:
    point = trials.bench.points[0]
    of(trials, "state at rest", Fault("bitflip", 4, bit=25), part="parameters")
    of(trials, "fprop", Fault("tile", 4, 10.0))
    for ordinal in range(4):
        of(trials, "saved activation", Fault("bitflip", 4, bit=29), ordinal=251 * ordinal)
    computed = trials.bench.compute(point.start, 0)
    assert computed.digest == point.gradients
    summed = trials.bench.reduced(point.start, computed.gradients)
    assert trials.bench.commit(point.start, summed, computed.counts) == point.clean_digest
    assert trials.bench.masked(point)
    assert [excess.ratio for excess in trials.bench.excess(point)] == [0.0, 0.0]


def test_a_wrong_tile_of_a_product_is_caught_and_blamed(trials: Trials) -> None:
    for operation in ("fprop", "dgrad", "wgrad"):
        line = of(trials, operation, Fault("tile", 1, 3.0))
        assert (line["harmful"], line["by"], line["before_commit"]) == (True, "gemm", True)
        assert line["above"]
        assert line["deviation"] > line["floor"] > 0
        assert (line["verdict"], line["blamed"], line["replays"]) == ("CORRUPT", "n0", 2)


def test_a_fault_that_comes_back_takes_a_third_vote(trials: Trials) -> None:
    line = of(trials, "fprop", Fault("tile", 1, 3.0), recurrent=True)
    assert (line["verdict"], line["blamed"], line["replays"]) == ("CORRUPT", "n0", 3)


def test_below_the_floor_is_below(trials: Trials) -> None:
    line = of(trials, "fprop", Fault("bitflip", 1, bit=0))
    assert line["above"] is False
    assert line["deviation"] < line["floor"]
    assert line["sensors"] == ["recompute"]
    assert not by_identity(line)
    trials.bench.guard.again = 0.0
    try:
        assert not of(trials, "fprop", Fault("bitflip", 1, bit=0))["caught"]
    finally:
        trials.bench.guard.again = 1.0


@pytest.mark.parametrize("recurrent", [False, True])
def test_a_wrong_update_is_seen_before_it_is_committed(trials: Trials, recurrent: bool) -> None:
    line = of(trials, "optimizer", Fault("bitflip", 1, bit=29), recurrent=recurrent)
    assert (line["by"], line["before_commit"], line["caught"]) == ("states", True, True)
    assert (line["verdict"], line["blamed"], line["replays"]) == ("CORRUPT", "n0", 0)
    assert not line["auditable"]  # its gradients were right
    assert (line["floor"], line["above"], line["sensors"]) == (0.0, True, [])  # whole copies are compared


def test_memory_that_changed_is_blamed_before_the_commit(trials: Trials) -> None:
    line = of(trials, "state at rest", Fault("bitflip", 4, bit=20), part="parameters")
    assert (line["by"], line["before_commit"], line["blamed"]) == ("states", True, "n0")


def test_memory_that_changed_is_still_wrong_when_the_step_is_replayed(trials: Trials) -> None:
    """Where the sensors see it, since products overflow; whether the fault would come back is nothing to it."""
    flips = (of(trials, "state at rest", Fault("bitflip", seed, bit=30), part="parameters") for seed in range(40))
    line = next(line for line in flips if line["sensors"])
    assert (line["verdict"], line["blamed"], line["replays"]) == ("CORRUPT", "n0", 3)


def test_without_sensors_states_are_seen_to_differ_at_the_next_gate(trials: Trials) -> None:
    """The control."""
    trials.bench.guard.enabled = False
    try:
        late = of(trials, "optimizer", Fault("bitflip", 1, bit=29))
    finally:
        trials.bench.guard.enabled = True
    assert (late["by"], late["before_commit"], late["verdict"]) == ("digest", False, "ROLLED_BACK")


@pytest.mark.parametrize("operation", ["sent gradient", "reduced gradient"])
@pytest.mark.parametrize("fault", [Fault("value", 1, 100.0), Fault("bitflip", 1, bit=0)])
def test_what_strikes_a_sum_is_seen_whatever_it_changes_and_whichever_part(
    trials: Trials, operation: str, fault: Fault
) -> None:
    """The first spans are added up by the struck rank, the last by its peer."""
    last = len(trials.bench.layout.spans) - 1
    for ordinal in (0, last):
        line = of(trials, operation, fault, ordinal=ordinal)
        assert (line["by"], line["before_commit"]) == ("reduction", True)
        assert (line["verdict"], line["blamed"], line["replays"]) == ("CORRUPT", "n0", 0)


def test_without_sensors_a_wrong_payload_is_committed(trials: Trials) -> None:
    """The control: what was sent wrongly all ranks hold alike, and what one holds alone a digest shows too late."""
    trials.bench.guard.enabled = False
    try:
        sent = of(trials, "sent gradient", Fault("value", 1, 100.0))
        reduced = of(trials, "reduced gradient", Fault("value", 1, 100.0))
    finally:
        trials.bench.guard.enabled = True
    assert (sent["harmful"], sent["caught"]) == (True, False)
    assert (reduced["by"], reduced["before_commit"]) == ("digest", False)


def test_a_step_that_cannot_go_on_is_caught(trials: Trials) -> None:
    sort = next(site for site in trials.drawings[0].sites["dispatch"] if "sort" in site.operator)
    drawn = Coordinates(0, "fp32", 0, "dispatch", "bitflip", Fault("bitflip", 1, bit=60), False, sort, 1)
    line = _Trial(trials.bench, trials.bench.points[0], drawn).outcome()
    assert (line["caught"], "verdict" in line) == (True, False)
    assert (line["stopped"], line["harmful"]) == (True, False)  # nothing is committed


def test_the_natural_floor_is_small_and_everywhere(trials: Trials) -> None:
    floors = trials.bench.points[0].floors
    used = trials.bench.points[0].norms > 0
    assert bool((floors[used] > 0).all())
    assert 1e-8 < float(floors[used].median()) < 1e-5
