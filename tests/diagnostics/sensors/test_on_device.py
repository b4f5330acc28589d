"""What GPUs have otherwise than CPUs, as far as a CPU can show it: hashes that stay on a device, cuDNN's attention,
sizes of blocks, readings by check, operands that are not finite."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch
from operations import CPU, CpuBench, alarms, aten, outliers, run, worst
from torch import Tensor, nn

from diagnostics.sensors.checks import attention, attention_backward, gemm, moves, recompute, rows
from diagnostics.sensors.checks import bench as bench_module
from diagnostics.sensors.checks.operand import Operand
from diagnostics.sensors.checks.operation import Call
from diagnostics.sensors.checks.signs import Signs
from diagnostics.sensors.digest import differ, digest, digest_on_device, stamp
from diagnostics.sensors.guard import Guard
from diagnostics.sensors.quiet import quiet
from diagnostics.sensors.tolerance import UnknownTolerance

CHECKS = attention.CHECKS | attention_backward.CHECKS


def test_stamps_are_compared_at_once_wherever_they_are() -> None:
    a, b = torch.arange(5.0), torch.arange(1.0, 6.0)
    here, there = [stamp(a), stamp(b)], [digest_on_device(a), digest_on_device(b)]
    assert here == [digest(a), digest(b)]
    assert differ([(here[0], here[0]), (here[0], here[1])]) == [False, True]
    assert differ([(there[0], there[1]), (here[0], here[0]), (there[1], there[1])]) == [True, False, False]
    assert differ([]) == []


def trained(monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, torch.optim.Optimizer, Guard]:
    """A guard whose hashes stay tensors, as they are on a GPU."""
    for module in ("saved", "upkeep"):
        monkeypatch.setattr(f"diagnostics.sensors.{module}.stamp", digest_on_device)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    return model, optimizer, Guard(model, optimizer)


def test_hashes_on_the_device_see_what_changed_between_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, guard = trained(monkeypatch)
    x = torch.randn(5, 8)
    for spoilt in (False, True):
        with guard.step() as step:
            kept = model[0](x)
            kept = torch.tanh(kept)
            loss = model[2](kept).sum()
            if spoilt:
                with quiet():  # as memory does: no operator of the step writes
                    kept.data.view(torch.int32)[2, 3] ^= 1
            loss.backward()
        assert step.clean is not spoilt
        assert {alarm.sensor for alarm in step.alarms} == ({"saved"} if spoilt else set())


def test_hashes_on_the_device_see_what_changed_at_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, guard = trained(monkeypatch)
    for spoilt in (False, False, True):
        if spoilt:
            model[2].weight.data.view(torch.int32)[1, 2] ^= 1
        with guard.step() as step:
            model(torch.randn(5, 8)).sum().backward()
        assert [(a.sensor, a.module) for a in step.alarms] == ([("at rest", "2.weight")] if spoilt else [])
        optimizer.step()


def test_readings_by_check_are_in_order() -> None:
    model, x = nn.Linear(8, 16), torch.randn(5, 8)
    guard = Guard(model)
    with guard.step() as step:
        model(x).sum().backward()
    found = guard.log.by_site()
    assert len(found) == step.checks
    assert [site.operation for site, _ in found if site.sensor == "gemm"] == ["addmm", "mm"]
    assert max(reading for _, reading in found) == step.worst


def cudnn(dtype: torch.dtype, causal: bool) -> tuple[Call, Call]:
    """Forward and backward as cuDNN's operators give them, computed by the CPU's kernel."""
    q, k, v, grad = (torch.randn(2, 2, 40, 16, generator=torch.Generator().manual_seed(n)).to(dtype) for n in range(4))
    there = run(aten._scaled_dot_product_flash_attention_for_cpu.default, q, k, v, 0.0, causal)
    back = run(
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default, grad, q, k, v, *there.out, 0.0, causal
    )
    out, lse = there.out
    none, tall = torch.empty(0), lse[..., None]
    forward = aten._scaled_dot_product_cudnn_attention.default
    given = Call(
        forward, (q, k, v, None, True, 0.0, causal, False), {}, (out, tall, none, none, 40, 40, none, none, none)
    )
    backward = aten._scaled_dot_product_cudnn_attention_backward.default
    args = (grad, q, k, v, out, tall, none, none, None, none, none, 40, 40, 0.0, causal)
    return given, Call(backward, args, {}, back.out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_as_cudnn_gives_it(dtype: torch.dtype, causal: bool) -> None:
    for call in cudnn(dtype, causal):
        assert worst(CHECKS, call) <= 1
        bad = tuple(t.clone() if isinstance(t, Tensor) else t for t in call.out)
        bad[0][1, 1, 7] *= 40
        assert alarms(CHECKS, Call(call.func, call.args, call.kwargs, bad))


def test_only_results_that_are_written_are_compared() -> None:
    """What attention returns for dropout is memory that nobody has written, where there is none."""
    attention = {name: count for name, count in recompute._RESULTS.items() if "attention" in name}
    for name, count in attention.items():
        returns = getattr(aten, name).default._schema.returns
        assert [(value.name or "").replace("_", "") for value in returns[:count]] in (
            ["output", "logsumexp"],
            ["output", "softmaxlogsumexp"],
        ), name
        assert all("logsumexp" not in (value.name or "") for value in returns[count:])


def test_blocks_on_a_gpu_are_as_few_as_memory_allows() -> None:
    t = SimpleNamespace(shape=(1 << 13, 1 << 13), is_cuda=True)
    assert len(list(rows.blocks(cast(Tensor, t)))) == 2
    t.is_cuda = False
    assert len(list(rows.blocks(cast(Tensor, t)))) == 256


def test_a_conjugate_that_is_still_to_be_made_is_copied_right() -> None:
    x = torch.randn(3, 4, dtype=torch.complex64).conj()
    call = run(aten.clone.default, x)
    assert worst(moves.CHECKS, call) == 0
    call.out[1, 1] += 1
    assert worst(moves.CHECKS, call) > 1


@pytest.mark.parametrize("kernel", ["mm", "sdpa", "sdpa_backward"])
def test_kernels_of_products_have_no_constant_where_these_lose_precision(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = Guard(nn.Linear(2, 2))
    bench = guard.step()._inspection.bench
    assert bench.kappa(kernel, torch.ones(1)).accumulate > 0
    monkeypatch.setattr(bench_module, "fp32_precision", lambda device: "tf32")
    with pytest.raises(UnknownTolerance, match="tf32"):
        bench.kappa(kernel, torch.ones(1))
    assert bench.kappa(kernel, torch.ones(1, dtype=torch.bfloat16)).accumulate > 0
    assert bench.kappa("softmax", torch.ones(1)).accumulate > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_of_rows_that_a_mask_closes_a_gpu_says_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """There nobody asks what is finite: the host would wait. Other operands that are not finite alarm."""
    a, w, d = (outliers(*shape, seed=2, dtype=dtype) for shape in ((9, 16), (16, 12), (9, 12)))
    d[:5].masked_fill_(torch.ones(5, 12, dtype=torch.bool).triu_(5), -torch.inf)
    signs, kappa = Signs(3, CPU), CpuBench().kappa("mm", a)

    def found(c: Tensor) -> list[bool]:
        plus = gemm.Addend.of(d, 1.0, 12, signs, dtype != torch.float32)
        return [
            not value <= 1 for value in gemm.row_readings(c, Operand(a), Operand(w), signs, kappa, 1.0, plus).tolist()
        ]

    out = torch.addmm(d, a, w)
    assert found(out) == [True] * 5 + [False] * 4  # as a CPU has it: left to a second run
    monkeypatch.setattr(Tensor, "is_cuda", True)
    assert not any(found(out))
    for wrong in (torch.nan, torch.inf, 1e3):
        bad = out.clone()
        bad[7, 4] = wrong
        assert found(bad) == [row == 7 for row in range(9)]


def test_a_bf16_product_that_its_addend_cancels_is_quiet_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "is_cuda", True)
    a, w = (outliers(*shape, seed=2).abs().bfloat16() for shape in ((40, 512), (512, 48)))
    d = (a.float() @ w.float()).bfloat16()
    signs, kappa = Signs(3, CPU), CpuBench().kappa("mm", a)
    plus = gemm.Addend.of(d, -1.0, 48, signs, True)
    out = torch.addmm(d, a, w, beta=-1)
    assert bool((gemm.row_readings(out, Operand(a), Operand(w), signs, kappa, 1.0, plus) <= 1).all())
    out[7] += 0.1 * d[7]
    readings = gemm.row_readings(out, Operand(a), Operand(w), signs, kappa, 1.0, plus)
    assert [not value <= 1 for value in readings.tolist()] == [row == 7 for row in range(40)]
