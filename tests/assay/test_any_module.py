"""Modules of many kinds under the guard: clean steps stay clean and bit-equal, and what is not checked is said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_public_guard import equal, grads
from torch import Tensor, nn

import assay

Case = tuple[nn.Module, Callable[[], Any]]


def x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2)).to(dtype)


def dropout() -> Case:
    m = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    return m, lambda: m(x(4, 8)).sum().backward()


def convolution_and_batch_norm() -> Case:
    m = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    return m, lambda: m(x(2, 3, 8, 8)).sum().backward()


def lstm() -> Case:
    m = nn.LSTM(8, 8, 2)
    return m, lambda: m(x(5, 2, 8))[0].sum().backward()


def sparse_embedding() -> Case:
    m = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 4))
    return m, lambda: m(torch.tensor([1, 2, 3])).sum().backward()


def linear_in(dtype: torch.dtype) -> Callable[[], Case]:
    def make() -> Case:
        m = nn.Linear(64, 64).to(dtype)
        return m, lambda: m(x(16, 64, dtype=dtype)).abs().sum().float().backward()

    return make


def attention() -> Case:
    m = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.1)
    return m, lambda: m(x(2, 7, 16)).sum().backward()


def attention_with_dropout() -> Case:
    m = nn.Linear(8, 8)

    def run() -> None:
        q = m(x(4, 8))[None, None]
        F.scaled_dot_product_attention(q, q, q, dropout_p=0.2).sum().backward()

    return m, run


def gradient_of_a_gradient() -> Case:
    m = nn.Linear(8, 8)

    def run() -> None:
        (g,) = torch.autograd.grad(m(x(4, 8)).pow(3).sum(), m.weight, create_graph=True)
        g.pow(2).sum().backward()

    return m, run


def mapped() -> Case:
    m = nn.Linear(8, 8)
    return m, lambda: torch.vmap(m)(x(4, 8)).sum().backward()


def empty() -> Case:
    m = nn.Linear(8, 8)
    return m, lambda: m(x(0, 8)).sum().backward()


def without_gradients() -> Case:
    m = nn.Linear(8, 8)

    def run() -> None:
        with torch.inference_mode():
            m(x(4, 8))
        with torch.no_grad():
            m(x(4, 8))

    return m, run


CASES: dict[str, Callable[[], Case]] = {
    case.__name__: case
    for case in (
        dropout,
        convolution_and_batch_norm,
        lstm,
        sparse_embedding,
        attention,
        attention_with_dropout,
        gradient_of_a_gradient,
        mapped,
        empty,
        without_gradients,
    )
} | {str(dtype): linear_in(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.complex64)}
NOT_CHECKED = {
    "convolution_and_batch_norm": "a buffer of the model, which its module updates",
    "dropout": "draws random numbers",
    "lstm": "memory that nobody has written",
    "sparse_embedding": "layout torch.sparse_coo",
    "attention": "draws random numbers",
    "attention_with_dropout": "draws random numbers",
}


@pytest.mark.parametrize("name", CASES)
def test_any_module(name: str) -> None:
    torch.manual_seed(0)
    model, run = CASES[name]()
    made = []
    guard = assay.Guard(model)
    for guarded in (False, True, True):
        model.zero_grad()
        torch.manual_seed(1)  # dropout draws the same
        if guarded:
            with guard.step() as step:
                run()
            assert step.clean, step.alarms
        else:
            run()
        made.append([None if g is None or g.is_sparse else g for g in grads(model)])
    assert equal(made[0], made[1])
    assert equal(made[0], made[2])
    assert guard.failures == 0
    reasons = {row.reason for row in guard.coverage() if row.checked < 1 and row.operation != "randn"}  # inputs
    expected = NOT_CHECKED.get(name)
    assert all(expected is not None and expected in reason for reason in reasons), reasons
    assert bool(reasons) == (expected is not None)


def test_what_is_quantized_is_said_to_be_unseen() -> None:
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 8)), {nn.Linear})
    with pytest.raises(assay.NothingToCheck, match="quantized"), assay.Guard(model).step(), torch.no_grad():
        model(x(4, 8))


def test_a_users_own_error_passes() -> None:
    with pytest.raises(ValueError, match="mine"), assay.Guard(nn.Linear(2, 2)).step():
        raise ValueError("mine")
