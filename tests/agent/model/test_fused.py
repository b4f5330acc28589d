"""Gradients written by hand: against finite differences in fp64, and against autograd's own in bf16 and fp32."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from agent.model import dispatch
from agent.model.fused import (
    NO_LABEL,
    Weights,
    causal_attention,
    cross_entropy,
    key_value_heads,
    query_heads,
    rms_norm,
    routed_experts,
)

entropy_module = importlib.import_module("agent.model.fused.cross_entropy")  # the function has the module's name
DTYPES = [torch.float32, torch.bfloat16]


def drawn(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def turns(time: int, pairs: int, magnitude: float = 1.3) -> Tensor:
    angles = drawn(time, pairs, seed=9).detach()
    return torch.polar(torch.full_like(angles, magnitude), angles).to(torch.complex64)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-300))


def three_experts(x: Tensor, *weights: Tensor) -> Tensor:
    """Two experts with rows, and between them one without."""
    first, idle, last = Weights(*weights[:3]), Weights(*(w.detach() for w in weights[:3])), Weights(*weights[3:])
    return routed_experts(x, [x.shape[0] - 2, 0, 2], [first, idle, last])


def expert_shapes(rows: int, hidden: int, width: int) -> tuple[tuple[int, ...], ...]:
    """Of the operands of `three_experts`."""
    return ((rows, hidden), *(((width, hidden), (width, hidden), (hidden, width)) * 2))


LABELS = torch.tensor([0, 3, NO_LABEL, 6])
CHOSEN = torch.tensor([[0, 2], [2, 1], [0, 1]])
LAYOUT = dispatch.plan(CHOSEN, torch.tensor([2, 2, 2]), torch.bfloat16)  # padded slices
OPERATIONS: dict[str, tuple[Callable[..., Tensor | tuple[Tensor, ...]], tuple[Tensor, ...]]] = {
    "norm": (lambda x, w: rms_norm(x, w, 1e-2, torch.float64), (drawn(3, 5), drawn(5, seed=2))),
    "cross entropy": (lambda x: cross_entropy(x, LABELS), (drawn(4, 7),)),
    "query": (lambda x: query_heads(x, turns(3, 2), 2, 4), (drawn(6, 2 * 7),)),
    "key and value": (lambda x, s: key_value_heads(x, s, turns(3, 2), 2, 3), (drawn(6, 2 * 8), drawn(6, 4, seed=2))),
    "attention": (
        lambda q, k, v: causal_attention(q, k, v, 0.3, None),
        (drawn(4, 5, 3), drawn(4, 5, 3, seed=2), drawn(4, 5, 2, seed=3)),
    ),
    "dispatch": (lambda x: dispatch.dispatch(x, LAYOUT), (drawn(3, 4),)),
    "combine": (
        lambda y, gates: dispatch.combine(y, gates, LAYOUT),
        (drawn(sum(LAYOUT.sizes), 4), drawn(3, 2, seed=2)),
    ),
    "experts": (three_experts, tuple(drawn(*shape, seed=i) for i, shape in enumerate(expert_shapes(5, 4, 3)))),
}


class _OnePercentMore(torch.autograd.Function):
    """The identity, whose gradient is wrong: what the checks below must see."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 1.01


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    operation, operands = OPERATIONS[name]
    assert gradcheck(operation, operands)
    for wrong in range(len(operands)):

        def spoiled(*given: Tensor, wrong: int = wrong) -> Tensor | tuple[Tensor, ...]:
            return operation(*[_OnePercentMore.apply(x) if i == wrong else x for i, x in enumerate(given)])

        with pytest.raises(RuntimeError, match="Jacobian mismatch"):
            gradcheck(spoiled, operands)


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight


