"""What the guard costs on a decoder layer's step, and what each setting of it sees for that.

A layer as Llama has it (RMSNorm, attention, SwiGLU) and a head, forward and backward, at hidden sizes 256 and 2048 and
8,192 tokens, fp32 and bf16, 2 threads. Guarded and unguarded steps of one process are taken in turn; a cost is the
median of the rounds' ratios to the unguarded steps around them. Memory that is freed is kept for the next step, on both
sides. Beside each cost stand

- the coverage of the same setting;
- the recall of the same setting, on 1,024 tokens, by flips of a bit in the upper half of the number, its sign apart, in
  any element of any product of the step. Without a budget all products are checked, and by the same check whatever else
  is: faults are dealt to those settings in turn, and counted together;
- the checks' own clock, a share of the step's other time: it meets less of the machine's noise than a ratio of steps;
- what the cost cannot go below, unless the caches hold it: each operand and result of what is checked read once, and
  what autograd keeps twice, as fast as the same threads read memory. In 16 bits a product takes a third or less of
  fp32's time, but its operands half of fp32's bytes.

Meant for a machine that does nothing else: two threads wait for each other at every operator.

`--device cuda` takes hidden 2048 and 4096 on a GPU instead, and a stack of layers: each step is timed until the device
is through with it, so that launches cost what they cost a user. fp32 is IEEE there, without TF32.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress

from agent.training.allocator import keep_memory
from agent.training.spec import AGAIN
from benchmarks._decoder import VOCABULARY, WINDOW, Decoder
from benchmarks._figures import Figure, document
from benchmarks._touched import Touched, bytes_a_second
from benchmarks.campaign.intervals import wilson
from diagnostics.faults.models import Fault
from diagnostics.faults.sites import Census
from diagnostics.faults.strike import Blow, Strike
from diagnostics.sensors.coverage import Coverage
from diagnostics.sensors.guard import Guard
from diagnostics.sensors.outlay import seconds_an_operator

THREADS = 2
TOKENS = 8192
# Steps before the first round: the first plain one asks for memory, and a budget learns its share in two of its own.
WARM = 2
#: Marks: of everything checked, and of a sample, at hidden 2048.
FULL, SAMPLED = 0.02, 0.008
CPU = torch.device("cpu")


class Size(NamedTuple):
    """What is measured, and on how many rounds and faults."""

    hidden: int
    tokens: int
    rounds: int
    faults: int
    layers: int = 1
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)


SIZES = {
    "cpu": (  # hidden 2048 takes 28 s of one Zen 5 core a step in fp32, 8 s in bf16: of few rounds, all takes minutes
        Size(256, TOKENS, 5, 40),
        Size(2048, TOKENS, 3, 24, dtypes=(torch.bfloat16,)),
        Size(2048, TOKENS, 2, 12, dtypes=(torch.float32,)),
    ),
    "cuda": (  # fp32 steps, without tensor cores, take ten times as long: of fewer rounds and faults
        Size(2048, TOKENS, 9, 60, dtypes=(torch.bfloat16,)),
        Size(4096, TOKENS, 9, 60, dtypes=(torch.bfloat16,)),
        Size(2048, TOKENS, 7, 40, 4, (torch.bfloat16,)),
        Size(2048, TOKENS, 5, 24, dtypes=(torch.float32,)),
        Size(4096, TOKENS, 3, 12, dtypes=(torch.float32,)),
    ),
}
QUICK = (Size(128, 512, 1, 4),)
_PRODUCTS = ("aten.mm.default", "aten.addmm.default", "aten.bmm.default")


@dataclass(frozen=True)
class Setting:
    """One way to guard."""

    name: str
    options: dict[str, float]
    target: float | None = None


SETTINGS = (
    Setting("everything", {"again": 1.0}, FULL),
    Setting("as a job", {"again": AGAIN}),
    Setting("identities only", {"again": 0.0}),
    Setting("a budget of 0.8 %", {"budget": SAMPLED}, SAMPLED),
)


class Cost(NamedTuple):
    """Of one way, by round."""

    ratios: list[float]  # to the plain steps before and after
    own: list[float]  # by the checks' own clock, a share of the step's other time


class Bench:
    """Layers in one precision, guarded in each way."""

    def __init__(
        self, hidden: int, dtype: torch.dtype, tokens: int, layers: int = 1, device: torch.device = CPU
    ) -> None:
        torch.manual_seed(hidden)
        self.model = Decoder(hidden, layers).to(device, dtype)
        self.tokens = torch.randint(0, VOCABULARY, (max(1, tokens // WINDOW), min(tokens, WINDOW))).to(device)
        self.guards = {setting.name: Guard(self.model, **setting.options) for setting in SETTINGS}
        self.plain: list[float] = []  # seconds of the rounds' unguarded steps

    def step(self) -> None:
        """Forward and backward, with gradients made anew."""
        self.model.zero_grad()
        self.model(self.tokens).backward()

    def guarded(self, setting: Setting) -> bool:
        """The same under a guard; whether it was clean."""
        with self.guards[setting.name].step() as step:
            self.step()
        return step.clean

    def deterministic(self) -> None:
        """The same with torch's own demand that every kernel be repeatable."""
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            self.step()
        finally:
            torch.use_deterministic_algorithms(False)

    def costs(self, rounds: int) -> dict[str, Cost]:
        """By setting, from rounds of one step each between plain ones; "deterministic" among them."""
        ways: dict[str, Callable[[], Any]] = {"deterministic": self.deterministic}
        for setting in SETTINGS:
            ways[setting.name] = lambda setting=setting: self.guarded(setting)  # type: ignore[misc]
        device = self.tokens.device
        self._warm()
        costs = {name: Cost([], []) for name in ways}
        before = _seconds(self.step, device)
        for _ in range(rounds):
            took = {name: _seconds(way, device) for name, way in ways.items()}
            after = _seconds(self.step, device)
            for name, seconds in took.items():
                costs[name].ratios.append(2 * seconds / (before + after))
                if name in self.guards:
                    costs[name].own.append(self._own(name, seconds))
            self.plain.append(after)
            before = after
        return costs

    def _warm(self) -> None:
        """What is timed afterwards has its memory, and a budget its share: coverage is that of the timed steps."""
        self.step()
        for setting in SETTINGS:
            for _ in range(WARM if "budget" in setting.options else 0):
                self.guarded(setting)
        for guard in self.guards.values():
            guard.account = Coverage()

    def _own(self, name: str, seconds: float) -> float:
        """The share of the last guarded step's other time that its checks took, and watching its operators."""
        step = self.guards[name].current
        assert step is not None
        checks = step.seconds + step.operators * seconds_an_operator(False)
        return checks / (seconds - checks)

    def recall(self, settings: Sequence[Setting], faults: int) -> int:
        """How many of so many faults alarm; each in a step of its own, at products spread over the step."""
        with Census(self.model) as census:
            self.step()
        products = [site for site in census.sites if site.operator in _PRODUCTS]
        seen = 0
        for number in range(faults):
            site = products[number * len(products) // faults]
            width = 8 * torch.empty((), dtype=site.results[0].dtype).element_size()
            bit = random.Random(number).randrange(width // 2, width - 1)
            blow = Blow(site.operator, Fault("bitflip", number, bit=bit))
            with Strike({site.number: blow}, lambda *_: None):
                seen += not self.guarded(settings[number % len(settings)])
        return seen

    def touched(self) -> Touched:
        """What the checks of a step read at least."""
        with Touched() as touched:
            self.step()
        return touched

    def covered(self, setting: Setting) -> str:
        """Share of calls that were checked, of products and of all operators."""
        rows = self.guards[setting.name].coverage()
        products = [row for row in rows if row.operation in ("mm", "addmm", "bmm")]
        parts = ((products, "of products"), (rows, "of all operators"))
        return ", ".join(f"{_share(chosen):.3f} {what}" for chosen, what in parts)


def _share(rows: list[Any]) -> float:
    return sum(row.checked * row.calls for row in rows) / max(1, sum(row.calls for row in rows))


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def figures(bench: Bench, name: str, large: bool, rounds: int, speed: float) -> Iterable[Figure]:
    """Every setting's cost with its coverage, and the limit of each; speed: bytes a second."""
    costs, touched = bench.costs(rounds), bench.touched()
    cost = statistics.median(costs.pop("deterministic").ratios) - 1
    unit = "share of a step"
    yield Figure(f"{name}: a plain step", statistics.median(bench.plain), "s", "lower", samples=rounds)
    yield Figure(f"{name}: deterministic kernels alone", cost, unit, "lower", samples=rounds)
    for setting in SETTINGS:
        seen, target = costs[setting.name], setting.target if large else None
        own, coverage = statistics.median(seen.own), bench.covered(setting)
        cost = statistics.median(seen.ratios) - 1
        clock = "the checks' own clock" if bench.tokens.device.type == "cpu" else None  # a GPU's is not the host's
        told = (f"{name}: {setting.name}", cost, unit, "lower", target, None, clock, own if clock else None)
        yield Figure(*told, coverage, rounds)
        share = setting.options.get("again")
        if share is not None:
            least = touched.identities + share * (touched.again + touched.saved)
            limit = least / speed / statistics.median(bench.plain)
            told = (f"{name}: limit, {setting.name}", limit, unit, "lower", None, None, "bytes read", least)
            yield Figure(*told, None, 1)


def recalls(bench: Bench, name: str, faults: int) -> Iterable[Figure]:
    """Recall with its interval: of the settings that check all products, and of each that draws them."""
    drawn = [[setting] for setting in SETTINGS if "budget" in setting.options]
    for settings in ([setting for setting in SETTINGS if "again" in setting.options], *drawn):
        seen = bench.recall(settings, faults)
        low, high = wilson(seen, faults)
        called = "without a budget" if len(settings) > 1 else settings[0].name
        said = f"95 % interval {low:.3f}..{high:.3f}; products, upper half of the bits"
        told = (f"{name}: recall, {called}", seen / faults, "share of faults", "higher")
        yield Figure(*told, coverage=said, samples=faults)


def of_size(size: Size, dtype: torch.dtype, device: torch.device, speed: float) -> Iterable[Figure]:
    """All figures of one size in one precision. Recall's steps are smaller, and drawn with the share of the others."""
    name = f"hidden {size.hidden}, " + (f"{size.layers} layers, " if size.layers > 1 else "")
    name += "fp32" if dtype == torch.float32 else "bf16"
    bench = Bench(size.hidden, dtype, size.tokens, size.layers, device)
    yield from figures(bench, name, size.hidden >= 2048, size.rounds, speed)
    small = Bench(size.hidden, dtype, min(size.tokens, WINDOW), size.layers, device)
    for called, guard in small.guards.items():
        guard.sampler.budget, guard.sampler.share = None, bench.guards[called].sampler.share
    yield from recalls(small, name, size.faults)


def main() -> None:
    """Run and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the document only (it is the only output anyway)")
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds: does it run, not what is it")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where (default: cpu)")
    asked = parser.parse_args()
    torch.set_num_threads(THREADS)
    keep_memory()
    device = torch.device(asked.device)
    sizes, speed = QUICK if asked.quick else SIZES[asked.device], bytes_a_second(device)
    where = f"{THREADS} threads" if device.type == "cpu" else device.type
    found = [Figure("reading memory", speed / 1e9, "GB/s", "higher", coverage=where, samples=1)]
    with Progress(console=Console(file=sys.stderr)) as progress:
        bar = progress.add_task("settings", total=sum(len(size.dtypes) for size in sizes))
        for size in sizes:
            for dtype in size.dtypes:
                found += of_size(size, dtype, device, speed)
                progress.advance(bar)
    accelerator = torch.cuda.get_device_name() if device.type == "cuda" else None
    print(document("guard_overhead", found, threads=THREADS, accelerator=accelerator))


if __name__ == "__main__":
    main()
