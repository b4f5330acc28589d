"""What a guard does on a GPU: the steps of models under it, and the speed of the kernels that check as they go.

For each model: gradients guarded and unguarded, bit for bit; clean steps with AdamW, then one with embeddings 1e4 and
1e-4 times as large, which must not alarm; a tile of one product after another made wrong below the guard, which must.
For each Triton kernel: its time with its sums over the same kernel's without, beside a copy or cuBLAS. What guarding
costs on a GPU is `benchmarks.guard_overhead --device cuda`.

Without a GPU the models run on the CPU, and the kernels, which Triton compiles for GPUs only, are left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks import _gpu_guard
from benchmarks._figures import Figure, document
from benchmarks._gpu_models import CASES
from diagnostics.sensors.tolerance import shipped_table

KERNELS = "kernels"
#: Clean steps of a model, products of it that are struck, and rounds of a kernel.
STEPS, STRUCK, ROUNDS = 30, 40, 31


def of_model(name: str, device: torch.device, steps: int, products: int) -> Iterator[Figure]:
    """A model's: each on one that is made anew."""
    table, make = shipped_table(), CASES[name]
    bits = _gpu_guard.bits(make(device), table)
    told = "; ".join(f"not repeated by torch: {parameter}" for parameter in bits.unrepeated) or None
    yield Figure(
        f"{name}: gradients that guarding changes",
        len(bits.by_guard),
        "tensors",
        "lower",
        0,
        coverage=told,
        samples=bits.parameters,
    )
    clean = _gpu_guard.clean(make(device), table, steps)
    worst = max(clean.worst, key=lambda kind: clean.worst[kind], default="")
    told = f"{clean.checks} checks, {clean.failures} failed; largest reading {clean.largest:.3f}, {worst}"
    yield Figure(
        f"{name}: alarms in clean steps", len(clean.alarms), "alarms", "lower", 0, coverage=told, samples=clean.steps
    )
    uncovered = sorted({line.partition(" of ")[2] for line in clean.coverage if not line.startswith("1.00")})
    told = "; ".join(uncovered[:3]) or "every operator of every step is checked"
    yield Figure(f"{name}: kinds of calls not covered", len(uncovered), "", "lower", coverage=told)
    struck = _gpu_guard.struck(make(device), table, products)
    seen = (struck.products - len(struck.missed)) / max(struck.products, 1)
    told = "; ".join((*struck.missed, *struck.unnamed)) or "each is named by its own product's check"
    yield Figure(f"{name}: struck products seen", seen, "share", "higher", 1.0, coverage=told, samples=struck.products)


def of_kernels(device: torch.device, rounds: int) -> Iterator[Figure]:
    """The Triton kernels'; none without a GPU."""
    if device.type == "cuda":
        from benchmarks import _gpu_kernels  # Triton compiles as it is imported, or not at all

        yield from _gpu_kernels.figures(device, rounds)


def main() -> None:
    """Run and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the document only (it is the only output anyway)")
    parser.add_argument("--quick", action="store_true", help="one small model, few steps: does it run, not what is it")
    parser.add_argument("--only", choices=[*CASES, KERNELS], action="append", help="may be given several times")
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = asked.only or (["tiny fp32", KERNELS] if asked.quick else [*CASES, KERNELS])
    found: list[Figure] = []
    with Progress(console=Console(file=sys.stderr)) as progress:
        bar = progress.add_task("gpu", total=len(chosen))
        for name in chosen:
            progress.update(bar, description=name)
            if name == KERNELS:
                found += of_kernels(device, 3 if asked.quick else ROUNDS)
            else:
                found += of_model(name, device, *((1, 2) if asked.quick else (STEPS, STRUCK)))
            progress.advance(bar)
    accelerator = torch.cuda.get_device_name() if device.type == "cuda" else None
    print(document("gpu", found, torch.get_num_threads(), accelerator))


if __name__ == "__main__":
    main()
