"""Steps whose operands hold infinities or NaN: as they should be they are quiet, and what is wrong beside is seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import outliers
from struck import Struck, first
from torch import Tensor, nn

from diagnostics.sensors import inspection
from diagnostics.sensors.guard import Guard, GuardedStep

aten = torch.ops.aten
SEEDS = st.integers(2_000_000, 3_000_000)
STRANGE = (torch.inf, -torch.inf, torch.nan)


def change(operator: Any, damage: Callable[[Tensor], object]) -> Struck:
    """The first result of the operator's first call."""
    return Struck(operator, lambda out: damage(first(out)), at=0)


def step_of(work: Callable[[], object], *modes: Any, model: nn.Module | None = None, key: int = 3) -> GuardedStep:
    guard = Guard(model or nn.Linear(1, 1))
    with guard.step(key) as step:
        for mode in modes:
            mode.__enter__()
        try:
            work()
        finally:
            for mode in modes:
                mode.__exit__(None, None, None)
    assert step.failures == 0
    return step


def masks(positions: int, seed: int, kind: str) -> Tensor:
    closed = torch.rand(positions, positions, generator=torch.Generator().manual_seed(seed)) < 0.3
    closed = closed.fill_diagonal_(False) if seed % 2 else torch.ones_like(closed).triu_(1)
    return closed if kind == "bool" else torch.zeros(closed.shape).masked_fill_(closed, -torch.inf)


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(("bool", "float")), st.integers(2, 20), st.sampled_from((torch.float32, torch.bfloat16)), SEEDS)
def test_attention_with_a_mask_and_its_weights_is_quiet(kind: str, n: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    module = nn.MultiheadAttention(16, 2, batch_first=True).to(dtype)
    x = outliers(2, n, 16, seed=seed, dtype=dtype)
    mask = masks(n, seed, kind)
    mask = mask if kind == "bool" else mask.to(dtype)
    assert step_of(lambda: module(x, x, x, attn_mask=mask)[0].sum().backward(), model=module, key=seed).clean


@pytest.mark.parametrize(
    ("place", "value", "sensor"),
    [
        ((1, 0, 3), 0.0, "gemm"),
        ((1, 0, 3), torch.nan, "recompute"),
        ((1, 2, 1), 1e-3, "recompute"),
        ((1, 5, 1), 9.0, "gemm"),
    ],
)
def test_what_is_wrong_in_masked_scores_is_seen(place: tuple[int, ...], value: float, sensor: str) -> None:
    """A closed place that is not -inf; a wrong score beside one; a wrong one in the last row, which sees all."""
    torch.manual_seed(0)
    module, x = nn.MultiheadAttention(16, 2, batch_first=True), outliers(2, 6, 16, seed=4)

    def work() -> None:
        module(x, x, x, attn_mask=torch.ones(6, 6, dtype=torch.bool).triu_(1))[0].sum().backward()

    def wrong(out: Tensor) -> None:
        out[place] = value if value in (0.0, torch.nan) or value != value else out[place] + value

    step = step_of(work, change(aten.baddbmm, wrong), model=module)
    assert sensor in {alarm.sensor for alarm in step.alarms if alarm.operation == "baddbmm"}


def strange(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of which one in some rows, not in all, is not finite."""
    x = outliers(*shape, seed=seed, dtype=dtype)
    rows = x.view(-1, shape[-1])
    rows[:: 2 + seed % 3, seed % shape[-1]] = STRANGE[seed % 3]
    return x


def identities(seed: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Calls of every identity that has a tolerance, some operand of which is not finite."""
    x, y, index = strange(seed, 6, 8, dtype=dtype), outliers(6, 8, seed=seed + 1, dtype=dtype), torch.arange(6) % 3
    q, k, v = (outliers(1, 2, 6, 8, seed=seed + place, dtype=dtype) for place in (2, 3, 4))
    bad = strange(seed, 1, 2, 6, 8, dtype=dtype)
    weight = outliers(8, seed=seed + 5, dtype=dtype)

    def backward(of: Callable[..., Tensor], *given: Tensor) -> Callable[[], object]:
        """With a gradient that is not finite."""

        def run() -> None:
            leaves = [t.clone().requires_grad_() for t in given]
            with torch.enable_grad():
                out = of(*leaves)
            out.backward(strange(seed + 1, *out.shape, dtype=out.dtype))

        return run

    return {
        "mm": lambda: x @ y.t(),
        "mm right": lambda: y @ x.t(),
        "bmm": lambda: bad[0] @ q[0].transpose(1, 2),
        "addmm": lambda: torch.addmm(weight, x, q[0, 0].t() @ q[0, 0]),
        "addend": lambda: torch.addmm(x, y, q[0, 0].t() @ q[0, 0], beta=-1),
        "mm.out": lambda: torch.mm(y, y.t(), out=torch.empty(6, 6, dtype=dtype)),
        "softmax": lambda: (x.softmax(-1), torch.full((3, 5), -torch.inf, dtype=dtype).softmax(-1)),
        "log_softmax": lambda: x.log_softmax(-1),
        "softmax backward": backward(lambda t: t.softmax(-1), y),
        "log_softmax backward": backward(lambda t: t.log_softmax(-1), y),
        "layer norm": lambda: F.layer_norm(x, (8,), weight, weight),
        "layer norm backward": backward(lambda t, w: F.layer_norm(t, (8,), w, w), y, weight),
        "query": lambda: F.scaled_dot_product_attention(bad, k, v),
        "key": lambda: F.scaled_dot_product_attention(q, bad, v),
        "value": lambda: F.scaled_dot_product_attention(q, k, bad, is_causal=True),
        "attention backward": backward(F.scaled_dot_product_attention, q, k, v),
        "attention, all backward": backward(F.scaled_dot_product_attention, bad, k, v),
        "nll": backward(lambda t: F.nll_loss(t, index % 3, reduction="none"), x),
        "nll mean": lambda: F.nll_loss(x, index),
        "index_add": lambda: y.clone().index_add_(0, index, x),
        "index_add target": lambda: (x.clone().index_add_(0, index, y), x.index_add(0, index, y)),
        "scatter_add": lambda: torch.zeros(6, 8, dtype=dtype).scatter_add(1, index[:, None].expand(6, 8), x),
        "index_put": lambda: y.clone().index_put_((index,), x, accumulate=True),
        "embedding": backward(lambda w: F.embedding(index, w), y),
        "cumsum": lambda: x.cumsum(1),
        "topk": lambda: (x.topk(3), x.sort(), x.topk(2, largest=False)),
        "bincount": lambda: torch.bincount(index, x[:, 0].float()),
    }


@settings(deadline=None, max_examples=25)
@given(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)), SEEDS)
def test_infinities_and_nan_that_were_given_are_no_alarm(dtype: torch.dtype, seed: int) -> None:
    for name, work in identities(seed, dtype).items():
        with torch.no_grad():
            step = step_of(work, key=seed)
        assert step.clean, (name, step.alarms)


