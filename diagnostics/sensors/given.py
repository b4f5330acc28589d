"""What people give a guard, judged before anything is made of it: an error here says what to give instead."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

from torch import Tensor, nn

from diagnostics.health import Alarm
from diagnostics.sensors.tolerance import ToleranceTable


def check_guard(model: Any, optimizer: Any, table: Any, numbers: dict[str, Any]) -> None:
    """Raises TypeError where one of a guard's arguments is of another type than it must be."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {_a(model)}, must be a torch.nn.Module")
    if optimizer is not None and not hasattr(optimizer, "register_step_pre_hook"):
        raise TypeError(
            f"optimizer is {_a(optimizer)}, must be a torch.optim.Optimizer or None; budget and other options go by "
            "name: Guard(model, budget=0.01)"
        )
    if table is not None and not isinstance(table, ToleranceTable):
        raise TypeError(
            f"table is {_a(table)}, must be a ToleranceTable: diagnostics.sensors.tolerance.parse_table(text) reads one"
        )
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} is {value!r}, must be a number")


def key_of(key: Any) -> int:
    """A step's key. Raises TypeError when it is no integer."""
    try:
        return operator.index(key)
    except TypeError:
        raise TypeError(f"key is {_a(key)}, must be an integer: the step's number, or a seed") from None


def check_tensor(name: str, tensor: Any) -> None:
    """Raises TypeError when it is none."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is {_a(tensor)}, must be a tensor; scalars go to observe")


def check_scalar(name: str, value: Any) -> None:
    """Raises TypeError when it is no real number, nor a tensor of one; ValueError when the tensor has more."""
    if isinstance(value, Tensor) and not value.is_complex():
        if value.numel() != 1:
            raise ValueError(f"{name} has shape {list(value.shape)}, must be one number, e.g. its mean")
    elif not isinstance(value, Real):
        raise TypeError(f"{name} is {_a(value)}, must be a real number or a tensor of one")


def check_scalars(names: Sequence[str], values: Any) -> None:
    """Raises ValueError unless there is one value for each name: a tensor [n], or a sequence of n numbers."""
    shape = list(values.shape) if isinstance(values, Tensor) else [len(values)]
    if shape != [len(names)]:
        raise ValueError(
            f"{len(names)} names ({', '.join(names)[:80]}) came with values of shape {shape}: give one each"
        )


def alarms_of(alarms: Any) -> list[Alarm]:
    """Raises TypeError when these are no alarms."""
    if isinstance(alarms, Alarm) or not isinstance(alarms, Iterable):
        raise TypeError(f"alarms is {_a(alarms)}, must be several: step.alarms, or a list of them")
    found = list(alarms)
    for each in found:
        if not isinstance(each, Alarm):
            raise TypeError(f"{_a(each)} is among the alarms: give step.alarms, or a list of some of them")
    return found


def _a(value: Any) -> str:
    """A value by its type, and short ones by what they are as well."""
    shown = repr(value)
    return (
        f"{type(value).__name__} {shown}"
        if isinstance(value, (str, int, float)) and len(shown) < 40
        else ("None" if value is None else f"a {type(value).__name__}")
    )
