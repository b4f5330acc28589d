"""Strikes on a real step: any operator, below the guard, by coordinates; the census says which there are."""

from __future__ import annotations

import random
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from sample_model import Sample, batch, gradients
from torch import Tensor, nn

from diagnostics.faults.models import Damage, Fault
from diagnostics.faults.sites import Census, Site
from diagnostics.faults.strike import Blow, SavedFlip, StepDiffers, Strike, Triggered
from diagnostics.sensors.guard import Guard
from diagnostics.sensors.guarded_step import GuardedStep


class Seen(list[Damage]):
    """A witness that remembers."""

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], harm: Damage) -> None:
        self.append(harm)


def step(model: nn.Module, below: AbstractContextManager[object] | None = None, enabled: bool = True) -> GuardedStep:
    model.zero_grad()
    guard = Guard(model, enabled=enabled)
    if below is None:
        with guard.step(1) as sense:
            model(batch(0)).backward()
    else:
        with below, guard.step(1) as sense:
            model(batch(0)).backward()
    return sense


def sites_of(model: nn.Module, enabled: bool = True) -> list[Site]:
    census = Census(model)
    step(model, census, enabled)
    return census.sites


def same(one: list[Tensor | None], other: list[Tensor | None]) -> bool:
    return all(a is b is None or torch.equal(a, b) for a, b in zip(one, other, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_census_names_operators_by_pass_and_module(dtype: torch.dtype) -> None:
    model = Sample(dtype)
    sites = sites_of(model)
    products = [site for site in sites if site.operator in ("aten.mm.default", "aten.addmm.default")]
    for name in ("layers.0.mix", "layers.1.experts.1.down", "head"):
        passes = sorted(site.pass_ for site in products if site.module == name)
        assert passes == ["dgrad", "fprop", "wgrad"] if name != "layers.0.mix" else ["fprop", "wgrad"]
    assert {site.module for site in sites if site.operator == "aten.silu_backward.default"} == {
        f"layers.{layer}.experts.{expert}" for layer in (0, 1) for expert in (0, 1)
    }
    assert not any("view" in site.operator or ".t." in site.operator for site in sites)
    assert [site.number for site in sites] == sorted({site.number for site in sites})


def test_the_guards_own_arithmetic_is_not_counted() -> None:
    model = Sample()
    assert sites_of(model) == sites_of(model, enabled=False)


@pytest.mark.parametrize("pass_", ["fprop", "dgrad", "wgrad"])
def test_a_struck_product_is_seen_and_unguarded_is_not(pass_: str) -> None:
    model = Sample()
    products = [site for site in sites_of(model) if site.pass_ == pass_]
    step(model)
    clean = gradients(model)
    for number, site in enumerate(random.Random(0).sample(products, 4)):
        seen = Seen()
        blows = {site.number: Blow(site.operator, Fault("tile", number, 3.0))}
        sense = step(model, Strike(blows, seen))
        assert len(seen) == 1
        assert not sense.clean
        assert not same(clean, gradients(model))
        assert step(model, Strike(blows, seen), enabled=False).clean  # the control: nobody looks
    step(model)
    assert same(clean, gradients(model))


def test_every_operator_can_be_struck() -> None:
    """Each number is the operator that the census found there; in-place ones, views' sources and fused ones alike."""
    model = Sample(torch.bfloat16)
    for site in sites_of(model)[::7]:
        seen = Seen()
        step(model, Strike({site.number: Blow(site.operator, Fault("bitflip", 3, bit=0))}, seen))
        assert len(seen) == 1
        assert int(seen[0].changed.sum()) == 1


def test_a_fused_optimizer_that_returns_nothing_is_struck_where_it_writes() -> None:
    parameter = nn.Parameter(torch.ones(20, 20))
    parameter.grad = torch.ones(20, 20)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    optimizer.step()  # the first makes the moments besides
    census = Census(nn.Identity())
    with census:
        optimizer.step()
    (fused,) = [site for site in census.sites if "fused_adamw" in site.operator]
    assert fused.results[0].shape == (20, 20)
    before = parameter.detach().clone()
    seen = Seen()
    with Strike({fused.number: Blow(fused.operator, Fault("row", 1, 9.0))}, seen):
        optimizer.step()
    assert int(((parameter.detach() - before).abs() > 0.5).any(1).sum()) == 1


def test_memory_copied_onto_itself_is_no_site() -> None:
    """`x[i] += y` adds in place and then copies the view onto itself, for which torch does nothing."""
    x, census = torch.zeros(4, 5), Census(nn.Identity())
    with census:
        x[1:3] += 1
        x[0] = x[2]
    assert [site.operator for site in census.sites] == ["aten.add_.Tensor", "aten.copy_.default"]


def test_another_operator_at_the_number_is_refused() -> None:
    model = Sample()
    site = sites_of(model)[5]
    with pytest.raises(StepDiffers, match=r"aten\.zap"):
        step(model, Strike({site.number: Blow("aten.zap", Fault("bitflip", 1))}, Seen()))


def test_without_strictness_a_blow_falls_where_it_can() -> None:
    model = Sample()
    seen = Seen()
    number = sites_of(model)[-1].number
    step(
        model, Strike({0: Blow("aten.zap", Fault("bitflip", 1), 5), number: Blow("", Fault("bitflip", 1))}, seen, False)
    )
    assert len(seen) == 1


def test_an_input_triggered_fault_comes_with_the_value() -> None:
    model = Sample()
    site = next(s for s in sites_of(model) if s.operator == "aten.mm.default" and s.pass_ == "fprop")
    blow = Blow(site.operator, Fault("bitflip", 11, bit=30))
    wide, narrow, never = Seen(), Seen(), Seen()
    step(model, Triggered(site.number, blow, wide, width=0.1))
    step(model, Triggered(site.number, blow, narrow, width=1e-6))
    assert len(wide) > len(narrow) >= 1  # the value itself is there
    step(model, Triggered(10**6, blow, never))
    assert not never


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kept_result_is_flipped_between_forward_and_backward(dtype: torch.dtype) -> None:
    """The loss is the clean one, the gradients are not, and nothing of the model's own is touched."""
    model = Sample(dtype)
    loss = model(batch(0))
    loss.backward()
    clean, parameters = gradients(model), [parameter.detach().clone() for parameter in model.parameters()]
    changed = 0
    for ordinal in range(0, 60, 4):
        model.zero_grad()
        seen = Seen()
        with SavedFlip(ordinal, Fault("bitflip", ordinal, bit=0), seen):
            struck = model(batch(0))
            assert not seen
            struck.backward()
        assert torch.equal(loss, struck)
        assert [int(harm.changed.sum()) for harm in seen] == [1]
        changed += not same(clean, gradients(model))
        assert all(torch.equal(a, b) for a, b in zip(parameters, model.parameters(), strict=True))
    assert changed >= 5
    model.zero_grad()
    model(batch(0)).backward()
    assert same(clean, gradients(model))


def test_a_kept_result_is_flipped_under_the_guards_hooks_too() -> None:
    """The guard keeps what autograd saves by hooks of its own; memory changes all the same."""
    model = Sample()
    found = []
    for ordinal in range(0, 40, 4):
        seen = Seen()
        found.append(step(model, SavedFlip(ordinal, Fault("bitflip", ordinal, bit=20), seen)).clean)
        assert len(seen) == 1
    assert not all(found)


def test_the_same_coordinates_are_the_same_fault() -> None:
    model = Sample()
    site = sites_of(model)[40]
    first, again, other = Seen(), Seen(), Seen()
    for seed, seen in ((3, first), (3, again), (4, other)):
        step(model, Strike({site.number: Blow(site.operator, Fault("value", seed, 2.0))}, seen))
    assert torch.equal(first[0].after, again[0].after)
    assert not torch.equal(first[0].after, other[0].after)
