"""What a checkpointed region makes again is compared with what it made: one bit shows, in either run, and is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpointed import Flip, Stack, compared, tokens
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from diagnostics.sensors import fingerprints
from diagnostics.sensors.digest import digest_on_device
from diagnostics.sensors.guard import Guard
from diagnostics.sensors.inspection import NOT_AGAIN

KINDS = {"reentrant": True, "not reentrant": False}
#: By operator: its first call of the forward's, and of the recomputation's, which begins with the second block.
CALLS = {"silu": (0, 2), "mul": (0, 2), "add": (0, 4), "addmm": (0, 6)}


def gradients(model: Stack) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operator", CALLS)
def test_one_bit_in_either_run_is_seen_and_named(operator: str, kind: str, dtype: torch.dtype) -> None:
    """Its lowest: below what any identity sees. Without fingerprints, in a job's setting or less, nobody looks."""
    model, x = Stack(dtype, use_reentrant=KINDS[kind]), tokens(dtype)
    for run, at in enumerate(CALLS[operator]):
        place = f"blocks.{run}" + (".gate" if operator == "addmm" else "")
        for on in (True, False):
            guard = Guard(model, again=0, fingerprints=on)
            with Flip(operator, at), guard.step(1) as step:
                model(x).backward()
            found = [(a.sensor, a.module, a.operation, a.pass_) for a in step.alarms]
            assert found == ([("fingerprint", place, operator, "fprop")] if on else [])
            assert guard.failures == 0
        guard = Guard(model, again=0)
        with guard.step(1) as step:
            model(x).backward()
        assert step.clean
        assert step.skipped == {}


@pytest.mark.parametrize("kind", KINDS)
def test_no_bit_is_changed_and_several_calls_of_a_region_do_not_meet(kind: str) -> None:
    """Gradients are accumulated over three batches; a fault in the second one's forward is found in its backward."""
    results = []
    batches = [tokens() + shift for shift in (0.0, 1.0, 2.0)]
    for on in (None, True):
        model = Stack(use_reentrant=KINDS[kind])
        guard = Guard(model, again=1 / 16, enabled=on is not None)
        with guard.step(1) as step:
            losses = [model(batch) for batch in batches]
            for loss in losses:
                loss.backward()
        assert step.clean
        results.append([*(loss.detach() for loss in losses), *gradients(model)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert compared(guard).count(("blocks.0", "silu")) == 3
    with Flip("silu", 2), guard.step(1) as step:
        losses = [model(batch) for batch in batches]
        for loss in losses:
            loss.backward()
    assert [(a.sensor, a.module, a.operation) for a in step.alarms] == [("fingerprint", "blocks.0", "silu")]


@pytest.mark.parametrize("kind", KINDS)
def test_coverage_counts_what_was_compared_and_no_more(kind: str) -> None:
    model, x = Stack(use_reentrant=KINDS[kind]), tokens()
    shares = {}
    for on in (True, False):
        guard = Guard(model, again=0, fingerprints=on)
        with guard.step(1):
            model(x).backward()
        shares[on] = {(row.module, row.operation, row.pass_): row for row in guard.coverage()}
    for operator, calls in (("silu", 2), ("mul", 2), ("add", 4 if KINDS[kind] else 3)):
        row = shares[True]["blocks.0", operator, "fprop"]
        ends_early = operator == "add" and not KINDS[kind]  # the residual stream's sum is not made again
        assert (row.calls, row.checked) == (calls, 2 / 3 if ends_early else 1)
        assert row.reason == (NOT_AGAIN if ends_early else "")
        assert shares[False]["blocks.0", operator, "fprop"].checked == 0
    backward = [row for row in shares[True].values() if row.operation == "silu_backward"]
    assert [row.checked for row in backward] == [0, 0]
    assert all(0 <= row.checked <= 1 for row in shares[True].values())


def test_what_is_run_again_every_time_is_not_hashed_but_products_are() -> None:
    model, x = Stack(use_reentrant=False), tokens()
    guard = Guard(model, again=1)
    with guard.step(1) as step:
        model(x).backward()
    assert step.clean
    assert {operation.split(".")[0] for _, operation in compared(guard)} == {"addmm", "native_layer_norm"}


def test_a_budget_draws_and_both_runs_draw_alike() -> None:
    model, x = Stack(use_reentrant=True), tokens()
    guard = Guard(model, budget=1e6, again=0)  # so large that calls are drawn, and only as told here
    counts = []
    for share in (1.0, 0.5, 1e-4):
        guard.sampler.share = share
        with guard.step(7) as step:
            model(x).backward()
        assert step.clean
        assert step.skipped == {}
        counts.append(len(compared(guard)))
    assert counts[0] > counts[1] > counts[2] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_changes_between_the_two_runs(kind: str) -> None:
    """Memory, not an operator: nobody writes. Both sides of every product's identity have the weight as it is."""
    model, x = Stack(use_reentrant=KINDS[kind]), tokens()
    for on in (True, False):
        with Guard(model, again=0, fingerprints=on).step(1) as step:
            loss = model(x)
            model.blocks[1].up.weight.detach().numpy().view("int32")[3, 5] ^= 1
            loss.backward()
        found = [(a.sensor, a.module, a.operation) for a in step.alarms]
        assert found == ([("fingerprint", "blocks.1.up", "addmm")] if on else [])


def test_a_fingerprint_that_fails_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Stack(use_reentrant=False), tokens()
    model(x).backward()
    plain = gradients(model)
    model.zero_grad()
    guard = Guard(model, again=0)
    asked = []

    def broken(t: Tensor) -> int:
        asked.append(t.shape)
        if len(asked) == 20:
            raise RuntimeError("no hash today")
        return 0

    monkeypatch.setattr(fingerprints, "_print", broken)
    with guard.step(1) as step:
        model(x).backward()
    assert step.clean
    assert guard.failures == 1
    assert len(asked) == 20  # what is out of step is of no use
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(model), strict=True))
    assert any("no hash today" in row.reason for row in guard.coverage() if row.operation == "fingerprint")
    with guard.step(2) as step:
        model(x).backward()
    assert guard.failures == 1
    assert len(asked) > 20


