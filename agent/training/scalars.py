"""What a rank's step is compared by with the steps before it: loss, gradient norms, expert loads, FP8."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from agent.model import V3
from agent.model.fp8 import Found
from diagnostics.sensors.guarded_step import GuardedStep

#: The least spread of a share: in most steps nothing of most tensors saturates or vanishes, and then a few in 10,000.
SHARE = 1e-3


class Scalars:
    """The names of a model's scalars, made once, and how a step gives them to its guard. Nothing here waits."""

    def __init__(self, model: V3) -> None:
        self._parameters = list(model.parameters())
        self._norms = tuple(f"gradient norm of {name}" for name, _ in model.named_parameters())
        at = {id(module): name for name, module in model.named_modules()}
        self._entropies = tuple(f"expert-load entropy of {at[id(router)]}" for router in model.routers())

    def observe(self, step: GuardedStep, counts: Tensor, quantised: Sequence[Found] = ()) -> None:
        """After the backward: this rank's own gradients, before any sum. `counts` is int64 [MoE layers, experts].

        `quantised` has been read for the step's record already.
        """
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        step.observe_all(self._norms, torch.stack(torch._foreach_norm(gradients)))
        if self._entropies:
            step.observe_all(self._entropies, load_entropy(counts))
        for what, values, least in (
            ("amax", [one.amax for one in quantised], 0.0),
            ("saturated share", [one.saturation for one in quantised], SHARE),
            ("underflowed share", [one.underflow for one in quantised], SHARE),
        ):
            step.observe_all([f"{what} of {one.module}'s {one.tensor}" for one in quantised], values, least)


def load_entropy(counts: Tensor) -> Tensor:
    """Entropy of int64 [layers, experts] routed tokens, over that of an even load: fp32 [layers] in 0..1."""
    share = counts.float() / counts.sum(-1, keepdim=True).clamp(min=1)
    entropy: Tensor = torch.special.entr(share).sum(-1)
    return entropy / max(math.log(counts.shape[-1]), 1e-9)
