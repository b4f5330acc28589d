"""Which calls a guard checks when it may not take all the time it wants."""

from __future__ import annotations

from diagnostics.sensors.multilinear import MASK, splitmix64

# The share is corrected by what the last step cost, halfway each time, so that one slow step does not empty the next.
_GAIN = 0.5
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

    def draws(self, key: int, call: int, of: float = 1.0) -> bool:
        """Whether the call with this number is checked in the step with this key; `of` is its kind's own share."""
        share = self.share * of
        return share >= 1.0 or splitmix64(splitmix64(key & MASK) ^ call) < share * (MASK + 1)

    def spent(self, checks_s: float, step_s: float) -> None:
        """A step took so long altogether, of which so long for the checks that were drawn."""
        if self.budget is None or checks_s <= 0:
            return
        wanted = self.share * self.budget * max(step_s - checks_s, 0.0) / checks_s
        self.share = min(1.0, max(_LEAST, self.share * (wanted / self.share) ** _GAIN if self.share < 1 else wanted))
