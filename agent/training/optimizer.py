"""AdamW from one slot into the other in a single pass that also hashes what it writes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from agent.training.layout import Piece, State, StateLayout
from diagnostics.sensors.digest import digest

#: Elements per chunk: 5 arrays of 128 KiB stay in a 2 MiB L2 while a chunk is copied, updated and hashed.
CHUNK = 32_768
_MASK = (1 << 64) - 1


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
    """One step's pass over the state: `step` counts from 1, summed gradients are multiplied by `coefficient`."""

    step: int
    lr: float
    coefficient: float
    settings: AdamW


def clip_coefficient(norm: float, limit: float, world: int) -> float:
    """What summed gradients are multiplied by: the mean over `world` ranks, scaled so that its norm is at most `limit`.

    `norm` is that of the summed gradient.
    """
    mean = norm / world
    return min(1.0, limit / (mean + 1e-6)) / world


def update(layout: StateLayout, old: State, new: State, gradients: Tensor, change: Pass) -> tuple[int, int, int]:
    """Write what this rank optimises after the step into `new`; returns the 64-bit sums of the hashes of its pieces of
    the parameters and of both moments.

    `gradients` (float32 [flat], summed over ranks) is scaled in place by the pass's coefficient. Chunks are visited in
    a fixed order with a fixed size, so the bits depend on the layout alone. bf16 moments are rounded to nearest once a
    step; beta2 = 0.95 moves the second moment by up to 1/20 of itself, well above their 1/256.
    """
    totals = [0, 0, 0]
    settings = change.settings
    step_tensor = torch.tensor(float(change.step))
    for chunk in _chunks(layout.pieces):
        part = slice(chunk.start, chunk.stop)
        moment = slice(chunk.moment, chunk.moment + chunk.stop - chunk.start)
        targets = [new.parameters[part], new.exp_avg[moment], new.exp_avg_sq[moment]]
        sources = (old.parameters[part], old.exp_avg[moment], old.exp_avg_sq[moment])
        # The kernel takes one type: bf16 moments are widened into a chunk of their own and rounded back.
        outputs = [t if t.dtype == torch.float32 else torch.empty(t.shape, dtype=torch.float32) for t in targets]
        for source, output in zip(sources, outputs, strict=True):
            output.copy_(source)
        torch._fused_adamw_(  # the kernel behind torch.optim.AdamW(fused=True)
            [outputs[0]],
            [gradients[part].mul_(change.coefficient)],
            [outputs[1]],
            [outputs[2]],
            [],
            [step_tensor],
            lr=change.lr,
            beta1=settings.beta1,
            beta2=settings.beta2,
            weight_decay=settings.weight_decay if chunk.decay else 0.0,
            eps=settings.eps,
            amsgrad=False,
            maximize=False,
        )
        starts = (chunk.start, chunk.moment, chunk.moment)
        for region, (target, output, start) in enumerate(zip(targets, outputs, starts, strict=True)):
            if target is not output:
                target.copy_(output)
            totals[region] += digest(target, layout.place(layout.word(region, start)))
    return totals[0] & _MASK, totals[1] & _MASK, totals[2] & _MASK


def _chunks(pieces: tuple[Piece, ...]) -> list[Piece]:
    """The pieces cut to CHUNK."""
    return [
        Piece(start, min(start + CHUNK, piece.stop), piece.moment + start - piece.start, piece.decay)
        for piece in pieces
        for start in range(piece.start, piece.stop, CHUNK)
    ]
