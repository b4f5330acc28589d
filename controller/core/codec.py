"""Events, actions and snapshots as JSON-ready dicts and back, strictly: what cannot be read exactly is refused."""

from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from enum import StrEnum
from functools import cache
from math import isfinite
from typing import Any, get_args, get_origin, get_type_hints

from controller.core import actions, events
from controller.core.actions import Action
from controller.core.events import Event
from controller.core.state import STATE_VERSION, State

TYPE = "type"
UNION = type(int | None)
# JSON has no such numbers, and a loss may well be one.
NON_FINITE = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


class CodecError(ValueError):
    """A document is not what it says it is: where, and what was expected there."""

    def __init__(self, where: str, wanted: str, found: object) -> None:
        super().__init__(f"{where}: expected {wanted}, found {found!r:.80}")


def _registry() -> dict[str, type[Event] | type[Action]]:
    classes = [item for module in (events, actions) for item in vars(module).values() if isinstance(item, type)]
    return {item.__name__: item for item in classes if issubclass(item, Event | Action) and item not in (Event, Action)}


TYPES = _registry()


def encode(item: Event | Action) -> dict[str, Any]:
    """An event or action as a dict of JSON types with its type's name under "type"."""
    return {TYPE: type(item).__name__, **_plain_fields(item)}


def decode(document: object) -> Event | Action:
    """The event or action that `encode` made `document` of. Raises CodecError for anything else."""
    if not isinstance(document, dict) or not isinstance(document.get(TYPE), str):
        raise CodecError("document", 'an object with a "type"', document)
    kind = TYPES.get(document[TYPE])
    if kind is None:
        raise CodecError("type", "a known event or action", document[TYPE])
    item = _read_dataclass(kind, {key: value for key, value in document.items() if key != TYPE}, document[TYPE])
    assert isinstance(item, Event | Action)
    return item


def encode_state(state: State) -> dict[str, Any]:
    """A snapshot of core, with the version of its layout."""
    document = _plain_fields(state)
    document["outstanding"] = {key: encode(action) for key, action in state.outstanding.items()}
    return {"version": STATE_VERSION, "state": document}


def decode_state(document: object) -> State:
    """The state of a snapshot. Raises CodecError; of another version, feed the recorded events to core instead."""
    if not isinstance(document, dict) or document.get("version") != STATE_VERSION:
        found = document.get("version") if isinstance(document, dict) else document
        raise CodecError("version", f"a snapshot of version {STATE_VERSION}", found)
    state = _read(State, document.get("state"), "state")
    assert isinstance(state, State)
    return state


def _plain(value: object) -> Any:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return value if isfinite(value) else str(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return _plain_fields(value)


def _plain_fields(value: Any) -> dict[str, Any]:
    return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _read(hint: Any, value: object, where: str) -> Any:
    """`value` as the type that `hint` says, recursively."""
    if hint is Action:
        return decode(value)
    origin = get_origin(hint)
    if origin is UNION:
        return None if value is None else _read(_some(hint), value, where)
    if origin is tuple:
        return _read_tuple(get_args(hint)[0], value, where)
    if origin is dict:
        key, item = get_args(hint)
        return _read_dict(key, item, value, where)
    if is_dataclass(hint) and isinstance(hint, type):
        return _read_dataclass(hint, value, where)
    return _read_scalar(hint, value, where)


def _some(hint: Any) -> Any:
    return next(item for item in get_args(hint) if item is not type(None))


def _read_tuple(item: Any, value: object, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise CodecError(where, "a list", value)
    return tuple(_read(item, entry, f"{where}[{index}]") for index, entry in enumerate(value))


def _read_dict(key: Any, item: Any, value: object, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise CodecError(where, "an object", value)
    try:
        return {key(name): _read(item, entry, f"{where}.{name}") for name, entry in value.items()}
    except ValueError as error:
        if isinstance(error, CodecError):
            raise
        raise CodecError(where, f"keys of type {key.__name__}", sorted(value)) from error


def _read_dataclass(kind: type, value: object, where: str) -> Any:
    if not isinstance(value, dict):
        raise CodecError(where, "an object", value)
    hints = _hints(kind)
    names = [item.name for item in fields(kind)]
    # Stored events outlive versions: a field with a default may have been added after one was written.
    lasting = kind.__module__ == events.__name__
    added = {item.name for item in fields(kind) if item.default is not MISSING and lasting}
    if not set(names) - added <= set(value) <= set(names):
        raise CodecError(where, f"the fields {', '.join(names)}", sorted(map(str, value)))
    return kind(**{name: _read(hints[name], value[name], f"{where}.{name}") for name in names if name in value})


def _read_scalar(hint: Any, value: object, where: str) -> Any:
    read = SCALARS.get(hint, _read_enum)
    found = read(hint, value)
    if found is None:
        raise CodecError(where, hint.__name__, value)
    return found


def _read_float(_: Any, value: object) -> float | None:
    if isinstance(value, str):
        return NON_FINITE.get(value)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _read_exact(hint: Any, value: object) -> Any:
    return value if type(value) is hint else None


def _read_enum(hint: Any, value: object) -> Any:
    return next((member for member in hint if member.value == value), None)


SCALARS: dict[type, Callable[[Any, object], Any]] = {
    float: _read_float,
    int: _read_exact,
    bool: _read_exact,
    str: _read_exact,
}
