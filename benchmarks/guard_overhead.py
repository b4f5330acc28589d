"""What the guard costs on a decoder layer's step, and what each setting of it sees for that.

A layer as Llama has it (RMSNorm, attention, SwiGLU) and a head, forward and backward, at hidden sizes 256 and 2048 and
8,192 tokens, fp32 and bf16, 2 threads. Guarded and unguarded steps of one process are taken in turn; a cost is the
median of the rounds' ratios. Beside each cost stand the coverage and the recall of the very same setting: faults by bit
flips in the upper half of the number, its sign apart, in any element of any product of the step. Memory that is
freed is kept for the next step, on both sides.

`--device cuda` takes hidden 2048 and 4096 on a GPU instead, and a stack of layers: each step is timed until the device
is through with it, so that launches cost what they cost a user. fp32 is IEEE there, without TF32.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from agent.training.allocator import keep_memory
from agent.training.spec import AGAIN
from benchmarks._figures import Figure, document
from benchmarks.campaign.intervals import wilson
from diagnostics.faults.models import Fault
from diagnostics.faults.sites import Census
from diagnostics.faults.strike import Blow, Strike
from diagnostics.sensors.coverage import Coverage
from diagnostics.sensors.guard import Guard

THREADS = 2
TOKENS = 8192
WINDOW = 1024
VOCABULARY = 4096
HEAD = 64
WARM = 3
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
    "cpu": (Size(256, TOKENS, 9, 60), Size(2048, TOKENS, 5, 12)),
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


class Layer(nn.Module):
    """[windows, WINDOW, hidden] -> the same."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        wide = 11 * hidden // 4
        self.before, self.between = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.gate, self.up = nn.Linear(hidden, wide, bias=False), nn.Linear(hidden, wide, bias=False)
        self.down = nn.Linear(wide, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        y = self.between(x)
        return x + cast(Tensor, self.down(F.silu(self.gate(y)) * self.up(y)))


class Decoder(nn.Module):
    """int64 [windows, WINDOW] -> the loss of the next token."""

    def __init__(self, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, hidden)
        self.layers = nn.Sequential(*(Layer(hidden) for _ in range(layers)))
        self.last = nn.RMSNorm(hidden)
        self.head = nn.Linear(hidden, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.head(self.last(self.layers(self.embedding(tokens))))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


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


class Bench:
    """Layers in one precision, guarded in each way."""

    def __init__(
        self, hidden: int, dtype: torch.dtype, tokens: int, layers: int = 1, device: torch.device = CPU
    ) -> None:
        torch.manual_seed(hidden)
        self.model = Decoder(hidden, layers).to(device, dtype)
        self.tokens = torch.randint(0, VOCABULARY, (max(1, tokens // WINDOW), min(tokens, WINDOW))).to(device)
        self.guards = {setting.name: Guard(self.model, **setting.options) for setting in SETTINGS}

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

    def costs(self, rounds: int) -> dict[str, list[float]]:
        """Ratios to the unguarded step of the same round, by setting; "deterministic" among them."""
        ways: dict[str, Callable[[], Any]] = {"deterministic": self.deterministic}
        for setting in SETTINGS:
            ways[setting.name] = lambda setting=setting: self.guarded(setting)  # type: ignore[misc]
        ratios: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(WARM + rounds):
            if turn == WARM:  # a budget has been learned by now: coverage is that of the steps that are timed
                for guard in self.guards.values():
                    guard.account = Coverage()
            for name, way in ways.items():
                plain, other = (_seconds(work, self.tokens.device) for work in (self.step, way))
                if turn >= WARM:
                    ratios[name].append(other / plain)
        return ratios

    def recall(self, setting: Setting, faults: int) -> int:
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
                seen += not self.guarded(setting)
        return seen

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


def figures(size: Size, dtype: torch.dtype, device: torch.device) -> Iterable[Figure]:
    """Costs with their coverage, and recall with its interval, of every setting."""
    bench, rounds, faults = Bench(size.hidden, dtype, size.tokens, size.layers, device), size.rounds, size.faults
    name = f"hidden {size.hidden}, " + (f"{size.layers} layers, " if size.layers > 1 else "")
    name += "fp32" if dtype == torch.float32 else "bf16"
    ratios = bench.costs(rounds)
    cost = statistics.median(ratios.pop("deterministic")) - 1
    yield Figure(f"{name}: deterministic kernels alone", cost, "share of a step", "lower", samples=rounds)
    for setting in SETTINGS:
        cost = statistics.median(ratios[setting.name]) - 1
        target = setting.target if size.hidden >= 2048 else None
        yield Figure(
            f"{name}: {setting.name}",
            cost,
            "share of a step",
            "lower",
            target,
            coverage=bench.covered(setting),
            samples=rounds,
        )
        seen = bench.recall(setting, faults)
        low, high = wilson(seen, faults)
        yield Figure(
            f"{name}: recall, {setting.name}",
            seen / faults,
            "share of faults",
            "higher",
            coverage=f"95 % interval {low:.3f}..{high:.3f}; products, upper half of the bits",
            samples=faults,
        )


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
    found: list[Figure] = []
    sizes = QUICK if asked.quick else SIZES[asked.device]
    with Progress(console=Console(file=sys.stderr)) as progress:
        bar = progress.add_task("settings", total=sum(len(size.dtypes) for size in sizes))
        for size in sizes:
            for dtype in size.dtypes:
                found += figures(size, dtype, device)
                progress.advance(bar)
    accelerator = torch.cuda.get_device_name() if device.type == "cuda" else None
    print(document("guard_overhead", found, threads=THREADS, accelerator=accelerator))


if __name__ == "__main__":
    main()
