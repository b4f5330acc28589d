"""Operators that have an identity and are so quick that running them once more, bit for bit, is worth its time as well.

An identity has a tolerance, below which a wrong result can still do harm; a second run has none, and is blind where an
identity is not: to a defect that gives the same wrong answer twice. Both are made of operators that take their time for
memory rather than for arithmetic, as those that no identity covers do: softmaxes, sums at chosen places, products of
few multiplications for each element that is read or written, M K N / (M K + K N + M N) <= MOST, and fused attention of
so few, T S / (T + S) <= MOST.

Sees: every transient fault of theirs, down to the last bit. Cost: that of `recompute`. On a CPU core with AVX-512 such
a product takes 0.4 to 1.1 times what its identity does in bf16, 4 to 11 times in fp32, which a GPU would not feel.
"""

from __future__ import annotations

from torch import Tensor

from diagnostics.sensors.checks import attention, attention_backward, gemm, softmax, sums
from diagnostics.sensors.checks.kinds import is_in_place
from diagnostics.sensors.checks.operation import Call
from diagnostics.sensors.checks.rows import argument

#: Multiplications for each element of operands and result. Attention by products over heads of 64 is below it whatever
#: the sequence's length, fused attention up to 128 positions, a model whose hidden size is 128, and any with fewer than
#: 64 tokens.
MOST = 64

_OF_MEMORY = frozenset(softmax.CHECKS | sums.CHECKS)
_ATTENTION = frozenset(attention.CHECKS | attention_backward.CHECKS)
_WRITES_A_RESULT = frozenset({"mm", "bmm"})  # `out` of the others may be the addend


def is_thin(call: Call) -> bool:
    """Whether to run the call once more, with an `out` of its own where it has one."""
    packet = call.func.overloadpacket
    if packet in _OF_MEMORY:
        return not is_in_place(call.func) or isinstance(call.before, Tensor)  # what was there is kept, as it is of sums
    if packet in _ATTENTION:
        queries, keys = argument(call, "query").shape[-2], argument(call, "key").shape[-2]
        return bool(queries * keys <= MOST * (queries + keys))
    if packet not in gemm.CHECKS or (is_in_place(call.func) and packet.__name__ not in _WRITES_A_RESULT):
        return False
    left, right = (arg for arg in call.args[-2:] if isinstance(arg, Tensor))
    return is_thin_product(left, right)


def is_thin_product(left: Tensor, right: Tensor) -> bool:
    """Whether left [..., M, K] times right [..., K, N] takes few multiplications for each element."""
    (rows, inner), columns = left.shape[-2:], right.shape[-1]
    return rows * inner * columns <= MOST * (rows * inner + inner * columns + rows * columns)
