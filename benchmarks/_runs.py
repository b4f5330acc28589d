"""Runs `assay run` for a benchmark, as a user would, with a progress bar on stderr."""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress


def options(description: str | None) -> argparse.Namespace:
    """The flags of every benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print the document only (it is the only output anyway)")
    parser.add_argument("--quick", action="store_true", help="a fraction of the work: does it run, not what is it")
    return parser.parse_args()


def runs(jobs: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """Run each job in a folder that is deleted afterwards; its "assay.run/1" document by name. Stops at a failure."""
    documents = {}
    with Progress(console=Console(file=sys.stderr)) as progress:
        bar = progress.add_task("assay run", total=len(jobs))
        for name, arguments in jobs.items():
            progress.update(bar, description=name)
            with tempfile.TemporaryDirectory(prefix="assay-bench-") as folder:
                documents[name] = _run([*arguments, "--dir", str(Path(folder) / "run")])
            progress.advance(bar)
    return documents


def _run(arguments: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "controller.cli.main", "run", *arguments, "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(arguments)}: exit {done.returncode}\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result
