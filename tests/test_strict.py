"""The rule of continuous integration about the tests themselves: a skipped one is a failure there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SKIPPED = "import pytest\n\ndef test_a():\n    pytest.skip('no such server')\n\ndef test_b():\n    pass\n"


@pytest.mark.parametrize(("strict", "code"), [("1", 1), ("", 0)])
def test_a_skipped_test_fails_where_it_must(tmp_path: Path, strict: str, code: int) -> None:
    (tmp_path / "test_it.py").write_text(SKIPPED)
    environment = {**os.environ, "PYTEST_STRICT": strict, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-c", os.devnull, "--rootdir", str(tmp_path)]
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
