"""Sums over ranks: in rank order, bit for bit; and whatever goes wrong in one is seen, and found where it was."""

import multiprocessing
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from garble import Garble
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from agent.training import strays
from agent.training.collective import Group, serve_rendezvous
from agent.training.division import Replicated
from agent.training.summing import BUCKET, Cut, Sum
from diagnostics.verify.between import sum_rulings

#: A gradient of two pieces a rank, the last of them short, in parts that are not equal.
ELEMENTS = BUCKET + 100_003


@cache
def gradient(rank: int) -> Tensor:
    return torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(rank))


@cache
def in_rank_order(world: int) -> Tensor:
    total = gradient(0).clone()
    for rank in range(1, world):
        total += gradient(rank)
    return total


Told = list[tuple[Any, ...]]


def whole(group: Group, key: int | None) -> tuple[Told, bool]:
    """What one faulty sum is ruled, and whether the gradient holds the sum of all."""
    division = Replicated(None, group)  # type: ignore[arg-type]  # a sum asks nothing of the layout
    gradients = gradient(group.rank).clone()
    reduction = division.reduce(gradients, key)
    told: Told = []
    if any(alarmed for (alarmed,) in group.gather([len(reduction.strays)])):
        parts = [found.part for found in division.explain(reduction)]
        told = sum_rulings(parts, [(f"n{rank}", f"cpu-n{rank}") for rank in range(group.world)])
    return told, torch.equal(gradients, in_rank_order(group.world))


