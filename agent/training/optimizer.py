"""AdamW from one slot into the other in a single pass that also hashes what it writes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from agent.training.layout import State, StateLayout
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


def clip_coefficient(norm: float, limit: float, world: int) -> float:
    """What summed gradients are multiplied by: the mean over `world` ranks, scaled so that its norm is at most `limit`.

    `norm` is that of the summed gradient.
    """
    mean = norm / world
    return min(1.0, limit / (mean + 1e-6)) / world


def update(
    layout: StateLayout,
    old: State,
    new: State,
    gradients: Tensor,
    *,
    step: int,
    lr: float,
    coefficient: float,
    settings: AdamW,
) -> int:
    """Write the state after `step` into `new`; returns the 64-bit sum of the hashes of parameters and moments.

    `gradients` (float32 [flat], summed over ranks) is scaled in place by `coefficient`. Chunks are visited in a fixed
    order with a fixed size, so the bits depend on the layout alone. bf16 moments are rounded to nearest once a step;
    beta2 = 0.95 moves the second moment by up to 1/20 of itself, well above their 1/256.
    """
    total = 0
    step_tensor = torch.tensor(float(step))
    for start, stop in _chunks(layout):
        part = slice(start, stop)
        targets = [new.parameters[part], new.exp_avg[part], new.exp_avg_sq[part]]
        sources = (old.parameters[part], old.exp_avg[part], old.exp_avg_sq[part])
        # The kernel takes one type: bf16 moments are widened into a chunk of their own and rounded back.
        outputs = [t if t.dtype == torch.float32 else torch.empty(t.shape, dtype=torch.float32) for t in targets]
        for source, output in zip(sources, outputs, strict=True):
            output.copy_(source)
        torch._fused_adamw_(  # the kernel behind torch.optim.AdamW(fused=True)
            [outputs[0]],
            [gradients[part].mul_(coefficient)],
            [outputs[1]],
            [outputs[2]],
            [],
            [step_tensor],
            lr=lr,
            beta1=settings.beta1,
            beta2=settings.beta2,
            weight_decay=settings.weight_decay if start < layout.decayed else 0.0,
            eps=settings.eps,
            amsgrad=False,
            maximize=False,
        )
        for region, (target, output) in enumerate(zip(targets, outputs, strict=True)):
            if target is not output:
                target.copy_(output)
            total += digest(target, layout.word(region, start))
    return total & _MASK


def _chunks(layout: StateLayout) -> list[tuple[int, int]]:
    """Ranges of the flat parameters, none of which crosses from decayed to undecayed ones."""
    ranges = []
    for begin, end in ((0, layout.decayed), (layout.decayed, layout.flat)):
        ranges += [(start, min(start + CHUNK, end)) for start in range(begin, end, CHUNK)]
    return ranges
