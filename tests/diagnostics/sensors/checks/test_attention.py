"""Fused attention, forward and backward: its identities in exact arithmetic, clean calls, faults, what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import CPU, SCALES, CpuBench, alarms, aten, checked, gross_faults, outliers, run, with_result, worst

from diagnostics.sensors.checks import attention, attention_backward
from diagnostics.sensors.checks.attention import ROWS, sampled_rows
from diagnostics.sensors.checks.operation import Call, Unsupported
from diagnostics.sensors.checks.signs import Signs

CHECKS = attention.CHECKS | attention_backward.CHECKS
FORWARD = aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
DTYPES = (torch.float32, torch.bfloat16)
DQ, DK, DV = 0, 1, 2


class Shape(NamedTuple):
    queries: int = 40
    keys: int = 40
    dim: int = 16
    key_heads: int = 2
    groups: int = 1
    causal: bool = False
    masked: str = ""


SQUARE = Shape()


def operands(shape: Shape, seed: int, dtype: torch.dtype, scale: float = 1.0) -> tuple[Any, ...]:
    """query, key, value, grad, mask; scale multiplies values and divides gradients, scores stay of the order of one."""
    heads = shape.key_heads * shape.groups
    q = outliers(2, heads, shape.queries, shape.dim, seed=seed, dtype=dtype)
    k = outliers(2, shape.key_heads, shape.keys, shape.dim, seed=seed + 1, dtype=dtype)
    v = outliers(2, shape.key_heads, shape.keys, shape.dim, seed=seed + 2, scale=scale, dtype=dtype)
    grad = outliers(2, heads, shape.queries, shape.dim, seed=seed + 3, scale=1 / scale, dtype=dtype)
    mask = None
    if shape.masked == "bias":
        mask = outliers(shape.queries, shape.keys, seed=seed, dtype=dtype)
    elif shape.masked:
        g = torch.Generator().manual_seed(seed)
        closed = torch.rand(2, 1, shape.queries, shape.keys, generator=g) < 0.4
        closed[:, :, shape.queries // 2] = shape.masked == "row"
        mask = torch.zeros(closed.shape, dtype=dtype).masked_fill_(closed, -torch.inf)
    return q, k, v, grad, mask


def calls(
    shape: Shape = SQUARE, seed: int = 2_000_001, dtype: Any = torch.float32, scale: float = 1.0
) -> tuple[Call, Call]:
    q, k, v, grad, mask = operands(shape, seed, dtype, scale)
    there = run(FORWARD, q, k, v, 0.0, shape.causal, attn_mask=mask)
    return there, run(BACKWARD, grad, q, k, v, *there.out, 0.0, shape.causal, attn_mask=mask)


SHAPES = st.builds(
    Shape,
    queries=st.integers(1, 90),
    keys=st.integers(1, 90),
    dim=st.sampled_from((8, 24, 64)),
    key_heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    causal=st.booleans(),
    masked=st.sampled_from(("", "bias", "some", "row")),
)


@settings(deadline=None, max_examples=100)
@given(SHAPES, st.sampled_from(DTYPES), st.sampled_from(SCALES), st.integers(2_000_000, 3_000_000))
def test_clean_attention_never_alarms(shape: Shape, dtype: torch.dtype, scale: float, seed: int) -> None:
    for call in calls(shape, seed, dtype, scale):
        assert worst(CHECKS, call, CpuBench(seed)) <= 1.0


@settings(deadline=None, max_examples=40)
@given(SHAPES, st.sampled_from(DTYPES), st.integers(2_000_000, 3_000_000), st.integers(1, 4000))
def test_readings_do_not_depend_on_how_a_call_is_cut(shape: Shape, dtype: torch.dtype, seed: int, most: int) -> None:
    """Head by head, some heads or entries of the batch at a time, or all at once: in the same order."""
    for call in calls(shape, seed, dtype):
        with patch.object(attention, "BLOCK_ELEMENTS", 1 << 40):
            whole = checked(CHECKS, call, CpuBench(seed))
        with patch.object(attention, "BLOCK_ELEMENTS", most):
            cut = checked(CHECKS, call, CpuBench(seed))
        for one, other in zip(whole, cut, strict=True):
            assert (one.result, one.shape) == (other.result, other.shape)
            assert torch.allclose(one.readings, other.readings, rtol=0.1, atol=0.4)  # roundings differ


@pytest.mark.parametrize("groups", [1, 3])
def test_each_wrong_head_is_named_where_it_lies_however_the_call_is_cut(
    groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "BLOCK_ELEMENTS", 1)
    there, back = calls(Shape(groups=groups), 2_000_003)
    for head in range(2 * groups):
        out, dq = there.out[0].clone(), back.out[DQ].clone()
        out[1, head, :, 3] += 1e3
        dq[1, head] *= 1.5
        hull = checked(CHECKS, with_result(there, out, 0))[0].readings.view(2, 2 * groups, 40)
        assert (hull > 1).any(-1).nonzero().tolist() == [[1, head]]
        found = checked(CHECKS, with_result(back, dq, DQ))
        keys, rows = found[2].readings.view(2, 2), found[3].readings.view(2, 2 * groups, ROWS)
        assert (keys > 1).nonzero().tolist() == [[1, head // groups]]
        assert (rows > 1).any(-1).nonzero().tolist() == [[1, head]]


@pytest.mark.parametrize("value", [0.0, 0.5, 1.001, -3.0, torch.inf, torch.nan])
def test_what_lies_inside_altogether_reads_as_it_does_row_by_row(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _, _, _ = operands(SQUARE, 2_000_002, torch.float32)
    there = run(FORWARD, q, k, torch.rand(2, 2, 40, 16))
    out = there.out[0].clone()
    out[1, 1, 7, 5] = value
    looked = [checked(CHECKS, with_result(there, out, 0))[0].readings]
    monkeypatch.setattr(attention, "_inside", lambda *_: False)
    looked.append(checked(CHECKS, with_result(there, out, 0))[0].readings)
    assert torch.equal(*looked) or value != value
    assert bool((looked[0] <= 1.0).all()) == (0 <= value <= 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0.0, 1e-4, 30.0, 1e4])
def test_uniform_and_one_hot_attention_are_quiet(dtype: torch.dtype, size: float) -> None:
    q, k, v, grad, _ = operands(Shape(70, 70), 2_000_002, dtype)
    there = run(FORWARD, q * size, k, v, 0.0, False)
    back = run(BACKWARD, grad + 1, q * size, k, v, *there.out, 0.0, False)
    assert worst(CHECKS, there) <= 1.0
    assert worst(CHECKS, back) <= 1.0


@pytest.mark.parametrize(
    ("shape", "dtype"), [(Shape(442, 1, 64, 1, 3), torch.float32), (Shape(282, 461, 64), torch.bfloat16)]
)
def test_gradients_that_all_point_one_way_are_quiet_where_attention_is_uniform(
    shape: Shape, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their sum drifts as its partial sums are rounded, and in all rows of dV alike."""
    q, k, v, grad, _ = operands(shape, 2_000_002, dtype)
    q, grad = q * 1e-3, grad.abs() + 2
    there = run(FORWARD, q, k, v)
    back = run(BACKWARD, grad, q, k, v, *there.out, 0.0, False)
    assert worst(CHECKS, back) <= 1.0
    wrong = back.out[DV].clone()
    wrong[0, 0, 0, 5] += 0.2 * grad[0, 0, :, 5].float().sum()
    assert alarms(CHECKS, with_result(back, wrong, DV))
    before = checked(CHECKS, back)[0]
    monkeypatch.setattr(attention_backward, "_ALIKE", 0.0)
    after = checked(CHECKS, back)[0]  # the negative control: without the allowance the same sum reads higher
    assert before.result == after.result == "dv"
    assert float(after.readings.amax()) > float(before.readings.amax()) * (1.0 if dtype == torch.float32 else 2.0)


