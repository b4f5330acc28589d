"""`assay calibrate`: what of the model's own it measures, what it writes, how it ends; and a job that takes a table."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from agent.calibrate import tool
from agent.calibrate.training import families
from agent.training.engine import Engine
from agent.training.spec import JobSpec, SpecError
from controller.cli.main import call
from diagnostics.calibration.measure import DeviceUnusable, Plan, measure
from diagnostics.calibration.operators import Family
from diagnostics.calibration.rules import RULES
from diagnostics.sensors.tolerance import SCHEMA, parse_table, shipped_table

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


def test_training_and_fp8_are_measured_by_what_their_kernels_announce() -> None:
    own = families()
    dtypes = torch.float32, torch.bfloat16
    done = measure(Plan(CPU, dtypes, own, 1, 7, shipped_table()), lambda line: None)
    assert set(done.constants) == {("float32", "mm"), ("bfloat16", "mm"), ("float32", "fp8")}
    for (dtype, kernel), constant in done.constants.items():
        assert constant.accumulate <= shipped_table().kappa("cpu", dtype, kernel).accumulate * 1.3
        assert constant.calls > 25
        assert 0 < constant.worst <= constant.share
    assert done.skipped == {("bfloat16", "fp8"): "its constant is for fp32 results"}
    assert not done.refused


def test_every_kernel_of_the_rules_has_a_family_that_measures_it() -> None:
    assert {kernel for family in tool._chosen(None).values() for kernel in family.kernels} == set(RULES)
    assert set(tool._chosen(["fp8"])) == {"FP8 products", "training"}
    assert set(tool._chosen(["sdpa_exp"])) == {"attention"}


def calibrated(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    try:
        code = tool.main(arguments)
    except SystemExit as stopped:  # argparse's way to end
        code = int(stopped.code or 0)
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_a_calibration_is_shown_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quick", "--kernel", "nll_loss", "--dtype", "bfloat16", "--dtype", "float16", "--seed", "3"]
    code, out, err = calibrated([*arguments, "--out", str(tmp_path / "t.json")], capsys)
    assert code == 0
    assert err.splitlines() == ["float32 losses", "bfloat16 losses", "float16 losses"]
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [["nll_loss", "bfloat16"], ["nll_loss", "float16"]]
    assert "skipped" in out
    written = (tmp_path / "t.json").read_text()
    assert parse_table(written).entries.keys() == {("cpu", "bfloat16", "nll_loss")}
    code, again, _ = calibrated([*arguments, "-o", "json"], capsys)
    assert (code, json.loads(again)) == (0, json.loads(written))
    assert json.loads(written)["measured"]["seed"] == 3


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--device", "tpu"], "--device"),
        (["--dtype", "float8"], "--dtype"),
        (["--kernel", "conv"], "--kernel"),
        (["--seed", "-1"], "--seed: must be a whole number >= 0"),
        (["--seed", "x"], "--seed"),
        (["--out", "nowhere/table.json"], "--out nowhere/table.json is not a file in a folder that exists"),
        (["--out", "."], "--out . is not a file"),
        (["--quickly"], "unrecognized arguments: --quickly"),
        (["twice"], "twice"),
    ],
)
def test_a_wrong_command_is_one_line_and_2(
    arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = calibrated(arguments, capsys)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("assay: ")
    assert told in err
    assert not list(tmp_path.iterdir())


def test_an_unusable_device_and_a_full_disk_are_5_and_a_refused_constant_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unusable(plan: Plan, tell: object) -> None:
        raise DeviceUnusable(f"device {plan.device} cannot be used: none is there")

    with monkeypatch.context() as patched:
        patched.setattr(tool, "measure", unusable)
        told = "assay: device cuda cannot be used: none is there\n"
        assert calibrated(["--device", "cuda"], capsys) == (5, "", told)

    def full(path: Path, made: object) -> None:
        raise OSError(28, "No space left on device")

    quick = ["--quick", "--kernel", "nll_loss", "--dtype", "float32", "--out", str(tmp_path / "t.json")]
    with monkeypatch.context() as patched:
        patched.setattr(tool, "write", full)
        code, _, err = calibrated(quick, capsys)
        assert (code, err.splitlines()[-1]) == (5, f"assay: --out {tmp_path / 't.json'}: No space left on device")

    def broken(draw: object, dtype: torch.dtype) -> None:
        torch.nn.functional.nll_loss(torch.full((3, 4), 1e-30), torch.tensor([1, 2, 3]))

    monkeypatch.setattr("diagnostics.sensors.checks.losses.ratio", lambda residual, limit: torch.full((), torch.nan))
    monkeypatch.setattr(tool, "_chosen", lambda kernels: {"broken": Family(("nll_loss",), broken)})
    code, out, _ = calibrated(quick, capsys)
    assert code == 1
    assert "refused" in out
    assert parse_table((tmp_path / "t.json").read_text()).entries == {}


def test_the_command_passes_words_and_code_along(capfd: pytest.CaptureFixture[str]) -> None:
    assert call(["calibrate", "--out", "nowhere/t.json"]) == 2
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "assay: --out nowhere/t.json is not a file in a folder that exists\n")


SPEC = {
    "job": "job",
    "preset": "tiny",
    "seed": 7,
    "steps": 1,
    "world": 1,
    "precision": "fp32",
    "corpus": None,
    "sensors": True,
    "tolerance_scale": 1.0,
    "checkpoint_every": 1,
    "storage": "",
    "threads": 1,
    "cache": "",
}


def table(accumulate: float) -> str:
    key = {"device_class": "cpu", "dtype": "float32", "kernel": "mm"}
    return json.dumps({"schema": SCHEMA, "kappas": [{**key, "output": 0, "accumulate": accumulate, "provenance": ""}]})


def guarded(spec: JobSpec) -> float:
    """The constant that an engine's guard has for fp32 products."""
    engine = SimpleNamespace(spec=spec, model=torch.nn.Linear(2, 2))
    guard = Engine._guarded(engine, 1.0)  # type: ignore[arg-type]
    assert guard.table.kappa("cpu", "bfloat16") == shipped_table().kappa("cpu", "bfloat16")
    return guard.table.kappa("cpu", "float32").accumulate


def test_a_job_s_table_goes_before_the_shipped_one() -> None:
    assert guarded(JobSpec(**SPEC)) == shipped_table().kappa("cpu", "float32").accumulate
    spec = JobSpec(**SPEC, tolerances=table(9e-7))
    assert guarded(JobSpec.from_json(spec.to_json())) == 9e-7
    with pytest.raises(SpecError, match=r"tolerances: .*0\.\.1; make a table with assay calibrate"):
        JobSpec(**SPEC, tolerances=table(2.0))
