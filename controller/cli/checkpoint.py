"""`assay checkpoint`: what was saved, how far it is trusted, and whether its bytes still are what was saved."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from controller.cli.errors import FAILED, OK, CommandError, ConditionError
from controller.cli.output import output_option, print_facts, print_json, print_table, short
from controller.cli.reading import read
from controller.cli.rundir import dir_option, load

#: Reads and hashes one checkpoint; at 1 GB/s this is a terabyte's worth.
VERIFY_S = 1000.0


@click.group("checkpoint")
def command() -> None:
    """List checkpoints or verify one."""


@command.command("list")
@click.option("--job", default="", help="Only this job's.")
@dir_option
@output_option
def list_(job: str, directory: Path, form: str) -> None:
    """List the run's checkpoints with their trust."""
    document = read(directory, "checkpoints", job)
    if form == "json":
        print_json(document)
        return
    rows = [
        (c["job"], c["step"], c["generation"], c["trust"], c["bytes"], short(c["digest"]), c["path"])
        for c in document["checkpoints"]
    ]
    print_table("checkpoints", ("job", "step", "generation", "trust", "bytes", "digest", "path"), rows)


@command.command("verify")
@click.argument("step", required=False, type=click.IntRange(min=0))
@dir_option
@output_option
def verify(step: int | None, directory: Path, form: str) -> int:
    """Recompute the digest of the newest checkpoint, or of STEP's, from its files. Exit 1 if it does not hold."""
    path = find(directory, step)
    document = {"schema": "assay.verify/1", **recompute(path)}
    if form == "json":
        print_json(document)
    else:
        names = ("step", "digest", "chain", "path", "error")
        print_facts([("holds", "yes" if document["ok"] else "NO"), *((name, document.get(name)) for name in names)])
    return OK if document["ok"] else FAILED


def find(directory: Path, step: int | None) -> Path:
    """The checkpoint's folder, by what lies on storage: a newest one is not overlooked because nobody reported it."""
    run = load(directory)
    folder = directory / "checkpoints" / run.job
    names = sorted(path.name for path in folder.glob("step-*") if path.is_dir()) if folder.is_dir() else []
    if not names:
        raise ConditionError(f"job {run.job} has no checkpoint in {folder}")
    wanted = names[-1] if step is None else f"step-{step:08d}"
    if wanted not in names:
        raise CommandError(f"job {run.job} has no checkpoint of step {step}; there are {', '.join(names)}")
    return folder / wanted


def recompute(path: Path) -> dict[str, Any]:
    """Verify in a process of its own: this one never loads torch."""
    child = [sys.executable, "-P", "-m", "agent.checkpoint.verify", str(path)]
    try:
        done = subprocess.run(child, capture_output=True, text=True, timeout=VERIFY_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise CommandError(f"verifying {path} took longer than {VERIFY_S:.0f} s") from error
    try:
        document = json.loads(done.stdout)
    except ValueError as error:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise CommandError(f"cannot verify {path}: {last}") from error
    if not isinstance(document, dict) or "ok" not in document:
        raise CommandError(f"cannot verify {path}: unexpected output")
    return document
