"""Numbers the pictures that were sent and tells what changed between two, so that a page can resume where it was."""

import json
from collections import deque
from dataclasses import dataclass, field
from typing import Any

#: Deltas that a page which lost its connection can be brought up with; at one a second, two minutes.
KEPT = 120

Document = dict[str, Any]


def difference(before: Document, after: Document) -> Document:
    """The top-level keys whose value changed, with the new value; a key that went is null."""
    changed = {key: value for key, value in after.items() if key not in before or before[key] != value}
    return changed | {key: None for key in before if key not in after}


def apply(base: Document, delta: Document) -> Document:
    """The inverse of `difference`, as the page does it; a null removes the key."""
    return {key: value for key, value in (base | delta).items() if value is not None}


@dataclass(slots=True)
class History:
    """Pictures in order. Invariant: `kept` holds consecutive numbers and ends with `number`.

    `life` distinguishes this process's numbers from those of the one before it.
    """

    life: str
    number: int = 0
    current: Document = field(default_factory=dict)
    kept: deque[tuple[int, str]] = field(default_factory=lambda: deque(maxlen=KEPT))

    def add(self, picture: Document) -> bool:
        """Take the newest picture; True if something changed."""
        flat = {key: value for key, value in picture.items() if value is not None}
        delta = difference(self.current, flat)
        if not delta:
            return False
        self.number += 1
        self.current = flat
        self.kept.append((self.number, json.dumps(delta, allow_nan=False)))
        return True

    def since(self, seen: str) -> list[str]:
        """The server-sent events that bring a page up from `seen` ("LIFE-NUMBER", the Last-Event-ID).

        Without a usable `seen`, or if too much happened since, one event with the whole picture.
        """
        number = self._number(seen)
        if number is not None and number >= self.number:
            return []
        if number is not None and self.kept and self.kept[0][0] <= number + 1:
            return [self._event(n, "delta", text) for n, text in self.kept if n > number]
        return [self._event(self.number, "picture", json.dumps(self.current, allow_nan=False))]

    def mark(self) -> str:
        """The id of the newest picture."""
        return f"{self.life}-{self.number}"

    def _number(self, seen: str) -> int | None:
        life, _, number = seen.rpartition("-")
        if life != self.life or not number.isascii() or not number.isdecimal() or len(number) > 15:
            return None
        return int(number) if int(number) <= self.number else None

    def _event(self, number: int, name: str, data: str) -> str:
        return f"id: {self.life}-{number}\nevent: {name}\ndata: {data}\n\n"
