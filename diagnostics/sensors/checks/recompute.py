"""The check of any deterministic operator: the same arguments once more, compared bit for bit.

Identity. An operator is a function of its arguments: run again it gives the same bits. The reading counts the elements
whose bits differ, two for each, so that one difference is an alarm; bits are compared as integers, so that a NaN which
repeats is no difference. There is no tolerance and no constant to calibrate.

Sees: every transient fault, down to the last bit. Does not see: a defect that gives the same wrong answer twice, which
is why operations with an identity of their own should be checked by that; wrong inputs.
Not checkable: operators that draw random numbers (Tag.nondeterministic_seeded), unless all their dropout is off; those
that return memory nobody has written; least squares; those whose sums have no fixed order on GPUs (`_UNORDERED`); those
that write to an argument of which no copy was kept (`keeper`).
Cost: the operator once more, and a pass over its result, element-wise ones in pieces that stay in the caches
(`piecewise`); three passes where a bit differs; for an in-place operator a copy of its target before.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diagnostics.sensors.checks.arguments import read_by, targets, tensors, written_by
from diagnostics.sensors.checks.kinds import is_in_place, kind_of, name_of
from diagnostics.sensors.checks.operation import Before, Bench, Call, Checked, Unsupported
from diagnostics.sensors.checks.piecewise import gives_again
from diagnostics.sensors.checks.rows import argument, copy_of, differences, no_differences, rows_of

SENSOR = "recompute"

# Sums by atomic additions on GPUs: their bits depend on the order in which threads arrive. On a CPU they are ordered.
_UNORDERED = frozenset(
    {
        "index_add",
        "index_add_",
        "scatter_add",
        "scatter_add_",
        "index_put",
        "index_put_",
        "_index_put_impl_",
        "embedding_dense_backward",
        "_scaled_dot_product_flash_attention_backward",
        "_scaled_dot_product_efficient_attention_backward",
        "_scaled_dot_product_cudnn_attention_backward",
        "_flash_attention_backward",
        "_efficient_attention_backward",
        "bincount",
        "histc",
        "cumsum",
        "nll_loss2d_forward",
    }
)


# Operators that return a workspace, of which some is never written.
_WORKSPACES = frozenset({"mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn"})


# Operators whose bits differ from one run to the next with the same arguments: LAPACK's gelsy, which torch takes for
# least squares on a CPU (30 runs of 8 x 6, torch 2.13; its other drivers repeat themselves).
_UNREPEATABLE = frozenset({"linalg_lstsq"})


# How many results have values throughout. Fused attention: the output and the rows' logsumexp, without dropout; batch
# norm: all but its workspace; CTC: the losses, beside which paths shorter than the longest leave memory unwritten.
_RESULTS = {
    "_scaled_dot_product_flash_attention": 2,
    "_scaled_dot_product_efficient_attention": 2,
    "_scaled_dot_product_cudnn_attention": 2,
    "_scaled_dot_product_fused_attention_overrideable": 2,
    "_flash_attention_forward": 2,
    "_efficient_attention_forward": 2,
    "_cudnn_attention_forward": 2,
    "cudnn_batch_norm": 3,
    "miopen_batch_norm": 3,
    "_ctc_loss": 1,
}


@cache
def why_not(func: torch._ops.OpOverload, device: str, dropout: float | None = None) -> str | None:
    """Why running the operator again on this device type cannot be compared bit for bit; None if it can."""
    kind = kind_of(func)
    if kind in ("view", "blank"):
        return f"{name_of(func)} computes nothing"
    if name_of(func) in _WORKSPACES:
        return f"{name_of(func)} returns memory that nobody has written"
    if name_of(func) in _UNREPEATABLE:
        return f"{name_of(func)} does not give the same bits twice"
    if kind == "random" or (torch.Tag.nondeterministic_seeded in func.tags and dropout != 0.0):
        return f"{name_of(func)} draws random numbers"
    if torch.Tag.nondeterministic_bitwise in func.tags or (device != "cpu" and name_of(func) in _UNORDERED):
        return f"{name_of(func)} adds in no fixed order on {device}"
    return None


def keeper(func: torch._ops.OpOverload) -> Before:
    """What to keep before `func` runs, as `Call.before`: its arguments, with copies of those that it will write to.

    Costs nothing for operators that write to none.
    """

    def keep(args: tuple[Any, ...], kwargs: dict[str, Any], bench: Bench) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return _with_copies(func, args, kwargs)

    return keep


class Overwritten(NamedTuple):
    """What an operator with an identity was given, some of which its `out` lay over."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def overwritten(func: torch._ops.OpOverload) -> Before:
    """What to keep before `func`, an `out=` overload: its arguments as `Overwritten`, if it writes over one; else None.

    The identity would read what is there afterwards.
    """

    def keep(args: tuple[Any, ...], kwargs: dict[str, Any], bench: Bench) -> Overwritten | None:
        written, given = written_by(func, args, kwargs), read_by(func, args, kwargs)
        if not any(_meet(_extent(each), _extent(target)) for each in given for target in written):
            return None
        return Overwritten(*_with_copies(func, args, kwargs))

    return keep


