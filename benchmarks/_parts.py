"""Where a step's time goes, by class of operation, and how fast its matrix products alone could be."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

# Which class an operation's own time belongs to: the first of these that its name, or that of an operation which called
# it, begins with. From the innermost outwards.
_CLASSES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("products with weights", ("aten::mm", "aten::addmm")),
    ("attention", ("_CausalAttention", "_Query", "_KeyValue")),
    ("norms", ("_RMSNorm",)),
    ("cross entropy", ("_CrossEntropy",)),
    (
        "router and dispatch",
        (
            "_Dispatch",
            "_Combine",
            "aten::topk",
            "aten::sort",
            "aten::argsort",
            "aten::bincount",
            "aten::scatter",
            "aten::gather",
            "aten::sigmoid",
            "SigmoidBackward",
            "GatherBackward",
        ),
    ),
    ("SwiGLU", ("aten::silu", "SiluBackward", "_Experts")),
    ("casts of weights, activations and gradients", ("aten::to", "aten::_to_copy", "ToCopyBackward")),
    ("optimizer", ("Optimizer.", "aten::_fused_adamw_")),
    ("clipping", ("aten::linalg_vector_norm", "aten::_foreach")),
)
REST = "the rest"


def shares(step: Callable[[], float], steps: int) -> dict[str, float]:
    """Seconds of a step by class; what runs under the profiler takes a little longer than without."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(steps):
            step()
    found = {name: 0.0 for name, _ in _CLASSES} | {REST: 0.0}
    for event in seen.events() or ():
        found[_class_of(event)] += event.self_cpu_time_total * 1e-6 / steps
    return found


def _class_of(event: Any) -> str:
    while event is not None:
        name = event.name.removeprefix("autograd::engine::evaluate_function: ")
        for kind, beginnings in _CLASSES:
            if name.startswith(beginnings):
                return kind
        event = event.cpu_parent
    return REST


def products(step: Callable[[], float]) -> Counter[tuple[Any, ...]]:
    """How often a step makes each product: (operation, dtype, shape and strides of left, of right)."""
    seen: Counter[tuple[Any, ...]] = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
                left, right = args[:2]
                layouts = [(tuple(x.shape), tuple(x.stride())) for x in (left, right)]
                seen[(func.overloadpacket.__name__, left.dtype, *layouts)] += 1
            return func(*args, **(kwargs or {}))

    with Count():
        step()
    return seen


def operations(made: Counter[tuple[Any, ...]]) -> int:
    """Multiplications and additions of all products."""
    return sum(count * 2 * _size(left) * right[0][-1] for (_, _, left, right), count in made.items())


def _size(layout: tuple[tuple[int, ...], tuple[int, ...]]) -> int:
    return int(torch.Size(layout[0]).numel())


def alone(made: Counter[tuple[Any, ...]], repeats: int) -> float:
    """Seconds that the same products take one after another with nothing between: the ceiling of any step."""
    total = 0.0
    for (name, dtype, left, right), count in made.items():
        operands = [_strided(layout, dtype) for layout in (left, right)]
        product = getattr(torch, name)
        total += count * _seconds(lambda: product(*operands), repeats)  # noqa: B023 (called at once)
    return total


def rate(dtype: torch.dtype, size: int, repeats: int) -> float:
    """Operations a second of a square product."""
    left, right = (torch.randn(size, size).to(dtype) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: left @ right, repeats)


def _strided(layout: tuple[tuple[int, ...], tuple[int, ...]], dtype: torch.dtype) -> Tensor:
    shape, stride = layout
    room = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    return torch.randn(room).to(dtype).as_strided(shape, stride)


def _seconds(call: Callable[[], object], repeats: int) -> float:
    call()
    call()
    taken = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)
