"""The campaign: faults of every model in every kind of operator of a real training step, and what became of them.

docs/campaign.md says what is measured and what each field of the record means. `--keep FOLDER` lets it go on where it
was interrupted; `--lines FILE` writes the record, one line a fault; `--picture FILE` draws it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks._figures import Figure, document
from benchmarks.campaign.intermittent import Curve, curve_blocks, curve_figures
from benchmarks.campaign.kept import collected, folder_for
from benchmarks.campaign.picture import picture
from benchmarks.campaign.pool import Block, Pool, Worker
from benchmarks.campaign.report import figures, outside, table
from benchmarks.campaign.work import Plan, Striking, blocks_of, lost

#: Steps of training done where faults strike: the first, within the warm-up (10), and when experts share the load.
POINTS = (0, 30, 200)
QUICK_POINTS = (0, 2)
#: A spare's chance of auditing a given step, for the audits' column: one step in ten.
AUDIT = 0.1


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the document only, without the table on stderr")
    parser.add_argument("--quick", action="store_true", help="60 faults: does it run, not what is it")
    parser.add_argument("--faults", type=int, default=20_000, metavar="N", help="over all precisions (20000)")
    parser.add_argument("--trials", type=int, default=40, metavar="N", help="of each q and precision (40)")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of weights, data and faults")
    parser.add_argument("--shards", type=int, default=1, metavar="N", help="processes, each of one thread (1)")
    parser.add_argument("--audit", type=float, default=AUDIT, metavar="P", help="a spare's chance of auditing a step")
    parser.add_argument("--again", type=float, default=1.0, metavar="P", help="share of operators to run again (1)")
    parser.add_argument("--no-sensors", action="store_true", help="the control: nothing senses")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="of finished faults: they are not tried again")
    parser.add_argument("--lines", type=Path, metavar="FILE", help="write the record here; .gz compresses it")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="write the picture here, as SVG")
    parser.add_argument("--against", type=Path, metavar="FILE", help="a document of another seed to compare with")
    asked = parser.parse_args(arguments)
    for name, least in (("faults", 1), ("trials", 0), ("shards", 1)):
        if getattr(asked, name) < least:
            parser.error(f"--{name} is {getattr(asked, name)}: must be at least {least}")
    for name in ("audit", "again"):
        if not 0 <= getattr(asked, name) <= 1:
            parser.error(f"--{name} is {getattr(asked, name)}: must be in 0..1")
    return asked


def run(pool: Pool, make: Callable[[], Worker], blocks: list[Block], folder: Path, title: str) -> list[dict[str, Any]]:
    """Work the blocks off with a progress bar on stderr; their lines."""
    with Progress(console=Console(file=sys.stderr)) as progress:
        bar = progress.add_task(title, total=sum(len(block.indices) for block in blocks))
        for block in pool.run(make, blocks, folder, lost):
            progress.advance(bar, len(block.indices))
    return collected(folder, (block.number for block in blocks))


def compared(found: list[Figure], path: Path) -> Figure:
    """How many shares have an interval that does not meet that of another seed's document."""
    theirs = json.loads(path.read_text())["figures"]
    apart = outside(found, theirs)
    for line in apart:
        print(line, file=sys.stderr)
    return Figure(f"shares whose intervals do not meet those of {path.name}", len(apart), "shares", "lower", 0.0)


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """One JSON object a line, by index. The same lines make the same file, compressed or not."""
    plain = [{key: _plain(value) for key, value in line.items()} for line in lines]
    text = "".join(json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n" for line in plain).encode()
    path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)


def _plain(value: Any) -> Any:
    """JSON has no infinity: it is written as "inf"."""
    return "inf" if value == math.inf else value


def main(arguments: list[str] | None = None) -> None:
    """Run and print one JSON document."""
    asked = options(arguments)
    torch.set_num_threads(1)
    faults, trials = (60, 1) if asked.quick else (asked.faults, asked.trials)
    with tempfile.TemporaryDirectory(prefix="assay-campaign-") as temporary:
        keep = (asked.keep or Path(temporary)).absolute()
        keep.mkdir(parents=True, exist_ok=True)
        points = QUICK_POINTS if asked.quick else POINTS
        plan = Plan(asked.seed, points, keep / "corpus", not asked.no_sensors, asked.again)
        told = (plan.seed, plan.points, plan.sensors, plan.again)
        with Pool(asked.shards) as pool:
            lines = run(pool, partial(Striking, plan), blocks_of(faults), folder_for(keep, "faults", *told), "faults")
            folder = folder_for(keep, "intermittent", *told)
            curve = run(pool, partial(Curve, plan), curve_blocks(trials), folder, "intermittent") if trials else []
    found = [*figures(lines, asked.audit), *curve_figures(curve, asked.audit)]
    if asked.against:
        found.append(compared(found, asked.against))
    if asked.lines:
        write_lines(asked.lines, lines)
    if asked.picture:
        asked.picture.write_text(picture(lines))
    if not asked.json:
        print(table(lines), file=sys.stderr)
    print(document("sdc_campaign", found, threads=1))


if __name__ == "__main__":
    main()
