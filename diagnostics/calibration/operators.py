"""The operators that are run on clean data, by family; what else a family's autograd runs is measured on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diagnostics.calibration.values import SCALES, Draw
from diagnostics.sensors.checks.norms import rms_norm_readings
from diagnostics.sensors.checks.operation import Bench, Checked
from diagnostics.sensors.checks.router import gate_readings

# Sums from one term to those of the largest layers that a test machine multiplies in milliseconds, and lengths that
# are no multiple of any vector or tile.
_INNER = (1, 2, 3, 7, 16, 33, 64, 100, 128, 257, 512, 1000, 1024, 2048, 4096)

# Rows of a vocabulary are the longest that a softmax meets.
_CLASSES = 8192

# Lengths beyond torch's blocks of keys (512) and of queries (64 to 256), and heads that are no multiple of a vector.
_POSITIONS = 600
_HEADS = (8, 16, 24, 64, 128, 136)

# A GPU has several kernels for it, of which torch takes one by version and device: a constant has to hold for all.
_BACKENDS = {
    torch.float32: (SDPBackend.EFFICIENT_ATTENTION,),
    torch.bfloat16: (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION),
    torch.float16: (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION),
}

# A norm's: one to hidden sizes in use, some that are no multiple of a vector.
_WIDTHS = (1, 2, 7, 33, 64, 100, 128, 500, 768, 1024, 2048, 2896)
_EPSILON = 1e-6

# What a token's gates sum to (arXiv 2412.19437's 671B model).
_GATES = 2.5


@dataclass(frozen=True, slots=True)
class Family:
    """Operators that are tried together.

    kernels: whose constants are measured on them. run: one clean call, or forward and backward, of a trial's choice.
    most: trials beyond which no more is learned. check: of what `run` returns, where no operator's own check reads it.
    """

    kernels: tuple[str, ...]
    run: Callable[[Draw, torch.dtype], object]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    most: int | None = None
    check: Callable[[Any, Bench], Iterable[Checked]] | None = None


def products(draw: Draw, dtype: torch.dtype) -> Tensor:
    """Plain, batched and added ones, in every layout that forward and backward have."""
    m, k, n, scale = draw.size(96), draw.pick(_INNER), draw.size(700), draw.pick(SCALES)
    form = draw.pick(("mm", "mm", "left turned", "right turned", "addmm", "bmm", "baddbmm"))
    batch = (draw.size(4),) if form in ("bmm", "baddbmm") else ()
    # All terms of a sum are alike where a batch is one token repeated: their roundings are, too, and add up.
    kinds = ("equal channels", "equal rows") if draw.below(5) == 0 else (None, None)
    left = draw.values(*batch, m, k, dtype=dtype, scale=scale, kind=kinds[0])
    right = draw.values(*batch, k, n, dtype=dtype, kind=kinds[1])
    if form == "left turned":
        left = left.mT.contiguous().mT
    elif form == "right turned":
        right = right.mT.contiguous().mT
    if form == "addmm":
        return torch.addmm(draw.values(1, n, dtype=dtype, scale=scale)[0], left, right)
    if form == "baddbmm":
        return torch.baddbmm(draw.values(*batch, m, n, dtype=dtype, scale=scale), left, right, beta=0.5, alpha=2.0)
    return torch.matmul(left, right)


def grouped_products(draw: Draw, dtype: torch.dtype) -> Tensor:
    """Experts on their slices, some of which are empty. Sizes are multiples of 8, as the kernel wants."""
    groups, rows, k, n = 1 + draw.below(4), 8 * draw.size(20), 8 * draw.size(64), 8 * draw.size(64)
    ends = torch.sort(draw.index(rows // 8 + 1, groups).mul(8)).values.to(torch.int32)
    ends[-1] = rows
    left = draw.values(rows, k, dtype=dtype, scale=draw.pick(SCALES))
    if draw.below(2):
        return F.grouped_mm(left.t().contiguous(), draw.values(rows, n, dtype=dtype), offs=ends)
    return F.grouped_mm(left, draw.values(groups, k, n, dtype=dtype), offs=ends)


def softmaxes(draw: Draw, dtype: torch.dtype) -> None:
    """Softmax and log-softmax, forward and backward, of flat, steep and one-hot rows."""
    shape = draw.size(64), draw.size(_CLASSES)
    scale = draw.pick((*SCALES, 10.0))
    x = draw.values(*shape, dtype=dtype, scale=scale).requires_grad_()
    grad = draw.values(*shape, dtype=dtype, scale=1 / scale)
    if draw.below(2):
        grad = F.one_hot(draw.index(shape[1], shape[0]), shape[1]).to(dtype) / -shape[0]
    for softmax in (F.softmax, F.log_softmax):
        torch.autograd.backward(softmax(x, dim=-1), grad)


def losses(draw: Draw, dtype: torch.dtype) -> None:
    """The negative log-likelihood, some of whose targets are ignored, forward and backward."""
    rows, classes = draw.size(4096), 1 + draw.size(1024)
    scale = draw.pick(SCALES)
    kind = "equal rows" if draw.below(5) == 0 else None
    y = F.log_softmax(draw.values(rows, classes, dtype=dtype, scale=scale, kind=kind), dim=-1).requires_grad_()
    target = draw.index(classes, rows)
    target[1::5] = -100
    weight = draw.values(1, classes, dtype=dtype, kind="positive")[0] + 0.1 if draw.below(2) else None
    loss = F.nll_loss(y, target, weight, reduction=draw.pick(("mean", "sum")))
    torch.autograd.backward(loss, torch.full_like(loss, draw.pick(SCALES)))


def attention(draw: Draw, dtype: torch.dtype) -> None:
    """Fused attention, forward and backward: grouped heads, causal, masked or biased, uniform to steep."""
    batch, heads, groups = 1 + draw.below(2), 1 + draw.below(2), 1 + draw.below(3)
    queries, dim = draw.size(_POSITIONS), draw.pick(_HEADS)
    keys = queries if draw.below(2) else draw.size(_POSITIONS)
    kinds, scale = ("normal", "outlier channels", "biased", "positive"), draw.pick(SCALES)
    steep = draw.pick((1e-3, 1.0, 1.0, 4.0))
    query = draw.values(batch, heads * groups, queries, dim, dtype=dtype, scale=steep, kind=draw.pick(kinds))
    key = draw.values(batch, heads, keys, dim, dtype=dtype, kind=draw.pick(("normal", "biased")))
    value = draw.values(batch, heads, keys, dim, dtype=dtype, scale=scale, kind=draw.pick(kinds))
    grad = draw.values(batch, heads * groups, queries, dim, dtype=dtype, scale=1 / scale, kind=draw.pick(kinds))
    form = draw.pick(("plain", "causal" if queries == keys else "plain", "mask", "bias"))
    mask = draw.values(queries, keys, dtype=dtype, kind=draw.pick(kinds)) if form == "bias" else None
    if form == "mask":
        closed = draw.index(5, queries, keys) < 2
        closed[:, 0] = False  # a row that sees no key is each kernel's own affair
        mask = torch.zeros(closed.shape, dtype=dtype, device=draw.device).masked_fill_(closed, -torch.inf)
    query, key, value = (t.requires_grad_() for t in (query, key, value))
    backend = None if draw.device.type == "cpu" else _BACKENDS[dtype][draw.key % len(_BACKENDS[dtype])]
    if backend == SDPBackend.EFFICIENT_ATTENTION:  # it knows no groups: heads are repeated, as models do
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    with nullcontext() if backend is None else sdpa_kernel([backend, SDPBackend.MATH]):
        causal = form == "causal"
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=True)
    torch.autograd.backward(out, grad)


def fused_norms(draw: Draw, dtype: torch.dtype) -> None:
    """Layer norm, and RMS norm where the device has one kernel for it (CPUs have none); rows far from zero too."""
    rows, width, scale = draw.size(512), draw.pick(_WIDTHS), draw.pick(SCALES)
    x = draw.values(rows, width, dtype=dtype, scale=scale) + draw.pick((0.0, 0.0, 30.0)) * scale
    weight = 1 + 0.3 * draw.values(1, width, dtype=dtype, kind="normal")[0]
    bias = draw.values(1, width, dtype=dtype)[0]
    x, weight, bias = (t.requires_grad_() for t in (x, weight, bias))
    grad = draw.values(rows, width, dtype=dtype, scale=1 / scale)
    for out in (F.layer_norm(x, (width,), weight, bias, _EPSILON), F.rms_norm(x, (width,), weight, _EPSILON)):
        torch.autograd.backward(out, grad)


class Composed(NamedTuple):
    """An RMS norm that is made of other operators."""

    x: Tensor  # [rows, n]
    weight: Tensor  # [n]
    grad: Tensor  # of its result
    dx: Tensor


def composed_norm(draw: Draw, dtype: torch.dtype) -> Composed:
    """As Hugging Face's models have it: in fp32, cast back before the weight."""
    rows, width, scale = draw.size(512), draw.pick(_WIDTHS), draw.pick(SCALES)
    x = draw.values(rows, width, dtype=dtype, scale=scale).requires_grad_()
    weight = 1 + 0.3 * draw.values(1, width, dtype=dtype, kind="normal")[0]
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + _EPSILON)).to(dtype)
    grad = draw.values(rows, width, dtype=dtype, scale=1 / scale)
    (dx,) = torch.autograd.grad(weight * normed, x, grad)
    return Composed(x.detach(), weight, grad, dx)


