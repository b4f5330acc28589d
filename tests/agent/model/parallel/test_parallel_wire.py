"""FP8 rows on the wire: as many bytes as the paper's, the values that the experts' linears would have made anyway."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agent.model.crossing import token_bytes
from agent.model.fp8 import Recipe
from agent.model.fp8.emulation import quantised
from agent.model.parallel.wire import packed, unpacked


def rows(n: int, hidden: int, seed: int) -> Tensor:
    """Rows whose elements have very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, hidden, generator=generator)
    return (values * 2.0 ** torch.randint(-20, 20, (n, hidden), generator=generator)).bfloat16()


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 5), hidden=st.integers(1, 300), seed=st.integers(0, 999))
def test_what_arrives_is_what_a_linear_would_have_quantised(n: int, hidden: int, seed: int) -> None:
    x = rows(n, hidden, seed)
    sent = packed(x)
    assert sent.dtype == torch.uint8
    assert sent.shape == (n, hidden + 4 * -(-hidden // 128))
    arrived = unpacked(sent, hidden)
    assert arrived.dtype == torch.bfloat16
    assert torch.equal(arrived.float(), quantised(x, 1, 128, Recipe()))
    again = unpacked(packed(arrived), hidden)
    assert torch.equal(again, arrived)  # a second hop, and the linear itself, change nothing
    assert torch.equal(quantised(arrived, 1, 128, Recipe()), arrived.float())


def test_under_other_scales_the_values_would_not_fit_into_bf16() -> None:
    once = quantised(rows(64, 128, 1), 1, 128, Recipe(power_of_two=False))
    assert not torch.equal(once.bfloat16().float(), once)


def test_bytes_of_a_row() -> None:
    assert packed(rows(1, 7168, 0)).shape[1] == token_bytes(7168, "fp8") == 7168 + 4 * 56


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 2.0**100])
def test_a_block_that_is_no_number_arrives_as_none(bad: float) -> None:
    x = torch.ones(2, 200, dtype=torch.bfloat16)
    x[1, 150] = bad
    arrived = unpacked(packed(x), 200)
    assert torch.equal(arrived[0], x[0])
    assert torch.equal(arrived[1, :128], x[1, :128])
    assert bool(arrived[1, 128:].isnan().all())
