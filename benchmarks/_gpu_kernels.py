"""Triton kernels that check in the pass that makes the data, timed on a GPU beside what they would be without.

Times are of the device, from event to event, each after the L2 cache was written over; ways take turns in one process.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import triton
from torch import Tensor

from agent.model.fp8 import kernels as recipe
from benchmarks._figures import Figure
from diagnostics.sensors.checks.operand import Operand
from diagnostics.sensors.checks.rounded import energy_readings
from diagnostics.sensors.checks.signs import Signs
from diagnostics.sensors.kernels.hashing import hashed
from diagnostics.sensors.kernels.product import multiply, multiply_quantised
from diagnostics.sensors.kernels.quantised import BLOCK, quantise
from diagnostics.sensors.tolerance import shipped_table

#: A layer's: tokens, hidden size and the inner one of its feed-forward part.
ROWS, HIDDEN, WIDE = 8192, 4096, 11264
#: Bytes that are hashed or copied, and of the buffer that pushes them out of the cache (H100: 50 MB, H200: 60 MB).
HASHED, FLUSH = 1 << 28, 1 << 28
WARM = 5


def timed(ways: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of each on the device."""
    flush = torch.empty(FLUSH, dtype=torch.uint8, device=device)
    spans: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in ways}
    for turn in range(WARM + rounds):
        for name, way in ways.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            begin.record()  # type: ignore[no-untyped-call]
            way()
            end.record()  # type: ignore[no-untyped-call]
            if turn >= WARM:
                spans[name].append((begin, end))
    torch.cuda.synchronize(device)
    return {name: statistics.median(begin.elapsed_time(end) for begin, end in taken) for name, taken in spans.items()}


