"""Every operator that torch tests itself with, forward and backward: guarded it gives the same bits, and no alarm."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.common_methods_invocations import op_db  # the samples torch 2.13, which is pinned, ships
from torch.utils._pytree import tree_leaves, tree_map

import assay
from diagnostics.sensors.checks.rows import copy_of, same

SAMPLES = 4
OPERATORS = [op for op in op_db if "empty" not in op.name]  # memory that nobody has written is never the same
DTYPES = [torch.float32, torch.bfloat16]


def named(op: Any) -> str:
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else str(op.name)


def fresh(value: Any) -> Any:
    """The sample's tensors anew, laid out as they were."""
    return copy_of(value.detach()).requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def made(op: Any, sample: Any) -> list[Tensor]:
    """Results, gradients, what has become of the arguments, and the state of the random numbers."""
    torch.manual_seed(3)
    given = tree_map(fresh, (sample.input, sample.args, sample.kwargs))
    out = op(given[0], *given[1], **given[2])
    results, leaves = tensors(out), tensors(given)
    ends = [t for t in results if t.requires_grad and t.layout is torch.strided]
    total = sum(((t.abs() if t.is_complex() else t).float().sum() for t in ends), start=torch.zeros(()))
    if total.requires_grad:
        total.backward()
    gradients = [t.grad for t in leaves if t.grad is not None]
    return [t.detach() for t in (*results, *gradients, *leaves)] + [torch.get_rng_state()]


#: By `gelsy` torch's own bits depend on where its memory lies: they differ from themselves now and then.
UNSTEADY = frozenset({"linalg.lstsq", "linalg.lstsq.grad_oriented"})


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(alike(a, b) for a, b in zip(some, others, strict=True))


def alike(a: Tensor, b: Tensor) -> bool:
    if (a.layout, a.shape, a.dtype) != (b.layout, b.shape, b.dtype):
        return False
    if a.layout is not torch.strided or a.is_quantized or a._is_zerotensor():
        return True
    return a.stride() == b.stride() and same(a, b)


def finite(some: Iterable[Tensor]) -> bool:
    return all(bool(t.isfinite().all()) for t in some if t.is_floating_point() and t.layout is torch.strided)


def differences(op: Any, dtype: torch.dtype, guarded: Callable[[], list[Tensor]] | None = None) -> list[str]:
    """What guarding changes of an operator's first samples, or what alarms in them though all results are finite."""
    torch.manual_seed(1)
    samples = op.sample_inputs("cpu", dtype, requires_grad=op.supports_autograd)
    found = []
    for number, sample in zip(range(SAMPLES), samples, strict=False):
        try:
            plain = made(op, sample)
        except Exception:  # noqa: BLE001 - a sample for another device, or without a backward
            continue
        repeats = equal(plain, made(op, sample))
        guard = assay.Guard(nn.Linear(2, 2))
        step = guard.step()
        try:
            with step:
                seen = made(op, sample) if guarded is None else guarded()
        except assay.NothingToCheck:
            pass
        if repeats and named(op) not in UNSTEADY and not equal(plain, seen):
            found.append(f"{number}: other bits")
        if not step.clean and (repeats and finite(plain)):
            found.append(f"{number}: {step.alarms[:2]}")
        if guard.failures:
            found.append(f"{number}: {[row for row in guard.coverage() if 'failed' in row.reason][:2]}")
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("op", OPERATORS, ids=named)
def test_guarding_changes_no_bit_and_nothing_alarms(op: Any, dtype: torch.dtype) -> None:
    if dtype in op.supported_dtypes("cpu"):
        assert differences(op, dtype) == []


def test_other_bits_are_found() -> None:
    """The control."""
    (exp,) = (op for op in op_db if named(op) == "exp")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert differences(exp, torch.float32, guarded=lambda: [torch.zeros(1)])[0] == "0: other bits"
    assert not alike(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert alike(torch.tensor([math.nan]), torch.tensor([math.nan]))
