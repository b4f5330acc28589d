"""Has a job's table of tolerances looked at before anything is started, by the code that will read it there."""

import subprocess
from pathlib import Path

from controller.cli.errors import CommandError, UsageError
from controller.local.plan import PYTHON

_NO_TABLE = 2


def read(path: str | None) -> str | None:
    """The text of the table in a file: it travels in the job's specification. None is the shipped one.

    Raises UsageError.
    """
    if path is None:
        return None
    try:
        text = Path(path).read_text("utf-8")
    except OSError as error:
        raise UsageError(f"--tolerances {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--tolerances {path} is not UTF-8 text") from error
    child = [*PYTHON, "-m", "diagnostics.sensors.check_table"]
    done = subprocess.run(child, input=text, capture_output=True, text=True, check=False)
    if done.returncode == _NO_TABLE:
        raise UsageError(f"--tolerances {path}: {done.stderr.strip()}; make one with assay calibrate")
    if done.returncode != 0:
        raise CommandError(
            f"the table of tolerances could not be looked at: {done.stderr.strip().rpartition(chr(10))[2]}"
        )
    return text
