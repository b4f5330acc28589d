"""Coverage says of each call what became of it: muted, left out, failed before it ran, under its own pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import assay
from diagnostics.sensors import saved
from diagnostics.sensors.account import MUTED
from diagnostics.sensors.checks import bench, gemm, grouped, undecided
from diagnostics.sensors.checks.operation import Call
from diagnostics.sensors.fingerprints import SENSOR as FINGERPRINT
from diagnostics.sensors.places import BACKWARD, DGRAD, FPROP, WGRAD

aten = torch.ops.aten


def row(guard: assay.Guard, operation: str, pass_: str = BACKWARD) -> tuple[float, str]:
    """Checked, and the reason, over all modules."""
    rows = [each for each in guard.coverage() if (each.operation, each.pass_) == (operation, pass_)]
    calls = sum(each.calls for each in rows)
    return sum(each.checked * each.calls for each in rows) / calls, "; ".join({each.reason for each in rows} - {""})


def test_what_was_given_to_a_step_can_be_muted() -> None:
    model = nn.Linear(2, 2)
    guard = assay.Guard(model)
    counts = torch.tensor([4, 5])

    def step() -> assay.GuardedStep:
        with guard.step() as step:
            model(torch.ones(1, 2))
            guard.check_equal("counts", counts, 4)
        return step

    first = step()
    assert [alarm.exact for alarm in first.alarms] == [True]
    assert guard.mute(first.alarms) == 1
    second = step()
    assert second.clean
    assert second.skipped == {MUTED: 1}
    assert guard.mute(first.alarms) == 0


def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every hash of what autograd keeps differs from the one before, as where hashing itself is broken."""
    count = iter(range(1_000_000))
    monkeypatch.setattr(saved, "stamp", lambda t: next(count))


def test_a_muted_hash_is_no_coverage(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong(monkeypatch)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.randn(3, 4)
    guard = assay.Guard(model)
    for muted in (False, True):
        guard.account = type(guard.account)()
        with guard.step() as step:
            model(x).sum().backward()
        assert step.clean is muted
        checked, reason = row(guard, saved.OPERATION)
        assert (checked, reason) == ((0.0, MUTED) if muted else (1.0, ""))
        guard.mute(step.alarms)


def test_a_muted_fingerprint_is_no_coverage() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4))
    guard = assay.Guard(model, again=0.0)
    x = torch.randn(3, 4, requires_grad=True)
    for muted in (0, 2):
        guard.account = type(guard.account)()
        with guard.step() as step:
            checkpoint(model, x, use_reentrant=False).sum().backward()
        assert step.clean
        assert row(guard, "silu", FPROP)[0] == (0.0 if muted else 1.0)
        assert step.skipped.get(MUTED, 0) == muted
        sites = [site for site, _ in guard.log.by_site() if site.sensor == FINGERPRINT]
        assert len(sites) == 2 - muted  # of addmm and silu, which are made again
        for site in sites:
            guard.widening.mute(site.sensor, site.module, site.operation, site.pass_)


@pytest.mark.parametrize("again", [1.0, 0.25, 0.0])
def test_kept_tensors_that_are_not_hashed_are_counted(again: float) -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(20) for layer in (nn.Linear(4, 4), nn.Tanh())]
    model, x = nn.Sequential(*layers, nn.BatchNorm1d(4)), torch.randn(8, 4)
    guard = assay.Guard(model, again=again)
    with guard.step() as step:
        model(x).square().sum().backward()
    assert step.clean
    checked, reason = row(guard, saved.OPERATION)
    assert 0 < checked < 1 if again else checked == 0
    assert "a buffer of the model" in reason
    assert ("not drawn" in reason) is (again == 0.25)
    assert ("nothing is run again" in reason) is (again == 0)


def conjugate_product(z: Tensor) -> Tensor:
    return (z * z.conj()).real.sum()


def negative_product(z: Tensor) -> Tensor:
    n = torch.conj(z).imag  # a negative view of z's own memory
    return (n * z.imag).sum()


