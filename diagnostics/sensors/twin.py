"""A second optimizer that makes one parameter's update again, and leaves every generator of random numbers alone."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from diagnostics.sensors.checks.rows import same
from diagnostics.sensors.quiet import quiet

# Torch's own account of an optimizer, which the twin has of its own.
_OWN = frozenset(("defaults", "param_groups", "state"))


class Randomness:
    """The states of the generators that an optimizer may draw from: torch's (CPU and one GPU), Python's and numpy's.

    Those that an optimizer keeps to itself are not among them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._states = self._read()

    def moved(self) -> bool:
        """Whether anybody drew since."""
        then, now = self._states, self._read()
        tensors = zip(then[0], now[0], strict=True)
        return then[1] != now[1] or any(not torch.equal(a, b) for a, b in tensors)

    def restore(self) -> None:
        """As if nobody had drawn since."""
        (cpu, *others), (python, (name, _, *rest), key) = self._states
        torch.set_rng_state(cpu)
        for state in others:
            torch.cuda.set_rng_state(state, self._device)
        random.setstate(python)
        np.random.set_state((name, np.frombuffer(key, np.uint32), *rest))

    def _read(self) -> tuple[list[Tensor], tuple[Any, ...]]:
        name, key, *rest = np.random.get_state()
        tensors = [torch.get_rng_state()]
        if self._device.type == "cuda":
            tensors.append(torch.cuda.get_rng_state(self._device))
        return tensors, (random.getstate(), (name, None, *rest), np.asarray(key).tobytes())


class Twin:
    """An optimizer of the same class, options and state, that holds a copy of one parameter and its gradient.

    Raises TypeError, ValueError or RuntimeError, whatever the class does, when it cannot be made of a group alone.
    """

    def __init__(self, optimizer: Optimizer, group: dict[str, Any], original: nn.Parameter) -> None:
        with quiet():
            twin = nn.Parameter(original.detach().clone(), requires_grad=original.requires_grad)
            twin.grad = None if original.grad is None else original.grad.detach().clone()
            options = {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
            made: Any = type(optimizer)
            second: Optimizer = made([{"params": [twin], **options}])
            second.state[twin] = copy.deepcopy(optimizer.state.get(original, {}))
            for key, value in vars(optimizer).items():
                if key not in _OWN and _is_small(value):  # GradScaler's scale, a count of steps
                    setattr(second, key, value.detach().clone() if isinstance(value, Tensor) else value)
        self._parameter = twin
        self._second = second

    def repeats(self, original: Tensor) -> bool:
        """Make the update, and say whether it left the bits of `original`."""
        step: Any = type(self._second).step
        if getattr(step, "hooked", False):
            step = step.__wrapped__  # torch's wrapper would call hooks that are meant for every optimizer
        with quiet():
            step(self._second)
            return same(self._parameter.detach(), original.detach())


def is_torchs(optimizer: Optimizer) -> bool:
    """Whether its class is one of torch's, whose updates are of each parameter by itself and draw nothing."""
    return type(optimizer).__module__.split(".")[:2] == ["torch", "optim"]


def _is_small(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() <= 1
    return value is None or isinstance(value, (bool, int, float, complex, str))
