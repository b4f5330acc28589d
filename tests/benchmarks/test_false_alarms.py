"""Clean training is counted as it is: no alarm at the shipped tolerances, and many at a thousandth of them."""

from pathlib import Path

import pytest

from benchmarks import false_alarms
from benchmarks.campaign.bench import Bench
from benchmarks.campaign.clean import BOUND, Runs, Training, clean_figures, lost_run, run_blocks
from benchmarks.campaign.draw import PRECISIONS

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_clean_run_has_no_alarm_and_its_control_has(tmp_path: Path) -> None:
    (block,) = run_blocks(0, ["fp32"])
    line = Training(Runs(7, 2, tmp_path)).line(block, 0)
    assert (line["alarms"], line["verdicts"], line["first"]) == (0, 0, "")
    assert line["checks"] > 500
    assert 0 < line["largest"] < 1
    control = Training(Runs(7, 2, tmp_path, tolerance_scale=1e-3)).line(block, 0)
    assert control["alarms"] > 100
    assert control["checks"] == line["checks"]
    assert control["first"].startswith("step 1: Alarm(")
    assert control["verdicts"] == 0  # a repetition gives the same gradients: nobody is blamed
    assert control["largest"] == pytest.approx(1e3 * line["largest"], rel=0.02)


def test_runs_are_numbered_on_and_none_begins_or_draws_as_another(tmp_path: Path) -> None:
    blocks = run_blocks(3, ["fp32", "bf16", "fp32"])
    assert [(block.place, block.indices) for block in blocks] == [("fp32", (3,)), ("bf16", (4,)), ("fp32", (5,))]
    one, same, other = (Training(Runs(7, 1, tmp_path)).line(blocks[0], n) for n in (3, 3, 5))
    assert one == same
    assert one["seed"] != other["seed"]
    drawn = []
    for seed in (10, 12):
        bench = Bench("fp32", seed, (), tmp_path)
        bench.advance(bench.beginning(), 1)
        drawn.append(bench.guard.current._key)
    assert drawn[0] != drawn[1]


def test_ten_million_checks_without_an_alarm_prove_one_in_a_million() -> None:
    made = {"alarms": 0, "verdicts": 0, "largest": 0.8}
    few = [{"precision": p, "checks": 1_000_000, **made} for p in PRECISIONS]
    assert not {figure.name: figure for figure in clean_figures(few)}[BOUND].met
    many = {figure.name: figure for figure in clean_figures(few * 4)}
    assert many[BOUND].met
    assert many[BOUND].samples == 12_000_000
    assert [many[f"{BOUND}, {precision}"].met for precision in PRECISIONS] == [True] * 3
    third = {figure.name: figure for figure in clean_figures(few * 3)}
    assert third[BOUND].met
    assert not third[f"{BOUND}, fp32"].met  # three million of its own prove less
    assert many["alarms, clean training, bf16"].samples == 4_000_000


def test_clean_training_that_ends_its_process_is_no_figure() -> None:
    (block,) = run_blocks(4, ["bf16"])
    with pytest.raises(RuntimeError, match="clean run 4 in bf16"):
        lost_run(block, 4)


def test_senseless_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        false_alarms.options(["--checks", "0"])
    assert "--checks" in capsys.readouterr().err
