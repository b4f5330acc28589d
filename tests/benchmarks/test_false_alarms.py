"""Clean training is counted as it is: no alarm at the shipped tolerances, and many at a thousandth of them."""

from pathlib import Path

import pytest

from benchmarks import false_alarms
from benchmarks.campaign.clean import Runs, Training, clean_figures, lost_run, run_blocks
from benchmarks.campaign.draw import PRECISIONS

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_clean_run_has_no_alarm_and_its_control_has(tmp_path: Path) -> None:
    (block,) = run_blocks(0, 1)
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


def test_blocks_go_round_the_precisions() -> None:
    blocks = run_blocks(3, 6)
    assert [block.place for block in blocks] == [*PRECISIONS, *PRECISIONS]
    assert [block.indices for block in blocks] == [(n,) for n in range(3, 9)]


def test_ten_million_checks_without_an_alarm_prove_one_in_a_million() -> None:
    made = {"alarms": 0, "verdicts": 0, "largest": 0.8}
    few = [{"precision": p, "checks": 1_000_000, **made} for p in PRECISIONS]
    bound = "alarms per 1e6 clean checks, 95 % upper bound"
    assert not {figure.name: figure for figure in clean_figures(few)}[bound].met
    many = {figure.name: figure for figure in clean_figures(few * 4)}
    assert many[bound].met
    assert many[bound].samples == 12_000_000
    assert many["alarms, clean training, bf16"].samples == 4_000_000


def test_clean_training_that_ends_its_process_is_no_figure() -> None:
    (block,) = run_blocks(4, 1)
    with pytest.raises(RuntimeError, match="clean run 4 in bf16"):
        lost_run(block, 4)


def test_senseless_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        false_alarms.options(["--checks", "0"])
    assert "--checks" in capsys.readouterr().err
