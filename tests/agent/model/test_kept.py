"""What the model keeps from forward to backward goes through autograd, where the sensor of saved tensors hashes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from agent.model import PRESETS, V3
from agent.model.fp8 import Emulation, Fp8, Recipe
from agent.model.fp8.recipe import Backend
from agent.model.fp8.triton import Triton
from agent.model.linear import Linear
from agent.model.parallel import Echo, ExpertParallel
from diagnostics.sensors.guard import Guard
from diagnostics.sensors.quiet import quiet

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@pytest.mark.parametrize(
    ("backend", "kept"),
    [(Emulation(), 2), (Emulation(Recipe(power_of_two=False)), 2), (Triton(), 3)],
    ids=["emulation", "fp32 scales", "codes and scales"],
)
def test_a_bit_of_anything_that_an_fp8_product_keeps_alarms(backend: Backend, kept: int) -> None:
    """The activation; the quantised weight as values, or as codes and scales. Unhashed nobody sees it: the control."""
    for number in range(kept):
        for again, sensors in ((1.0, {"saved"}), (0.0, set())):
            module = Linear(140, 130, torch.float8_e4m3fn)
            module.weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
            module.fp8 = Fp8(backend)
            x = torch.randn(9, 140, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16).requires_grad_()
            guard = Guard(module, again=again)
            with guard.step(1) as step:
                y = module(x)
                saved = [each for each in y.grad_fn.saved_tensors if each is not None]
                assert len(saved) == kept
                flip(saved[number])
                y.float().sum().backward()
            assert {alarm.sensor for alarm in step.alarms} == sensors


def flip(t: Tensor) -> None:
    """The lowest bit of the last element, as memory does: no operator of the step writes it, and no version counts."""
    with quiet():
        words = t.data.view(_WORDS[t.element_size()])
        words[(-1,) * words.dim()] ^= 1


@pytest.mark.parametrize("parallel", [None, ExpertParallel(2, Echo(2), Echo(2))], ids=["whole", "divided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_no_tensor_but_parameters_waits_outside_of_autograd(
    dtype: torch.dtype, parallel: ExpertParallel | None
) -> None:
    model = V3(PRESETS["tiny"].config, compute_dtype=dtype, parallel=parallel)
    tokens = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(4))
    ours = [node for node in nodes(model.loss(tokens).total.grad_fn) if hasattr(node, "__dict__")]
    assert len(ours) > 10
    for node in ours:
        held = [each for each in tensors(vars(node)) if not isinstance(each, nn.Parameter)]
        assert not held, f"{type(node).__name__} keeps {[tuple(each.shape) for each in held]} as attributes"


def nodes(last: Any) -> list[Any]:
    found: dict[Any, None] = {}
    waiting = [last]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found[node] = None
            waiting += [each for each, _ in node.next_functions]
    return list(found)


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in containers and dataclasses, however deep."""
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        yield from tensors([getattr(value, field.name) for field in dataclasses.fields(value)])
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors(each)