def check_composed(made: Composed, bench: Bench) -> Iterable[Checked]:
    """`rms_norm_readings` of its gradient."""
    kappa = bench.kappa("rms_norm", made.dx)
    readings = rms_norm_readings(made.x, made.weight, _EPSILON, made.grad, made.dx, bench.signs, kappa)
    return [Checked("norm", "dx", readings, tuple(made.dx.shape))]


def running_sums(draw: Draw, dtype: torch.dtype) -> Tensor:
    """Along rows that are as long as a vocabulary."""
    return draw.values(draw.size(32), draw.size(_CLASSES), dtype=dtype, scale=draw.pick(SCALES)).cumsum(-1)


def placed_sums(draw: Draw, dtype: torch.dtype) -> None:
    """Rows that are added at places which repeat, and the gradient of an embedding."""
    places, sent, width, scale = draw.size(256), draw.size(1024), draw.size(1024), draw.pick(SCALES)
    there = draw.values(places, width, dtype=dtype, scale=scale)
    rows = draw.values(sent, width, dtype=dtype, scale=scale, kind="equal rows" if draw.below(5) == 0 else None)
    index = draw.index(draw.size(places), sent)
    there.index_add(0, index, rows, alpha=draw.pick((1.0, -2.0)))
    there.index_put((index,), rows, accumulate=True)
    there.scatter_add(0, index[:, None].expand(-1, width), rows)
    weight = there.requires_grad_()
    torch.autograd.backward(F.embedding(index, weight), rows)


