"""The end of `assay run` for a person: what was trained, what went wrong, and where everything lies."""

from typing import Any

from controller.cli import incident, status
from controller.cli.output import print_facts, print_table, short


def print_summary(document: dict[str, Any]) -> None:
    """Print an "assay.run/1" document as tables on stdout."""
    again = document["executed_steps"] - document["committed_steps"]
    print_facts(
        [
            ("job", document["job"]),
            ("result", _result(document)),
            ("steps", f"{document['committed_steps']} of {document['steps']} committed, {again} executed again"),
            ("loss", f"{_nats(document['loss_first'])} -> {_nats(document['loss_last'])} nats a token"),
            ("speed", f"{document['tokens_per_s']:.0f} tokens/s"),
            ("state digest", document["state_digest"]),
            ("chain digest", document["chain_digest"]),
            ("state of a rank", _held(document["state_bytes"])),
            ("generations", len(document["generations"])),
            ("checkpoints", ", ".join(f"{c['step']} ({c['trust']})" for c in document["checkpoints"]) or None),
            *status.lost(document),
            ("directory", document["dir"]),
        ]
    )
    print_table("incidents", incident.COLUMNS, incident.rows(document["incidents"]))
    last = max((entry["generation"] for entry in document["placement"]), default=0)
    rows = [
        (entry["rank"], entry["node"], short(entry["device"], 24), entry["pid"])
        for entry in document["placement"]
        if entry["generation"] == last
    ]
    print_table(f"placement of generation {last}", ("rank", "node", "device", "pid"), rows)


def _result(document: dict[str, Any]) -> str:
    status = str(document.get("status", "")).lower()
    reason = document.get("reason")
    return f"{status}: {reason}" if reason and status != "completed" else status


def _held(ranks: list[dict[str, Any]]) -> str | None:
    """The largest rank's bytes by what they are."""
    if not ranks:
        return None
    largest = max(ranks, key=lambda rank: sum(rank.values()) - rank["rank"])
    shown = [f"{kind} {value / 1e6:.1f}" for kind, value in largest.items() if kind != "rank" and value]
    return f"{', '.join(shown)} MB" if shown else None


def _nats(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