def plain_attention(apart: Tensor | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query @ key.transpose(1, 2) * 0.3
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        if apart is not None:
            hidden = hidden | apart.repeat_interleave(2, 0)
        return scores.masked_fill(hidden, -math.inf).softmax(-1) @ value

    return attend


def plain_heads(flat: Tensor) -> Tensor:
    rows = flat.view(2, 3, 2, 7)
    pairs = (
        torch.view_as_complex(rows[..., 3:].contiguous().view(2, 3, 2, 2, 2))
        * turns(3, 2).to(torch.complex128)[:, None]
    )
    turned = torch.view_as_real(pairs).flatten(-2)
    return torch.cat([rows[..., :3], turned], -1).transpose(1, 2).flatten(0, 1)


def plain_experts(x: Tensor, *weights: Tensor) -> Tensor:
    parts = zip(x.split([len(x) - 2, 2]), (weights[:3], weights[3:]), strict=True)
    return torch.cat([F.silu(part @ gate.t()) * (part @ up.t()) @ down.t() for part, (gate, up, down) in parts])


MANY = torch.arange(40).remainder(30) - 1  # among them labels that are not asked for
DOCUMENTS = torch.tensor([[0] * 200 + [1] * 100, [0] * 140 + [1] * 160])
APART = DOCUMENTS.unsqueeze(2) != DOCUMENTS.unsqueeze(1)
SEQUENCES = ((4, 300, 6), (4, 300, 6), (4, 300, 5))  # five blocks of queries, the last of them not whole
CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "norm": (lambda x, w: rms_norm(x, w.float(), 1e-3, x.dtype), plain_norm, ((50, 64), (64,))),
    "cross entropy": (
        lambda x: cross_entropy(x, MANY),
        lambda x: F.cross_entropy(x, MANY, ignore_index=NO_LABEL, reduction="none"),
        ((40, 30),),
    ),
    "attention": (lambda *x: causal_attention(*x, 0.3, None), plain_attention(None), SEQUENCES),
    "documents": (lambda *x: causal_attention(*x, 0.3, APART), plain_attention(APART), SEQUENCES),
    "query": (lambda x: query_heads(x, turns(3, 2), 2, 4), plain_heads, ((6, 14),)),
    "experts": (three_experts, plain_experts, expert_shapes(80, 32, 24)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_the_plain_ones_but_for_rounding(name: str, dtype: torch.dtype) -> None:
    fused, plain, shapes = CASES[name]
    operands = [drawn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    exact = [x.detach().double().requires_grad_() for x in operands]
    found, wanted = fused(*operands), plain(*exact)
    grad = drawn(*wanted.shape, seed=11, dtype=dtype).detach()
    gradients = torch.autograd.grad(found, operands, grad.to(found.dtype))
    true = torch.autograd.grad(wanted, exact, grad.double())
    bound = 2e-6 if dtype == torch.float32 else 1e-2  # a bf16 number is rounded by up to 2^-9 = 2e-3
    for one, other in zip((found, *gradients), (wanted, *true), strict=True):
        assert distance(one.detach(), other.detach()) < bound
        assert distance(one.detach(), 1.03 * other.detach()) > bound


def test_queries_see_no_key_of_a_later_block() -> None:
    query, key, value = (drawn(2, 300, d, seed=d, dtype=torch.float32) for d in (6, 6, 5))
    out = causal_attention(query, key, value, 0.3, None)
    by_key, by_value = torch.autograd.grad(out[:, :128].sum(), (key, value))
    assert not by_key[:, 128:].any()
    assert not by_value[:, 128:].any()
    assert by_key[:, :128].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sure_label_keeps_its_gradient(dtype: torch.dtype) -> None:
    """p of the label rounds to 1 in bf16, and its gradient p - 1 must not become 0."""
    logits = torch.zeros(1, 8, dtype=dtype)
    logits[0, 2] = 12.0
    logits.requires_grad_()
    cross_entropy(logits, torch.tensor([2])).sum().backward()
    assert logits.grad is not None
    rest = 7 * math.exp(-12) / (1 + 7 * math.exp(-12))
    assert float(logits.grad[0, 2]) == pytest.approx(-rest, rel=1e-2)
    assert float(logits.detach().softmax(-1)[0, 2].to(torch.bfloat16)) - 1 == 0  # as the plain way in bf16 has it


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=4, max_size=4), min_size=1, max_size=5),
    label=st.integers(0, 3),
)
def test_cross_entropy_is_finite_and_never_negative_for_any_logits(rows: list[list[float]], label: int) -> None:
    logits = torch.tensor(rows).requires_grad_()
    losses = cross_entropy(logits, torch.full((len(rows),), label))
    losses.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (losses >= -1e-3).all()
    wanted = F.cross_entropy(logits.detach().double(), torch.full((len(rows),), label), reduction="none")
    torch.testing.assert_close(losses.detach().double(), wanted, rtol=1e-6, atol=2e-3)  # 1e4 is known to 1e-3 in fp32


def test_an_infinite_logit_makes_the_loss_nan() -> None:
    assert cross_entropy(torch.tensor([[0.0, math.inf]]), torch.tensor([0])).isnan().all()


def test_chunks_of_the_vocabulary_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = drawn(37, 11, dtype=torch.float32), torch.arange(37).remainder(11)

    def run() -> tuple[Tensor, Tensor]:
        losses = cross_entropy(logits, labels)
        return losses.detach(), torch.autograd.grad(losses.sum(), logits)[0]

    whole = run()
    monkeypatch.setattr(entropy_module, "_CHUNK", 44)
    for one, other in zip(whole, run(), strict=True):
        assert torch.equal(one, other)