def drawn(rows: int, columns: int, device: torch.device, seed: int) -> Tensor:
    """bf16 normal values."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, device=device).bfloat16()


def signs(n: int, device: torch.device) -> Tensor:
    """fp32 +-1."""
    return torch.randint(0, 2, (n,), generator=torch.Generator(device).manual_seed(n), device=device) * 2.0 - 1.0


def recipe_quantise(x: Tensor, tiled: bool, warps: int) -> Callable[[], Tensor]:
    """The recipe's own kernel, which makes the same codes and scales and no sums."""
    rows, k = x.shape
    tall = BLOCK if tiled else 16
    grid = (triton.cdiv(rows, tall), triton.cdiv(k, BLOCK))
    codes = torch.empty(rows, k, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(grid[0] if tiled else rows, grid[1], dtype=torch.float32, device=x.device)

    def run() -> Tensor:
        recipe.quantise[grid](
            x,
            codes,
            scales,
            scales,
            rows,
            k,
            x.stride(0),
            x.stride(1),
            HEIGHT=tall,
            SHARED=tiled,
            POWER_OF_TWO=True,
            COUNT=False,
            num_warps=warps,
        )
        return codes

    return run


def quantising(device: torch.device, rounds: int) -> Iterator[Figure]:
    """Activations in 1x128 and weights in 128x128, with their sums and without."""
    for name, rows, k, tiled, warps in (
        ("1x128, 32768 x 4096", 4 * ROWS, HIDDEN, False, 4),
        ("128x128, 45056 x 4096", 4 * WIDE, HIDDEN, True, 16),
    ):
        x, along, down = drawn(rows, k, device, 1), signs(k, device), signs(rows, device)
        copied = torch.empty_like(x)
        ways: dict[str, Callable[[], Any]] = {
            "sums": lambda x=x, along=along, down=down, tiled=tiled: quantise(x, along, down if tiled else None, tiled),
            "plain": recipe_quantise(x, tiled, warps),
            "copy": lambda x=x, copied=copied: copied.copy_(x),
        }
        took = timed(ways, rounds, device)
        yield ratio(f"quantise {name}, with sums over without", took["sums"], took["plain"], rounds)
        moved = x.numel() * 3 / took["sums"] * 1e-6  # two bytes read and one written
        copy = x.numel() * 4 / took["copy"] * 1e-6
        yield Figure(
            f"quantise {name}, with sums", moved, "GB/s", "higher", peer="copy", peer_value=copy, samples=rounds
        )


def ratio(name: str, value: float, peer: float, rounds: int, better: str = "lower") -> Figure:
    """One time over another; the peer's milliseconds beside it."""
    return Figure(name, value / peer, "ratio", better, peer="the other's, ms", peer_value=peer, samples=rounds)


def products(device: torch.device, rounds: int) -> Iterator[Figure]:
    """bf16 and FP8 products of a layer's size, with the sums of their accumulators and without, beside cuBLAS."""
    left, right, r = drawn(ROWS, HIDDEN, device, 2), drawn(HIDDEN, WIDE, device, 3), signs(WIDE, device)
    operations = 2.0 * ROWS * HIDDEN * WIDE
    weight = quantise(right.t(), torch.zeros(HIDDEN, device=device), r, tiled=True)
    assert weight.down is not None
    rows = quantise(left, weight.down)
    ways: dict[str, Callable[[], Any]] = {
        "bf16 sums": lambda: multiply(left, right, r),
        "bf16 plain": lambda: multiply(left, right, r, sums=False),
        "fp8 sums": lambda: multiply_quantised(rows, weight, r),
        "fp8 plain": lambda: multiply_quantised(rows, weight, r, sums=False),
        "cuBLAS bf16": lambda: left @ right,
    }
    took = timed(ways, rounds, device)
    for kind in ("bf16", "fp8"):
        name = f"{kind} product 8192 x 4096 x 11264"
        yield ratio(f"{name}, with sums over without", took[f"{kind} sums"], took[f"{kind} plain"], rounds)
        yield ratio(f"{name}, with sums over cuBLAS in bf16", took[f"{kind} sums"], took["cuBLAS bf16"], rounds)
        speed = operations / took[f"{kind} sums"] * 1e-9
        cublas = operations / took["cuBLAS bf16"] * 1e-9
        yield Figure(f"{name}, with sums", speed, "TFLOP/s", "higher", None, None, "cuBLAS bf16", cublas, None, rounds)


def hashing(device: torch.device, rounds: int) -> Iterator[Figure]:
    """The hash of 256 MiB, beside a copy of as many and a read."""
    generator = torch.Generator(device).manual_seed(4)
    words = torch.randint(-(2**31), 2**31, (HASHED // 4,), generator=generator, device=device, dtype=torch.int32)
    flat, target = words.view(torch.uint8), torch.empty_like(words)
    ways: dict[str, Callable[[], Any]] = {
        "hash": lambda: hashed(flat, 0),
        "copy": lambda: target.copy_(words),
        "read": lambda: words.view(torch.int64).sum(),
    }
    took = timed(ways, rounds, device)
    rates = {name: HASHED / milliseconds * 1e-6 for name, milliseconds in took.items()}
    yield Figure(
        "hash, 256 MiB", rates["hash"], "GB/s", "higher", peer="read", peer_value=rates["read"], samples=rounds
    )
    over = rates["hash"] / rates["copy"]
    yield Figure("hash over copy", over, "", "higher", 0.5, peer="copy, GB/s", peer_value=rates["copy"], samples=rounds)


def checking(device: torch.device, rounds: int) -> Iterator[Figure]:
    """The check of a bf16 product in three kernels, forward and the gradient of the weight, over the product itself."""
    signs_of, kappa = Signs(5, device), shipped_table().kappa("cuda", "bfloat16")
    x, weight, grad = (drawn(*shape, device, 5) for shape in ((ROWS, HIDDEN), (HIDDEN, WIDE), (ROWS, WIDE)))
    for name, left, right in (("forward", x, weight), ("gradient of the weight", x.t(), grad)):
        c = left @ right
        ways: dict[str, Callable[[], Any]] = {
            "check": lambda c=c, left=left, right=right: energy_readings(
                c, Operand(left), Operand(right), signs_of, kappa, 1.0, None
            ),
            "product": lambda left=left, right=right: left @ right,
        }
        took = timed(ways, rounds, device)
        yield ratio(f"check of a bf16 product, {name}, over the product", took["check"], took["product"], rounds)


def figures(device: torch.device, rounds: int) -> Iterator[Figure]:
    """Of all kernels."""
    for part in (quantising, products, checking, hashing):
        yield from part(device, rounds)
