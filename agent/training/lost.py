"""Coverage that a step lost: checks that failed themselves, calls that none could judge, and why, told once each."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

#: Reasons that a rank tells in one generation. A check that breaks gives one for all its calls; reasons that differ
#: from call to call (an address, a size) would otherwise fill the store with what is one and the same.
REASONS = 16
#: Characters of a reason: some quote an exception, and its end says little.
CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class Lost:
    """Of one step: `failed` checks failed themselves, `unjudged` other calls could not be judged; the reasons of both.

    Neither stops the training: what is not covered is only not seen.
    """

    failed: int = 0
    unjudged: int = 0
    reasons: tuple[str, ...] = ()


#: Where nothing was lost.
COVERED = Lost()


def lost(failures: int, skipped: Mapping[str, int]) -> Lost:
    """What a guarded step lost; `skipped` counts calls by reason, those of the `failures` among them."""
    return Lost(failures, max(sum(skipped.values()) - failures, 0), tuple(skipped))


class Tracer(Protocol):
    """What marks of a reason need of the node's daemon."""

    def span(self, name: str, parent: str, **attributes: str | int | float) -> AbstractContextManager[str]:
        """A span of the trace that `parent` belongs to (empty: a new one)."""


class Reasons:
    """The reasons of one rank in one generation, each of which is heard once.

    Invariant: at most REASONS were heard; `fresh` are those that no record has taken along yet.
    """

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._heard: set[str] = set()
        self._fresh: list[str] = []

    def hear(self, step: int, found: Lost) -> None:
        """Take note of an attempt's reasons, committed or not; a new one leaves a mark in the telemetry."""
        for reason in found.reasons:
            told = reason[:CHARACTERS]
            if told in self._heard or len(self._heard) == REASONS:
                continue
            self._heard.add(told)
            self._fresh.append(told)
            with self._tracer.span("lost_coverage", "", step=step, reason=told):
                pass  # a mark in time

    def take(self) -> list[str]:
        """Those that were heard since the last call."""
        fresh, self._fresh = self._fresh, []
        return fresh
