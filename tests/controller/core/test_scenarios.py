"""Every transcript in tests/scenarios says what core does, word for word."""

from pathlib import Path

import pytest
import scenario_runner

TRANSCRIPTS = sorted(scenario_runner.FOLDER.glob("*.txt"))


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_transcript(path: Path) -> None:
    assert scenario_runner.run(path.read_text()) == path.read_text()


def test_there_are_transcripts() -> None:
    assert len(TRANSCRIPTS) >= 17


def test_a_transcript_with_another_outcome_is_noticed() -> None:
    text = (scenario_runner.FOLDER / "kill.txt").read_text()
    tampered = text.replace("StartGeneration n0", "StartGeneration n2")
    assert tampered != text
    assert scenario_runner.run(tampered) != tampered
