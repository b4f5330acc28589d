"""What the sensors see, how often they cry wolf, and what the hash costs: the figures of docs/sensing.md.

One process, one thread, the real `tiny` model. Faults are injected one a step, below the sensors, in the operator's own
result; the tolerances are the shipped ones, calibrated on other seeds.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from agent.model import PRESETS, V3
from agent.training.engine import loss_scale
from benchmarks._figures import Figure, document
from benchmarks.campaign.intervals import wilson
from diagnostics.faults.inject import Injector
from diagnostics.faults.spec import OPS, FaultSpec, Kind
from diagnostics.sensors.digest import digest, digest_bytes
from diagnostics.sensors.guard import Guard

PRESET = PRESETS["tiny"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
# The faults that must never escape (fault, bit); 30 is the drill's default bit.
ABOVE: list[tuple[Kind, int]] = [("tile", 30), ("stuck", 30), ("scale", 30), ("bitflip", 30)]
FP32_BITS = (20, 21, 22, 23, 26, 31)
# bf16 rounds away what an fp32 check would see: these are measured, without a target.
BF16_BITS = (16, 18, 20, 21, 22, 23, 26, 31)
# FP8 products are checked as fp32 sums, before they are rounded to bf16: what fp32 must see, they must.
BITS = {"fp32": FP32_BITS, "bf16": BF16_BITS, "fp8": FP32_BITS}
SEED = 20_000  # none of the seeds the tolerances were calibrated on
HASH_BYTES = 64 << 20  # well outside the caches


class Bench:
    """One model in one precision, with its guard."""

    def __init__(self, precision: str) -> None:
        self.precision = precision
        self.model = V3(PRESET.config, compute_dtype=DTYPES[precision])
        self.model.initialise(SEED)
        self.guard = Guard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=PRESET.peak_lr, betas=(0.9, 0.95))
        self.scale = loss_scale(PRESET) if precision == "fp8" else 1.0

    def tokens(self, seed: int) -> torch.Tensor:
        """Repetitive tokens int64 [batch, time]: a loss that falls, so that later steps look like training."""
        generator = torch.Generator().manual_seed(SEED + seed)
        words = torch.randint(0, 256, (32,), generator=torch.Generator().manual_seed(1))
        return words[torch.randint(0, 32, (PRESET.micro_batch, PRESET.sample_len), generator=generator)]

    def backward(self, tokens: torch.Tensor) -> None:
        """Forward and backward, of a scaled loss in FP8, as the engine makes them."""
        total = self.model.loss(tokens).total
        torch.autograd.backward(total, total.new_full((), self.scale))

    def is_seen(self, spec: FaultSpec) -> bool:
        """Whether an alarm names the very product that was corrupted."""
        self.model.zero_grad()
        injector = Injector(self.model, spec)
        with injector, self.guard.step(SEED + spec.seed) as step:
            self.backward(self.tokens(spec.seed))
        if injector.fired is None:
            raise RuntimeError(f"{spec} did not fire")
        place = (injector.fired["module"], spec.op)
        return place in {(alarm.module, alarm.pass_) for alarm in step.alarms}

    def clean_step(self, key: int) -> tuple[int, int]:
        """Train one step; (checks, alarms)."""
        self.optimizer.zero_grad()
        with self.guard.step(SEED + key) as step:
            self.backward(self.tokens(key))
        alarms = len(step.alarms)
        if self.scale != 1.0:
            for parameter in self.model.parameters():
                if parameter.grad is not None:  # an expert without tokens has none
                    parameter.grad.mul_(1 / self.scale)
        self.optimizer.step()
        return step.checks, alarms

    def seconds(self, guarded: bool, key: int) -> float:
        """One forward and backward."""
        self.model.zero_grad()
        tokens = self.tokens(key)
        begin = time.perf_counter()
        if guarded:
            with self.guard.step(key) as step:
                self.backward(tokens)
            if not step.clean:
                raise RuntimeError(f"false alarm: {step.alarms[0]}")
        else:
            self.backward(tokens)
        return time.perf_counter() - begin


def recall(bench: Bench, each: int, tick: Callable[[], None]) -> Iterator[Figure]:
    """Share of faults seen, by pass and fault; last, what all that must be seen prove together."""
    cases: list[tuple[Kind, int]] = [*ABOVE, *(("bitflip", bit) for bit in BITS[bench.precision])]
    all_seen = all_cast = 0
    for (number, (fault, bit)), op in itertools.product(enumerate(cases), OPS):
        seeds = range(number * each, (number + 1) * each)  # no two bits are flipped in the same element
        seen = sum(bench.is_seen(FaultSpec(None, op, fault, bit, seed)) for seed in seeds)
        tick()
        must = bench.precision != "bf16" or (fault, bit) in ABOVE
        all_seen, all_cast = all_seen + must * seen, all_cast + must * each
        name = f"recall {bench.precision} {op} {fault}" + (f" bit {bit}" if fault == "bitflip" else "")
        yield Figure(name, seen / each, "share", "higher", 1.0 if must else None, coverage="every linear", samples=each)
    name = f"recall {bench.precision} above the floor, 95 % lower bound"
    yield Figure(name, wilson(all_seen, all_cast)[0], "share", "higher", coverage="every linear", samples=all_cast)


def false_alarms(bench: Bench, steps: int, tick: Callable[[], None]) -> Iterator[Figure]:
    """Alarms in clean training from the first step on, and the rate that their number proves."""
    checks = alarms = 0
    for key in range(steps):
        made, raised = bench.clean_step(key)
        checks, alarms = checks + made, alarms + raised
        tick()
    name = f"false alarms {bench.precision}"
    yield Figure(name, alarms, "alarms", "lower", 0.0, coverage="every linear", samples=checks)
    most = wilson(alarms, checks)[1] * 1e6
    name = f"{name} per 1e6 clean checks, 95 % upper bound"
    yield Figure(name, most, "alarms", "lower", 1.0, coverage="every linear", samples=checks)


def overhead(bench: Bench, pairs: int, tick: Callable[[], None]) -> Figure:
    """Guarded over unguarded forward and backward, interleaved; the median of ratios."""
    ratios = []
    for key in range(pairs):
        bare = bench.seconds(False, key)
        ratios.append(bench.seconds(True, key) / bare)
        tick()
    value = statistics.median(ratios) - 1
    return Figure(
        f"guard overhead {bench.precision} tiny", value, "share", "lower", coverage="every linear", samples=pairs
    )


def rate(work: Callable[[], object], size: int, rounds: int) -> float:
    """GB/s, the median of `rounds`."""
    work()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return size / statistics.median(times) / 1e9


def hash_speed(rounds: int) -> Iterator[Figure]:
    """The hash against a memory copy of the same bytes, each on one thread."""
    source = torch.randn(HASH_BYTES // 4)
    target = torch.empty_like(source)
    copy = rate(lambda: target.copy_(source), HASH_BYTES, rounds)
    hashed = rate(lambda: digest(source), HASH_BYTES, rounds)
    yield Figure("digest of a tensor", hashed, "GB/s", "higher", copy / 2, None, "memcpy", copy, samples=rounds)


def hash_misses(trials: int) -> Iterator[Figure]:
    """The same bit flipped in 32 lanes: misses of the hash, and of the XOR fold it replaces."""
    rng = np.random.default_rng(SEED)
    words = rng.standard_normal(4096, dtype=np.float32).view(np.int32)
    clean, folded = digest_bytes(words.tobytes()), int(np.bitwise_xor.reduce(words))
    missed = missed_by_xor = 0
    for _ in range(trials):
        at, bit = int(rng.integers(0, 4096 - 32)), int(rng.integers(0, 31))
        bad = words.copy()
        bad[at : at + 32] ^= np.int32(1 << bit)
        missed += digest_bytes(bad.tobytes()) == clean
        missed_by_xor += int(np.bitwise_xor.reduce(bad)) == folded
    yield Figure(
        "hash misses, one bit in 32 lanes",
        missed,
        "misses",
        "lower",
        0.0,
        None,
        "XOR fold",
        missed_by_xor,
        None,
        trials,
    )


def main() -> None:
    """Run and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the document only (it is the only output anyway)")
    parser.add_argument("--quick", action="store_true", help="few samples: does it run, not what is it")
    quick = parser.parse_args().quick
    each, steps, pairs, trials = (2, 5, 5, 500) if quick else (20, 200, 20, 20_000)
    torch.set_num_threads(1)
    figures: list[Figure] = []
    with Progress(console=Console(file=sys.stderr)) as progress:
        cases = sum(3 * (len(ABOVE) + len(bits)) for bits in BITS.values())
        bar = progress.add_task("sensors", total=cases + len(BITS) * (steps + pairs))

        def tick() -> None:
            progress.advance(bar)

        for precision in DTYPES:
            bench = Bench(precision)
            figures.extend(false_alarms(bench, steps, tick))
            figures.append(overhead(bench, pairs, tick))
            figures.extend(recall(bench, each, tick))
        figures.extend(hash_speed(5 if quick else 20))
        figures.extend(hash_misses(trials))
    print(document("sensor_visibility", figures, threads=1))


if __name__ == "__main__":
    main()
