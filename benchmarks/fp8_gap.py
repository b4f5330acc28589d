"""Does FP8 learn as BF16 does: `small` on the same data and initial weights, seed by seed, with its noise and controls.

What is claimed is a difference, so what counts is its interval. Beside it stand the noise floor, the same difference
between BF16 and BF16 from weights changed by less than bf16 sees, and a control that must be found out.
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from benchmarks._figures import Figure, document
from benchmarks._fp8_training import Blockwise, Coarse, PerTensor, Regime, Variant, train

#: Section 3.3 of the paper: FP8 stayed within 0.25 % of BF16's loss.
TARGET = 0.0025
#: Losses of the last steps that are averaged: single steps differ by their samples.
LAST = 50
#: Half the paper's peak rate (2.2e-4, section 4.2). At the preset's, 1e-3, two runs of BF16 from weights 1e-4 apart
#: ended 2.7 % apart, at this one 0.03 % (docs/fp8.md has what was tried): 0.25 % cannot be seen there, and can here.
REGIME = Regime(steps=300, peak_lr=1.1e-4, warmup=60)
BASE, FLOOR, OURS = "bf16", "bf16 from stirred weights", "fp8"
MUST_FAIL, ONE_SCALE = "fp8 without mantissas", "per-tensor fp8"
VARIANTS = {
    BASE: Variant("bf16"),
    FLOOR: Variant("bf16", stirred=True),
    OURS: Variant("fp8", Blockwise),
    MUST_FAIL: Variant("fp8", Coarse),
    ONE_SCALE: Variant("fp8", PerTensor),
}
#: Runs of each variant, from seed 1 on.
SEEDS = {BASE: 4, FLOOR: 3, OURS: 4, MUST_FAIL: 3, ONE_SCALE: 3}
#: Student's t, two-sided 95 %, for 1, 2, ... degrees of freedom (any table, e.g. NIST/SEMATECH e-Handbook 1.3.6.7.2):
#: with few seeds the standard error is itself uncertain, and twice of it is not 95 %.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
#: Runs beside each other, each on one thread.
WORKERS = 2

Losses = dict[tuple[str, int], list[float]]


def measure(jobs: list[tuple[str, int]], regime: Regime, folder: Path) -> Losses:
    """Losses by (variant, seed). Runs that `folder` has are taken from there, others are trained and kept in it."""
    paths = {job: kept_at(folder, *job, regime) for job in jobs}
    found = {job: json.loads(path.read_text())["losses"] for job, path in paths.items() if path.exists()}
    missing = [(*job, regime, str(path)) for job, path in paths.items() if job not in found]
    with (
        multiprocessing.get_context("spawn").Pool(WORKERS) as pool,
        Progress(console=Console(file=sys.stderr)) as progress,
    ):
        bar = progress.add_task("training", total=len(jobs), completed=len(found))
        for name, seed, losses in pool.imap_unordered(_run, missing):
            found[name, seed] = losses
            progress.console.print(f"{name}, seed {seed}: {statistics.fmean(losses[-LAST:]):.5f}")
            progress.advance(bar)
    return found


def _run(job: tuple[str, int, Regime, str]) -> tuple[str, int, list[float]]:
    name, seed, regime, path = job
    losses = train(VARIANTS[name], seed, regime, str(Path(path).parent))
    part = Path(path + ".part")
    part.write_text(json.dumps({"variant": name, "seed": seed, "regime": asdict(regime), "losses": losses}))
    part.rename(path)
    return name, seed, losses


def kept_at(folder: Path, name: str, seed: int, regime: Regime) -> Path:
    """Named by everything that the losses depend on and that may change from call to call, the code included."""
    state = hashlib.blake2b(repr((VARIANTS[name], seed, regime)).encode(), digest_size=8)
    root = Path(__file__).parent.parent
    code = [*root.glob("agent/model/**/*.py"), *root.glob("agent/training/*.py"), root / "benchmarks/_fp8_training.py"]
    for path in sorted(code):
        state.update(path.read_bytes())
    return folder / f"{name.replace(' ', '-')}-{seed}-{state.hexdigest()}.json"


def gaps(found: Losses, name: str, base: str = BASE) -> dict[int, float]:
    """By seed: the variant's mean loss of the last steps over that of `base`, less 1."""
    ends = {job: statistics.fmean(losses[-LAST:]) for job, losses in found.items()}
    return {seed: ends[name, seed] / ends[base, seed] - 1 for which, seed in sorted(found) if which == name}


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean, its standard error, and half the width of its 95 % interval, of independent values (two at least)."""
    error = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), error, STUDENT[len(values) - 2] * error


def figures(found: Losses, whole: bool) -> Iterator[Figure]:
    """Losses, then gaps to BF16; no target where the run is too short to mean anything."""
    for name in VARIANTS:
        runs = [losses for (which, _), losses in found.items() if which == name]
        mean = statistics.fmean(statistics.fmean(losses[-LAST:]) for losses in runs)
        yield Figure(f"loss of {name}, mean of the last {LAST} steps", mean, "nats/byte", "lower", samples=len(runs))
    base = [statistics.fmean(losses[-LAST:]) for (which, _), losses in found.items() if which == BASE]
    if len(base) > 1:
        spread = statistics.stdev(base) / statistics.fmean(base)
        yield Figure("bf16's own spread over seeds", spread, "share", "lower", samples=len(base))
    for name in VARIANTS:
        if name != BASE:
            yield from _gap(name, BASE, gaps(found, name), whole)
    yield from _gap(ONE_SCALE, OURS, gaps(found, ONE_SCALE, OURS), whole)


def _gap(name: str, base: str, by_seed: dict[int, float], whole: bool) -> Iterator[Figure]:
    title = f"relative loss gap to {base}, {name}"
    for seed, gap in by_seed.items():
        yield Figure(f"{title}, seed {seed}", gap, "share", "lower", samples=1)
    if len(by_seed) < 2:
        return
    count = len(by_seed)
    mean, error, half = interval(list(by_seed.values()))
    target = TARGET if whole and name == OURS else None
    found_out = TARGET if whole and name == MUST_FAIL else None
    yield Figure(f"{title}, mean over seeds", mean, "share", "lower", samples=count)
    yield Figure(f"{title}, size of that mean", abs(mean), "share", "lower", target, samples=count)
    yield Figure(f"{title}, standard error of that mean", error, "share", "lower", samples=count)
    yield Figure(f"{title}, lower end of the 95 % interval", mean - half, "share", "higher", found_out, samples=count)
    yield Figure(f"{title}, upper end of the 95 % interval", mean + half, "share", "lower", samples=count)
    yield Figure(f"{title}, farthest end of the interval", abs(mean) + half, "share", "lower", target, samples=count)


def main() -> None:
    """Run and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the document only (it is the only output anyway)")
    parser.add_argument("--quick", action="store_true", help="a fraction of the work: does it run, not what is it")
    parser.add_argument("--keep", type=Path, help="folder of finished runs: those that it has are not run again")
    asked = parser.parse_args()
    regime = Regime(6, REGIME.peak_lr, REGIME.warmup) if asked.quick else REGIME
    jobs = [(name, seed) for name, seeds in SEEDS.items() for seed in range(1, (1 if asked.quick else seeds) + 1)]
    with tempfile.TemporaryDirectory(prefix="assay-fp8-gap-") as temporary:
        folder = asked.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found = measure(sorted(jobs, key=lambda job: job[1]), regime, folder)
    print(document("fp8_gap", list(figures(found, not asked.quick)), threads=1))


if __name__ == "__main__":
    main()
