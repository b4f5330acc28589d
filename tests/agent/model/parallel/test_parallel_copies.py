"""Which copies go where, against a plan made by hand; rows come home summed in the order of their places."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agent.model.parallel.copies import copies, gathered, spread


@st.composite
def wishes(draw: st.DrawFn) -> tuple[list[list[int]], int]:
    """Places that rows want (some none, some one twice), and how many places there are."""
    count, width = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    row = st.lists(st.integers(-1, count - 1), min_size=width, max_size=width)
    return draw(st.lists(row, max_size=12)), count


def tensor(rows: list[list[int]], width: int = 1) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64) if rows else torch.zeros(0, width, dtype=torch.int64)


@settings(max_examples=150, deadline=None)
@given(wishes(), st.sampled_from([1, 4]))
def test_one_copy_of_a_row_at_each_place_that_it_wants(wish: tuple[list[list[int]], int], multiple: int) -> None:
    rows, count = wish
    layout = copies(tensor(rows), count, multiple)
    found = spread(torch.arange(1.0, len(rows) + 1).unsqueeze(1), layout).flatten().tolist()
    assert layout.length == len(found) == sum(layout.sizes)
    start = 0
    for place, size in enumerate(layout.sizes):
        wanted = [t + 1 for t, row in enumerate(rows) if place in row]
        assert found[start : start + len(wanted)] == wanted  # in the order of the rows
        assert not any(found[start + len(wanted) : start + size])  # then nothing but padding
        assert size % multiple == 0
        assert size - len(wanted) < multiple
        start += size
    assert layout.rows.shape[0] == sum(len({p for p in row if p >= 0}) for row in rows)


@settings(max_examples=150, deadline=None)
@given(wishes(), st.sampled_from([1, 4]), st.integers(0, 9))
def test_rows_sum_their_copies_in_the_order_of_places(
    wish: tuple[list[list[int]], int], multiple: int, seed: int
) -> None:
    rows, count = wish
    layout = copies(tensor(rows), count, multiple)
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.randn(layout.length, 3, generator=generator)
    weights = torch.randn(len(rows), layout.home.shape[1], generator=generator)
    starts = [sum(layout.sizes[:place]) for place in range(count)]
    plain, weighted = torch.zeros(len(rows), 3), torch.zeros(len(rows), 3)
    for t, row in enumerate(rows):
        for j, place in enumerate(sorted({p for p in row if p >= 0})):
            copy = buffer[starts[place] + sum(place in earlier for earlier in rows[:t])]
            plain[t] += copy
            weighted[t].addcmul_(copy, weights[t, j])
    assert torch.equal(gathered(buffer, layout), plain)  # bit for bit, so the order is this one
    torch.testing.assert_close(gathered(buffer, layout, weights), weighted)


def test_the_order_is_visible_in_the_bits() -> None:
    layout = copies(torch.tensor([[2, 0, 1]]), 3)
    large, small = 2.0**24, 1.0
    buffer = torch.tensor([[large], [small], [small]])
    assert gathered(buffer, layout).item() == (torch.tensor(large) + small + small).item()
    assert gathered(buffer.flip(0), layout).item() == (torch.tensor(small) + small + large).item() != large


def test_rows_of_bf16_are_summed_in_fp32() -> None:
    layout = copies(torch.tensor([[0, 1]]), 2)
    total = gathered(torch.tensor([[256.0], [1.0]], dtype=torch.bfloat16), layout)
    assert (total.dtype, total.item()) == (torch.float32, 257.0)  # bf16 has no 257
