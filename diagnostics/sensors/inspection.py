"""Looks at the operators of one step as they run: draws which are checked, and keeps the readings by place."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from diagnostics.sensors import saved
from diagnostics.sensors.account import MUTED, Account
from diagnostics.sensors.announced import Announced, inside_announced
from diagnostics.sensors.checks import recompute
from diagnostics.sensors.checks.arguments import read_by, tensors, written_by
from diagnostics.sensors.checks.bench import StepBench
from diagnostics.sensors.checks.gemm import KERNEL, product_check
from diagnostics.sensors.checks.kinds import is_in_place, kind_of
from diagnostics.sensors.checks.operation import Call, Checked, Unsupported
from diagnostics.sensors.checks.registry import Plan
from diagnostics.sensors.checks.rows import PER_DIFFERENCE, differences, rows_of
from diagnostics.sensors.checks.thin import is_thin, is_thin_product
from diagnostics.sensors.checks.undecided import decided, made_again
from diagnostics.sensors.checks.unjudged import finite_readings, unlike
from diagnostics.sensors.compiler import has_compiled
from diagnostics.sensors.coverage import Coverage
from diagnostics.sensors.facts import facts_of
from diagnostics.sensors.places import FPROP, UNNAMED, Place, Places
from diagnostics.sensors.quiet import quiet
from diagnostics.sensors.readings import ReadingLog
from diagnostics.sensors.recomputation import Recomputation
from diagnostics.sensors.regions import inside
from diagnostics.sensors.sampling import NOT_DRAWN, Sampler
from diagnostics.sensors.tolerance import ToleranceTable, UnknownTolerance, Widening
from diagnostics.sensors.written import Written

UNPLACED = Place(UNNAMED, FPROP)
NOT_AGAIN = "no identity covers it, and nothing is run again"
_BUFFER = "a buffer of the model, which its module updates"
_FAILED = object()  # what should have kept what an operator writes over has failed


class Inspection:
    """Of one step: `watch.Step` and `saved.Watcher`.

    again: share of what is run a second time and of kept tensors that are hashed. compare: whether what checkpointing
    makes again is compared.
    """

    def __init__(
        self,
        key: int,
        places: Places,
        log: ReadingLog,
        coverage: Coverage,
        sampler: Sampler,
        table: ToleranceTable,
        widening: Widening,
        device: torch.device,
        again: float,
        compare: bool = True,
    ) -> None:
        self.bench = StepBench(key, table, device)
        self.account = Account(log, coverage, widening)
        self.operators = 0  # that ran, views too
        self.written = Written()
        self._key = key
        self._places = places
        self._sampler = sampler
        self._again = again
        self.all_seen = again >= 1 and sampler.share >= 1 and sampler.budget is None and not has_compiled()
        self._recomputation = Recomputation(key, self.account, sampler, again) if compare else None
        self.looking = 0.0  # seconds of `run`, the operators' own and those of checks left out
        self._ran = 0.0  # seconds of the operators
        self._seconds = 0.0
        self._covered = False  # whether a check has judged the call that is looked at
        self._calls = 0
        self._over = False

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operator and look at it."""
        begin, ran, checks = time.perf_counter(), self._ran, self.seconds
        out = self._inspect(func, args, kwargs)
        self.looking += time.perf_counter() - begin - (self._ran - ran) - (self.seconds - checks)
        return out

    def _inspect(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.operators += 1
        facts = facts_of(func)
        plan = facts.plan
        if facts.writes:
            self.written.note(func, args, kwargs)
        if plan is None or inside_announced():
            out = self._call(func, args, kwargs)
            if facts.changes:
                self._show(None, func, args, kwargs, out)
            return out
        self._calls += 1
        self._covered = False
        share = self._again if plan.again else 1.0
        if plan.check is None or not self._sampler.draws(self._key, self._calls, share):
            out = self._call(func, args, kwargs)
            if plan.writes:
                self.tried(plan.name, lambda: self.bench.forget(written_by(func, args, kwargs)))
            self.tried(plan.name, lambda: self._pass_by(plan, args, out))
            self._ask(plan, func, args, kwargs, out)
            if facts.changes or inside():
                self._show(plan, func, args, kwargs, out)
            return out
        begin, ran = time.perf_counter(), self._ran
        before = self.account.tried(plan.name, lambda: self._before(plan, func, args, kwargs), failed=_FAILED)
        out = self._call(func, args, kwargs)
        if plan.writes:
            self.tried(plan.name, lambda: self.bench.forget(written_by(func, args, kwargs)))
        if before is not _FAILED:
            self.tried(plan.name, lambda: self._look(plan, Call(func, args, kwargs, out, before)))
        self._ask(plan, func, args, kwargs, out)
        self._seconds += time.perf_counter() - begin - (self._ran - ran)
        if facts.changes or inside():
            self._show(plan, func, args, kwargs, out)
        return out

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        begin = time.perf_counter()
        out = func(*args, **kwargs)
        self._ran += time.perf_counter() - begin
        return out

    def announced(self, product: Announced, out: Tensor) -> None:
        """Check one product that was announced, in whichever pass, against the operands that its kernel saw."""
        if out.numel():
            self.tried(product.operation, lambda: self._look_announced(product, out))
            if self._recomputation is not None:
                self._recomputation.announced(out)

    def _look_announced(self, product: Announced, out: Tensor) -> None:
        place = Place(self._places.named(product.weight), product.pass_)
        self._calls += 1
        if not self._sampler.draws(self._key, self._calls):
            self.account.passed(place, product.operation, NOT_DRAWN)
            return
        begin = time.perf_counter()
        with quiet():
            left, right = product.operands()
            name = product.operation
            if self._judge(place, name, lambda: product_check(name, left, right, out, self.bench)):
                again = product.again
                if again is not None and is_thin_product(left, right):
                    self._look_twice(place, name, lambda: _made_again(again, out))
        self._seconds += time.perf_counter() - begin

    def leaves_out(self, tensor: Tensor) -> str:
        """See `saved.Watcher`."""
        self._calls += 1
        if tensor.data_ptr() in self._places.buffers:
            return _BUFFER
        if not self._over and self._repeats():
            return ""
        return NOT_DRAWN if self._again else NOT_AGAIN

    def compared(self, tensor: Tensor, equal: bool | Tensor) -> None:
        """See `saved.Watcher`."""
        place = self._places.of((), False)
        if isinstance(equal, Tensor):
            reading = torch.where(equal, 0.0, PER_DIFFERENCE).reshape(1)
        else:
            reading = tensor.new_full((1,), 0.0 if equal else PER_DIFFERENCE, dtype=torch.float32)
        one = Checked(saved.SENSOR, "out", reading, tuple(tensor.shape), exact=True)
        self.account.judged(place, saved.OPERATION, one)

    def not_compared(self, reason: str) -> None:
        """See `saved.Watcher`."""
        self.account.passed(self._places.of((), False), saved.OPERATION, reason)

    def stepped_aside(self, reason: str) -> None:
        """See `saved.Watcher`."""
        self.account.coverage.note(UNNAMED, "saved tensors", f"saved tensors: no hooks may stand here: {reason}")

    def spent(self, seconds: float) -> None:
        """See `saved.Watcher`."""
        self._seconds += seconds

    def tried(self, operation: str, work: Callable[[], Any]) -> Any:
        """See `Account.tried`."""
        return self.account.tried(operation, work)

    @property
    def seconds(self) -> float:
        """That the checks took."""
        return self._seconds + (0.0 if self._recomputation is None else self._recomputation.seconds)

    def not_seen(self, operation: str, reason: str) -> None:
        """See `watch.Step`."""
        self.account.passed(self._places.of((), False), operation, reason)

    def end(self) -> None:
        """The step is over: let go of its tensors."""
        self._over = True
        self.bench.clear()
        if self._recomputation is not None:
            self._recomputation.end()

    def _before(self, plan: Plan, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if plan.product and is_in_place(func) and not self.bench.has_tolerance(KERNEL, args[0]) and self._repeats():
            return recompute.Overwritten(*recompute.keeper(func)(args, kwargs, self.bench))
        if plan.before is None:
            return None
        with quiet():
            return plan.before(args, kwargs, self.bench)

    def _look(self, plan: Plan, call: Call) -> None:
        place = self._place(plan, call.args)
        if plan.copies:
            self._places.copied(call.args[0], call.out)
        strange = unlike(call)
        if strange is not None:
            self.account.skip(place, plan.name, strange)
            return
        check = recompute.check if isinstance(call.before, recompute.Overwritten) else plan.check
        assert check is not None

        def judge() -> None:
            if self._judge(place, plan.name, lambda: check(call, self.bench), call) and is_thin(call):
                kept = call if call.before is not None else replace(call, before=(call.args, call.kwargs))
                self._look_twice(place, plan.name, lambda: recompute.check_target(kept, self.bench))

        with quiet():
            self.account.tried(plan.name, judge, place)

    def _look_twice(self, place: Place, operation: str, again: Callable[[], Iterable[Checked]]) -> None:
        """Where it costs little, what an identity has judged is run again as well: that has no tolerance."""
        if not self._repeats():
            return
        with suppress(Unsupported):  # sums in no fixed order: the identity has to do
            for one in again():
                self.account.keep(place, operation, one)

    def _judge(
        self, place: Place, operation: str, check: Callable[[], Iterable[Checked]], instead: Call | None = None
    ) -> bool:
        """Keep a check's readings. Where an identity cannot judge its call, the operator is run again instead.

        True if an identity judged it, and nothing was run again.
        """
        by_identity, made, heard = True, 0, 0
        try:
            found = check()
            if instead is not None and self.all_seen:
                found = decided(found, instead, self.bench, self._places.is_parameter)
            for one in found:
                made += 1
                heard += self.account.keep(place, operation, one)
                by_identity &= one.sensor != recompute.SENSOR
        except (Unsupported, UnknownTolerance) as reason:
            if instead is not None and self._may_run_again(instead):
                plain = replace(instead, before=None)  # what was kept was kept for the identity
                self._judge(place, operation, lambda: made_again(plain, self.bench))
            else:
                self.account.skip(place, operation, str(reason))
            return False
        if made and not heard:
            self.account.skip(place, operation, MUTED)
            return False
        self.account.covered(place, operation)
        self._covered = True
        return by_identity

    def _show(self, plan: Plan | None, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """To the fingerprints, where they care."""
        shown = self._recomputation
        if shown is not None and isinstance(func, OpOverload):
            place = UNPLACED if plan is None else self._place(plan, args)
            shown.saw(plan, Call(func, args, kwargs, out), self._calls, place, self._covered)

    def _ask(self, plan: Plan, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Whether what no check has judged is finite, in a step in which what is not may pass.

        What an operator wrote over is not known any more, unless it drew what it wrote.
        """
        if self.all_seen and not self._covered and (not plan.writes or kind_of(func) == "random"):
            given = read_by(func, args, kwargs) if isinstance(func, OpOverload) else tensors((args, kwargs))
            self.unseen(plan.name, tensors(out), given)

    def unseen(self, operation: str, results: Iterable[Tensor | None], given: Iterable[Tensor | None]) -> None:
        """See `watch.Step`."""
        if self.all_seen:
            with quiet():
                self.tried(operation, lambda: self._finite(operation, results, given))

    def _finite(self, operation: str, results: Iterable[Tensor | None], given: Iterable[Tensor | None]) -> None:
        place = self._places.of((), False)
        for one in finite_readings((t for t in results if t is not None), (t for t in given if t is not None)):
            if one.readings.is_cuda or bool(one.readings.isnan()):
                self.account.asked += self.account.keep(place, operation, one)

    def _may_run_again(self, call: Call) -> bool:
        """What an operator wrote over was kept for its identity only, not for another run."""
        return self._repeats() and call.func.namespace == "aten" and not is_in_place(call.func)

    def _repeats(self) -> bool:
        """Whether the call that is looked at is drawn to be run again."""
        return self._sampler.draws(self._key, self._calls, self._again)

    def _pass_by(self, plan: Plan, args: tuple[Any, ...], out: Any) -> None:
        place = self._place(plan, args)
        if plan.copies:
            self._places.copied(args[0], out)
        undrawn = NOT_AGAIN if plan.again and not self._again else NOT_DRAWN
        self.account.passed(place, plan.name, plan.reason or undrawn)

    def _place(self, plan: Plan, args: tuple[Any, ...]) -> Place:
        if not plan.product:
            return self._places.of((), False)
        operands = [arg for arg in args if isinstance(arg, Tensor)]
        return self._places.of(operands[:2] if plan.grouped else operands[-2:], True)


def _made_again(again: Callable[[], Tensor], out: Tensor) -> Iterable[Checked]:
    yield Checked(recompute.SENSOR, "out", differences(rows_of(out), rows_of(again())), tuple(out.shape), exact=True)
