"""The example in the documentation does what the page says it prints."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_example_catches_its_fault_and_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "docs" / "examples" / "guard_a_model.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(": ")[2] for line in lines if line.startswith("step")] == [
        "committed",
        "committed",
        "committed",
        "not committed",
        "committed",
    ]
    assert "model.layers.1.mlp.up_proj (mm, dgrad)" in lines[4]
    assert lines[-1].endswith("0 of them not checked in full")
    page = (
        ROOT / "docs" / "sensing.md"
    ).read_text()  # which shows this output; readings and losses are a machine's own
    assert lines[4].partition(" reads")[0] in page
    for line in (lines[2], lines[3], lines[6]):
        name, _, rest = line.partition(": ")
        assert any(name in shown and rest.partition(", ")[2] in shown for shown in page.splitlines()), line
