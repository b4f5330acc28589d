"""Faults between ranks, by coordinates (rank, step, which call): what a collective or the optimizer gave is changed.

They sit below every check, in the operation's own result, and strike once, in the first attempt of their step.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from agent.model.parallel import routed
from agent.model.parallel.process_group import ProcessGroup
from agent.training import division, summing, zero
from agent.training.collective import Group, Subgroup
from agent.training.computation import Computation
from agent.training.engine import Engine


@dataclass
class Garble:
    """`what` is the operation, `call` which of them in the step, `element` and `bit` what is flipped.

    What is changed is the result, or with `before` what is given to it, or with `apart` a copy of that, so that only
    what leaves is wrong. Of what is traded it is the first rank's, or with `every` each other rank's. With `how` "lose"
    the element's row is zero instead, with "swap" it is exchanged with the row before it, with "off" one is added to
    the element; of the choice of experts given to a dispatch, "other" takes the expert beside one, "none" loses it; of
    a hash, "hash" changes a bit. With `often` it strikes in each attempt.
    """

    what: str
    rank: int
    step: int
    call: int = 0
    element: int = 5
    bit: int = 30
    how: str = "flip"
    often: bool = False
    before: bool = False
    apart: bool = False
    every: bool = False

    def __post_init__(self) -> None:
        self._made = 0
        self._now = (0, "")
        self.struck = 0

    def strike(self, step: int, phase: str) -> None:
        """A phase of a step begins: calls are counted anew from each forward."""
        self._now = (step, phase)
        if phase == "forward":
            self._made = 0

    def install(self, rank: int) -> None:
        """Let the operation of this process fail, if it is the fault's rank."""
        if rank != self.rank:
            return
        owner, name, result = OPERATIONS[self.what]
        original: Callable[..., Any] = getattr(owner, name)

        def failing(*args: Any, **kwargs: Any) -> Any:
            due = self._due()
            if due and self.what == "dispatch":  # the router's backward reads its own choice again
                args = (args[0]._replace(experts=args[0].experts.clone()), *args[1:])
            if due and self.apart:
                args = (args[0], [part.clone() for part in args[1]], *args[2:])
            if due and (self.before or self.apart):
                self._strike(result(None, args))
            out = original(*args, **kwargs)
            if due and self.how == "hash":
                self.struck += 1
                return out ^ 1 << self.bit
            if due and not (self.before or self.apart):
                self._strike(result(out, args))
            return out

        setattr(owner, name, failing)

    def _due(self) -> bool:
        if self._now[0] != self.step or (self.struck and not self.often):
            return False
        self._made += 1
        return self._made == self.call + 1

    def _strike(self, found: Tensor | list[Tensor]) -> None:
        tensors = found if isinstance(found, list) else [found]
        for tensor in tensors if self.every else tensors[:1]:
            self._change(tensor)

    def _change(self, tensor: Tensor) -> None:
        if self.how == "lose":
            tensor[self.element] = 0
        elif self.how == "swap":
            tensor[[self.element, self.element - 1]] = tensor[[self.element - 1, self.element]]
        elif self.how == "other":
            tensor.view(-1)[self.element] ^= 1
        elif self.how == "none":
            tensor.view(-1)[self.element] = -1
        elif self.how == "off":
            tensor.view(-1)[self.element] += 1
        else:
            tensor.view(-1).view(torch.int32)[self.element] ^= 1 << self.bit
        self.struck += 1


@dataclass
class Overflow:
    """Software whose gradients in a step are finite on each rank and not in their sum, on whatever device.

    With `once` it is no software: it is in the run of the first attempt alone, on every rank, and no replay has it.
    With `loss` that run's loss on rank 0 is not finite either.
    """

    step: int
    once: bool = False
    loss: bool = False
    what: str = "overflow"
    struck: int = 0

    def strike(self, step: int, phase: str) -> None:
        """It goes by what is computed."""

    def install(self, rank: int) -> None:
        """Let the engine of this process overflow."""
        original = Engine.compute

        def computing(engine: Engine, step: int, rank: int, attempt: int, gradients: Tensor) -> Computation:
            found = original(engine, step, rank, attempt, gradients)
            if step == self.step and (attempt == 1 or not self.once):
                gradients[5] = 3e38
                self.struck += 1
                found = replace(found, loss=math.nan) if self.loss and rank == 0 else found
            return found

        Engine.compute = computing  # type: ignore[method-assign]


def _traded(args: tuple[Any, ...], side: int) -> list[Tensor]:
    """What a trade gives to, or takes from, the other ranks."""
    ranks: Subgroup = args[0]
    return [t for peer, t in zip(ranks.members, args[side], strict=True) if peer != ranks.rank and t.numel()]


#: Where each operation is, and which tensor it gave.
OPERATIONS: dict[str, tuple[Any, str, Callable[[Any, tuple[Any, ...]], Tensor | list[Tensor]]]] = {
    "exchange": (ProcessGroup, "exchange", lambda out, args: out),
    "trade": (Subgroup, "trade", lambda out, args: _traded(args, 2)),
    "give": (Subgroup, "trade", lambda out, args: _traded(args, 1)),
    "last piece": (summing, "add_up", lambda out, args: args[0][-1]),
    "add": (summing, "add_up", lambda out, args: args[1]),
    "hash": (summing, "digest", lambda out, args: args[0]),
    "sum at rest": (division, "squared_norm", lambda out, args: args[0][0]),
    "slice in use": (zero, "update", lambda out, args: args[3][args[0].dense_slice]),
    "slice at rest": (zero, "squared_norm", lambda out, args: args[0][0]),
    "all_gather": (Subgroup, "all_gather", lambda out, args: args[1]),
    "shift": (Group, "shift", lambda out, args: args[2]),
    "dispatch": (routed, "dispatch", lambda out, args: args[0].experts),
    "adamw": (torch, "_fused_adamw_", lambda out, args: args[0][0]),
}
