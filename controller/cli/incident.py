"""`assay incident`: what went wrong, what was decided and why, and how long it took."""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from controller.cli.output import output_option, print_facts, print_json, print_table, seconds, short
from controller.cli.reading import read
from controller.cli.rundir import dir_option

COLUMNS = ("id", "kind", "step", "caught", "verdict", "node", "resumed from", "detected after", "recovered after")


@click.group("incident")
def command() -> None:
    """List incidents or show one with its timeline."""


@command.command("list")
@click.option("--job", default="", help="Only this job's.")
@dir_option
@output_option
def list_(job: str, directory: Path, form: str) -> None:
    """List the run's incidents."""
    document = read(directory, "incidents", job)
    if form == "json":
        print_json(document)
        return
    print_table("incidents", COLUMNS, rows(document["incidents"]))


@command.command("show")
@click.argument("incident")
@dir_option
@output_option
def show(incident: str, directory: Path, form: str) -> None:
    """Show INCIDENT: votes, actions with their reasons, and the timeline."""
    document = read(directory, "incident", incident)
    if form == "json":
        print_json(document)
        return
    print_facts(zip(COLUMNS, next(iter(rows([document]))), strict=True))
    votes = [(v["node"], v["device"], v.get("role"), short(v["digest"])) for v in document["votes"]]
    print_table("votes", ("node", "device", "role", "digest"), votes)
    actions = [(a["type"], a["target"], a["reason"]) for a in document["actions"]]
    print_table("actions", ("action", "target", "reason"), actions)
    entries = [(_clock(entry["time"]), entry["text"]) for entry in document.get("timeline", [])]
    print_table("timeline", ("time", "what"), entries)


def rows(incidents: Iterable[dict[str, Any]]) -> Iterable[Sequence[object]]:
    """Incidents as rows under COLUMNS."""
    for item in incidents:
        yield (
            item["id"],
            item["kind"],
            item["detected_step"] if item["detected_step"] is not None else item["injected_step"],
            "yes" if item.get("caught", True) else "NO",
            item["verdict"],
            item["node"],
            item["resumed_from"],
            seconds(item["detect_s"]),
            seconds(item["recovery_s"]),
        )


def _clock(moment: float) -> str:
    fraction = int(moment * 1000) % 1000
    return f"{time.strftime('%H:%M:%S', time.localtime(moment))}.{fraction:03d}"
