"""What the wire may carry: bounds on names, texts, numbers and lists, so that no message can hurt the controller."""

import math
import re

# A report is about 300 bytes and a batch holds at most 500, so nothing honest comes near.
MESSAGE_BYTES = 256 * 1024
BATCH_REPORTS = 500
# Entries of any one list: a megabyte of empty submessages would otherwise become hundreds of megabytes of objects.
LIST_ENTRIES = 4096
# Longer than any path or reason that an agent writes.
STRING_CHARACTERS = 16 * 1024
# A job's specification is a flat JSON object of a dozen keys.
SPEC_CHARACTERS = 64 * 1024
# What a JSON reader in any language keeps exactly, and both engines' BIGINT holds.
INTEGER_LIMIT = 2**53
# Clocks may be wrong, but a time beyond the year 5000 is not a time; arithmetic on it would only spread.
TIME_LIMIT = 1e11

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# Measurements that may honestly be NaN or infinite: a corrupted step is what this program looks for.
_MAY_BE_NOT_FINITE = frozenset({"loss", "grad_norm", "reading", "value", "amax"})
# What an honest agent may quote from anywhere (an exception, a log): cut and cleaned instead of refused, because a
# refused report comes again.
_FREE_TEXT = frozenset({"detail", "reason", "location", "lost_because"})


class MalformedError(ValueError):
    """A message that cannot have come from an honest agent; says which field is wrong."""


def check_name(value: str, what: str) -> str:
    """Give `value` back if it may name a node or a job; raises MalformedError."""
    if not _NAME.fullmatch(value):
        raise MalformedError(f"{what} must be 1 to 128 letters, digits, '.', '_' or '-', not {value[:40]!r}")
    return value


def check_text(value: str, what: str) -> str:
    """Give `value` back if it is a text that we store; raises MalformedError."""
    check_count(len(value), STRING_CHARACTERS, f"characters in {what}")
    if "\0" in value:
        raise MalformedError(f"{what} holds a NUL character")
    return value


def check_field(value: str, name: str) -> str:
    """Check a text field by its name: job names, free text (cut and cleaned), any other text."""
    if name == "job" and value:
        return check_name(value, name)
    if name in _FREE_TEXT:
        return value[:STRING_CHARACTERS].replace("\0", "\N{REPLACEMENT CHARACTER}")
    return check_text(value, name)


def check_integer(value: int, name: str) -> int:
    """Give `value` back if every reader keeps it exactly; raises MalformedError."""
    if abs(value) >= INTEGER_LIMIT:
        raise MalformedError(f"{name} is out of range: {value}")
    return value


def check_number(value: float, name: str) -> float:
    """Give `value` back if it is finite, or `name` is a measurement that need not be; raises MalformedError."""
    if name in ("time", "fired_at"):
        return check_time(value, name)
    if math.isfinite(value) or name in _MAY_BE_NOT_FINITE:
        return value
    raise MalformedError(f"{name} is not a number: {value}")


def check_time(value: float, name: str) -> float:
    """Give `value` (seconds since 1970) back if it is a time; raises MalformedError."""
    if not (math.isfinite(value) and 0 <= value < TIME_LIMIT):
        raise MalformedError(f"{name} is not a time: {value}")
    return value


def check_count(count: int, limit: int, what: str) -> None:
    """Raise MalformedError if there are too many of something."""
    if count > limit:
        raise MalformedError(f"{count} {what}; at most {limit} are taken")
