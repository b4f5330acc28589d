"""Which block of an update is repeated: drawn alike by all, each as likely, and compared by its bits."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.sensors.optimizer import BLOCK, blocks, differing, drawn

SIZES = st.lists(st.integers(0, 5 * BLOCK), min_size=1, max_size=4).filter(any)


@given(SIZES, st.integers(0, 2**64 - 1), st.integers(0, 100))
def test_a_block_lies_in_its_piece_and_begins_on_a_boundary(sizes: list[int], key: int, owner: int) -> None:
    block = drawn(key, owner, sizes)
    assert block == drawn(key, owner, sizes)
    assert block.start % BLOCK == 0
    assert 0 <= block.start < block.stop <= sizes[block.piece]
    assert block.stop - block.start == BLOCK or block.stop == sizes[block.piece]


def test_every_block_comes_as_often() -> None:
    """600 draws of 6 blocks: 100 each, which stray by 9; six deviations are 55."""
    sizes = [3 * BLOCK, 1, 2 * BLOCK]
    found = Counter(drawn(key, 3, sizes) for key in range(600))
    assert len(found) == blocks(sizes) == 6
    assert all(45 <= count <= 155 for count in found.values())


def test_owners_draw_apart() -> None:
    assert len({drawn(7, owner, [64 * BLOCK]) for owner in range(16)}) > 8


def test_nothing_to_draw_from_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"sizes are \[0, 0\]"):
        drawn(1, 0, [0, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_are_compared_and_not_values(dtype: torch.dtype) -> None:
    one = torch.tensor([0.0, 1.0, torch.nan], dtype=dtype)
    assert differing([one], [one.clone()]) == 0
    assert differing([one], [torch.tensor([-0.0, 1.0, torch.nan], dtype=dtype)]) == 1
    assert differing([one, one], [one, one + 1]) > 0
