"""Which calls a guard checks when it may not take all the time it wants."""

from __future__ import annotations

from diagnostics.sensors.multilinear import MASK, splitmix64

NOT_DRAWN = "not drawn: a share of the calls is checked"

# A step counts 0.7 of the one after it, so that what all checks cost is the mean over some three steps at the present
# share; the first step, which checks everything but is colder than others, is forgotten within twenty.
_KEEPS = 0.7
# One step that drew nothing, or only what is cheap, must not make the next one dear.
_GROWS = 2.0
_LEAST = 1e-4


class Sampler:
    """Draws calls with a probability that keeps the checks within `budget`, a fraction of the step's other time.

    Draws are a function of the step's key and the call's number. The first step checks everything: what a check costs
    is known only then. Without a budget everything is checked always.

    Invariant: 0 < share <= 1. Raises ValueError when the budget is not positive.
    """

    def __init__(self, budget: float | None) -> None:
        if budget is not None and not 0 < budget < float("inf"):
            raise ValueError(f"budget is {budget}, must be a positive fraction of the step's time, e.g. 0.01, or None")
        self.budget = budget
        self.share = 1.0
        self._checks_s = self._shares = 0.0  # sums over steps, the older ones fading

    def draws(self, key: int, call: int, of: float = 1.0) -> bool:
        """Whether the call with this number is checked in the step with this key; `of` is its kind's own share."""
        share = self.share * of
        return share >= 1.0 or splitmix64(splitmix64(key & MASK) ^ call) < share * (MASK + 1)

    def spent(self, checks_s: float, step_s: float, watching_s: float = 0.0) -> None:
        """A step took so long altogether, of which so long for the checks that were drawn.

        watching_s: what it took besides, whatever the share: the budget bears it, and the checks get what is left.
        """
        if self.budget is None:
            return
        self._checks_s = _KEEPS * self._checks_s + checks_s
        self._shares = _KEEPS * self._shares + self.share
        every = self._checks_s / self._shares  # what checking everything would take
        left = max(0.0, self.budget * max(0.0, step_s - checks_s - watching_s) - watching_s)
        wanted = left / every if every > 0 else 1.0
        self.share = min(1.0, max(_LEAST, min(wanted, _GROWS * self.share)))
