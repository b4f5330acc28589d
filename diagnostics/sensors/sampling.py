"""Which calls a guard checks, and which steps it watches, when it may not take all the time it wants."""

from __future__ import annotations

import math

from diagnostics.sensors.multilinear import MASK, splitmix64

NOT_DRAWN = "not drawn: a share of the calls is checked"
NOT_WATCHED = "not drawn: a share of the steps is watched"

# Checks that took the budget by their own clock would exceed it: in every second step by the draw, and in the mean by
# what no clock of theirs sees: caches that they leave to the operators after them, and gradients that torch, with any
# dispatch mode about, does not add in place (of a step at hidden 2048 0.04 % in bf16 and 0.12 % in fp32, by a profile).
AIM = 0.5
# A step counts 0.9 of the one after it, so that what all checks cost is the mean over some ten steps at the present
# share: of fewer it is so noisy that its inverse, the share, comes out a fifth too high in the mean.
_KEEPS = 0.9
# One step that drew nothing, or only what is cheap, must not make the next one dear.
_GROWS = 2.0
_LEAST = 1e-4  # of the calls of a step that is watched
_RAREST = 2.0**-20  # of steps
# Of a step's time something is its own, whatever its clocks say.
_REST = 0.01


class Sampler:
    """Draws calls, or whole steps, with a probability that keeps the checks within `budget`, a fraction of the step's
    other time.

    Calls are drawn while watching every operator takes less than half of what is allowed: each step costs the same.
    Otherwise steps are: one in `period` is watched, and everything in it checked; the others run as if there were no
    guard. Either way a call is checked with the same chance, `chance`, in the long run.

    Draws of calls are a function of the step's key and the call's number, those of steps of their number alone. Periods
    are powers of two, and the steps of a longer one are among those of each shorter one, so that ranks which wait for
    each other watch the same steps, or nearly. At first all is checked: what that costs is known only then. Without a
    budget everything is checked always.

    Invariant: 0 < share <= 1, and share is 1 where period is not. Raises ValueError when the budget is not positive.
    """

    def __init__(self, budget: float | None) -> None:
        if budget is not None and not 0 < budget < float("inf"):
            raise ValueError(f"budget is {budget}, must be a positive fraction of the step's time, e.g. 0.01, or None")
        self.budget = budget
        self.share = 1.0
        self.period = 1
        self.watches = True  # whether the next step, or the one under way, is watched
        self._steps = 0
        self._checks_s = self._shares = 0.0  # sums over watched steps, the older ones fading

    @property
    def chance(self) -> float:
        """That a call of any step is checked."""
        return self.share / self.period

    def draws(self, key: int, call: int, of: float = 1.0) -> bool:
        """Whether the call with this number is checked in the step with this key; `of` is its kind's own share."""
        share = self.share * of
        return share >= 1.0 or splitmix64(splitmix64(key & MASK) ^ call) < share * (MASK + 1)

    def over(self) -> None:
        """A step is over, and what follows belongs to the next: whether that one is watched is drawn."""
        self._steps += 1
        self.watches = splitmix64(self._steps) % self.period == 0

    def spent(self, checks_s: float, step_s: float, watching_s: float = 0.0, whole: bool = False) -> None:
        """A watched step took so long altogether, of which so long for the checks that were drawn.

        watching_s: what it took besides, whatever the share: the budget bears it, and the checks get what is left.
        whole: whether steps are to be drawn in any case, since watching is not known apart.
        """
        if self.budget is None:
            return
        self._checks_s = _KEEPS * self._checks_s + checks_s
        self._shares = _KEEPS * self._shares + self.share
        every = self._checks_s / self._shares  # what checking everything would take
        checked = checks_s + watching_s
        rest = max(_REST * max(step_s, checked), step_s - checked)
        allowed = AIM * self.budget * rest
        most = _GROWS * self.chance
        if whole or watching_s > allowed / 2:
            wanted = _over(allowed, every + watching_s)
            self.share, self.period = 1.0, 1 << math.ceil(-math.log2(max(_RAREST, min(wanted, most, 1.0))))
        else:
            wanted = _over(allowed - watching_s, every)
            self.share, self.period = max(_LEAST, min(wanted, most, 1.0)), 1


def _over(allowed: float, needed: float) -> float:
    return allowed / needed if needed > 0 else math.inf
