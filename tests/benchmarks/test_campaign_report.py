"""Figures, comparison, picture and record of a campaign, from made-up lines."""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import sdc_campaign
from benchmarks._figures import Figure
from benchmarks.campaign.draw import BLOCK, PRECISIONS, placed
from benchmarks.campaign.intermittent import RATES, chance, curve_blocks, curve_figures, struck
from benchmarks.campaign.kept import append, collected, folder_for, lines_of, missing, path_of
from benchmarks.campaign.picture import picture
from benchmarks.campaign.report import figures, outside, table
from benchmarks.campaign.work import blocks_of


def line(index: int, **changes: Any) -> dict[str, Any]:
    made = {
        "index": index,
        "precision": "fp32",
        "operation": "fprop",
        "model": "bitflip",
        "deviation": 0.5,
        "floor": 0.1,
        "above": True,
    }
    made |= {
        "stopped": False,
        "masked": False,
        "harmful": True,
        "harms_state": True,
        "caught": True,
        "before_commit": True,
        "by": "gemm",
        "named": True,
    }
    made |= {
        "recurrent": False,
        "sensors": ["gemm"],
        "auditable": True,
        "verdict": "CORRUPT",
        "blamed": "n0",
        "replays": 2,
    }
    return made | changes


def values(lines: list[dict[str, Any]]) -> dict[str, Any]:
    return {figure.name: figure for figure in figures(lines, 0.1)}


def test_shares_are_of_what_they_say() -> None:
    missed = line(0, caught=False, before_commit=False, by="", named=None, above=None)
    late = line(1, before_commit=False, by="digest", named=None, verdict="ROLLED_BACK", blamed="")
    harmless = line(2, harmful=False)
    masked = line(3, masked=True, harmful=False, verdict="FALSE_ALARM", blamed="")
    stopped = line(10, stopped=True, harmful=False, by="error", named=None, verdict="", above=None)
    found = values([missed, late, harmless, masked, *(line(i) for i in range(4, 10)), stopped])
    assert found["stopped: torch refuses, or the process ends"].value == 1 / 11
    assert found["recall, harmful"].value == 7 / 8
    assert found["recall, unmasked"].value == 8 / 9
    assert found["recall, unmasked and above the floor"].value == 1.0
    assert found["caught before the commit, of harmful that were caught"].value == 6 / 7
    assert found["device found, of unmasked with a verdict"].value == 7 / 8
    assert found["recall, harmful, operation fprop, bf16"].value is None
    audit = found["audit's chance a step, of unmasked that no sensor saw, operation fprop"]
    assert (audit.value, audit.samples) == (0.1, 1)


def test_a_device_that_repeats_its_fault_is_not_found_by_repeating() -> None:
    by_recomputation = {"recurrent": True, "sensors": ["recompute"]}
    both = {"recurrent": True, "sensors": ["gemm", "recompute"]}
    found = values([line(0, **by_recomputation), line(1, **both), line(2, sensors=["recompute"]), line(3)])
    assert found["recall, harmful"].value == 1.0
    assert found["recall, harmful, recurrent faults not by recomputation alone"].value == 3 / 4
    assert found["recall, harmful, nothing drawn"].value == 2 / 4
    assert found["recall, unmasked and above an identity's floor, nothing drawn"].value == 2 / 4
    assert found["recall, harmful, 0.0625 drawn as in a job, expected"].value == (2 + 2 / 16) / 4
    moved = [{"sensors": ["moves"]}, {"sensors": ["moves", "recompute"]}, {"sensors": [], "by": "states"}]
    found = values([line(index, recurrent=True, **one) for index, one in enumerate(moved)])
    assert found["recall, harmful, recurrent faults not by recomputation alone"].value == 1 / 3