@pytest.mark.parametrize("closing", [-1e4, torch.finfo(torch.float32).min])
def test_a_mask_without_infinities_blinds_no_check(closing: float) -> None:
    q, k, v, _, _ = operands(SQUARE, 2_000_004, torch.float32)
    mask = torch.zeros(40, 40).masked_fill_(torch.ones(40, 40, dtype=torch.bool).triu_(1), closing)
    there = run(FORWARD, q, k, v, 0.0, False, attn_mask=mask)
    assert worst(CHECKS, there) <= 1.0
    row = int(sampled_rows(40, Signs(0, CPU), CPU)[3])
    wrong = there.out[0].clone()
    wrong[0, 0, row] *= 1.001
    assert alarms(CHECKS, with_result(there, wrong, 0))


def test_a_large_bias_has_its_own_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row's query is small, and so is the rounding of its products: what is added to them is rounded too."""
    there, _ = calls(Shape(45, 37, 8, 1, masked="bias"), 2_059_433)
    assert worst(CHECKS, there, CpuBench(2_059_433)) <= 1.0
    noise = attention.Attention.score_noise
    unbiased = lambda self, *given: noise(replace(self, mask=None), *given)  # noqa: E731
    monkeypatch.setattr(attention.Attention, "score_noise", unbiased)
    assert alarms(CHECKS, there, CpuBench(2_059_433))  # the negative control


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_zeros_and_nothing_are_quiet(dtype: torch.dtype) -> None:
    zeros = torch.zeros(1, 2, 5, 8, dtype=dtype)
    there = run(FORWARD, zeros, zeros, zeros)
    assert worst(CHECKS, there) == 0.0
    assert worst(CHECKS, run(BACKWARD, zeros, zeros, zeros, zeros, *there.out, 0.0, False)) == 0.0
    empty = Call(FORWARD, (zeros[:0], zeros[:0], zeros[:0]), {}, (zeros[:0], torch.zeros(0, 2, 5)))
    assert checked(CHECKS, empty) == []