def test_without_the_second_run_most_of_them_would_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "decided", lambda checks, *_: checks)
    with torch.no_grad():
        alarmed = {name for name, work in identities(2_000_004, torch.float32).items() if not step_of(work).clean}
    assert {"mm", "bmm", "addend", "softmax", "layer norm backward", "value", "index_add", "embedding"} <= alarmed


FAULTS = {
    "mm": aten.mm,
    "addend": aten.addmm,
    "softmax": aten._softmax,
    "log_softmax": aten._log_softmax,
    "layer norm": aten.native_layer_norm,
    "value": aten._scaled_dot_product_flash_attention_for_cpu,
    "index_add": aten.index_add_,
    "index_put": aten.index_put_,
    "embedding": aten.embedding_dense_backward,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("fault", ["bit", "NaN"])
def test_a_wrong_last_bit_beside_them_and_a_nan_that_nothing_gave_alarm(
    name: str, dtype: torch.dtype, fault: str
) -> None:
    def wrong(out: Tensor) -> None:
        place = int(out.reshape(-1).isfinite().nonzero()[-1])
        if fault == "NaN":
            out.view(-1)[place] = torch.nan
        else:
            out.view(torch.int32 if dtype == torch.float32 else torch.int16).view(-1)[place] ^= 1

    with torch.no_grad():
        assert not step_of(identities(2_000_004, dtype)[name], change(FAULTS[name], wrong)).clean


@pytest.mark.parametrize("value", STRANGE)
def test_what_is_not_finite_though_all_that_was_given_is_alarms(value: float) -> None:
    x = outliers(6, 8, seed=3)

    def spoil(out: Tensor) -> None:
        out[0, 1] = value

    for packet, work in (
        (aten.mm, lambda: x @ x.t()),
        (aten._softmax, lambda: x.softmax(1)),
        (aten.native_layer_norm, lambda: F.layer_norm(x, (8,))),
        (aten.index_add, lambda: x.index_add(0, torch.arange(3), x[:3])),
    ):
        with torch.no_grad():
            step = step_of(work, change(packet, spoil))
        assert {alarm.sensor for alarm in step.alarms} - {"recompute"}


@pytest.mark.parametrize("by_rows", [True, False])
def test_of_grouped_products_rows_of_no_group_are_not_compared(by_rows: bool) -> None:
    a = outliers(16, 8, seed=4, dtype=torch.bfloat16)
    w = outliers(2, 8, 8, seed=5, dtype=torch.bfloat16) if by_rows else outliers(16, 8, seed=5, dtype=torch.bfloat16)
    a[3, 3] = torch.inf
    given = (a, w) if by_rows else (a.t(), w)
    offs = torch.tensor([4, 10], dtype=torch.int32)

    def leave_rows(out: Tensor) -> None:  # what nobody has written is whatever was there
        if by_rows:
            out[10:] = 7.0

    def wrong(out: Tensor) -> None:
        leave_rows(out)
        out.view(torch.int16)[(2, 2) if by_rows else (0, 2, 2)] ^= 1

    work = lambda: torch._grouped_mm(*given, offs=offs)  # noqa: E731
    with torch.no_grad():
        assert step_of(work, change(aten._grouped_mm, leave_rows)).clean
        assert not step_of(work, change(aten._grouped_mm, wrong)).clean


def test_an_infinite_matrix_that_a_product_was_written_over_is_not_covered() -> None:
    x, guard = strange(2_000_004, 6, 6), Guard(nn.Linear(1, 1))
    with guard.step(1) as step, torch.no_grad():
        x.addmm_(x.nan_to_num(0.0, 0.0, 0.0), torch.eye(6))
    assert step.clean
    (row,) = [row for row in guard.coverage() if row.operation == "addmm_"]
    assert (row.checked, "written over" in row.reason) == (0.0, True)


def test_a_scaled_loss_that_overflows_fp16_is_left_to_its_scaler() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.Linear(64, 8))
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=2.0**24)
    guard, skipped = Guard(model), 0
    for number in range(12):
        with guard.step(number) as step:
            with torch.autocast("cpu", torch.float16):
                logits = model(outliers(16, 32, seed=number))
                loss = logits.pow(2).mean() + F.cross_entropy(logits, torch.arange(16) % 8)
            scaler.scale(loss).backward()
        assert step.clean, step.alarms
        assert step.failures == 0
        weights = model[0].weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        skipped += torch.equal(weights, model[0].weight)
    assert 0 < skipped < 12  # some steps overflowed, and others did not