def test_what_identities_see_alone_is_said_of_each_precision_and_operation() -> None:
    seen, drawn = line(0), line(1, precision="fp8", operation="dgrad", sensors=["recompute"])
    exact = line(2, precision="fp8", floor=0.0, sensors=["recompute"])
    found = values([seen, drawn, exact])
    name = "recall, unmasked and above an identity's floor, nothing drawn"
    assert found[name].value == 1 / 2
    assert [found[f"{name}, {precision}"].value for precision in PRECISIONS] == [1.0, None, 0.0]
    assert found[f"{name}, operation dgrad, fp8"].samples == 1


@pytest.mark.parametrize("sensors", [["recompute"], ["moves"], ["saved"], ["moves", "saved"]])
def test_what_a_job_only_draws_counts_as_drawn(sensors: list[str]) -> None:
    """Moves and kept tensors as well; what the gate caught, without a sensor, and identities are always there."""
    found = values([line(0, sensors=sensors), line(1, sensors=[*sensors, "gemm"]), line(2, sensors=[], by="states")])
    assert found["recall, harmful, nothing drawn"].value == 2 / 3
    assert found["recall, harmful, 0.0625 drawn as in a job, expected"].value == (2 + 1 / 16) / 3


def test_a_share_of_all_does_not_meet_its_target_with_few() -> None:
    found = values([line(i) for i in range(100)])
    assert found["recall, harmful"].met
    assert not found["recall, harmful, 95 % lower bound"].met
    assert values([line(i) for i in range(3_840)])["recall, harmful, 95 % lower bound"].met


def test_another_seed_is_compared_by_intervals() -> None:
    def campaign(missed: int) -> list[dict[str, Any]]:
        return [line(i, caught=i >= missed) for i in range(200)]

    theirs = [asdict(figure) for figure in figures(campaign(20), 0.1)]
    assert not outside(figures(campaign(24), 0.1), theirs)
    apart = outside(figures(campaign(80), 0.1), theirs)
    assert any(text.startswith("recall, harmful:") for text in apart)


def test_probabilities_are_no_shares() -> None:
    """A chance within so many steps has an interval of its own, and no tries that were hits."""
    mine = [Figure("caught within 100 steps", 0.9, "probability", "higher", coverage="95 % interval", samples=40)]
    theirs = [asdict(replace(mine[0], value=0.1))]
    assert not outside(mine, theirs)
    assert outside([replace(mine[0], unit="share")], [{**theirs[0], "unit": "share"}])


def test_the_table_has_hits_of_tries() -> None:
    text = table([line(0), line(1, caught=False), line(2, precision="fp8", operation="norm")])
    assert "| fprop | 1 of 2 (9.5 to 90.5 %) | - | - |" in text
    assert "| all | 1 of 2 (9.5 to 90.5 %) | - | 1 of 1 (20.7 to 100.0 %) |" in text


def test_the_picture_is_an_svg_that_shows_all_precisions() -> None:
    lines = [line(i, precision=PRECISIONS[i % 3], deviation=10.0 ** (i % 9 - 6)) for i in range(90)]
    lines += [line(90, deviation=float("inf")), line(91, deviation=None)]
    root = ElementTree.fromstring(picture(lines))
    assert len(root.findall(".//{*}polyline")) == 6  # and what identities catch alone, dashed
    assert {"fprop", "bitflip", *PRECISIONS} <= {text.text for text in root.findall(".//{*}text")}


def test_blocks_hold_every_fault_once_and_share_a_precision() -> None:
    blocks = blocks_of(1_010)
    assert sorted(index for block in blocks for index in block.indices) == list(range(1_010))
    assert [block.place for block in blocks] == sorted((b.place for b in blocks), key=PRECISIONS.index)
    for block in blocks:
        assert {placed(index, 3)[0] for index in block.indices} == {block.place}
        assert len({placed(index, 3)[1] for index in block.indices}) == 1
        assert len(block.indices) <= BLOCK
    assert {placed(index, 3) for index in range(15 * BLOCK)} == {(p, n) for p in PRECISIONS for n in range(3)}


