"""`assay status`: the job, its nodes, and every process of the run with its pid."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from controller.cli.output import output_option, print_facts, print_json, print_table
from controller.cli.reading import read
from controller.cli.rundir import dir_option, load, local_processes

SUSPICION = ("device", "serial", "node", "suspicion", "evidence", "faults", "undecided", "false alarms", "last")


@click.command("status")
@dir_option
@output_option
def command(directory: Path, form: str) -> None:
    """Show the job, its nodes and every process."""
    document = status_document(directory)
    if form == "json":
        print_json(document)
        return
    job = document["job"] or {}
    print_facts(
        [
            ("job", job.get("job")),
            ("state", job.get("status")),
            ("steps", f"{job.get('committed_steps', 0)} of {job.get('steps', 0)} committed"),
            ("generation", job.get("generation")),
            ("running", "yes" if document["running"] else "no"),
            ("status page", document["status_url"]),
            *lost(job),
        ]
    )
    nodes = [(n.get("node", n.get("name")), n.get("state"), "yes" if n.get("spare") else "") for n in document["nodes"]]
    print_table("nodes", ("node", "state", "spare"), nodes)
    print_table("devices", SUSPICION, [row for node in document["nodes"] for row in suspicions(node)])
    columns = ("role", "node", "rank", "generation", "pid")
    print_table("processes", columns, [[entry.get(c) for c in columns] for entry in document["processes"]])


def lost(document: dict[str, Any]) -> Iterator[tuple[str, object]]:
    """A line for each device whose sensors fail; none while all is well."""
    for entry in document.get("lost_coverage") or []:
        yield "lost coverage", entry["text"]


def suspicions(node: dict[str, Any]) -> Iterator[Sequence[object]]:
    """A node's devices as rows under SUSPICION."""
    for entry in node.get("suspicion", []):
        counts = [entry[name] for name in ("evidence", "faults", "undecided", "false_alarms")]
        last = entry["last_at"]
        when = None if last is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(last))
        yield (entry["device"], entry["serial"] or None, node.get("node"), f"{entry['mean']:.3f}", *counts, when)


def status_document(directory: Path) -> dict[str, Any]:
    """The controller's view joined with the supervisor's; no processes once the run has ended."""
    run = load(directory)
    document = read(directory, "status")
    processes = merge(document["processes"], local_processes(directory)) if run.running else []
    return {
        **document,
        "processes": processes,
        "running": run.running,
        "dir": str(directory.absolute()),
        "status_url": run.status_url,
    }


def merge(reported: list[dict[str, Any]], local: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every process once. The supervisor knows better than an agent's last report: it sees its children die."""
    seen: set[int] = set()
    merged: list[dict[str, Any]] = []
    for entry in [*local, *reported]:
        pid = entry.get("pid")
        if not isinstance(pid, int) or pid in seen or not alive(pid):
            continue
        seen.add(pid)
        merged.append({key: entry.get(key) for key in ("role", "node", "rank", "generation", "pid")})
    return merged


def alive(pid: int) -> bool:
    """Whether the process is there and not a zombie; reports of what has just died must not be listed."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