@pytest.mark.parametrize("made", [conjugate_product, negative_product])
def test_a_tensor_and_its_conjugate_are_two(made: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    z = torch.randn(5, dtype=torch.complex64, requires_grad=True)
    guard = assay.Guard(nn.Linear(2, 2))
    with guard.step() as step:
        made(z * 2).backward()
    assert step.clean, step.alarms
    assert row(guard, saved.OPERATION) == (1.0, "")


class Experts(nn.Module):
    """Grouped products of rows that are sorted by expert; rows behind the last offset belong to none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 16, 16))
        self.offs = torch.tensor([16, 32], dtype=torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        return torch._grouped_mm(x, self.weight, offs=self.offs)


def test_grouped_products_have_their_own_pass() -> None:
    model = Experts()
    guard = assay.Guard(model)
    with guard.step() as step:
        model(torch.randn(32, 16, requires_grad=True)).square().sum().backward()
    assert step.clean
    passes = [(each.pass_, each.calls) for each in guard.coverage() if each.operation == "_grouped_mm"]
    assert sorted(passes) == sorted([(FPROP, 1), (DGRAD, 1), (WGRAD, 1)])


def test_without_a_tolerance_rows_that_nobody_wrote_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where fp32 products are made in TF32: the product is made again, of which those rows hold anything."""
    monkeypatch.setattr(bench, "fp32_precision", lambda device: "tf32")
    x, weight, offs = torch.randn(40, 16), torch.randn(2, 16, 16), torch.tensor([16, 32], dtype=torch.int32)
    call = Call(aten._grouped_mm.default, (x, weight, offs), {}, torch._grouped_mm(x, weight, offs=offs))
    for struck, alarm in ((39, False), (31, True)):
        call.out[struck, 3] += 1
        (one,) = undecided.made_again(call, bench.StepBench(0, assay.Guard(nn.Linear(2, 2)).table, torch.device("cpu")))
        assert bool((one.readings > 1).any()) is alarm
    guard, model = assay.Guard(Experts()), Experts()
    monkeypatch.setattr(grouped, "product_again", lambda call: (_ for _ in ()).throw(ZeroDivisionError("asked")))
    with guard.step() as step:
        model(torch.randn(32, 16))
    assert step.failures == 1  # so that is where it was to be made again


def test_what_failed_before_an_operator_ran_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """The addend has been written over by then: measured afterwards it would be an alarm."""

    def step(guard: assay.Guard) -> assay.GuardedStep:
        with guard.step() as step, torch.no_grad():
            torch.ones(4, 4).addmm_(torch.ones(4, 4), torch.ones(4, 4))
        return step

    guard = assay.Guard(nn.Linear(2, 2))
    assert step(guard).clean
    assert row(guard, "addmm_", FPROP) == (1.0, "")

    def fails(*_: Any) -> Any:
        raise ZeroDivisionError("before")

    monkeypatch.setattr(gemm.Addend, "of", fails)
    second = step(guard)
    assert second.clean
    assert (second.failures, sum(second.skipped.values())) == (1, 1)
    assert sum(each.calls for each in guard.coverage() if each.operation == "addmm_") == 2


def test_a_product_of_a_sparse_matrix_is_made_again() -> None:
    sparse = torch.eye(8).to_sparse_csr()
    guard = assay.Guard(nn.Linear(2, 2))
    with guard.step() as step, torch.no_grad():
        torch.mm(sparse, torch.randn(8, 3))
    assert step.clean
    assert (step.failures, guard.account.checked > 0) == (0, True)


@pytest.mark.parametrize("values", [torch.ones(2), torch.tensor(1.0), torch.ones(1, 1), [1.0, 2.0], []])
def test_observed_scalars_come_with_as_many_names(values: Any) -> None:
    """One too many would go by the next one's name."""
    guard = assay.Guard(nn.Linear(2, 2))
    with guard.step() as step:
        with pytest.raises(ValueError, match=r"1 names \(a\) came with values of shape"):
            step.observe_all(["a"], values)
        step.observe_all(["b", "c"], torch.tensor([3.0, 4.0]))
        step.observe("loss", 1.0)
    assert [(each.name, each.value) for each in step.evidence] == [("b", 3.0), ("c", 4.0), ("loss", 1.0)]


def test_what_lies_at_rest_can_be_muted() -> None:
    """As where its hash is broken: every device's alarm is no device's fault."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    guard = assay.Guard(model, optimizer)

    def step(damage: bool) -> assay.GuardedStep:
        if damage:
            with torch.no_grad():
                model.weight[0, 0] += 1
        with guard.step() as step:
            model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return step

    assert step(False).clean
    first = step(True)
    assert [(alarm.sensor, alarm.exact) for alarm in first.alarms] == [("at rest", True)]
    assert guard.recalibrate(first.alarms) == 0
    assert guard.mute(first.alarms) == 1
    second = step(True)
    assert second.clean
    assert second.skipped == {MUTED: 1}