@pytest.mark.parametrize("causal", [False, True])
def test_the_identities_hold_in_exact_arithmetic_and_only_they(causal: bool) -> None:
    q, k, v, grad, _ = (
        None if t is None else t.double() for t in operands(Shape(groups=2, causal=causal), 5, torch.float32)
    )
    leaves = [t.requires_grad_() for t in (q, k, v)]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=causal, enable_gqa=True)
    dq, dk, dv = torch.autograd.grad(out, leaves, grad)
    by_key = lambda t: t.detach().reshape(2, 2, 80, 16)  # noqa: E731
    assert torch.allclose(dv.sum(2), by_key(grad).sum(2), atol=1e-10)
    assert float(dk.sum(2).abs().amax()) < 1e-10 * float(dk.abs().sum(2).amax())
    there, back = by_key(q).mT @ by_key(dq), dk.mT @ k.detach()
    assert torch.allclose(there, back, atol=1e-10 * float(there.abs().amax()))
    # dQ alone sums to nothing: no identity was overlooked that would be cheaper
    assert float(dq.sum(2).abs().amax()) > 1e-3 * float(dq.abs().sum(2).amax())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [Shape(), Shape(33, 50, groups=2), Shape(causal=True), Shape(masked="some")])
def test_gross_faults_of_every_result_alarm(dtype: torch.dtype, shape: Shape) -> None:
    there, back = calls(shape, 2_000_003, dtype)
    for call, places in ((there, (0,)), (back, (DQ, DK, DV))):
        for place in places:
            for fault, bad in gross_faults(call.out[place], 1):
                assert alarms(CHECKS, with_result(call, bad, place)), (place, fault)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e6, 1e15, 1e19, 1e20, 1e26, 1e32, 1e38, math.inf, math.nan])
def test_an_element_of_any_size_alarms_backward(dtype: torch.dtype, size: float) -> None:
    """Also where a norm's squares overflow, whose tolerance would admit anything."""
    _, back = calls(Shape(causal=True), 2_000_003, dtype)
    for place in (DQ, DK, DV):
        for sign in (1, -1):
            bad = back.out[place].clone()
            bad[1, 0, 7, 3] = sign * size
            assert alarms(CHECKS, with_result(back, bad, place)), place


def test_norms_that_overflow_hide_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    _, back = calls(Shape(causal=True), 2_000_003, torch.float32)
    bad = back.out[DK].clone()
    bad[1, 0, 7, 3] = 1e30
    assert alarms(CHECKS, with_result(back, bad, DK))
    monkeypatch.setattr("diagnostics.sensors.checks.attention_backward._bounded", lambda norms: norms)
    assert not alarms(CHECKS, with_result(back, bad, DK))


