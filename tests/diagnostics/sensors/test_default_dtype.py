"""What a check reads does not depend on the type that torch gives new tensors by default."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from operations import flipped
from struck import Struck
from torch import Tensor, nn

from diagnostics.sensors.guard import Guard
from diagnostics.sensors.readings import Site

aten = torch.ops.aten
IDS = torch.arange(24).view(2, 12) % 10


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64])
def default(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """A default type that must be set by the test, and is set back after it."""
    yield request.param
    torch.set_default_dtype(torch.float32)


def model(dtype: torch.dtype) -> nn.ModuleDict:
    torch.manual_seed(3)
    parts = {"embedding": nn.Embedding(10, 16), "norm": nn.LayerNorm(16), "head": nn.Linear(16, 10)}
    return nn.ModuleDict(parts).to(dtype)


def loss_of(parts: nn.ModuleDict) -> Tensor:
    """Every sensor: sums, norms, attention with a mask, products, topk, sort, cumsum, moves, a loss."""
    x = parts["norm"](parts["embedding"](IDS))
    heads = x.view(2, 12, 2, 8).transpose(1, 2)
    mask = x.new_zeros(12, 12).masked_fill(torch.ones(12, 12, dtype=torch.bool).triu(1), -torch.inf)
    x = x + F.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask).transpose(1, 2).reshape(x.shape)
    gates, chosen = x.float().softmax(-1).topk(3, dim=-1)
    counts = torch.bincount(chosen.flatten(), minlength=16).cumsum(0)
    x = x * gates.sum(-1, keepdim=True).to(x.dtype) + x.sort(dim=-1)[0] + (counts[-1] - 72)
    x = torch.zeros_like(x).index_add(0, torch.tensor([1, 0]), x)
    x = x + torch.zeros_like(x).scatter_add(2, chosen, gates.to(x.dtype)).cumsum(2)
    return F.cross_entropy(parts["head"](x).flatten(0, 1).float(), IDS.flatten())


def readings_of(parts: nn.ModuleDict) -> list[tuple[Site, float]]:
    parts = copy.deepcopy(parts)
    guard = Guard(parts)
    with guard.step(5) as step:
        loss_of(parts).backward()
    assert step.failures == 0
    assert step.clean, step.alarms
    return guard.log.by_site()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_readings_are_the_same_whatever_the_default_type(default: torch.dtype, dtype: torch.dtype) -> None:
    parts = model(dtype)
    expected = readings_of(parts)
    torch.set_default_dtype(default)
    assert readings_of(parts) == expected


def test_a_fault_is_seen_whatever_the_default_type(default: torch.dtype) -> None:
    torch.set_default_dtype(default)
    parts = model(torch.float32)
    guard = Guard(parts)
    flip = Struck(aten.native_layer_norm_backward, lambda out: out[1].copy_(flipped(out[1], 3, 22)))
    with flip, guard.step(5) as step:
        loss_of(parts).backward()
    assert [(alarm.operation, alarm.module) for alarm in step.alarms] == [("native_layer_norm_backward.dw", "norm")]
