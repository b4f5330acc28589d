"""What commands print: documents on stdout as JSON or as tables, talk on stderr, and nothing a node said unescaped."""

import json
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

Document = dict[str, Any]

#: Columns of a table whose output is not a terminal: tables are for people, and a narrow default would cut digests.
PIPED_WIDTH = 160

output_option = click.option(
    "-o",
    "--output",
    "form",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="Print a table or a JSON document.",
)


def escape(value: object) -> str:
    """Text that cannot steer a terminal: everything unprintable is shown as its code; None is a dash."""
    if value is None:
        return "-"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))


def to_json(document: Document) -> str:
    """Indented ASCII JSON: control characters of every kind are escaped, and what is not finite becomes null."""
    return json.dumps(finite(document), indent=2, allow_nan=False)


def finite(value: Any) -> Any:
    """The same document with null for NaN and infinities, which JSON has no word for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return value


def print_json(document: Document) -> None:
    """Print a document on stdout."""
    click.echo(to_json(document))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows on stdout. NO_COLOR and pipes are respected."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    count = 0
    for row in rows:
        table.add_row(*(Text(escape(cell)) for cell in row))
        count += 1
    printer = console()
    printer.print(Text(f"\n{escape(title)}" if count else f"\n{escape(title)}: none", style="italic"))
    if count:
        printer.print(table)


def print_facts(facts: Iterable[tuple[str, object]]) -> None:
    """Print names and values on stdout, one a line."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, Text(escape(value)))
    console().print(table)


def say(text: str) -> None:
    """Talk to the person on stderr."""
    click.echo(escape(text), err=True)


def console() -> Console:
    """Rich's console on the current stdout."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False, markup=False)


def seconds(value: float | None) -> str:
    """A duration for people."""
    if value is None:
        return "-"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"


def short(digest: object, length: int = 16) -> str:
    """The beginning of a digest for a table."""
    return "-" if digest is None else escape(digest)[:length]