def gates(draw: Draw, dtype: torch.dtype) -> Tensor:
    """fp32 [tokens, copies] of a router, as V3's makes them: the best scores over their sum, times 2.5."""
    experts = draw.size(256)
    logits = draw.values(draw.size(512), experts, dtype=dtype, scale=draw.pick((1.0, 10.0, 1e-4)), kind="normal")
    scores = torch.sigmoid(logits.clamp(min=-20))  # scores near 1e-20 do not sum to 2.5: that is added to their sum
    best = scores.topk(min(experts, draw.size(64)), dim=-1).values
    return best / (best.sum(-1, keepdim=True) + 1e-20) * _GATES


def check_gates(made: Tensor, bench: Bench) -> Iterable[Checked]:
    """`gate_readings` of each token."""
    return [Checked("router", "out", gate_readings(made, _GATES, bench.kappa("gates", made)), tuple(made.shape))]


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "products": Family(("mm",), products),
        "grouped products": Family(("mm",), grouped_products),
        "softmax": Family(("softmax", "log_softmax", "softmax_backward"), softmaxes),
        "losses": Family(("nll_loss",), losses),
        "attention": Family(("sdpa", "sdpa_exp", "sdpa_backward"), attention),
        "norms": Family(("layer_norm", "rms_norm", "norm_weight"), fused_norms),
        "composed RMS norm": Family(("rms_norm",), composed_norm, check=check_composed),
        "running sums": Family(("cumsum",), running_sums),
        "sums at places": Family(("sums",), placed_sums),
        "gates": Family(("gates",), gates, (torch.float32,), check=check_gates),
    }
)
