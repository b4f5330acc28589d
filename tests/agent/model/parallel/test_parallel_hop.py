"""One hop without peers: what is sent is masked, and the gradients are those of indexing."""

from collections.abc import Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agent.model.parallel import Echo
from agent.model.parallel.hop import Tokens, combine, dispatch


def tokens(count: int, world: int, each: int, top: int, seed: int) -> Tokens:
    """Random rows, gates and choices, some of which are none."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(count, world * each, generator=generator).topk(top).indices
    chosen[torch.rand(count, top, generator=generator) < 0.3] = -1
    rows = torch.randn(count, 6, generator=generator).requires_grad_()
    return Tokens(rows, torch.rand(count, top, generator=generator).requires_grad_(), chosen)


def by_indexing(given: Tokens, world: int, each: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, gates and numbers of the copies, destination by destination, and the row that each is a copy of."""
    at = given.experts.div(each, rounding_mode="floor")
    pairs = [(d, t) for d in range(world) for t in range(len(at)) if d in at[t].tolist()]
    source = torch.tensor([t for _, t in pairs], dtype=torch.int64)
    kept = torch.stack([at[t] == d for d, t in pairs]) if pairs else torch.zeros(0, at.shape[1], dtype=torch.bool)
    numbers = torch.where(kept, given.experts[source] % each, -1)
    return given.rows[source], given.gates[source] * kept, numbers, source


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, 9), world=st.integers(1, 4), each=st.integers(1, 3), data=st.data(), seed=st.integers(0, 99)
)
def test_a_hop_is_indexing(count: int, world: int, each: int, data: st.DataObject, seed: int) -> None:
    top = data.draw(st.integers(1, world * each))
    given = tokens(count, world, each, top, seed)
    rows, gates, numbers, source = by_indexing(given, world, each)
    found, trip = dispatch(given, Echo(world), each, fp8=False)
    assert torch.equal(found.rows, rows)
    assert torch.equal(found.gates, gates)  # gates of other destinations are 0, numbers -1
    assert torch.equal(found.experts, numbers)

    scales = torch.rand(rows.shape, generator=torch.Generator().manual_seed(seed))
    weights = torch.rand(gates.shape, generator=torch.Generator().manual_seed(seed + 1))
    home = combine((found.rows * scales).sin(), trip, torch.float32)
    wanted = torch.zeros(count, 6).index_add(0, source, (rows * scales).sin())
    torch.testing.assert_close(home, wanted)
    inputs = (given.rows, given.gates)
    ours = torch.autograd.grad(home.square().sum() + (found.gates * weights).square().sum(), inputs)
    theirs = torch.autograd.grad(wanted.square().sum() + (gates * weights).square().sum(), inputs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    linear = torch.autograd.grad((dispatch(given, Echo(world), each, fp8=False)[0].gates * weights).sum(), given.gates)
    expected = torch.autograd.grad((by_indexing(given, world, each)[1] * weights).sum(), given.gates)
    torch.testing.assert_close(linear, expected)  # a gate that was masked on its way gets no gradient from there


class Garbling(Echo):
    """Changes what arrives in the exchanges of int64, counts first, then numbers of experts."""

    def exchange(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        arrived = super().exchange(rows, send, receive).clone()
        if arrived.dtype == torch.int64:
            arrived.view(-1)[1] ^= 1 << 40
        return arrived


def test_a_count_that_changes_on_its_way_is_outvoted_and_a_number_stays_one_of_an_expert() -> None:
    """Whoever hashes the exchanges holds the step: until then no rank waits for rows that do not come, or falls."""
    given = tokens(9, 2, 3, 4, 1)
    clean, _ = dispatch(given, Echo(2), 3, fp8=False)
    found, trip = dispatch(given, Garbling(2), 3, fp8=False)
    assert trip.receive == trip.layout.sizes
    assert torch.equal(found.rows, clean.rows)
    assert not torch.equal(found.experts, clean.experts)
    assert -1 <= int(found.experts.min()) <= int(found.experts.max()) < 3
