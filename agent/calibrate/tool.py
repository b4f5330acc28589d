"""`python -m agent.calibrate.tool`, which `assay calibrate` runs: measures, says what it found, writes the table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NoReturn

import torch

from agent.calibrate.training import families as of_training
from diagnostics.calibration.document import Machine, document, text, write
from diagnostics.calibration.measure import QUICK_TRIALS, TRIALS, DeviceUnusable, Plan, measure
from diagnostics.calibration.operators import FAMILIES, Family
from diagnostics.calibration.rules import DTYPES, RULES
from diagnostics.sensors.tolerance import shipped_table

#: As the `assay` command has them: a constant was refused; the command cannot be meant; this machine does not let us.
FAILED, USAGE, CONDITION, INTERRUPTED = 1, 2, 5, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Calibrate and return the exit code; what goes wrong is one line on stderr."""
    options = _parser().parse_args(arguments)
    if options.out is not None and (options.out.is_dir() or not options.out.parent.is_dir()):
        return _told(f"--out {options.out} is not a file in a folder that exists", USAGE)
    try:
        made = _made(options)
        if options.out is not None:
            write(options.out, made)
    except DeviceUnusable as error:
        return _told(str(error), CONDITION)
    except OSError as error:
        return _told(f"--out {options.out}: {error.strerror or error}", CONDITION)
    except KeyboardInterrupt:
        return INTERRUPTED
    sys.stdout.write(text(made) if options.output == "json" else _table(made))
    return FAILED if made["refused"] else 0


class _Parser(argparse.ArgumentParser):
    """Complains in one line, as every command does."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"assay: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="assay calibrate", description="Measure the sensors' tolerances on this machine.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="what to measure (default: cpu)")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), action="append", help="may be given several times (default: all)"
    )
    parser.add_argument(
        "--kernel", choices=list(RULES), action="append", help="with the ones that are measured together (default: all)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the table goes, whole or not at all")
    parser.add_argument("--seed", type=_whole, default=0, help="of the data (default: 0)")
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_TRIALS} trials of each family and dtype instead of {TRIALS}"
    )
    parser.add_argument("-o", "--output", choices=["table", "json"], default="table")
    return parser


def _made(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device)
    dtypes = tuple(DTYPES[name] for name in DTYPES if name in (options.dtype or DTYPES))
    trials = QUICK_TRIALS if options.quick else TRIALS
    plan = Plan(device, dtypes, _chosen(options.kernel), trials, options.seed, shipped_table())
    measured = measure(plan, lambda line: sys.stderr.write(f"{line}\n"))
    return document(measured, Machine.of(device), date.today())


def _chosen(kernels: Sequence[str] | None) -> Mapping[str, Family]:
    known = {**FAMILIES, **of_training()}
    return {name: family for name, family in known.items() if kernels is None or set(kernels) & set(family.kernels)}


def _table(made: Mapping[str, Any]) -> str:
    lines = [f"{'kernel':<18}{'dtype':<10}{'output':>10}{'accumulate':>12}   found"]
    for row in made["kappas"]:
        found = row["provenance"].partition(": ")[2]
        lines.append(f"{row['kernel']:<18}{row['dtype']:<10}{row['output']:>10g}{row['accumulate']:>12g}   {found}")
    for kind in ("skipped", "refused"):
        lines += [f"{row['kernel']:<18}{row['dtype']:<10}{kind:>10}   {row['reason']}" for row in made[kind]]
    return "\n".join(lines) + "\n"


def _whole(given: str) -> int:
    if not given.isascii() or not given.isdigit():
        raise argparse.ArgumentTypeError(f"must be a whole number >= 0, not {given!r}")
    return int(given)


def _told(message: str, code: int) -> int:
    sys.stderr.write(f"assay: {' '.join(message.split())}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