def of_pairs(group: Group, key: int | None) -> tuple[Told, bool]:
    """The same of the ranks that hold the same experts, two of four, of which each has its part."""
    pairs = [group.among((0, 2)), group.among((1, 3))]
    total = Sum(pairs[group.rank % 2], "experts")
    gradients = gradient(group.rank).clone()
    total.reduce(gradients, key is not None)
    total.place()
    if key is not None:
        total.hold()
    told: Told = []
    if any(alarmed for (alarmed,) in group.gather([len(total.strays)])):
        parts = [found.part for found in strays.explained(group, total.strays, [total])]
        told = sum_rulings(parts, [(f"n{rank}", f"cpu-n{rank}") for rank in range(group.world)])
    own = Cut.of(ELEMENTS, 2).whole(group.rank // 2)
    wanted = gradient(group.rank % 2) + gradient(group.rank % 2 + 2)
    return told, torch.equal(gradients[own], wanted[own])


def _rank(rank: int, world: int, endpoint: Any, out: Any, make: Any, garbles: Sequence[Garble], keys: Any) -> None:
    torch.set_num_threads(1)
    if rank == 0:
        _store, address = serve_rendezvous("127.0.0.1")
        for _ in range(world):
            endpoint.put(address)
    group = Group(endpoint.get(), "sums", rank, world)
    told = []
    for garble in garbles:
        garble.install(rank)
        for key in keys:
            garble.struck = 0
            garble.strike(garble.step, "forward")
            faulty = make(group, key)
            garble.strike(0, "")
            told.append((key, garble.struck, faulty, make(group, key)))
    out.put((rank, told))
    group.barrier()
    group.close()


def ranks(world: int, make: Any, garbles: Sequence[Garble], keys: Sequence[int | None] = (1,)) -> list[list[Any]]:
    """What each rank was told of each garble, under each key."""
    context = multiprocessing.get_context("spawn")
    endpoint, out = context.Queue(), context.Queue()
    processes = [
        context.Process(target=_rank, args=(rank, world, endpoint, out, make, garbles, keys)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    told = dict(out.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(60)
    return [told[rank] for rank in range(world)]


Case = tuple[Garble, int, str]
#: With the rank that is blamed (-1: none) and why. Three ranks trade three times, 2 x their pieces to be added and once
#: the sums; each hashes 6 pieces to be given, then 3 pieces and their sum twice, then 3 parts of the sum.
OF_THREE: list[Case] = [
    (Garble("trade", 1, 1, bit=0), -1, "a piece changed on its way from n0 to n1"),
    (Garble("trade", 2, 2, every=True), 2, "2 pieces changed on their way, and n2 is an end of each"),
    (
        Garble("give", 0, 3, call=1, apart=True, every=True),
        0,
        "2 pieces changed on their way, and n0 is an end of each",
    ),
    (Garble("give", 1, 4, before=True, bit=0), 1, "what n1 sent does not hash as it did"),
    (Garble("hash", 2, 5, call=6, how="hash"), 2, "what n2 received does not hash as it did"),
    (Garble("hash", 1, 6, how="hash"), 1, "what n1 sent does not hash as it did"),
    (Garble("last piece", 2, 7, before=True, bit=0), 2, "what n2 gave itself to add changed in its memory"),
    (Garble("add", 0, 8, call=1, bit=0), 0, "what n0 added up is not the sum when it adds again"),
    (Garble("hash", 0, 9, call=9, how="hash"), 0, "the part of the sum that n0 made changed in its memory"),
    (Garble("trade", 1, 10, call=2, bit=0), 1, "n1 alone does not hold the sum that its owner made"),
    (Garble("trade", 1, 11, call=2, every=True), 1, "2 pieces changed on their way, and n1 is an end of each"),
    (Garble("give", 2, 12, call=2, apart=True, every=True), 2, "n2 is an end of each"),
    (Garble("give", 0, 13, call=2, before=True), 0, "what n0 sent does not hash as it did"),
    (Garble("sum at rest", 1, 14, before=True, bit=0), 1, "the part of the sum that n1 made changed in its memory"),
]
#: Where nobody else can tell, what changed on its way to be added is nobody's.
OF_TWO: list[Case] = [
    (Garble("trade", 1, 1, bit=0), -1, "a piece changed on its way from n0 to n1"),
    (Garble("give", 1, 2, call=1, apart=True), -1, "a piece changed on its way from n1 to n0"),
    (Garble("give", 1, 3, call=1, before=True), 1, "what n1 sent does not hash as it did"),
    (Garble("add", 1, 4), 1, "what n1 added up is not the sum"),
    (Garble("trade", 0, 5, call=2, bit=0), 0, "n0 alone does not hold the sum that its owner made"),
    (Garble("give", 0, 6, call=2, before=True), 0, "what n0 sent does not hash as it did"),
]
#: On a mesh the sums are not handed out; what is given to one holder of the same experts.
OF_PAIRS: list[Case] = [
    (Garble("trade", 2, 1, bit=0), -1, "a piece changed on its way from n0 to n2"),
    (Garble("give", 3, 2, before=True, bit=0), 3, "what n3 sent does not hash as it did"),
    (Garble("add", 1, 3, call=1, bit=0), 1, "what n1 added up is not the sum"),
]


@pytest.mark.parametrize(
    ("world", "make", "cases"), [(3, whole, OF_THREE), (2, whole, OF_TWO), (4, of_pairs, OF_PAIRS)]
)
def test_what_goes_wrong_in_a_sum_is_seen_and_found(world: int, make: Any, cases: list[Case]) -> None:
    """All ranks rule alike; made again, the sum is that in rank order. Unchecked, what went wrong is taken for one."""
    told = ranks(world, make, [garble for garble, *_ in cases], keys=(1, None))
    for number, (garble, blamed, why) in enumerate(cases):
        checked, unchecked = zip(*(rank[2 * number : 2 * number + 2] for rank in told), strict=True)
        assert sum(struck for _, struck, *_ in checked) > 0, garble
        rulings = [faulty for _, _, (faulty, _), _ in checked]
        assert all(ruling == rulings[0] for ruling in rulings)
        ((suspect, ruling),) = rulings[0]
        assert (ruling.blamed_node, suspect if blamed >= 0 else -1) == (f"n{blamed}" if blamed >= 0 else None, blamed)
        assert why in ruling.reason
        assert "in the reduction" in ruling.reason
        assert all(again == ([], True) for _, _, _, again in checked)
        assert all(faulty == [] for _, _, (faulty, _), _ in unchecked)
        if garble.what != "hash" and garble.bit:  # nobody hashes then; and a sum may round the least bit away
            assert not all(right for _, _, (_, right), _ in unchecked)


@given(st.integers(0, 3 * BUCKET), st.integers(1, 9))
def test_every_element_is_in_one_piece(elements: int, world: int) -> None:
    cut = Cut.of(elements, world)
    spans = [cut.of_part(owner, number) for owner in range(world) for number in range(cut.pieces)]
    assert [owner for owner in range(world) if cut.whole(owner).stop < cut.whole(owner).start] == []
    reached = 0
    for span in spans:
        assert span.start == reached or span.start == span.stop
        assert 0 <= span.stop - span.start <= max(BUCKET // world, 4096)
        reached = max(reached, span.stop)
    assert reached == elements
