"""Training speed of the V3 model on this machine, beside Hugging Face's on the same shape, tokens and optimizer.

`small` with a vocabulary of 4,096 and no MTP module (8.5 M parameters), 4 x 256 tokens, 2 threads. A step is forward,
backward, clipping and fused AdamW. Each variant has a process of its own, set up as its users run it, and all take a
few steps in turn, so that whatever else the machine does falls on all of them. `--vs-hf` adds Hugging Face; without
transformers its figures are null and the exit code is 5.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from agent.training.allocator import keep_memory
from benchmarks import _parts, _steps
from benchmarks._figures import Figure, document
from benchmarks._steps import COMPILED, COMPILED_KEEPING, DEFAULT, OURS, TOKENS, Step, Variant

THREADS = 2
MISSING_PEER = 5
WARM = 3
#: Steps that a variant takes in a row; the first finds another's data in the caches.
RUN = 3
PROFILED = 3  # steps taken apart: the profiler's own bookkeeping takes seconds for each
#: Hugging Face's figures, tokens/s, on the machine that the targets were set with.
NOTED = {"HF default, fp32": 4483.0, "HF autocast bf16": 4969.0, "HF compiled, bf16": 6543.0}


def fastest(candidates: Sequence[Variant], steps: int, tick: Callable[[], None]) -> Variant:
    """The variant with the least time for a step, of a few in turn."""
    made = [(variant, _steps.step_of(variant)[1]) for variant in candidates]
    best = {variant: float("inf") for variant in candidates}
    for turn in range(WARM + steps):
        for variant, step in made:
            taken = _timed(step)
            if turn >= WARM:
                best[variant] = min(best[variant], taken)
        tick()
    return min(best, key=lambda variant: best[variant])


class Alone:
    """A variant in a process of its own: nothing that one side sets reaches another."""

    def __init__(self, variant: Variant) -> None:
        context = multiprocessing.get_context("spawn")
        self._line, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(variant, theirs), daemon=True)
        self._process.start()

    def run(self, steps: int) -> list[float]:
        """Seconds of so many steps in a row."""
        self._line.send(steps)
        taken: list[float] = self._line.recv()
        return taken

    def close(self) -> None:
        """End the process."""
        self._line.send(0)
        self._process.join()


def _serve(variant: Variant, line: Connection[Any, Any]) -> None:
    step = _steps.alone(variant, THREADS)
    while steps := line.recv():
        line.send([_timed(step) for _ in range(steps)])


def in_turn(variants: Sequence[Variant], rounds: int, tick: Callable[[], None]) -> dict[str, list[float]]:
    """Seconds of a step by the variant's name, one for each round: the faster of the last two of a run's steps."""
    made = {variant.name: Alone(variant) for variant in variants}
    taken: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(1 + rounds):
        for name, one in made.items():
            seconds = one.run(RUN)
            if turn >= 1:
                taken[name].append(min(seconds[1:]))
        tick()
    for one in made.values():
        one.close()
    return taken


def _timed(step: Step) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def speeds(taken: dict[str, list[float]]) -> list[Figure]:
    """Median tokens/s of each variant, and the marks that ours must reach."""
    figures = []
    for name, seconds in taken.items():
        noted = NOTED.get(name)
        figures.append(
            Figure(
                f"speed, {name}",
                TOKENS / statistics.median(seconds),
                "tokens/s",
                "higher",
                peer="the same where the targets were set" if noted else None,
                peer_value=noted,
                samples=len(seconds),
            )
        )
    return figures


def ratios(taken: dict[str, list[float]], peers: bool) -> list[Figure]:
    """Medians over rounds of a peer's seconds over ours, each round's steps lying side by side."""
    marks = (
        ("ours bf16", "HF default, fp32", 2.0),
        ("ours bf16", "HF compiled, bf16", 1.4),
        ("ours bf16", "HF compiled, bf16, keeping memory", None),
        ("ours bf16", "HF autocast bf16", None),
        ("ours fp32", "HF default, fp32", 1.0),
        ("ours bf16, sensors on", "HF default, fp32", None),
        ("ours fp32, sensors on", "HF default, fp32", None),
    )
    figures = []
    for name, peer, target in marks if peers else ():
        value = None
        if peer in taken:
            value = statistics.median(theirs / own for theirs, own in zip(taken[peer], taken[name], strict=True))
        figures.append(Figure(f"{name} over {peer}", value, "times", "higher", target, peer=peer))
    for kind in ("fp32", "bf16"):
        pairs = zip(taken[f"ours {kind}, sensors on"], taken[f"ours {kind}"], strict=True)
        cost = statistics.median(on / off for on, off in pairs) - 1
        figures.append(
            Figure(
                f"sensors' share of a step, {kind}",
                cost,
                "share",
                "lower",
                coverage="every product; a sixteenth of moves and element-wise work",
            )
        )
    return figures


def parts(repeats: int) -> list[Figure]:
    """The bf16 and fp32 step taken apart, and what its products alone would take."""
    figures = []
    for variant in (OURS[0], OURS[2]):
        _, step = _steps.step_of(variant)
        for _ in range(WARM):
            step()
        kind = variant.name.removeprefix("ours ")
        for name, seconds in _parts.shares(step, PROFILED).items():
            figures.append(Figure(f"time of a step, {kind}: {name}", seconds * 1e3, "ms", "lower", samples=PROFILED))
        made = _parts.products(step)
        ceiling, work = _parts.alone(made, 3 * repeats), _parts.operations(made)
        square = _parts.rate(variant.dtype or torch.float32, 1024, 3 * repeats)
        figures += [
            Figure(f"products of a step, {kind}", work * 1e-9, "GFLOP", "lower"),
            Figure(f"products of a step alone, {kind}", ceiling * 1e3, "ms", "lower"),
            Figure(f"ceiling by the products' own speed, {kind}", TOKENS / ceiling, "tokens/s", "higher"),
            Figure(f"product of 1024 x 1024 matrices, {kind}", square * 1e-9, "GFLOP/s", "higher"),
            Figure(f"ceiling at that speed, {kind}", TOKENS * square / work, "tokens/s", "higher"),
        ]
    return figures


def memory(variants: Sequence[Variant], peers: bool) -> list[Figure]:
    """Peak resident memory of steps over that of the idle model, each in a process of its own."""
    grown = {}
    context = multiprocessing.get_context("spawn")
    for variant in variants:
        with context.Pool(1) as alone:
            grown[variant.name] = alone.apply(_peak_growth, (variant,)) / 2**20
    figures = [Figure(f"memory of a step, {name}", value, "MiB", "lower") for name, value in grown.items()]
    for name, peer in (("ours fp32", "HF default, fp32"), ("ours bf16", "HF autocast bf16")) if peers else ():
        value = grown[name] / grown[peer] if peer in grown else None
        figures.append(Figure(f"memory of a step, {name} over {peer}", value, "share", "lower", 1.0, peer=peer))
    return figures


def _peak_growth(variant: Variant) -> int:
    """Bytes. The optimizer's moments and the gradients are part of it, for either side."""
    step = _steps.alone(variant, THREADS)
    Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the peak so far
    idle = _resident("VmRSS")
    for _ in range(WARM):
        step()
    return _resident("VmHWM") - idle


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def peers_of(quick: bool, tick: Callable[[], None]) -> list[Variant]:
    """Hugging Face as it comes, at its best under autocast, and compiled."""
    ways = [
        Variant("HF autocast bf16", autocast=True, experts=experts, attention=attention)
        for experts in _steps.EXPERTS
        for attention in _steps.ATTENTION
    ]
    best = fastest(ways, 1 if quick else 5, tick)
    return [DEFAULT, best] if quick else [DEFAULT, best, COMPILED, COMPILED_KEEPING]


