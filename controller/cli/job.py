"""`assay job`: one job, and every step that it committed."""

from pathlib import Path

import click

from controller.cli.output import output_option, print_facts, print_json, print_table, short
from controller.cli.reading import read
from controller.cli.rundir import dir_option
from controller.cli.status import lost


@click.group("job")
def command() -> None:
    """Show a job or its steps."""


@command.command("show")
@click.argument("job", default="")
@dir_option
@output_option
def show(job: str, directory: Path, form: str) -> None:
    """Show JOB (the newest if not named) with its generations."""
    document = read(directory, "job", job)
    if form == "json":
        print_json(document)
        return
    facts = ("job", "status", "reason", "world", "steps", "committed_steps")
    print_facts([*((name.replace("_", " "), document.get(name)) for name in facts), *lost(document)])
    columns = ("generation", "first_step", "last_step", "resumed_from", "reason")
    print_table("generations", columns, [[g.get(c) for c in columns] for g in document["generations"]])


@command.command("steps")
@click.argument("job", default="")
@dir_option
@output_option
def steps(job: str, directory: Path, form: str) -> None:
    """List each (rank, step) that JOB (the newest if not named) committed, once."""
    document = read(directory, "steps", job)
    if form == "json":
        print_json(document)
        return
    rows = [
        (
            *(s["rank"], s["step"], s["generation"], _loss(s.get("loss")), s.get("attempts")),
            *(s.get("checks"), s.get("failed_checks"), s.get("unjudged"), short(s.get("digest"))),
        )
        for s in document["steps"]
    ]
    columns = ("rank", "step", "generation", "loss", "attempts", "checks", "failed checks", "unjudged", "digest")
    print_table(f"steps of {document['job']}", columns, rows)


def _loss(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "-"
