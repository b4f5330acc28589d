"""The least that checks have to read: operands and results once, what autograd keeps twice."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks._touched import Touched, bytes_a_second


def test_products_element_wise_work_and_what_is_kept_are_counted() -> None:
    x, w = torch.randn(4, 8), nn.Parameter(torch.randn(8, 16))
    with Touched() as forward:
        y = (x @ w) * 2.0
    product, doubled = (32 + 128 + 64) * 4, 2 * 64 * 4
    assert (forward.identities, forward.again, forward.saved) == (product, product + doubled, 32 * 4)
    assert forward.products == product
    square = torch.ones(1024, 1024)
    with Touched() as wide:
        square @ square
    assert (wide.identities, wide.again) == (3 << 22, 0)
    with Touched() as softmax:
        square.softmax(-1)
    assert (softmax.identities, softmax.products) == (2 << 22, 0)
    with Touched() as view:
        y.t().view(16, 4)
    assert (view.identities, view.again, view.saved) == (0, 0, 0)


def test_what_two_operators_keep_is_hashed_once_then_and_twice_when_it_is_used() -> None:
    x, weights = torch.randn(4, 8), [nn.Parameter(torch.randn(8, 8)) for _ in range(2)]
    with Touched() as step:
        loss = (x @ weights[0]).sum() + (x @ weights[1]).sum()
        assert step.saved == x.nbytes
        loss.backward()
    assert step.saved == 3 * x.nbytes


def test_memory_has_a_speed() -> None:
    assert 1e8 < bytes_a_second(torch.device("cpu")) < 1e13
