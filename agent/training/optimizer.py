"""AdamW from one slot into the other in a single pass that also hashes what it writes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from agent.training.layout import Piece, State, StateLayout
from diagnostics.sensors.digest import digest
from diagnostics.sensors.multilinear import MASK

#: Elements per chunk: 5 arrays of 128 KiB stay in a 2 MiB L2 while a chunk is copied, updated and hashed.
CHUNK = 32_768
#: Of a pass that is made again. A multiple of every vector width, so that each element meets the same instructions.
HALF = CHUNK // 2
#: Parameters and both moments.
Triple = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class AdamW:
    """Hyper-parameters; the paper's values (arXiv 2412.19437, section 4.2) are the defaults."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    bias_gamma: float = 0.001


@dataclass(frozen=True, slots=True)
class Pass:
    """One step's pass over the state: `step` counts from 1, summed gradients are multiplied by `coefficient`.

    With a `key`, the same on all ranks, what ranks hand each other in it is checked; `state` is what the old state was
    committed with as its digest, `replica` what the replica in it must hash to.
    """

    step: int
    lr: float
    coefficient: float
    settings: AdamW
    key: int | None = None
    state: int = 0
    replica: int = 0


def clip_coefficient(norm: float, limit: float, world: int) -> float:
    """What summed gradients are multiplied by: the mean over `world` ranks, scaled so that its norm is at most `limit`.

    `norm` is that of the summed gradient.
    """
    mean = norm / world
    return min(1.0, limit / (mean + 1e-6)) / world


def update(
    layout: StateLayout, old: State, new: State, gradients: Tensor, change: Pass, again: bool = False
) -> list[tuple[int, int, int]]:
    """Write what this rank optimises after the step into `new`; returns, for each piece of the layout, the 64-bit
    hashes of its parameters and of both moments.

    `gradients` (float32 [flat], summed over ranks) stay as they are: a pass that is in doubt is made again. Chunks are
    visited in a fixed order, backwards and in halves if made `again`. That changes no bit, but a lane, a core or a
    moment that was bad meets other elements.
    """
    totals = []
    for piece in reversed(layout.pieces) if again else layout.pieces:
        sums = [0, 0, 0]
        for part in _chunks(piece, HALF if again else CHUNK):
            dense = slice(part.start, part.stop)
            moment = slice(part.moment, part.moment + part.stop - part.start)
            targets = (new.parameters[dense], new.exp_avg[moment], new.exp_avg_sq[moment])
            sources = (old.parameters[dense], old.exp_avg[moment], old.exp_avg_sq[moment])
            apply(sources, targets, gradients[dense] * change.coefficient, change, part.decay)
            starts = (part.start, part.moment, part.moment)
            for region, (target, start) in enumerate(zip(targets, starts, strict=True)):
                sums[region] += digest(target, layout.place(layout.word(region, start)))
        totals.append((sums[0] & MASK, sums[1] & MASK, sums[2] & MASK))
    return totals[::-1] if again else totals


def apply(sources: Triple, targets: Triple, gradient: Tensor, change: Pass, decay: bool) -> None:
    """AdamW on some elements: parameters and both moments from `sources` into `targets`; `gradient` is scaled already.

    bf16 moments are rounded to nearest once a step; beta2 = 0.95 moves the second moment by up to 1/20 of itself, well
    above their 1/256.
    """
    settings = change.settings
    # The kernel takes one type: bf16 moments are widened into a chunk of their own and rounded back.
    outputs = [t if t.dtype == torch.float32 else torch.empty(t.shape, dtype=torch.float32) for t in targets]
    for source, output in zip(sources, outputs, strict=True):
        output.copy_(source)
    torch._fused_adamw_(  # the kernel behind torch.optim.AdamW(fused=True)
        [outputs[0]],
        [gradient],
        [outputs[1]],
        [outputs[2]],
        [],
        [torch.tensor(float(change.step))],
        lr=change.lr,
        beta1=settings.beta1,
        beta2=settings.beta2,
        weight_decay=settings.weight_decay if decay else 0.0,
        eps=settings.eps,
        amsgrad=False,
        maximize=False,
    )
    for target, output in zip(targets, outputs, strict=True):
        if target is not output:
            target.copy_(output)


def _chunks(piece: Piece, size: int) -> list[Piece]:
    """The piece cut to `size` elements."""
    return [
        Piece(start, min(start + size, piece.stop), piece.moment + start - piece.start, piece.decay)
        for start in range(piece.start, piece.stop, size)
    ]
