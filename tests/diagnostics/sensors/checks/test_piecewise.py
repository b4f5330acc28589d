"""Run again in pieces: every bit is compared, nothing of full size is made, and arguments stay as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import CpuBench, aten, flipped, outliers, run, with_result

from diagnostics.sensors.checks import moves, piecewise, recompute
from diagnostics.sensors.checks.operation import Call
from diagnostics.sensors.checks.piecewise import cut, gives_again, pieces
from diagnostics.sensors.checks.rows import differences, same
from diagnostics.sensors.quiet import quiet

X = outliers(6, 64, seed=1).view(2, 3, 64)
CALLS: list[tuple[Any, tuple[Any, ...]]] = [
    (aten.mul.Tensor, (X, X.flip(2))),
    (aten.mul.Tensor, (X, torch.linspace(-1, 1, 64))),
    (aten.add.Tensor, (X[:, :1], X)),
    (aten.add.Tensor, (X.transpose(0, 1), torch.tensor(2.0))),
    (aten.silu.default, (X.bfloat16(),)),
    (aten.silu_backward.default, (X, X.abs())),
    (aten.where.self, (X > 0, X, torch.tensor(0.0))),
    (aten.mul_.Tensor, (X.clone(), X[..., :1])),
    (aten.pow.Tensor_Scalar, (X, 2)),
]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of one row in fp32, so that what is tested has several."""
    monkeypatch.setattr(piecewise, "PIECE_BYTES", 256)


@pytest.mark.parametrize(("func", "args"), CALLS, ids=lambda v: str(v)[:20])
def test_every_element_is_compared_in_some_piece(func: Any, args: tuple[Any, ...]) -> None:
    call = run(func, *args)
    given = call.before or (call.args, call.kwargs)
    kept = [arg.clone() for arg in given[0] if isinstance(arg, torch.Tensor)]
    with quiet():
        assert gives_again(func, given[0], given[1], call.out)
        for element in range(call.out.numel()):
            bad = flipped(call.out, element, 16 if call.out.dtype == torch.bfloat16 else 0)
            assert not gives_again(func, given[0], given[1], bad)
            if element % 50 == 0:  # the whole is then compared, row by row
                (found,) = recompute.check(with_result(call, bad), CpuBench())
                assert found.readings.sum() == 2.0
    assert all(torch.equal(a, b) for a, b in zip(given[0], kept, strict=False) if isinstance(a, torch.Tensor))


@pytest.mark.parametrize("width", [1, 7, 33, 35, 67])
def test_where_a_piece_ends_within_a_vector_nothing_alarms(width: int) -> None:
    """torch makes what is left over otherwise, to the last bit; then the whole is run again."""
    x = outliers(6, width, seed=1)
    for func, args in ((aten.silu_backward.default, (x, x.abs())), (aten.exp.default, (x,))):
        with quiet():
            (found,) = recompute.check(run(func, *args), CpuBench())
        assert float(found.readings.sum()) == 0


@pytest.mark.parametrize("cuttable", [True, False])
def test_no_second_result_of_full_size_is_made(cuttable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the pieces there is one: the control."""
    made = []

    class Counted:
        _schema, tags, overloadpacket = aten.silu.default._schema, aten.silu.default.tags, aten.silu
        _overloadname, namespace = "default", "aten"

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            made.append(x.numel())
            result: torch.Tensor = aten.silu.default(x)
            return result

    if not cuttable:
        monkeypatch.setattr(piecewise, "PIECE_BYTES", 1 << 20)
    counted: Any = Counted()
    with quiet():
        (found,) = recompute.check(Call(counted, (X,), {}, aten.silu.default(X)), CpuBench())
    assert float(found.readings.sum()) == 0
    assert found.readings.numel() == 6
    assert (max(made) == X.numel()) is not cuttable
    assert sum(made) == X.numel()


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten.sum.dim_IntList, (X, [0])),
        (aten.mm.default, (X[0], X[0].t())),
        (aten.softmax.int, (X, -1)),
        (torch.ops.aten.one_hot.default, (torch.arange(64),)),
        (aten.cat.default, ([X, X],)),
        (aten.mul.out, (X, X)),
    ],
    ids=lambda v: str(v)[:20],
)
def test_what_is_not_element_wise_is_not_cut(func: Any, args: tuple[Any, ...]) -> None:
    named = {"out": torch.empty_like(X)} if func is aten.mul.out else {}
    assert not gives_again(func, args, named, func(*args, **named))


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.integers(1, 6), max_size=4),
    st.integers(1, 200),
    st.data(),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_pieces_cover_a_tensor_once(shape: list[int], most: int, data: st.DataObject, dtype: torch.dtype) -> None:
    whole = torch.zeros(shape, dtype=dtype)
    lower = [data.draw(st.sampled_from([1, size])) for size in shape[data.draw(st.integers(0, len(shape))) :]]
    other = torch.randn(lower)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(piecewise, "PIECE_BYTES", most)
        expected = torch.zeros(shape) + other
        for piece in pieces(whole):
            part = whole[piece]
            assert part.nbytes <= most or part.numel() <= max(shape[-1:] or [1])
            part += 1
            assert torch.equal(torch.zeros(part.shape) + cut(other, piece, whole.dim()), expected[piece])
    assert bool((whole == 1).all()) or whole.dim() == 0  # a number is no more than one element: it is never cut


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 3), st.integers(1, 9), st.integers(0, 8), st.integers(0, 15), st.booleans(), st.booleans())
def test_same_sees_any_bit_in_any_layout(lead: int, width: int, at: int, bit: int, low: bool, turned: bool) -> None:
    base = torch.randn(5, 12).to(torch.bfloat16 if low else torch.float32)
    a = base[lead:, 1 : 1 + width]
    b = a.clone()
    if turned:
        a, b = a.t(), b.t().contiguous()
    assert same(a, b)
    words = b.view(torch.int16 if low else torch.int32)
    place = (at % b.shape[0], at % b.shape[1])
    words[place] ^= 1 << bit if bit < 15 else -(1 << 15)
    assert not same(a, b)
    assert int(differences(a, b).sum()) == 2


def test_nan_is_the_same_as_itself() -> None:
    assert same(torch.full((4,), torch.nan), torch.full((4,), torch.nan))
    assert not same(torch.tensor([0.0]), torch.tensor([-0.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_are_compared_in_pieces_where_they_lie(dtype: torch.dtype) -> None:
    """A slice's rows do not lie beside each other: nothing of it is copied to be compared."""
    out = X[:, :2].to(dtype).contiguous()
    assert float(moves.copied_readings(X[:, :2], out).sum()) == 0
    for element in range(out.numel()):
        bad = flipped(out, element, 16 if dtype == torch.bfloat16 else 0)
        assert moves.copied_readings(X[:, :2], bad).tolist() == [2.0 * (row == element // 64) for row in range(4)]