@settings(deadline=None, max_examples=60)
@given(st.sampled_from((DK, DV)), st.sampled_from(DTYPES), st.integers(2, 90), st.integers(2_000_000, 3_000_000))
def test_a_key_gradient_off_by_the_published_floor_alarms(
    place: int, dtype: torch.dtype, length: int, seed: int
) -> None:
    _, back = calls(Shape(length, length), seed, dtype)
    clean = back.out[place]
    bad = clean.clone()
    column = bad[1, 0, :, seed % 16].float()
    share = {torch.float32: 1e-4, torch.bfloat16: 0.09}[dtype]
    grad = back.args[0][1, 0].float()
    size = column.norm() + (grad[:, seed % 16].norm() if place == DV else 0)
    if place == DK:  # what the row sums of dS leave: an O that was rounded, a dP that was
        size = (
            size
            + 0.25 * (grad * back.args[4][1, 0].float()).norm(dim=-1) @ back.args[1][1, 0, :, seed % 16].float().abs()
        )
        size = size + grad.norm() * back.args[3][1, 0].float().norm(dim=-1).amax() * (dtype == torch.float32)
    if place == DV:
        size = size + 0.25 * grad[:, seed % 16].sum().abs()
    bad[1, 0, seed % length, seed % 16] += share * size + 0.01 * column.abs().amax() * (dtype == torch.bfloat16)
    assert alarms(CHECKS, with_result(back, bad, place), CpuBench(seed))
    assert not alarms(CHECKS, with_result(back, bad, place), CpuBench(seed, loose=1e9))


