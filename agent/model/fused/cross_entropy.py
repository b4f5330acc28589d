"""Cross entropy over a large vocabulary: fp32 within, while only the logits' own type lies in memory."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from agent.model.fused.precision import wide

# Elements worked on at a time: 1 MiB of fp32, which a 2-core machine's L2 holds (measured on 1024 x 4096 logits).
_CHUNK = 1 << 18
#: Marks a position whose label is not asked for.
NO_LABEL = -1


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label] of every row, 0 where there is no label; computed in fp32.

    With p = softmax(x), y the label and g = dL/dloss of the row: dL/dx_j = g (p_j - [j = y]). Kept are p in the type
    of the logits and p_y - 1 in fp32, since p_y may round to 1.

    Args:
        logits: [rows, vocabulary], fp32 or bf16.
        labels: int64 [rows]; NO_LABEL where there is none.

    Returns:
        fp32 [rows].
    """
    return cast(Tensor, _CrossEntropy.apply(logits, labels))  # type: ignore[no-untyped-call]


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        asked = labels.clamp(min=0).unsqueeze(1)
        keep = ctx.needs_input_grad[0]
        probability = torch.empty_like(logits) if keep else None
        log_sum = _log_sums(logits, probability)
        losses = log_sum - logits.gather(1, asked).to(log_sum.dtype)
        losses.masked_fill_(labels.unsqueeze(1) == NO_LABEL, 0.0)
        if keep:
            ctx.save_for_backward(probability, labels, asked, losses)
        return losses.squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        probability, labels, asked, losses = ctx.saved_tensors
        weight = grad.masked_fill(labels == NO_LABEL, 0.0).unsqueeze(1)
        out = torch.empty_like(probability)
        for part in _parts(probability):
            torch.mul(probability[part], weight[part], out=out[part])
        at_label = torch.expm1(-losses) * weight  # p_y - 1, where 0 stands for a row without label
        return out.scatter_(1, asked, at_label.to(out.dtype)), None


def _log_sums(logits: Tensor, probability: Tensor | None) -> Tensor:
    """log sum exp of each row, fp32 [rows, 1]; fills ``probability``."""
    found = logits.new_empty(logits.shape[0], 1, dtype=wide(logits.dtype))
    for part in _parts(logits):
        values = logits[part].to(found.dtype)
        share = values.softmax(1)
        # The largest share is at least 1 / vocabulary, so that its logarithm is as good as the sum's own.
        found[part] = values.amax(1, keepdim=True) - share.amax(1, keepdim=True).log()
        if probability is not None:
            probability[part] = share
    return found


def _parts(rows: Tensor) -> list[slice]:
    """Slices of [rows, vocabulary], each about `_CHUNK` elements; they depend on the shape alone."""
    step = max(1, _CHUNK // rows.shape[1])
    return [slice(start, start + step) for start in range(0, rows.shape[0], step)]
