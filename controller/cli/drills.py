"""Drills as people write them, KIND@STEP[:key=value,...], checked before anything starts."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from controller.core.events import Drill

KINDS = ("sdc", "kill", "hang", "node", "checkpoint", "controller")
KEYS = ("rank", "node", "layer", "op", "fault", "bit", "persistent")
OPS = ("fprop", "dgrad", "wgrad")
FAULTS = ("bitflip", "stuck", "tile", "scale")
#: What an sdc drill is unless it says otherwise: the highest exponent bit, in a forward product.
SDC_DEFAULTS: Mapping[str, str] = MappingProxyType({"op": "fprop", "fault": "bitflip", "bit": "30"})
_SDC_ONLY = frozenset({"layer", "op", "fault", "bit", "persistent"})
_TRUE = frozenset({"1", "true", "yes"})
_FALSE = frozenset({"0", "false", "no"})
#: Longer numbers than any step, layer or rank; keeps int() away from megabytes of digits.
_DIGITS = 9
_FORM = re.compile(rf"([^@:]*)@([0-9]{{1,{_DIGITS}}})(?::(.*))?", re.DOTALL | re.ASCII)


class DrillError(ValueError):
    """A drill that makes no sense; the message is one line that names the part."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a drill may name. None where it is not known here, as for a job that was started elsewhere."""

    steps: int | None = None
    world: int | None = None
    nodes: frozenset[str] | None = None
    layers: int | None = None


def parse(text: str, bounds: Bounds, ident: str = "") -> Drill:
    """Read KIND@STEP[:key=value,...]. Raises DrillError."""
    form = _FORM.fullmatch(text)
    if form is None:
        raise DrillError(f"drill {text!r} is not KIND@STEP[:key=value,...]")
    kind, step, rest = form.groups()
    pairs = [] if rest is None else rest.split(",")
    return build(kind, int(step), pairs, bounds, ident or text)


def build(kind: str, step: int, pairs: Iterable[str], bounds: Bounds, ident: str) -> Drill:
    """Check and assemble a drill from its parts; `ident` names it in what is recorded. Raises DrillError."""
    if kind not in KINDS:
        raise DrillError(f"unknown drill kind {kind!r}; known are {', '.join(KINDS)}")
    if step < 1:
        raise DrillError(f"drill {kind}: steps begin at 1, not {step}")
    if bounds.steps is not None and step > bounds.steps:
        raise DrillError(f"drill {kind}@{step} is beyond the last step, {bounds.steps}")
    values = _pairs(kind, pairs)
    rank = _number(kind, values, "rank", bounds.world, "the job has {} ranks, from 0")
    node = values.pop("node", "")
    values.pop("rank", None)
    if node and bounds.nodes is not None and node not in bounds.nodes:
        raise DrillError(f"drill {kind}: unknown node {node!r}; known are {', '.join(sorted(bounds.nodes))}")
    params = _fault(kind, values, bounds) if kind == "sdc" else {}
    return Drill(id=ident, kind=kind, step=step, rank=-1 if rank is None else rank, node=node, params=params)


def _pairs(kind: str, pairs: Iterable[str]) -> dict[str, str]:
    values: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if key not in KEYS:
            raise DrillError(f"drill {kind}: unknown key {key!r}; known are {', '.join(KEYS)}")
        if not equals or not value:
            raise DrillError(f"drill {kind}: {key} needs a value, as in {key}=VALUE")
        if key in values:
            raise DrillError(f"drill {kind}: {key} is given twice")
        if key in _SDC_ONLY and kind != "sdc":
            raise DrillError(f"drill {kind}: {key} belongs to sdc drills only")
        values[key] = value
    return values


def _fault(kind: str, values: dict[str, str], bounds: Bounds) -> dict[str, str]:
    """The fault's own keys, complete, each in its one spelling."""
    params = {**SDC_DEFAULTS, **values}
    _one_of(kind, "op", params["op"], OPS)
    _one_of(kind, "fault", params["fault"], FAULTS)
    params["bit"] = str(_number(kind, params, "bit", 32, "a float has {} bits, from 0"))
    layer = _number(kind, params, "layer", bounds.layers, "the model has {} layers, from 0")
    if layer is not None:
        params["layer"] = str(layer)
    if (persistent := params.pop("persistent", None)) is not None:
        if persistent.lower() not in _TRUE | _FALSE:
            raise DrillError(f"drill {kind}: persistent is true or false, not {persistent!r}")
        if persistent.lower() in _TRUE:
            params["persistent"] = "true"
    return params


def _number(kind: str, values: Mapping[str, str], key: str, limit: int | None, told: str) -> int | None:
    if (text := values.get(key)) is None:
        return None
    if not text.isascii() or not text.isdecimal() or len(text) > _DIGITS:
        raise DrillError(f"drill {kind}: {key} is a number from 0, not {text!r}")
    if limit is not None and int(text) >= limit:
        raise DrillError(f"drill {kind}: {key}={int(text)}, but {told.format(limit)}")
    return int(text)


def _one_of(kind: str, key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise DrillError(f"drill {kind}: {key} is one of {', '.join(known)}, not {value!r}")