def test_reentrant_regions_are_followed_while_a_step_is_open_and_no_longer() -> None:
    plain = CheckpointFunction.forward
    model, x = Stack(use_reentrant=True), tokens()
    with Guard(model).step(1), Guard(model).step(2):
        assert CheckpointFunction.forward is not plain
        loss = model(x)
    assert CheckpointFunction.forward is plain
    loss.backward()  # of a function that was followed
    with pytest.raises(ZeroDivisionError), Guard(model).step(3):
        raise ZeroDivisionError
    assert CheckpointFunction.forward is plain


@pytest.mark.parametrize("kind", KINDS)
def test_hashes_that_stay_on_a_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There nobody waits for a comparison: what was made of a wrong value differs as well, and comes later."""
    monkeypatch.setattr(fingerprints, "_print", digest_on_device)
    monkeypatch.setattr(fingerprints, "_on_host", lambda compared: False)
    monkeypatch.setattr(fingerprints, "_content", lambda t: None)
    model, x = Stack(use_reentrant=KINDS[kind]), tokens()
    guard = Guard(model, again=0)
    with guard.step(1) as step:
        model(x).backward()
    assert step.clean
    assert step.skipped == {}
    with Flip("silu", 0, bit=20), guard.step(1) as step:
        model(x).backward()
    assert {a.sensor for a in step.alarms} == {"fingerprint"}
    assert (step.alarms[0].module, step.alarms[0].operation) == ("blocks.0", "silu")
    assert [a.operation for a in step.alarms[1:3]] == ["mul", "add"]


def views(t: Tensor) -> dict[str, Tensor]:
    return {"whole": t, "across": t.t(), "with gaps": t[:, ::2], "odd": t[:301, :97].contiguous(), "small": t[0, :9]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
@pytest.mark.parametrize("view", views(torch.zeros(400, 300)))
def test_one_bit_anywhere_changes_the_hash(view: str, dtype: torch.dtype) -> None:
    t = views(torch.randn(400, 300, generator=torch.Generator().manual_seed(0)).to(dtype))[view]
    first = fingerprints._print(t)
    assert view == "with gaps" or fingerprints._print(t.clone()) == first
    for place in ((0,) * t.dim(), tuple(size // 2 for size in t.shape), tuple(size - 1 for size in t.shape)):
        before = t[place].clone()
        t[place] = before.logical_not() if dtype is torch.bool else before * (1 + torch.finfo(dtype).eps)
        assert not torch.equal(t[place], before)
        assert fingerprints._print(t) != first
        t[place] = before
    assert fingerprints._print(t) == first


def test_swaps_and_the_same_flip_in_many_lanes_change_the_hash() -> None:
    t = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    first = fingerprints._print(t)
    spoilt: list[Any] = [t.roll(1, 0), t.roll(16, 1), t.flip(1), t[torch.randperm(512)]]
    for lanes in (2, 16, 64):
        struck = t.clone()
        struck.view(torch.int32)[:, ::lanes] ^= 1 << 12
        spoilt.append(struck)
    assert all(fingerprints._print(each) != first for each in spoilt)
