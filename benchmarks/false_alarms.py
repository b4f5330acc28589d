"""False alarms: in clean training of `tiny`, check by check, and as incidents of whole jobs of `small`, sensors on.

`--keep FOLDER` lets the training go on where it was interrupted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks._figures import Figure, document
from benchmarks._runs import runs
from benchmarks.campaign.clean import QUICK_STEPS, STEPS, Runs, Training, clean_figures, lost_run, run_blocks
from benchmarks.campaign.draw import PRECISIONS
from benchmarks.campaign.kept import collected, folder_for
from benchmarks.campaign.pool import Pool

#: None of the seeds that tolerances were calibrated on, or whose alarms changed a check (50,000 and more); nor a
#: campaign's.
SEED = 60_000


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the document only (it is the only output anyway)")
    parser.add_argument("--quick", action="store_true", help="a fraction of the work: does it run, not what is it")
    parser.add_argument(
        "--checks", type=float, default=1.2e7, metavar="N", help="clean checks, a third in each precision (12e6)"
    )
    parser.add_argument("--shards", type=int, default=1, metavar="N", help="processes, each of one thread (1)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="of finished runs: they are not run again")
    asked = parser.parse_args(arguments)
    for name in ("checks", "shards"):
        if not getattr(asked, name) >= 1:
            parser.error(f"--{name} is {getattr(asked, name)}: must be at least 1")
    return asked


def trained(plan: Runs, folder: Path, checks: float, shards: int) -> list[dict[str, Any]]:
    """Runs until a third of so many checks is made in each precision; their lines."""
    made = dict.fromkeys(PRECISIONS, 0)
    lines: list[dict[str, Any]] = []
    with Progress(console=Console(file=sys.stderr)) as progress, Pool(shards) as pool:
        bar = progress.add_task("clean checks", total=checks)
        while short := [precision for precision in PRECISIONS if made[precision] < checks / len(PRECISIONS)]:
            blocks = run_blocks(len(lines), short * shards)
            for _ in pool.run(partial(Training, plan), blocks, folder, lost_run):
                pass
            for line in collected(folder, (block.number for block in blocks)):
                made[line["precision"]] += line["checks"]
                lines.append(line)
            progress.update(bar, completed=sum(made.values()))
    return lines


def jobs(steps: int) -> Iterator[Figure]:
    """Whole jobs. The control: at a thousandth of the tolerance the same steps do alarm."""
    common = ["--preset", "small", "--nodes", "2", "--spares", "0", "--seed", "5"]
    wanted = {p: [*common, "--precision", p, "--steps", str(steps)] for p in PRECISIONS}
    wanted["control"] = [*common, "--steps", "3", "--tolerance-scale", "0.001"]
    results = runs(wanted)
    for precision in PRECISIONS:
        found = len(results[precision]["incidents"])
        coverage = "what the guard's coverage lists, forward and backward"
        yield Figure(f"incidents, {precision}", found, "incidents", "lower", 0, coverage=coverage, samples=2 * steps)
    control = len(results["control"]["incidents"])
    yield Figure("incidents at tolerance-scale 0.001 (control)", control, "incidents", "higher", 1, samples=3)


def main(arguments: list[str] | None = None) -> None:
    """Run and print one JSON document."""
    asked = options(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="assay-false-alarms-") as temporary:
        keep = (asked.keep or Path(temporary)).absolute()
        keep.mkdir(parents=True, exist_ok=True)
        plan = Runs(SEED, QUICK_STEPS if asked.quick else STEPS, keep / "corpus")
        folder = folder_for(keep, "clean", plan.seed, plan.steps)
        lines = trained(plan, folder, 1 if asked.quick else asked.checks, asked.shards)
    figures = [*clean_figures(lines), *jobs(10 if asked.quick else 200)]
    print(document("false_alarms", figures, threads=1))


if __name__ == "__main__":
    main()
