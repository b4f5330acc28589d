"""What the guard costs on a decoder layer's step, and what each setting of it sees for that.

A layer as Llama has it (RMSNorm, attention, SwiGLU) and a head: AdamW's update, forward and backward, and the gate's
read, at hidden sizes 256 and 2048 and 8,192 tokens, fp32 and bf16, 2 threads. Guarded and unguarded steps of one
process are taken in turn; a cost is the median of the rounds' ratios to the unguarded steps around them. Memory that is
freed is kept for the next step, on both sides. Beside each cost stand, of the same shape, precision and setting,

- the coverage of the timed steps: the share of calls that were judged, whatever a check looks at within a call;
- the recall, by flips of any bit of any element of any result of forward and backward, every operator struck equally
  often; of all operators, of the products among them, and of the products by bits of the upper half, the sign one of
  them. Each fault is judged by the check of its own call and taken back before it is used (`_struck.py`), so that one
  step bears hundreds. A budget draws each call with the chance that it had in the timed steps, on the average;
- the checks' own clock, a share of the step's other time: it meets less of the machine's noise than a ratio of steps;
- what the cost cannot go below, unless the caches hold it: each operand and result of what is checked read once, what
  autograd keeps and the optimizer's state twice, as fast as the same threads read memory. In 16 bits a product takes a
  third or less of fp32's time, but its operands half of fp32's bytes.

"products alone" checks the products of the step and nothing else. A budget's clock is the mean of its rounds, which is
what it promises, and it has more rounds, a plain step and a guarded one in turn, with the median's 95 % interval; where
looking at each operator takes too much of it (the figure is there) it has whole steps watched, now and then, and a
round takes one that is and two that are not. A mark is met only where something is covered.
Meant for a machine that does nothing else: two threads wait for each other at every operator. There all takes some 95
minutes by the times of its steps (17 s and 9 s at hidden 2048); the last figure says what it took. `--only` takes one
size in one precision, named as in the figures.

`--device cuda` takes hidden 2048 and 4096 on a GPU instead, and a stack of layers: each step is timed until the device
is through with it, so that launches cost what they cost a user. fp32 is IEEE there, without TF32.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress

from agent.training.allocator import keep_memory
from benchmarks._figures import Figure, document
from benchmarks._guarded_steps import SETTINGS, Bench, Cost, Covered, Setting
from benchmarks._struck import Flip
from benchmarks._touched import Touched, bytes_a_second
from benchmarks.campaign.intervals import of_median, wilson

THREADS = 2
TOKENS = 8192
UNIT = "share of a step"
#: Marks are for this hidden size and above.
LARGE = 2048


class Size(NamedTuple):
    """What is measured, on how many rounds, and with how many faults for each operator."""

    hidden: int
    tokens: int
    rounds: int
    faults: int
    of_budgets: int = 0
    layers: int = 1
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)


SIZES = {
    "cpu": (  # hidden 2048 takes 17 s a step in fp32, 9 s in bf16: a round of all seven takes minutes
        Size(256, TOKENS, 5, 12, 10),
        Size(2048, TOKENS, 5, 6, 75, dtypes=(torch.bfloat16,)),
        Size(2048, TOKENS, 5, 6, 60, dtypes=(torch.float32,)),
    ),
    "cuda": (  # fp32 steps, without tensor cores, take ten times as long: of fewer rounds
        Size(2048, TOKENS, 9, 12, dtypes=(torch.bfloat16,)),
        Size(4096, TOKENS, 9, 12, dtypes=(torch.bfloat16,)),
        Size(2048, TOKENS, 7, 6, layers=4, dtypes=(torch.bfloat16,)),
        Size(2048, TOKENS, 5, 12, dtypes=(torch.float32,)),
        Size(4096, TOKENS, 3, 12, dtypes=(torch.float32,)),
    ),
}
QUICK = (Size(128, 512, 1, 2),)


def figures(bench: Bench, name: str, size: Size, speed: float) -> Iterable[Figure]:
    """Every setting's cost with its coverage, its limit and its recall; speed: bytes a second."""
    rounds, large = size.rounds, size.hidden >= LARGE
    costs, touched = bench.costs(rounds, size.of_budgets), bench.touched()
    cost, plain = statistics.median(costs.pop("deterministic").ratios) - 1, statistics.median(bench.plain)
    yield Figure(f"{name}: a plain step", plain, "s", "lower", samples=len(bench.plain))
    yield Figure(f"{name}: deterministic kernels alone", cost, UNIT, "lower", samples=rounds)
    yield watching(f"{name}: watching every operator, checking none", bench)
    for setting in SETTINGS:
        seen, called = costs[setting.name], f"{name}: {setting.name}"
        yield of_cost(called, setting, seen, bench.covered(setting), large, clocked=bench.tokens.device.type == "cpu")
        if setting.name == "everything" and bench.tokens.device.type == "cpu":
            own = statistics.median(seen.optimizer)
            yield Figure(f"{called}, of that the optimizer's checks", own, UNIT, "lower", samples=rounds)
        if setting.budget is None:
            yield limit(f"{name}: limit, {setting.name}", setting, bench, touched, speed)
        yield from recalls(name, setting, bench.struck(setting, statistics.mean(seen.shares), size.faults))


