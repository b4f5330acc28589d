"""Whole training steps of a decoder layer, as `guard_overhead` takes and times them: plain, and guarded in each way.

A step is the optimizer's update (AdamW over lists), forward and backward, and, guarded, the read that a gate waits for.
The update comes first, with the gradients of the step before: what a guard hashes after it is compared when its forward
begins, and between the two no other way's step changes the state, which all of them share.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.optim import AdamW

from agent.training.spec import AGAIN
from benchmarks._decoder import VOCABULARY, WINDOW, Decoder
from benchmarks._struck import Flip, eyes_of_step, strike_all
from benchmarks._touched import Touched
from diagnostics.sensors.announced import Announced
from diagnostics.sensors.checks.registry import plan_of
from diagnostics.sensors.coverage import Coverage, CoverageRow
from diagnostics.sensors.guard import Guard
from diagnostics.sensors.inspection import Inspection
from diagnostics.sensors.outlay import watching
from diagnostics.sensors.sampling import Sampler
from diagnostics.sensors.upkeep import Upkeep

# Steps of a budget before the first round, in which it learns its share; False: of one that draws steps, unwatched.
WARM = (True, True, False, False, True)
#: Marks: of everything checked, and of a sample, at hidden 2048 and above.
FULL, SAMPLED = 0.02, 0.008
CPU = torch.device("cpu")
_LEARNING_RATE = 1e-4
_OPTIMIZER = "<optimizer>"


@dataclass(frozen=True)
class Setting:
    """One way to guard. products: of the step, its products alone are checked, and nothing of the optimizer's."""

    name: str
    again: float = 1.0
    budget: float | None = None
    target: float | None = None
    products: bool = False


#: Of which every operator is watched too with none checked, to see what that takes.
SAMPLE = Setting("a budget of 0.8 %", budget=SAMPLED, target=SAMPLED)
SETTINGS = (
    Setting("everything", target=FULL),
    Setting("as a job", AGAIN),
    Setting("identities only", 0.0),
    Setting("products alone", 0.0, products=True),
    SAMPLE,
)
NOTHING = 1e-12  # as a share of the calls
_LOOKS = 3  # steps


class Cost(NamedTuple):
    """Of one way, by round. A guarded way has all four, others the ratios only.

    Where a budget has one step in several watched, a round takes one that is, the one after it, which may be slower for
    what that left behind, and one more that is not, and reckons the mean over the period from them.
    """

    ratios: list[float]  # to the plain steps before and after
    own: list[float]  # by the checks' own clock, a share of the step's other time
    optimizer: list[float]  # of that, what the optimizer's checks took
    shares: list[float]  # the chance of a call to be drawn


class Covered(NamedTuple):
    """Shares that were judged: of calls of products, of calls of all operators in forward and backward; and of the
    optimizer's tensors at rest, None where they are left out. Tensors kept for the backward are not counted."""

    products: float
    operators: float
    at_rest: float | None

    def __str__(self) -> str:
        told = f"{self.products:.3g} of products, {self.operators:.3g} of all operators"
        return told if self.at_rest is None else f"{told}, {self.at_rest:.3g} of tensors at rest"