def check(call: Call, bench: Bench) -> Iterable[Checked]:
    """Run the operator again and count, per row of each result, PER_DIFFERENCE for every element that differs.

    The call's own arguments stay as they are; `call.before` is what `keeper` kept, for operators that write to one.
    Raises Unsupported when the operator is not a function of its arguments, or they were written over and not kept.
    """
    results = _made_by(call.func, call.out, call.args, call.kwargs)
    if not results:
        return  # a number that the host already has
    device = results[0].device.type
    reason = why_not(call.func, device, dropout_of(call))
    if reason is not None:
        raise Unsupported(reason)
    if is_in_place(call.func) and call.before is None:
        raise Unsupported(f"{name_of(call.func)} wrote over its argument, of which no copy was kept")
    kept = call.before or (call.args, call.kwargs)
    if gives_again(call.func, kept[0], kept[1], call.out):
        yield Checked(SENSOR, "out", no_differences(call.out), tuple(call.out.shape), exact=True)
        return
    args, kwargs = _with_copies(call.func, *kept)
    returned = call.func(*args, **kwargs)
    again = _made_by(call.func, returned, args, kwargs)
    of_call = len(tensors(call.out))
    whole = results_of(call.func, of_call)
    for place, (first, second) in enumerate(zip(results, again, strict=True)):
        if first.numel() and not whole <= place < of_call:
            name = "out" if place == 0 else f"out{place}"
            yield Checked(SENSOR, name, differences(rows_of(first), rows_of(second)), tuple(first.shape), exact=True)


def check_target(call: Call, bench: Bench) -> Iterable[Checked]:
    """The same for a call of which the first argument alone was kept, as `call.before`, if it was written over."""
    if isinstance(call.before, Tensor):
        call = replace(call, before=((call.before, *call.args[1:]), call.kwargs))
    return check(call, bench)


def _with_copies(
    func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copies of what `func` writes to, each where it is given: also as an input, as in `maximum(x, y, out=x)`."""
    if not is_in_place(func):
        return args, kwargs
    touched: dict[int, list[tuple[int, int]]] = {}
    for target in written_by(func, args, kwargs):
        memory, extent = _extent(target)
        touched.setdefault(memory, []).append(extent)

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            memory, extent = _extent(value)
            meets = any(_meet((memory, extent), (memory, other)) for other in touched.get(memory, ()))
            return copy_of(value) if meets else value
        return [copied(each) for each in value] if isinstance(value, (list, tuple)) else value

    return tuple(copied(value) for value in args), {name: copied(value) for name, value in kwargs.items()}


def _extent(t: Tensor) -> tuple[int, tuple[int, int]]:
    """A tensor's memory, and from which of its bytes to which; of other layouts than strided the tensor is its own."""
    if t.layout is not torch.strided:
        return id(t), (0, 1)
    span = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1 if t.numel() else 0
    start = int(t.storage_offset()) * t.element_size()
    return t.untyped_storage().data_ptr(), (start, start + span * t.element_size())


def _meet(one: tuple[int, tuple[int, int]], other: tuple[int, tuple[int, int]]) -> bool:
    """Whether two extents have a byte in common."""
    (memory, (start, end)), (theirs, (first, last)) = one, other
    return memory == theirs and start < last and first < end


def _made_by(func: torch._ops.OpOverload, returned: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """What an operator made: what it returned, and what it wrote to where that is not returned."""
    found = tensors(returned)
    unsaid = any(not target.declared for target in targets(func))
    return found + written_by(func, args, kwargs) if unsaid or not found else found


def results_of(func: torch._ops.OpOverload, returned: int) -> int:
    """How many of the `returned` results hold values: of fused attention the first ones."""
    return min(returned, _RESULTS.get(name_of(func), returned))


def dropout_of(call: Call) -> float | None:
    """The share that an operator with a dropout of its own drops; None of others."""
    return float(argument(call, "dropout_p")) if _drops(call.func) else None


@cache
def _drops(func: torch._ops.OpOverload) -> bool:
    return any(declared.name == "dropout_p" for declared in func._schema.arguments)