@settings(deadline=None, max_examples=60)
@given(st.integers(8, 90), st.integers(2_000_000, 3_000_000))
def test_a_query_gradient_off_by_a_hundredth_of_its_rms_alarms_in_fp32(length: int, seed: int) -> None:
    _, back = calls(Shape(length, length), seed * 2)  # without outliers
    bad = back.out[DQ].clone()
    row = int(back.args[1][0, 1].norm(dim=-1).argmax())
    bad[0, 1, row, seed % 16] += 0.01 * bad[0, 1].square().mean().sqrt()
    found = checked(CHECKS, with_result(back, bad, DQ), CpuBench(seed))
    assert {each.result for each in found if not bool((each.readings <= 1.0).all())} >= {"dq"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_a_kernel_that_misread_an_operand_is_seen_backward(dtype: torch.dtype, wrong: int) -> None:
    _, back = calls(Shape(), 2_000_004, dtype)
    args = list(back.args)
    args[1 + wrong] = args[1 + wrong].clone()
    args[1 + wrong][0, 1, 7] *= -4
    bad = BACKWARD(*args, **back.kwargs)
    assert alarms(CHECKS, Call(BACKWARD, back.args, back.kwargs, bad))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_score_of_a_sampled_row_is_seen_forward_and_that_of_another_is_not(dtype: torch.dtype) -> None:
    shape = Shape(160, 160)
    there, _ = calls(shape, 2_000_004, dtype)
    drawn = sampled_rows(160, Signs(0, CPU), CPU)
    other = next(row for row in range(160) if row not in drawn.tolist())
    for row, seen in ((int(drawn[3]), True), (other, False)):
        q = there.args[0].clone()
        q[:, :, row] *= -1
        assert alarms(CHECKS, with_result(there, FORWARD(q, *there.args[1:]))) == seen
    bad = there.out[1].clone()
    bad[0, 0, int(drawn[2])] += 1e-3
    assert alarms(CHECKS, with_result(there, bad, 1))


def test_every_row_is_drawn_in_some_step_and_no_long_run_is_ever_missed() -> None:
    drawn = [sampled_rows(100, Signs(key, CPU), CPU) for key in range(200)]
    assert set(torch.cat(drawn).tolist()) == set(range(100))
    for rows in drawn:
        assert len(set(rows.tolist())) == ROWS
        assert int(rows.diff().amax()) <= -(-100 // ROWS)
    assert sampled_rows(5, Signs(1, CPU), CPU).tolist() == [0, 1, 2, 3, 4]


def test_a_nan_operand_gives_nan_readings() -> None:
    q, k, v, grad, _ = operands(Shape(), 4, torch.float32)
    v[0, 0, 3, 3] = torch.nan
    there = run(FORWARD, q, k, v)
    assert all(bool(each.readings.isnan().any()) for each in checked(CHECKS, there) if each.result != "lse")
    back = run(BACKWARD, grad, q, k, v, *there.out, 0.0, False)
    assert bool(checked(CHECKS, back)[1].readings.isnan().any())


def test_dropout_and_what_a_gpu_leaves_open_are_refused() -> None:
    q, k, v, grad, _ = operands(Shape(), 4, torch.float32)
    there, back = calls()
    with pytest.raises(Unsupported, match="dropout"):
        checked(CHECKS, Call(FORWARD, (q, k, v, 0.1), {}, there.out))
    with pytest.raises(Unsupported, match="dropout"):
        checked(CHECKS, Call(BACKWARD, (grad, q, k, v, *there.out, 0.1, False), {}, back.out))
    meta = [t.to("meta") for t in (q[:, :, :3], k, v)]
    flash = aten._scaled_dot_product_flash_attention.default
    with pytest.raises(Unsupported, match="other numbers"):
        attention.Attention.of(Call(flash, (*meta, 0.0, True), {}, None))


def padded(low: float, seed: int, dtype: torch.dtype, scale: float = 1.0, padding: int = 13) -> tuple[Call, Call]:
    """Causal, as a mask that closes by a finite `low`; of the second sequence the first tokens are padding, whose rows
    are closed throughout. Their gradient is zero, as that of what no loss reads."""
    q, k, v, grad, _ = operands(SQUARE, seed, dtype, scale)
    mask = torch.zeros(2, 1, 40, 40, dtype=dtype).masked_fill_(torch.ones(40, 40, dtype=torch.bool).triu_(1), low)
    mask[1, :, :, :padding] = low
    grad[1, :, :padding] = 0
    there = run(FORWARD, q, k, v, 0.0, False, attn_mask=mask)
    return there, run(BACKWARD, grad, q, k, v, *there.out, 0.0, False, attn_mask=mask)


LOWS = st.sampled_from((-3e4, -1e4, -1e5, -1e6, -1e7, -1e9, -1e30, torch.finfo(torch.bfloat16).min))


@settings(deadline=None, max_examples=100)
@given(LOWS, st.sampled_from(DTYPES), st.sampled_from(SCALES), st.integers(2_000_000, 3_000_000))
def test_rows_that_a_finite_mask_closes_throughout_never_alarm(
    low: float, dtype: torch.dtype, scale: float, seed: int
) -> None:
    there, back = padded(low, seed, dtype, scale)
    assert worst(CHECKS, there, CpuBench(seed)) <= 1.0
    assert worst(CHECKS, back, CpuBench(seed)) <= 1.0
    grad = outliers(*back.args[0].shape, seed=seed + 3, scale=1 / scale, dtype=dtype)  # of the padding too
    back = run(BACKWARD, grad, *back.args[1:], **back.kwargs)
    assert worst(CHECKS, back, CpuBench(seed)) <= 1.0


@pytest.mark.parametrize("low", [-1e4, -1e9, torch.finfo(torch.float32).min])
def test_rows_that_a_finite_mask_closes_throughout_blind_no_others(low: float) -> None:
    there, back = padded(low, 2_000_009, torch.float32)
    index = sampled_rows(40, Signs(0, CPU), CPU).tolist()
    for row in index:
        bad = there.out[0].clone()
        bad[1, 1, row] += 0.2 * (there.args[2][1, 1].mean(0) - bad[1, 1, row])  # inside the hull
        assert alarms(CHECKS, with_result(there, bad, 0)) is (row >= 13 or low == -1e4)
        bad[1, 1, row, 3] = 1e3  # outside of it
        assert alarms(CHECKS, with_result(there, bad, 0))
    for place, name in ((DV, "dv"), (DK, "dk"), (DQ, "dq")):
        bad = back.out[place].clone()
        bad[1, 1, 20, 3] += 0.02 * float(bad[1, 1, :, 3].norm())
        assert worst(CHECKS, with_result(back, bad, place)) > 1.0, name