class ProductsAlone:
    """Stands before what looks at a step's operators and shows it products only; the rest is listed, not checked."""

    def __init__(self, inner: Inspection, account: Coverage) -> None:
        self._inner = inner
        self._account = account

    def not_seen(self, operation: str, reason: str) -> None:
        """See `watch.Step`."""
        self._inner.not_seen(operation, reason)

    def unseen(self, operation: str, results: Any, given: Any) -> None:
        """See `watch.Step`."""
        self._inner.unseen(operation, results, given)

    def announced(self, product: Announced, out: torch.Tensor) -> None:
        """Products too."""
        self._inner.announced(product, out)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operator, and look at it if it is a product."""
        plan = plan_of(func)
        if plan is None or plan.product:
            return self._inner.run(func, args, kwargs)
        self._inner.operators += 1
        self._account.count("", plan.name, "", False, "products alone are checked")
        return func(*args, **kwargs)


class Bench:
    """Layers in one precision, guarded in each way."""

    def __init__(
        self, hidden: int, dtype: torch.dtype, tokens: int, layers: int = 1, device: torch.device = CPU
    ) -> None:
        torch.manual_seed(hidden)
        self.model = Decoder(hidden, layers).to(device, dtype)
        self.tokens = torch.randint(0, VOCABULARY, (max(1, tokens // WINDOW), min(tokens, WINDOW))).to(device)
        self.optimizer = self._adamw()
        self.optimizers: dict[str, AdamW] = {}  # one a guard, which hooks into it; the moments are the same
        self.guards: dict[str, Guard] = {}
        self._aside: dict[str, list[float]] = {}  # seconds of the optimizer's checks
        for setting in SETTINGS:
            optimizer = self.optimizers[setting.name] = self._adamw()
            optimizer.state = self.optimizer.state
            watched = None if setting.products else optimizer
            guard = self.guards[setting.name] = Guard(self.model, watched, setting.budget, setting.again)
            self._aside[setting.name] = [] if guard.upkeep is None else _noted(guard.upkeep)
        self.plain: list[float] = []  # seconds of the rounds' unguarded steps
        self.operators = 0  # of a watched step

    def _adamw(self) -> AdamW:
        return AdamW(self.model.parameters(), _LEARNING_RATE, foreach=True)

    def passes(self) -> None:
        """Forward and backward, with gradients made anew."""
        self.model.zero_grad()
        self.model(self.tokens).backward()

    def step(self) -> None:
        """A whole step without a guard."""
        self.optimizer.step()
        self.passes()

    def guarded(self, setting: Setting) -> None:
        """The same under a guard, its verdict read. Raises RuntimeError if it alarms."""
        guard = self.guards[setting.name]
        self.optimizers[setting.name].step()
        with guard.step() as step:
            if setting.products:
                self._narrow(guard)
            self.passes()
        if not step.clean:
            raise RuntimeError(f"{setting.name}: a false alarm: {step.alarms[0]}")

    def deterministic(self) -> None:
        """An unguarded one with torch's own demand that every kernel be repeatable."""
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            self.step()
        finally:
            torch.use_deterministic_algorithms(False)

    def costs(self, rounds: int, of_budgets: int = 0) -> dict[str, Cost]:
        """By setting, from rounds of one step each between plain ones; "deterministic" among them.

        of_budgets: rounds more of the budgets alone, whose costs are smaller than a step's noise.
        """
        self._warm()
        costs = {name: Cost([], [], [], []) for name in ("deterministic", *self.guards)}
        budgets = [setting for setting in SETTINGS if setting.budget is not None]
        before = self._seconds(self.step)
        for number in range(rounds + of_budgets):
            took = {"deterministic": self._seconds(self.deterministic)} if number < rounds else {}
            for setting in SETTINGS if number < rounds else budgets:
                took[setting.name] = self._timed(setting, costs[setting.name])
            after = self._seconds(self.step)
            for name, seconds in took.items():
                costs[name].ratios.append(2 * seconds / (before + after))
            self.plain.append(after)
            before = after
        return costs

    def _warm(self) -> None:
        """What is timed afterwards has its memory, and a budget its share: coverage is that of the timed steps."""
        self.passes()
        self.step()
        for setting in SETTINGS:
            for watched in () if setting.budget is None else WARM:
                self._taken(setting, watched)
        for guard in self.guards.values():
            guard.account = Coverage()

    def _timed(self, setting: Setting, cost: Cost) -> float:
        """The mean over the steps of a period, the sampler's."""
        guard = self.guards[setting.name]
        guard.spending.settle()
        period = guard.sampler.period
        cost.shares.append(guard.sampler.chance)
        taken = [self._taken(setting, watched=True)]
        if period > 1:
            taken.append(self._taken(setting, watched=False))
        if period > 2:
            taken += [self._taken(setting, watched=False)] * (period - 2)
            for _ in range(period - 3):  # the others of the period, which are as the one that was taken
                guard.account.step(watched=False)
        seconds, checks, aside = (statistics.fmean(each) for each in zip(*taken, strict=True))
        cost.own.append(checks / (seconds - checks))
        cost.optimizer.append(aside / (seconds - checks))
        return seconds

    def _taken(self, setting: Setting, watched: bool) -> tuple[float, float, float]:
        """Seconds of one step, of its checks by their own clock, and of these of the optimizer's.

        watched: whether this step is, if the budget draws steps.
        """
        guard, aside = self.guards[setting.name], self._aside[setting.name]
        aside.clear()
        guard.sampler.watches = watched or guard.sampler.period == 1
        seconds = self._seconds(lambda: self.guarded(setting))
        step = guard.current
        assert step is not None
        if guard.upkeep is not None:
            guard.upkeep.spent()
        self.operators = step.operators or self.operators
        return seconds, sum(aside) + step.seconds + watching(step.looking, step.operators), sum(aside)

    def _seconds(self, work: Callable[[], Any]) -> float:
        """What it took until the device was through with it."""
        begin = time.perf_counter()
        work()
        if self.tokens.device.type == "cuda":
            torch.cuda.synchronize(self.tokens.device)
        return time.perf_counter() - begin

    def struck(self, setting: Setting, share: float, times: int) -> list[Flip]:
        """Each operator of one step of this setting struck so many times, and each fault judged.

        share: the chance of a call to be drawn; the budget, which the faults' time would upset, is set aside.
        """
        guard = self.guards[setting.name]
        with _drawing(guard.sampler, share):
            narrow = (lambda: self._narrow(guard)) if setting.products else (lambda: None)
            return strike_all(guard, self.passes, times, narrow=narrow)

    def _narrow(self, guard: Guard) -> None:
        eyes = eyes_of_step()
        assert isinstance(eyes.step, Inspection)
        eyes.step = ProductsAlone(eyes.step, guard.account)

    def touched(self) -> Touched:
        """What the checks of a step read at least."""
        with Touched() as touched:
            self.passes()
        return touched

    def at_rest(self) -> int:
        """Bytes of what the optimizer's hashes cover: parameters and moments."""
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(value.nbytes for value in (*self.model.parameters(), *moments))

    def watching(self) -> float:
        """What looking at a step's operators takes when none is checked: a share of the plain step's time."""
        guard = self.guards[SAMPLE.name]
        account, guard.account = guard.account, Coverage()
        try:
            with _drawing(guard.sampler, NOTHING):
                checks = [self._taken(SAMPLE, watched=True)[1] for _ in range(_LOOKS)]
        finally:
            guard.account = account
        return statistics.median(checks) / statistics.median(self.plain)

    def covered(self, setting: Setting) -> Covered:
        """What the timed steps covered."""
        rows = self.guards[setting.name].coverage()
        inside = [row for row in rows if row.module != _OPTIMIZER and row.operation != "saved tensor"]
        products = [row for row in inside if row.operation in ("mm", "addmm", "bmm")]
        rest = [row for row in rows if row.module == _OPTIMIZER and row.operation == "at rest"]
        return Covered(_share(products), _share(inside), _share(rest) if rest else None)


@contextmanager
def _drawing(sampler: Sampler, share: float) -> Iterator[None]:
    """It draws calls with this chance, and learns nothing."""
    learned = vars(sampler).copy()
    sampler.budget, sampler.share, sampler.period, sampler.watches = None, share, 1, True
    try:
        yield
    finally:
        vars(sampler).update(learned)


def _noted(upkeep: Upkeep) -> list[float]:
    """Keeps the seconds that it tells: a guard with a budget asks for them within the step, and only once."""
    noted: list[float] = []
    asked = upkeep.spent

    def spent() -> float:
        noted.append(asked())
        return noted[-1]

    upkeep.spent = spent  # type: ignore[method-assign]
    return noted


def _share(rows: list[CoverageRow]) -> float:
    return sum(row.checked * row.calls for row in rows) / max(1, sum(row.calls for row in rows))