def test_kept_lines_are_whole_and_a_cut_one_is_done_again(tmp_path: Path) -> None:
    path = path_of(tmp_path, 7)
    for index in (3, 4):
        append(path, line(index))
    with path.open("a") as file:
        file.write('{"index": 5, "prec')  # killed here
    assert missing(tmp_path, 7, [3, 4, 5, 6]) == [5, 6]
    append(path, line(5))
    assert [kept["index"] for kept in collected(tmp_path, [7, 8])] == [3, 4, 5]
    assert lines_of(path_of(tmp_path, 8)) == []


def test_other_settings_are_kept_elsewhere(tmp_path: Path) -> None:
    first, again, other = (folder_for(tmp_path, "faults", seed, (0, 2)) for seed in (1, 1, 2))
    assert first == again != other


def test_the_record_is_the_same_file_for_the_same_lines(tmp_path: Path) -> None:
    lines = [line(0), line(1)]
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        sdc_campaign.write_lines(tmp_path / name, lines)
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    text = gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()).decode()
    assert [json.loads(kept) for kept in text.splitlines()] == lines
    sdc_campaign.write_lines(tmp_path / "c.jsonl", [line(0, excess=float("inf"))])
    told = json.loads((tmp_path / "c.jsonl").read_text(), parse_constant=pytest.fail)  # JSON has no infinity
    assert float(told["excess"]) == float("inf")


def test_struck_operators_are_as_many_as_q_says() -> None:
    rng = random.Random(1)
    for rate in (1e-2, 1e-4):
        draws = [struck(1_000, rate, rng) for _ in range(3_000)]
        assert all(draw and draw == sorted(set(draw)) and draw[-1] < 1_000 for draw in draws)
        expected = 1_000 * rate / (1 - (1 - rate) ** 1_000)
        assert sum(map(len, draws)) / len(draws) == pytest.approx(expected, rel=0.03)
        if rate == 1e-4:  # the first is anywhere
            assert sum(draw[0] for draw in draws) / len(draws) == pytest.approx(483, rel=0.05)


def test_the_curve_is_exact_where_chances_are_tiny() -> None:
    assert chance(1e-2, 1_000, 1.0, 1) == pytest.approx(1 - 0.99**1_000)
    assert chance(1e-9, 1, 0.5, 1) == pytest.approx(5e-10, rel=1e-6)
    assert chance(1e-6, 1_000, 0.5, 10_000) == pytest.approx(1 - (1 - 0.5 * (1 - (1 - 1e-6) ** 1_000)) ** 10_000)
    assert chance(0.5, 1_000, 1.0, 1) == pytest.approx(1.0)


def test_the_curve_has_audits_apart() -> None:
    lines = [
        {"index": i, "precision": "bf16", "rate": RATES[2], "operators": 1_000, "caught": i < 6, "auditable": i < 8}
        for i in range(10)
    ]
    found = {figure.name: figure.value for figure in curve_figures(lines, 0.1)}
    a_step = 1 - (1 - 1e-4) ** 1_000
    assert found["caught, of struck steps, q 0.0001, bf16"] == 0.6
    assert found["caught by sensors within 100 steps, q 0.0001, bf16"] == pytest.approx(1 - (1 - 0.6 * a_step) ** 100)
    assert found["caught by audits within 100 steps, q 0.0001, bf16"] == pytest.approx(1 - (1 - 0.08 * a_step) ** 100)


def test_curve_blocks_leave_room_for_more_trials() -> None:
    few, many = curve_blocks(3), curve_blocks(5)
    assert all(a.indices == b.indices[:3] for a, b in zip(few, many, strict=True))
    indices = [index for block in many for index in block.indices]
    assert len(set(indices)) == len(indices)


@pytest.mark.parametrize("bad", [["--faults", "0"], ["--shards", "0"], ["--audit", "1.5"], ["--again", "-1"]])
def test_senseless_options_are_refused(bad: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sdc_campaign.options(bad)
    assert bad[0] in capsys.readouterr().err