def main() -> int:
    """Run and print one JSON document; 5 where the peer that was asked for is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the document only (it is the only output anyway)")
    parser.add_argument("--quick", action="store_true", help="few steps, nothing compiled: does it run, not what is it")
    parser.add_argument("--vs-hf", action="store_true", help="beside Hugging Face's transformers")
    flags = parser.parse_args()
    torch.set_num_threads(THREADS)
    rounds, repeats = (2, 2) if flags.quick else (15, 8)
    version = _steps.transformers_version() if flags.vs_hf else None
    with Progress(console=Console(file=sys.stderr)) as progress:
        bar = progress.add_task("steps", total=WARM + (1 if flags.quick else 5) + 1 + rounds + 2)

        def tick() -> None:
            progress.advance(bar)

        peers = peers_of(flags.quick, tick) if version else []
        taken = in_turn([*peers, *OURS], rounds, tick)
        keep_memory()  # what follows in this process is ours
        figures = speeds(taken) + ratios(taken, flags.vs_hf) + parts(repeats)
        tick()
        figures += memory([*(p for p in peers if not p.compiled), OURS[0], OURS[2]], flags.vs_hf)
        tick()
    settings = [f"{p.name}: experts {p.experts or 'default'}, attention {p.attention or 'default'}" for p in peers]
    for figure in figures:
        if figure.peer is not None and figure.peer.startswith("HF"):
            figure.coverage = "; ".join(s for s in settings if s.startswith(figure.peer)) or "transformers missing"
            figure.peer = f"{figure.peer}, transformers {version}" if version else figure.peer
    print(document("train_speed", figures, threads=THREADS))
    return MISSING_PEER if flags.vs_hf and version is None else 0


if __name__ == "__main__":
    raise SystemExit(main())
