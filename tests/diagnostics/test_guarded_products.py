"""Products under the guard: every spelling and pass, grouped, without a tolerance, and of less precision than fp32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from sample_model import batch
from struck import PRODUCTS, Struck, last_bit, plus, product
from torch import Tensor, nn

from diagnostics.sensors.coverage import NothingToCheck
from diagnostics.sensors.guard import Guard


def products(w: nn.Parameter, x: torch.Tensor, kind: str) -> torch.Tensor:
    made: dict[str, Callable[[], torch.Tensor]] = {
        "mm": lambda: torch.mm(x, w.t()),
        "matmul": lambda: torch.matmul(x, w.t()),
        "operator": lambda: x @ w.t(),
        "addmm": lambda: torch.addmm(torch.ones(24), x, w.t()),
        "linear": lambda: F.linear(x, w),
        "bias": lambda: F.linear(x, w, torch.ones(24)),
        "3-D": lambda: F.linear(x.reshape(4, -1, 16), w),
        "3-D bias": lambda: F.linear(x.reshape(4, -1, 16), w, torch.ones(24)),
    }
    return made[kind]()


@pytest.mark.parametrize("kind", ["mm", "matmul", "operator", "addmm", "linear", "bias", "3-D", "3-D bias"])
def test_all_spellings_of_a_product(kind: str) -> None:
    model = nn.Linear(16, 24, bias=False)
    guard = Guard(model, again=0)
    x = torch.randn(32, 16, requires_grad=True)
    with guard.step(0) as step:
        products(model.weight, x, kind).square().sum().backward()
    assert step.clean
    assert step.checks == 3
    for at in range(3):
        with product(at, plus(100.0)), guard.step(1) as step:
            products(model.weight, x, kind).square().sum().backward()
        assert not step.clean


def test_a_type_without_a_tolerance_is_run_again_or_said() -> None:
    model = nn.Linear(8, 8, bias=False, dtype=torch.float64)

    def run() -> None:
        model(torch.ones(4, 8, dtype=torch.float64)).sum().backward()

    with product(0, plus(1.0)), Guard(model).step(0) as step:
        run()
    assert [(alarm.sensor, alarm.operation) for alarm in step.alarms] == [("recompute", "mm")]
    guard = Guard(model, again=0)
    with pytest.raises(NothingToCheck, match="float64"), guard.step(0):
        run()
    assert all("float64" in row.reason for row in guard.coverage() if row.operation == "mm")


def last_bits() -> Struck:
    """Of every product, in whatever memory that is."""
    return Struck((*PRODUCTS, torch.ops.aten.addmm_, torch.ops.aten.baddbmm_), last_bit)


IN_PLACE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "mm": lambda a, b, d: torch.mm(a[0], b[0], out=d[0]),
    "bmm": lambda a, b, d: torch.bmm(a, b, out=d),
    "addmm_": lambda a, b, d: d[0].addmm_(a[0], b[0]),
    "addmm": lambda a, b, d: torch.addmm(d[0], a[0], b[0], out=d[0]),
    "baddbmm_": lambda a, b, d: d.baddbmm_(a, b),
    "baddbmm": lambda a, b, d: torch.baddbmm(d, a, b, out=torch.empty_like(d)),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_products_without_a_tolerance_that_write_over_an_operand_are_run_again(name: str) -> None:
    torch.manual_seed(0)
    given = [torch.randn(*shape, dtype=torch.float64) for shape in ((2, 128, 160), (2, 160, 192), (2, 128, 192))]

    def run() -> Tensor:
        return IN_PLACE[name](*(value.clone() for value in given))

    guard, plain = Guard(nn.Linear(2, 2)), run()
    with guard.step() as step:
        assert torch.equal(plain, run())
    assert step.clean
    assert not guard.failures
    assert [(row.operation, row.checked) for row in guard.coverage() if "mm" in row.operation] == [(name, 1.0)]
    with last_bits(), guard.step() as step:
        run()
    assert [(alarm.sensor, alarm.operation) for alarm in step.alarms] == [("recompute", name)]
    without = Guard(nn.Linear(2, 2), again=0)
    with pytest.raises(NothingToCheck, match="no tolerance for mm in float64"), last_bits(), without.step():
        run()


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 3.0), (torch.bfloat16, 12.0)])
def test_grouped_products(dtype: torch.dtype, error: float) -> None:
    """Groups of any size, empty ones too; every pass; errors in units of the result's standard deviation."""

    def bad(out: Tensor) -> None:
        plus(error * float(out.float().std()))(out)

    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 64, 96, dtype=dtype))
    guard = Guard(nn.ParameterList([weight]), again=0)
    for key, ends in enumerate([[50, 100, 150, 200], [0, 3, 3, 200], [1, 2, 150, 200]]):
        offs = torch.tensor(ends, dtype=torch.int32)
        x = torch.randn(200, 64).to(dtype).requires_grad_()
        for at in range(-1, 3):
            with Struck(torch.ops.aten._grouped_mm, bad, at), guard.step(key) as step:
                torch._grouped_mm(x, weight, offs=offs).square().sum().backward()
            assert step.clean is (at < 0)
            assert step.checks == 3


def test_fp32_products_of_less_precision_are_run_again() -> None:
    """Where torch may make them in tf32 or bf16 the identity does not hold; the setting is the process's."""
    model, x = nn.Linear(64, 64), batch(0, 32, 64)
    guard = Guard(model)
    torch.set_float32_matmul_precision("medium")
    try:
        with product(0, plus(1.0)), guard.step() as step:
            model(x).sum().backward()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert [(a.sensor, a.module) for a in step.alarms] == [("recompute", "Linear")]
    with guard.step():
        model(x).sum().backward()
    assert all(row.checked == 1 for row in guard.coverage())