def of_cost(called: str, setting: Setting, seen: Cost, covered: Covered, large: bool, clocked: bool) -> Figure:
    """A cost with its coverage, the rounds' range, and what else of it is known.

    Its mark is met by a cost that buys something: coverage that is not nothing; and by the checks' own clock too, since
    a ratio of steps may come out below it by noise.

    clocked: whether the checks' own clock is the device's too; a GPU's is not the host's.
    """
    cost, rounds = statistics.median(seen.ratios) - 1, len(seen.ratios)
    told = f"{covered}; rounds {min(seen.ratios) - 1:.3f}..{max(seen.ratios) - 1:.3f}"
    if (within := of_median(seen.ratios)) is not None:
        told += f", the median's 95 % interval {within[0] - 1:.4f}..{within[1] - 1:.4f}"
    figure = Figure(called, cost, UNIT, "lower", setting.target if large else None, coverage=told)
    figure.samples = rounds
    if clocked:
        middle = statistics.median if setting.budget is None else statistics.fmean  # a budget is kept on the average
        figure.peer, figure.peer_value = "the checks' own clock", middle(seen.own)
        figure.met = figure.met and figure.target is not None and figure.peer_value <= figure.target
    if figure.met and covered.operators == 0:
        figure.met, figure.coverage = False, f"{covered}: what checks nothing meets no mark"
    return figure


def watching(called: str, bench: Bench) -> Figure:
    """What looking at each operator takes: where it is too much of a budget, that one has steps drawn, not calls."""
    told = (called, bench.watching(), UNIT, "lower", None, None, "operators watched", bench.operators)
    return Figure(*told, samples=1)


def limit(called: str, setting: Setting, bench: Bench, touched: Touched, speed: float) -> Figure:
    """What the setting's cost cannot go below, by bytes that must be read."""
    least = touched.identities + setting.again * (touched.again + touched.saved) + 2 * bench.at_rest()
    if setting.products:
        least = touched.products
    value = least / speed / statistics.median(bench.plain)
    return Figure(called, value, UNIT, "lower", None, None, "bytes read", least, samples=1)


def recalls(name: str, setting: Setting, found: Sequence[Flip]) -> Iterable[Figure]:
    """What the setting saw of the faults, with 95 % intervals."""
    products = [flip for flip in found if flip.product]
    chosen = {
        "recall": (found, "any operator of forward and backward, any bit"),
        "recall, products": (products, "any bit"),
        "recall, products, upper half of the bits": ([flip for flip in products if flip.upper], "sign included"),
    }
    for what, (flips, of) in chosen.items():
        seen = sum(flip.seen for flip in flips)
        low, high = wilson(seen, len(flips))
        value = seen / len(flips) if flips else None
        told = f"{seen} of {len(flips)}, 95 % interval {low:.3f}..{high:.3f}; {of}"
        called = f"{name}: {what}, {setting.name}"
        yield Figure(called, value, "share of faults", "higher", coverage=told, samples=len(flips))


def of_size(size: Size, dtype: torch.dtype, device: torch.device, speed: float) -> Iterable[Figure]:
    """All figures of one size in one precision."""
    bench = Bench(size.hidden, dtype, size.tokens, size.layers, device)
    yield from figures(bench, name_of(size, dtype), size, speed)


def name_of(size: Size, dtype: torch.dtype) -> str:
    """What the figures of one size in one precision begin with, e.g. "hidden 2048, bf16"."""
    name = f"hidden {size.hidden}, " + (f"{size.layers} layers, " if size.layers > 1 else "")
    return name + ("fp32" if dtype == torch.float32 else "bf16")


def main() -> None:
    """Run and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the document only (it is the only output anyway)")
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds: does it run, not what is it")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where (default: cpu)")
    parser.add_argument("--only", metavar="NAME", help='one size in one precision, e.g. "hidden 2048, bf16"')
    asked = parser.parse_args()
    sizes = QUICK if asked.quick else SIZES[asked.device]
    columns = {name_of(size, dtype): (size, dtype) for size in sizes for dtype in size.dtypes}
    if asked.only is not None and asked.only not in columns:
        parser.error(f"--only {asked.only!r}: must be one of {', '.join(map(repr, columns))}")
    begin = time.monotonic()
    torch.set_num_threads(THREADS)
    keep_memory()
    device = torch.device(asked.device)
    speed = bytes_a_second(device)
    where = f"{THREADS} threads" if device.type == "cpu" else device.type
    found = [Figure("reading memory", speed / 1e9, "GB/s", "higher", coverage=where, samples=1)]
    with Progress(console=Console(file=sys.stderr)) as progress:
        chosen = columns.values() if asked.only is None else [columns[asked.only]]
        for size, dtype in progress.track(chosen, description="sizes"):
            found += of_size(size, dtype, device, speed)
    found.append(Figure("all of this", time.monotonic() - begin, "s", "lower", samples=1))
    accelerator = torch.cuda.get_device_name() if device.type == "cuda" else None
    print(document("guard_overhead", found, threads=THREADS, accelerator=accelerator))


if __name__ == "__main__":
    main()
