"""What an identity cannot judge since the operands are not finite: the operator is run again, bit for bit, on a CPU.

An infinity or NaN among the operands (a mask's -inf, a scaled loss that overflowed, a mean over nothing) reaches the
rows that read it, on both sides of an identity, and their readings are not finite either. These rows are left out; the
others stand. Where all operands are finite such a reading is the alarm that it was. Results in fp16 that hold an
infinity, which is what there is beyond 65,504, are run again likewise; those of products are not (`beyond`).

Only where every operator of the step is looked at, for what comes of one that is not may be a device's fault: where
calls are drawn, or compiled code runs unseen, such readings stand, and alarm. What no check judges is asked whether it
is finite (`unjudged`). A parameter that is not finite is no operand to be excused: it was wrong before the step.
Elsewhere than on a CPU nobody asks: the host would wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from diagnostics.sensors.checks import gemm, grouped, recompute
from diagnostics.sensors.checks.beyond import all_finite
from diagnostics.sensors.checks.gemm import Addend
from diagnostics.sensors.checks.operation import Bench, Call, Checked, Unsupported
from diagnostics.sensors.checks.rows import some_strange

# Operands of which an identity knows what their infinities mean.
_KNOWN = frozenset({"attn_mask", "attn_bias", "logsumexp"})


def decided(
    checks: Iterable[Checked], call: Call, bench: Bench, is_parameter: Callable[[Tensor], bool]
) -> Iterator[Checked]:
    """The checks of a call, of which rows that they cannot judge are left to a second run.

    Raises Unsupported, after the others, where there can be none: what the operator wrote over was not kept.
    """
    found = list(checks)
    asked = any(not one.readings.is_cuda and some_strange(one.readings) for one in found)
    if not asked or _is_clear(call, is_parameter):
        yield from found
        return
    for one in found:
        yield one._replace(readings=torch.where(one.readings.isfinite(), one.readings, 0.0))
    if isinstance(call.before, Addend):
        raise Unsupported("operands that are not finite, one of which was written over")
    yield from made_again(call, bench)


def made_again(call: Call, bench: Bench) -> Iterable[Checked]:
    """The operator once more, bit for bit, whichever it is. Raises Unsupported as `recompute.check` does."""
    is_grouped = call.func.overloadpacket in grouped.CHECKS
    return [grouped.product_again(call)] if is_grouped else recompute.check_target(call, bench)


def _is_clear(call: Call, is_parameter: Callable[[Tensor], bool]) -> bool:
    """Whether what is not finite was made of what is, or of a parameter, by an operator that ends where fp32 does."""
    strange = [t for t in _operands(call) if not all_finite(t)]
    if strange:
        return any(is_parameter(t) for t in strange)
    results = [t for t in tree_leaves(call.out) if isinstance(t, Tensor) and t.dtype == torch.float16]
    return call.func.overloadpacket in gemm.CHECKS or not any(bool(t.isinf().any()) for t in results)


def _operands(call: Call) -> Iterator[Tensor]:
    """What the operator read, as far as it is still there or was kept."""
    before = call.before.along if isinstance(call.before, Addend) else call.before
    written = {t.data_ptr() for t in tree_leaves(call.out) if isinstance(t, Tensor)}
    for place, declared in enumerate(call.func._schema.arguments):
        if declared.name not in _KNOWN:
            value = call.args[place] if place < len(call.args) else call.kwargs.get(declared.name)
            leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
            yield from (leaf for leaf in leaves if leaf.data_ptr() not in written)
    if isinstance(before, Tensor):
        yield before
