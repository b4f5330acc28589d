"""What an identity covers is run again as well where that costs little, and a fault below its floor is seen so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from struck import Struck, last_bit
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from diagnostics.sensors.checks.operation import Call
from diagnostics.sensors.checks.thin import is_thin
from diagnostics.sensors.guard import Guard

aten = torch.ops.aten


def product(m: int, k: int, n: int, func: Any = aten.mm.default, **kwargs: Any) -> Call:
    args: tuple[Tensor, ...] = torch.empty(m, k), torch.empty(k, n)
    if "add" in func.overloadpacket.__name__:
        args = torch.empty(m, n), *args
    return Call(func, args, kwargs, torch.empty(m, n))


def attention(length: int) -> Call:
    heads = torch.empty(1, 2, length, 16)
    return Call(aten._scaled_dot_product_flash_attention_for_cpu.default, (heads, heads, heads), {}, None)


@pytest.mark.parametrize(
    ("call", "thin"),
    [
        (product(8192, 128, 128), True),
        (product(8192, 256, 256), False),
        (product(8192, 64, 8192), True),
        (product(16, 2048, 2048), True),
        (product(0, 2048, 2048), True),
        (product(8, 8, 8, aten.mm.out, out=torch.empty(8, 8)), True),
        (product(8, 8, 8, aten.addmm.default), True),
        (product(8, 8, 8, aten.addmm.out, out=torch.empty(8, 8)), False),
        (product(8, 8, 8, aten.addmm_.default), False),
        (Call(aten._softmax.default, (torch.empty(2, 2), -1, False), {}, torch.empty(2, 2)), True),
        (Call(aten.index_add.default, (torch.empty(2, 2), 0, torch.zeros(2), torch.empty(2, 2)), {}, None), True),
        (Call(aten.index_add_.default, (torch.empty(2, 2), 0, torch.zeros(2), torch.empty(2, 2)), {}, None), False),
        (attention(128), True),
        (attention(129), False),
        (Call(aten.native_layer_norm.default, (torch.empty(2, 2), [2], None, None, 1e-5), {}, None), False),
    ],
)
def test_what_takes_its_time_for_memory_is_thin(call: Call, thin: bool) -> None:
    assert is_thin(call) is thin


def step(model: nn.Module, x: Tensor, again: float, struck: Any) -> tuple[bool, set[str], int]:
    guard = Guard(model, again=again)
    with Struck(struck, last_bit, at=0), guard.step() as seen:
        torch.softmax(model(x), dim=-1).square().sum().backward()
    return seen.clean, {alarm.sensor for alarm in seen.alarms}, guard.failures


@pytest.mark.parametrize(
    ("struck", "dtype"),
    [
        *((struck, torch.float32) for struck in (aten.addmm, aten.mm, aten._softmax, aten._softmax_backward_data)),
        *((struck, torch.bfloat16) for struck in (aten.addmm, aten.mm, aten._softmax_backward_data)),
    ],
)
def test_the_last_bit_of_one_element_is_seen(struck: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(32, 16).to(dtype), torch.randn(64, 32, dtype=dtype)
    assert step(model, x, 1.0, struck) == (False, {"recompute"}, 0)
    assert step(model, x, 0.0, struck)[0]  # the control: below every floor


def test_a_product_that_is_written_to_a_part_of_a_tensor_is_run_again_beside_it() -> None:
    """With its own `out`: what the model has is read, and nothing is written."""
    torch.manual_seed(0)
    whole, guard = torch.zeros(9, 8), Guard(nn.Linear(8, 8))
    a, b = torch.randn(4, 8), torch.randn(8, 8)
    with guard.step() as seen:
        torch.mm(a, b, out=whole[3:7])
    assert seen.clean
    assert seen.checks == 2
    assert torch.equal(whole[3:7], a @ b)
    assert not whole[:3].any()
    assert not whole[7:].any()
    with Struck(aten.mm, last_bit, at=0), guard.step() as struck:
        torch.mm(a, b, out=whole[3:7])
    assert [alarm.sensor for alarm in struck.alarms] == ["recompute"]


def test_a_sum_that_is_added_in_place_is_made_again_of_what_was_there() -> None:
    torch.manual_seed(0)
    guard, there, rows = Guard(nn.Linear(8, 8)), torch.randn(4, 8), torch.randn(6, 8)
    index = torch.tensor([0, 2, 2, 3, 0, 2])
    with guard.step() as seen:
        there.index_add_(0, index, rows)
        there.scatter_add_(0, index[:, None].expand(6, 8), rows)
    assert (seen.clean, seen.checks, guard.failures) == (True, 4, 0)
    with Struck(aten.index_add_, last_bit, at=0), guard.step() as struck:
        there.index_add_(0, index, rows)
    assert [alarm.sensor for alarm in struck.alarms] == ["recompute"]


def test_what_only_a_second_run_can_judge_is_run_again_once() -> None:
    guard, index = Guard(nn.Linear(8, 8)), torch.tensor([0, 2, 2])
    there, rows = torch.arange(32).view(4, 8), torch.arange(24).view(3, 8)
    with guard.step() as seen:
        there.index_add_(0, index, rows)
        torch.index_add(there, 0, index, rows)
    assert (seen.clean, seen.checks, guard.failures) == (True, 2, 0)
    with Struck(aten.index_add_, last_bit, at=0), guard.step() as struck:
        there.index_add_(0, index, rows)
    assert len(struck.alarms) == 1


def test_fused_attention_inside_the_hull_of_its_values_is_seen_where_it_is_short() -> None:
    """The identity sees what leaves the hull, and 16 rows."""

    class Halved(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func.overloadpacket is aten._scaled_dot_product_flash_attention_for_cpu:
                out[0][0, 1, 30] += 0.5 * (args[2][0, 1, :31].mean(0) - out[0][0, 1, 30])
            return out

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 100, 16) for _ in range(3))
    for again, clean in ((1.0, False), (0.0, True)):
        guard = Guard(nn.Linear(8, 8), again=again)
        with Halved(), guard.step(key=1) as seen, torch.no_grad():
            nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        assert seen.clean == clean
        assert guard.failures == 0


def test_a_job_runs_a_share_again() -> None:
    guard, a, b = Guard(nn.Linear(8, 8), again=1 / 16), torch.randn(4, 8), torch.randn(8, 8)
    checks = 0
    for _ in range(8):
        with guard.step() as seen:
            for _ in range(40):
                torch.mm(a, b)
        checks += seen.checks
    assert 320 + 5 < checks < 320 + 45
