"""Recomputation sees every bit of every deterministic operator, and says why it can say nothing of the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import CpuBench, aten, flipped, outliers, run, with_result

from diagnostics.sensors.checks import recompute
from diagnostics.sensors.checks.kinds import is_view, kind_of
from diagnostics.sensors.checks.operation import Call, Unsupported
from diagnostics.sensors.quiet import quiet

X = outliers(5, 12, seed=1)
ROWS = torch.tensor([3, 0, 3])
OPERATORS: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (aten.silu.default, (X,), {}),
    (aten.mul.Tensor, (X, X), {}),
    (aten.sum.dim_IntList, (X, [0]), {}),
    (aten.rsqrt.default, (X.abs().bfloat16(),), {}),
    (aten.mm.default, (X, X.t()), {}),
    (aten.var_mean.correction, (X, [1]), {}),
    (aten.index_select.default, (X, 0, ROWS), {}),
    (aten.embedding_dense_backward.default, (X[:3], ROWS, 5, -1, False), {}),
    (aten.convolution.default, (X.view(1, 5, 12), torch.ones(2, 5, 3), None, [1], [0], [1], False, [0], 1), {}),
    (aten.scalar_tensor.default, (2.0,), {}),
]
_OWN = X.clone()
IN_PLACE: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (aten.add_.Tensor, (X.clone(), X), {"alpha": 2}),
    (aten.index_copy_.default, (X.clone(), 0, torch.tensor([1, 4]), X[:2]), {}),
    (aten.index_put_.default, (X.clone(), [ROWS], X[:3], True), {}),
    (aten.mul.out, (X, X), {"out": torch.ones(5, 12)}),
    (aten.add_.Tensor, (_OWN, _OWN), {}),  # what they write to is another argument of theirs as well
    (aten.maximum.out, (_OWN, X), {"out": _OWN}),
]


def reading(call: Call) -> float:
    with quiet():
        found = list(recompute.check(call, CpuBench()))
    return max((float(each.readings.amax()) for each in found), default=0.0)


@pytest.mark.parametrize(("func", "args", "kwargs"), OPERATORS + IN_PLACE, ids=lambda v: str(v)[:40])
def test_an_operator_run_again_gives_the_same_bits(func: Any, args: Any, kwargs: Any) -> None:
    call = run(func, *args, **kwargs)
    assert reading(call) == 0.0
    first = call.out[0] if isinstance(call.out, tuple) else call.out
    low = 16 if first.dtype == torch.bfloat16 else 0
    bad = flipped(first, first.numel() - 1, low)
    assert reading(with_result(call, bad, 0 if isinstance(call.out, tuple) else None)) == 2.0


@pytest.mark.parametrize(("func", "args", "kwargs"), IN_PLACE, ids=lambda v: str(v)[:40])
def test_what_was_kept_before_an_operator_wrote_over_it_stays_as_it_was(func: Any, args: Any, kwargs: Any) -> None:
    call = run(func, *args, **kwargs)
    kept = [t for t in [*call.before[0], *call.before[1].values()] if isinstance(t, torch.Tensor)]
    copies = [t.clone() for t in kept]
    reading(call)
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


def test_without_a_copy_an_operator_that_wrote_over_its_argument_is_refused_not_found_wrong() -> None:
    target = X.clone()
    out = aten.add_.Tensor(target, X)
    with pytest.raises(Unsupported, match="no copy was kept"):
        reading(Call(aten.add_.Tensor, (target, X), {}, out))
    wrong = Call(aten.add_.Tensor, (target, X), {}, out, ((target, X), {}))  # kept too late
    assert reading(wrong) == 24.0  # every element of every row


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 59), st.integers(0, 31), st.booleans())
def test_any_bit_of_any_element_is_seen(element: int, bit: int, low: bool) -> None:
    call = run(aten.silu.default, X.bfloat16() if low else X)
    bad = flipped(call.out, element, max(bit, 16) if low else bit)
    with quiet():
        (found,) = recompute.check(with_result(call, bad), CpuBench())
    assert found.readings.tolist() == [2.0 if row == element // 12 else 0.0 for row in range(5)]


def test_a_nan_that_repeats_is_no_difference_and_a_new_one_is() -> None:
    call = run(aten.sqrt.default, -X.abs())
    assert reading(call) == 0.0
    assert reading(with_result(run(aten.silu.default, X), X * torch.nan)) == 24.0


def test_a_defect_that_repeats_is_not_seen() -> None:
    class Broken:
        """Adds one, as a kernel with a defect does each time."""

        _schema = aten.silu.default._schema
        overloadpacket = aten.silu
        namespace = "aten"
        tags = aten.silu.default.tags

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return aten.silu.default(x) + 1

    broken: Any = Broken()
    assert reading(Call(broken, (X,), {}, broken(X))) == 0.0


@pytest.mark.parametrize(
    ("func", "args", "why"),
    [
        (aten.native_dropout.default, (X, 0.5, True), "random"),
        (aten.normal_.default, (X.clone(),), "random"),
        (aten.bernoulli.default, (X.abs().clamp(max=1),), "random"),
        (aten.linalg_lstsq.default, (X.t(), X.t()), "does not give the same bits twice"),
        (aten.view.default, (X, [12, 5]), "computes nothing"),
        (aten.empty_like.default, (X,), "computes nothing"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_its_reason(func: Any, args: Any, why: str) -> None:
    with pytest.raises(Unsupported, match=why):
        reading(run(func, *args))


def test_attention_can_be_run_again_only_without_dropout() -> None:
    q = outliers(1, 2, 6, 8, seed=4)
    assert reading(run(aten._scaled_dot_product_flash_attention_for_cpu.default, q, q, q)) == 0.0
    assert recompute.why_not(aten._scaled_dot_product_flash_attention.default, "cuda", 0.1) is not None
    assert recompute.why_not(aten._scaled_dot_product_flash_attention.default, "cuda", 0.0) is None


def test_sums_by_atomics_have_no_order_on_a_gpu() -> None:
    assert recompute.why_not(aten.index_add.default, "cpu") is None
    assert "no fixed order on cuda" in str(recompute.why_not(aten.index_add.default, "cuda"))


def test_an_optimizers_lists_return_nothing_and_are_compared_where_they_were_written() -> None:
    lists = ([X.clone(), X.clone()], [X, X])
    call = run(aten._foreach_add_.List, *lists)
    assert call.out is None
    assert reading(call) == 0.0
    lists[0][1].copy_(flipped(lists[0][1], 3, 0))
    assert reading(call) == 2.0


def test_a_number_for_the_host_is_not_read_again() -> None:
    assert list(recompute.check(run(aten._local_scalar_dense.default, X[0, 0]), CpuBench())) == []


@pytest.mark.parametrize(
    ("func", "kind"),
    [
        (aten.mm.default, "product"),
        (aten._scaled_dot_product_flash_attention_for_cpu_backward.default, "attention"),
        (aten.native_layer_norm.default, "norm"),
        (aten._softmax.default, "softmax"),
        (aten.nll_loss_forward.default, "loss"),
        (aten.topk.default, "router"),
        (aten.add_.Tensor, "elementwise"),
        (aten.silu.default, "elementwise"),
        (aten._foreach_mul_.Scalar, "elementwise"),
        (aten.sum.default, "reduction"),
        (aten.index_select.default, "move"),
        (aten.split.Tensor, "view"),
        (aten.detach_.default, "view"),
        (aten._unsafe_view.default, "view"),
        (aten.uniform_.default, "random"),
        (aten.empty.memory_format, "blank"),
        (aten.zeros.default, "creation"),
        (aten._local_scalar_dense.default, "unknown"),
    ],
)
def test_every_operator_has_a_kind(func: Any, kind: str) -> None:
    assert kind_of(func) == kind
    assert is_view(func) == (kind == "view")


def test_a_maximum_written_over_its_own_operand_is_made_again_of_what_that_was() -> None:
    """Made of what was written instead, the wrong value would be its own maximum: the control."""
    own, other = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0])
    call = run(aten.maximum.out, own, other, out=own)
    own[1] = 7.0
    assert reading(call) == 2.0
    assert reading(Call(call.func, call.args, call.kwargs, call.out, (call.args, call.kwargs))) == 0.0


def test_of_one_memory_only_what_is_written_is_copied() -> None:
    whole = torch.randn(4, 8)
    left, right = whole[:2], whole[2:]
    kept, _ = recompute.keeper(aten.add_.Tensor)((left, right), {}, CpuBench())
    assert kept[0] is not left
    assert kept[1] is right
