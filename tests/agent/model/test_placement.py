"""Redundant experts: everyone has a place, devices hold equally many, groups stay together, and copies never hurt."""

import random
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent.model import placement as placement_module
from agent.model.placement import Placement, PlacementError, packed, place, replicated


@dataclass(frozen=True)
class Case:
    load: list[float]
    copies: int
    devices: int
    nodes: int
    groups: int

    def placed(self) -> Placement:
        return place(self.load, self.copies, self.devices, self.nodes, self.groups)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    nodes, per_node = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    groups = draw(st.sampled_from([nodes, 2 * nodes, 1, 3]))
    devices = nodes * per_node
    experts = groups * draw(st.integers(1, 8))
    least = -(-experts // devices)
    copies = devices * (least + draw(st.integers(0, 3)))
    load = draw(st.lists(st.integers(0, 1000) | st.sampled_from([0, 1]), min_size=experts, max_size=experts))
    return Case([float(one) for one in load], copies, devices, nodes, groups)


@given(case=cases())
@example(case=Case([0.0] * 8, 8, 4, 2, 2))
def test_every_expert_has_a_place_and_devices_hold_equally_many(case: Case) -> None:
    placed = case.placed()
    held = Counter(expert for device in placed.devices for expert in device)
    assert held.keys() == set(range(len(case.load)))
    assert held.total() == case.copies
    assert {len(device) for device in placed.devices} == {case.copies // case.devices}
    assert placed.copies == dict(held)
    assert sum(placed.loads(case.load)) == pytest.approx(sum(case.load))
    assert placed == case.placed()


@given(case=cases())
def test_a_group_stays_on_one_node_when_groups_divide(case: Case) -> None:
    placed, size = case.placed(), len(case.load) // case.groups
    homes: dict[int, set[int]] = {}
    for device, held in enumerate(placed.devices):
        for expert in held:
            homes.setdefault(expert // size, set()).add(placed.node_of(device))
    if case.groups % case.nodes == 0:
        assert all(len(nodes) == 1 for nodes in homes.values())
        assert Counter(next(iter(nodes)) for nodes in homes.values()) == dict.fromkeys(
            range(case.nodes), case.groups // case.nodes
        )


def test_groups_that_do_not_divide_may_be_split() -> None:
    """The negative control of the above."""
    placed = place([9.0] * 3 + [1.0] * 3 + [1.0] * 3, 12, 4, nodes=2, groups=3)
    nodes = {placed.node_of(d) for d, held in enumerate(placed.devices) for expert in held if expert < 3}
    assert nodes == {0, 1}


@given(case=cases())
def test_copies_never_make_the_busiest_device_busier(case: Case) -> None:
    experts = len(case.load)
    if experts % case.devices:
        return  # without copies devices cannot hold equally many: there is nothing to compare with
    plain = place(case.load, experts, case.devices, case.nodes, case.groups)
    placed = case.placed()
    assert max(placed.loads(case.load)) <= max(plain.loads(case.load)) * (1 + 1e-12)
    assert placed.balancedness(case.load) >= plain.balancedness(case.load) * (1 - 1e-12)


def test_the_greedy_packing_alone_may_hurt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why the packing without copies is kept at hand: some load needs it."""

    def worse(load: list[float]) -> bool:
        weights = [1.0 * one for one in load]
        spread = placement_module._spread(weights, replicated(weights, 6), 2)
        greedy = max(map(sum, placement_module._carried(spread, weights)))
        return greedy > max(sum(weights[i] for i in held) for held in packed(weights, 2)) + 1e-9

    draws = random.Random(0)
    loads = [[draws.randint(0, 9) for _ in range(4)] for _ in range(2000)]
    assert any(worse(load) for load in loads)


def test_a_busy_expert_gets_copies() -> None:
    load = [10.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    plain, placed = place(load, 8, 4), place(load, 12, 4)
    assert placed.copies[0] == 5
    assert plain.balancedness(load) == pytest.approx(17 / 4 / 11)
    assert placed.balancedness(load) > 0.8


@pytest.mark.parametrize(
    ("load", "copies", "devices", "nodes", "groups", "told"),
    [
        ([], 4, 2, 1, 1, "load"),
        ([1.0, float("nan")], 2, 1, 1, 1, "load"),
        ([1.0, -1.0], 2, 1, 1, 1, "load"),
        ([1.0] * 4, 3, 1, 1, 1, "copies: 3 of 4"),
        ([1.0] * 4, 5, 2, 1, 1, "copies: 5 do not divide"),
        ([1.0] * 4, 6, 3, 2, 1, "devices: 3"),
        ([1.0] * 4, 4, 2, 1, 3, "groups: 4"),
        ([1.0] * 4, 4, 0, 1, 1, "devices, nodes, groups"),
        ([1.0] * 4, 4, 2, 0, 1, "devices, nodes, groups"),
    ],
)
def test_what_does_not_divide_is_named(
    load: list[float], copies: int, devices: int, nodes: int, groups: int, told: str
) -> None:
    with pytest.raises(PlacementError, match=told):
        place(load, copies, devices, nodes, groups)


def test_no_load_is_balanced() -> None:
    assert place([0.0] * 4, 4, 2).balancedness([0.0] * 4) == 1.0
