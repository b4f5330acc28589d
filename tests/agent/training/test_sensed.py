"""What an engine's step keeps beside the graph is checked when it ends: the backward's start, the expert counts."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from agent.model import PRESETS, V3
from agent.training.engine import sensed
from diagnostics.sensors.guard import Guard

CONFIG = PRESETS["tiny"].config
TOKENS = torch.randint(0, CONFIG.vocab_size, (2, 17 + CONFIG.mtp_depth), generator=torch.Generator().manual_seed(3))


class Flipped(TorchDispatchMode):
    """Memory that changes when the backward begins: the last result of an operator in the forward."""

    def __init__(self, operator: str, value: float) -> None:
        super().__init__()
        self._operator = operator
        self._value = value
        self._target: torch.Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        forward = torch._C._current_autograd_node() is None
        if not forward and self._target is not None:
            self._target.view(-1)[0] += self._value
            self._target = None
        out = func(*args, **(kwargs or {}))
        if forward and str(func) == self._operator:
            self._target = out
        return out


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (nullcontext(), None),
        (Flipped("aten.new_full.default", 1.0), "backward's start"),
        (Flipped("aten.stack.default", 3), "expert counts"),
    ],
)
def test_what_changes_in_memory_meanwhile_alarms(fault: AbstractContextManager[Any], name: str | None) -> None:
    model = V3(CONFIG)
    model.initialise(3)
    guard = Guard(model, again=0.0)
    with fault, guard.step(0) as step:
        sensed(model, guard, TOKENS, None, 1.0)
    assert [(alarm.sensor, alarm.module) for alarm in step.alarms] == ([] if name is None else [("kept", name)])
