"""`assay incident`: what went wrong, what was decided and why, how long it took, and the disputed computation again."""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from controller.cli.errors import FAILED
from controller.cli.evidence import FOLDER, beside, bundle_of, removal, rerun
from controller.cli.output import output_option, print_facts, print_json, print_table, seconds, short
from controller.cli.reading import read
from controller.cli.rundir import dir_option

COLUMNS = ("id", "kind", "step", "caught", "verdict", "node", "resumed from", "detected after", "recovered after")


@click.group("incident")
def command() -> None:
    """List incidents, show one with its timeline, or replay what it was about."""


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
    document["beside"] = beside(directory, document)
    if form == "json":
        print_json(document)
        return
    print_facts(
        [
            *zip(COLUMNS, next(iter(rows([document]))), strict=True),
            ("evidence", _evidence(document, directory)),
            *_beside(document["beside"]),
        ]
    )
    votes = [(v["node"], v["device"], v.get("role"), short(v["digest"])) for v in document["votes"]]
    print_table("votes", ("node", "device", "role", "digest"), votes)
    actions = [(a["type"], a["target"], a["reason"]) for a in document["actions"]]
    print_table("actions", ("action", "target", "reason"), actions)
    entries = [(_clock(entry["time"]), entry["text"]) for entry in document.get("timeline", [])]
    print_table("timeline", ("time", "what"), entries)


@command.command("replay")
@click.argument("incident")
@click.option("--attempt", type=click.IntRange(min=1), help="Which held attempt of the step. [default: the first]")
@click.option("--times", type=click.IntRange(1, 1000), default=1, show_default=True, help="How often to compute it.")
@click.option("--corpus", type=click.Path(path_type=Path), help="What the samples are cut from, if they are left out.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="A tokenizer.json for that corpus of text.")
@dir_option
@output_option
def replay(
    incident: str,
    attempt: int | None,
    times: int,
    corpus: Path | None,
    tokenizer: Path | None,
    directory: Path,
    form: str,
) -> int:
    """Compute what INCIDENT was about again on this machine, from its evidence, and compare with the votes.

    Exit 0 if this machine upholds the verdict, or computes what some voter computed where nobody is blamed; 1 if not,
    or if the bundle is damaged; 5 if the two machines cannot be compared.
    """
    found = read(directory, "incident", incident)
    bundle = bundle_of(directory, found, attempt)
    done = rerun(bundle, directory / "checkpoints" / found["job"], times, corpus, tokenizer)
    document = {"schema": "assay.incident.replay/1", "incident": incident, "bundle": str(bundle), **done}
    if form == "json":
        print_json(document)
    else:
        _print_replay(document)
    return int(document.get("exit", FAILED))


def _print_replay(document: dict[str, Any]) -> None:
    digests = document["digests"]
    here = document["digest"] or f"{len(set(digests))} different results in {len(digests)} tries"
    upholds = {True: "yes", False: "NO", None: "-"}[document["upholds"]]
    alike = document["fingerprint"] == document["recorded_fingerprint"]
    told = (("incident", document["incident"]), ("bundle", document["bundle"]), ("step", document["step"]))
    more = (("verdict", document["verdict"]), ("upheld here", upholds), ("computed here", here))
    print_facts([*told, ("rank", document["rank"]), *more, ("same fingerprint", "yes" if alike else "NO")])
    votes = [
        (v["role"], v["number"], v["node"], v["device"], short(v["digest"]), "yes" if v["agrees"] else "NO")
        for v in document["votes"]
    ]
    print_table("votes", ("role", "no.", "node", "device", "digest", "as computed here"), votes)


def _evidence(incident: dict[str, Any], directory: Path) -> str | None:
    """Each bundle's name, and whether it is still there."""
    folder = directory / FOLDER / str(incident["job"])
    told = [
        name if (folder / name).is_dir() else f"{name} (gone: {removal(folder, name) or 'nobody noted why'})"
        for name in incident.get("evidence", [])
    ]
    return ", ".join(told) or None


def _beside(bundles: list[dict[str, Any]]) -> Iterable[tuple[str, str]]:
    """A line for each scalar; which attempt's it is, where there are several."""
    for bundle in bundles:
        attempt = f"attempt {bundle['bundle'].rpartition('-')[2]}: " if len(bundles) > 1 else ""
        for one in bundle["statistics"]:
            told = f"{one['name']} was {one['value']:.4g}, in the steps before {one['median']:.4g}, z {one['z']:.1f}"
            yield "beside it", attempt + told


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
