"""bf16 moments in the flat state: where they lie, that the hash covers them, and what the optimizer makes of them."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from agent.training.layout import State, StateLayout
from agent.training.optimizer import CHUNK, AdamW, Pass, update
from diagnostics.sensors.digest import digest

MASK = (1 << 64) - 1
SETTINGS = AdamW()


class Odd(nn.Module):
    """Sizes that fill no word, no line and no chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.empty(CHUNK // 100 + 3, 107))
        self.small = nn.Parameter(torch.empty(3, 5))
        self.vector = nn.Parameter(torch.empty(7))
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)
        self.register_buffer("router_bias", torch.ones(5))


def states(layout: StateLayout, model: nn.Module) -> tuple[State, State]:
    old, new = (layout.view(memoryview(bytearray(layout.nbytes))) for _ in range(2))
    layout.capture(model, old)
    return old, new


def gradients(layout: StateLayout, step: int) -> torch.Tensor:
    """Zero in the padding, as backward leaves them."""
    made = torch.zeros(layout.flat)
    generator = torch.Generator().manual_seed(step)
    for span in layout.spans:
        made[span.start : span.start + span.size].normal_(0, 1e-3, generator=generator)
    return made


def apply(layout: StateLayout, old: State, new: State, step: int) -> int:
    totals = update(layout, old, new, gradients(layout, step), Pass(step, 1e-3, 1.0, SETTINGS))
    return sum(map(sum, totals)) & (2**64 - 1)


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_regions_fill_the_state_and_parts_carry_its_hash(moments: torch.dtype) -> None:
    model = Odd()
    layout = StateLayout(model, moments)
    old, new = states(layout, model)
    apply(layout, old, new, 1)
    assert old.exp_avg.dtype == moments
    assert layout.nbytes == old.words.numel() * 4
    spans = sorted((word, tensor.numel() * tensor.element_size()) for _, word, tensor in layout.parts(new))
    assert all(word * 4 + size <= after * 4 for (word, size), (after, _) in itertools.pairwise(spans))
    total = sum(digest(tensor, word) for _, word, tensor in layout.parts(new)) & MASK
    assert total == digest(new.words)


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_a_pass_made_again_gives_the_same_bits(moments: torch.dtype) -> None:
    """Backwards and in halves, over pieces that end within a vector, a half and a chunk."""
    model = nn.Module()
    for name, size in (("a", 5), ("b", CHUNK // 2 + 3), ("c", CHUNK + 17), ("d", 3 * CHUNK)):
        model.register_parameter(name, nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(size))))
    model.register_buffer("router_bias", torch.ones(5))
    layout = StateLayout(model, moments)
    old, new = states(layout, model)
    change = Pass(1, 1e-3, 0.37, SETTINGS)
    first = update(layout, old, new, gradients(layout, 1), change)
    made = new.words.clone()
    new.words.zero_()
    assert update(layout, old, new, gradients(layout, 1), change, again=True) == first
    new.words[layout.tail :] = made[layout.tail :]
    assert torch.equal(new.words, made)


def test_bf16_moments_halve_their_bytes() -> None:
    model = Odd()
    wide, narrow = StateLayout(model), StateLayout(model, torch.bfloat16)
    assert wide.nbytes - narrow.nbytes == 4 * narrow.flat


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_the_sum_of_hashes_is_that_of_what_was_written(moments: torch.dtype) -> None:
    model = Odd()
    layout = StateLayout(model, moments)
    old, new = states(layout, model)
    total = apply(layout, old, new, 1)
    assert total == digest(new.words[: layout.tail])


def test_a_flipped_bit_of_a_moment_is_seen() -> None:
    model = Odd()
    layout = StateLayout(model, torch.bfloat16)
    old, new = states(layout, model)
    total = apply(layout, old, new, 1)
    new.exp_avg_sq.view(torch.int16)[11] ^= 1
    assert total != digest(new.words[: layout.tail])


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 1000))
def test_one_step_is_adamw_rounded_once(seed: int) -> None:
    """Parameters move as with fp32 moments of the same values; moments are theirs, rounded to nearest."""
    model = Odd()
    narrow, wide = StateLayout(model, torch.bfloat16), StateLayout(model)
    (old, new), (wide_old, wide_new) = states(narrow, model), states(wide, model)
    old.exp_avg.copy_(gradients(narrow, seed))
    old.exp_avg_sq.copy_(gradients(narrow, seed + 1).square())
    wide_old.exp_avg.copy_(old.exp_avg)
    wide_old.exp_avg_sq.copy_(old.exp_avg_sq)
    apply(narrow, old, new, seed)
    apply(wide, wide_old, wide_new, seed)
    assert torch.equal(new.parameters, wide_new.parameters)
    assert torch.equal(new.exp_avg, wide_new.exp_avg.to(torch.bfloat16))
    assert torch.equal(new.exp_avg_sq, wide_new.exp_avg_sq.to(torch.bfloat16))


def test_many_steps_stay_near_fp32_moments() -> None:
    model = Odd()
    ends = []
    for moments in (torch.float32, torch.bfloat16):
        layout = StateLayout(model, moments)
        pair = states(layout, model)
        for step in range(1, 31):
            apply(layout, pair[(step - 1) % 2], pair[step % 2], step)
        ends.append(pair[0].parameters)
    start = states(StateLayout(model), model)[0].parameters
    strayed = float((ends[0] - ends[1]).norm() / (ends[0] - start).norm())
    assert 0 < strayed < 0.01
    assert math.isfinite(strayed)
