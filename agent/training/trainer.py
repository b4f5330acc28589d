"""The loop of one rank: find the state, then step by step compute, reduce, pass the gate, commit, report."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from agent.checkpoint.storage import Storage
from agent.model.router import updated_bias
from agent.slots import WAITING, SlotRecord, Slots
from agent.training.agreement import AT_REST
from agent.training.checkpointing import Checkpoints, WholeCheckpoints, checkpoints
from agent.training.collective import Group
from agent.training.computation import Computation, with_sums
from agent.training.doubt import Doubt
from agent.training.engine import Engine, vote_digest
from agent.training.evidence.leave import tidy
from agent.training.fingerprint import described
from agent.training.gate import Decision, Outcome, Row, decide
from agent.training.handed import Unlike
from agent.training.hearing import Hearing
from agent.training.held import Held, Member
from agent.training.lost import Reasons
from agent.training.optimizer import AdamW, clip_coefficient
from agent.training.recovery import Recovery
from agent.training.reduction import UNCHECKED, Reduction
from agent.training.replay import Daemon, Replayer
from agent.training.schedule import learning_rate
from agent.training.seating import divided, seated
from agent.training.steprecord import Times, step_record
from agent.training.transaction import Commit, Transaction
from diagnostics.health import Alarm, Verdict
from diagnostics.sensors.digest import chain
from diagnostics.verify.votes import Ruling

#: Times a step is computed in one generation before the job is stopped: a transient fault needs two.
MAX_ATTEMPTS = 6
#: How long a rank waits to be replaced after a verdict that needs it; then it gives up and says so.
REPLACEMENT_S = 300.0


class StepRefused(RuntimeError):
    """A step could not be committed, however often it was tried; the message is the explanation."""


class Awaiting(RuntimeError):
    """The gate holds until the controller replaces a device; raised when that never came."""


@dataclass(frozen=True, slots=True)
class Seat:
    """Which place in which generation this worker takes; `traceparent` is of the order that gave it."""

    job: str
    generation: int
    rank: int
    traceparent: str = ""


#: Called at (step, phase): drills strike here, by coordinates.
Strike = Callable[[int, str], None]


class Trainer:
    """One rank of one generation."""

    def __init__(
        self, engine: Engine, group: Group, slots: Slots, seat: Seat, daemon: Daemon, here: Member, strike: Strike
    ) -> None:
        self.engine = engine
        self.spec = engine.spec
        self.group = group
        self.slots = slots
        self.seat = seat
        self.daemon = daemon
        self.strike = strike
        self.settings = AdamW()
        self.ep = seated(engine, group)
        self.transaction = Transaction(slots, engine.layout, alone=group.world == 1)
        self.storage = Storage(Path(self.spec.storage), seat.job)
        self.division, source = divided(engine, group, self.transaction)
        members = [Member(*parts) for parts in group.gather_objects((here.node, here.device, here.pid))]
        self.replayer = Replayer(engine, group, members, daemon, self._enter)
        self.hearing = Hearing(self.replayer, group, daemon)
        self.recovery = Recovery(
            engine, group, self.transaction, self.division, source, self.storage, daemon, seat.generation
        )
        self.doubt = Doubt(seat.job, seat.generation, group, members, self.recovery, daemon)
        self.checkpoints: Checkpoints = WholeCheckpoints(None)
        self.executions: Counter[int] = Counter()
        self.committed = (0, 0)  # the last step, and its attempt
        self.reasons = Reasons(daemon)
        self.phase = (0, "rendezvous")
        self.own = 0  # digest of this rank's words at the last gate
        group.waiting = engine.journal.waiting = self._waiting

    def run(self) -> SlotRecord:
        """Train to the last step; returns its record. Raises PeerLost, StepRefused, Awaiting."""
        with self.daemon.span("resume", self.seat.traceparent) as trace:
            self._restore()
            with self.daemon.span("first_step", trace, step=self.transaction.record.step + 1):
                ended = self._advance()
        while not ended:
            ended = self._advance()
        self.checkpoints.close()
        return self.transaction.record

    def _restore(self) -> None:
        self._enter(0, "restore")
        if self.group.rank == 0:
            self.storage.fence(self.seat.generation)
        self.group.barrier()
        self.recovery.restore(self.doubt.altered)
        if self.group.rank == 0:
            tidy(self.spec, self.transaction.record.step, self.seat.generation)
        describe = described(self.engine, self.seat.generation, self.recovery.parent_step())
        self.checkpoints = checkpoints(self.engine, self.group, self.storage, describe, self.daemon)

    def _advance(self) -> bool:
        """Go on by one step; True when there is none left."""
        if self._finished():
            return True
        self._step(self.transaction.record.step + 1)
        return False

    def _finished(self) -> bool:
        """True once the last step is committed and a closing gate has made it final."""
        record = self.transaction.record
        if record.step < self.spec.steps:
            return False
        outcome, rows = self._gate(record.step + 1, 1, None)
        if outcome.decision is Decision.ROLL_BACK:
            self._roll_back(rows)
            return False
        self.checkpoints.settle(record.step, rows)
        return True

    def _step(self, step: int) -> None:
        trace = self.doubt.trace
        alarms: tuple[Alarm, ...] = ()
        first = self._first(step)
        for attempt in range(first, first + MAX_ATTEMPTS):
            with nullcontext() if trace is None else self.daemon.span("redo", trace, step=step, attempt=attempt):
                alarmed = self._attempt(step, attempt, first)
            if alarmed is None:
                return
            trace = self._hold(*alarmed)
            alarms = alarmed[0].computation.alarms
        told = f"{alarms[0].sensor} at {alarms[0].module} ({alarms[0].operation})" if alarms else "on another rank"
        raise StepRefused(f"step {step} still alarms after {MAX_ATTEMPTS} attempts, whatever the verdicts: {told}")

    def _first(self, step: int) -> int:
        """With which attempt a step begins: verdicts go by their number, so a roll-back does not begin anew."""
        return self.committed[1] + 1 if self.committed[0] == step else 1

    def _attempt(self, step: int, attempt: int, first: int) -> tuple[Held, Outcome] | None:
        """Compute, reduce and pass the gate; None when the step is committed or what preceded it rolled back.

        first: the attempt with which this try of the step began.
        """
        begun = time.monotonic()
        computation, original = self._compute(step, attempt)
        sensed = time.monotonic()
        self._enter(step, "reduce")
        self.strike(step, "reduce")
        key = self._key(step, attempt)
        reduction = self.division.reduce(self.engine.gradients, key)
        computation = with_sums(computation, reduction, self.engine.journal.made)
        outcome, rows = self._gate(step, attempt, computation, reduction)
        if outcome.decision is Decision.ROLL_BACK:
            self._roll_back(rows)
            return None
        self.checkpoints.settle(step - 1, rows)
        held = self._held(step, attempt, first, computation, original, reduction)
        if outcome.decision is not Decision.COMMIT:
            return replace(held, sums=self.division.explain(reduction)), outcome
        try:
            record = self._commit(step, outcome, rows, key)
        except Unlike as unlike:
            return replace(held, findings=unlike.findings), Outcome(Decision.REPLAY, str(unlike))
        times = Times(begun, sensed, time.monotonic())
        self.committed = (step, attempt)
        attempts = self.executions.pop(step)
        norm = outcome.norm / self.group.world
        if key is not None:
            computation = replace(computation, checks=computation.checks + self.division.compared)
        self.daemon.step(step_record(record, computation, norm, attempts, times, self.reasons.take()))
        self._capture(record)
        return None

    def _key(self, step: int, attempt: int) -> int | None:
        """What the checks between ranks are drawn from, the same on all of them; None where there are none."""
        return chain(self.spec.seed, step, attempt) if self.spec.sensors else None

    def _held(
        self, step: int, attempt: int, first: int, computation: Computation, original: str, reduction: Reduction
    ) -> Held:
        """The attempt, should the gate hold it."""
        record = self.transaction.record
        replica = 0 if record.shard is None else record.shard.replica
        state = (self.transaction.state, replica, record.digest, record.own)
        return Held(self.seat.generation, step, attempt, computation, original, *state, reduction, first=first)

    def _compute(self, step: int, attempt: int) -> tuple[Computation, str]:
        self._enter(step, "forward")
        self.strike(step, "forward")
        self.executions[step] += 1
        self.engine.bind(self.transaction.state)
        computation = self.engine.compute(step, self.group.rank, attempt, self.engine.gradients)
        self.reasons.hear(step, computation.lost)
        # The reduction overwrites these gradients, so an alarmed rank takes their digest now.
        digest = vote_digest(self.engine.gradients, computation.counts, computation.loss) if computation.alarm else ""
        return computation, digest

    def _gate(
        self, step: int, attempt: int, computation: Computation | None, reduction: Reduction = UNCHECKED
    ) -> tuple[Outcome, list[Row]]:
        """One exchange; without a computation it only compares the digests of the last commit."""
        self._enter(step, "gate")
        self.strike(step, "gate")
        record = self.transaction.record
        same = self.checkpoints.wait_copied()
        self.own = self.transaction.own(look=not same)
        row = Row(
            generation=self.seat.generation,
            step=step,
            attempt=attempt,
            alarm=computation.alarm if computation else False,
            reading=computation.reading if computation else 0.0,
            squared_norm=reduction.squared_norm,
            previous=record.step,
            digest=record.digest,
            loss=computation.loss if computation else 0.0,
            counts=tuple(computation.counts.flatten().tolist()) if computation else (),
            clock=computation.clock if computation else 0,
            written=self.checkpoints.written,
            intact=self.own == record.own,
            copy=reduction.copy,
            astray=computation.astray if computation else 0,
        )
        rows = [Row.unpack(values) for values in self.group.gather(row.pack())]
        return decide(rows, self.ep), rows

    def _commit(self, step: int, outcome: Outcome, rows: list[Row], key: int | None) -> SlotRecord:
        self._enter(step, "commit")
        self.strike(step, "commit")
        record = self.transaction.commit(
            self.engine.gradients,
            self.settings,
            Commit(
                generation=self.seat.generation,
                step=step,
                lr=learning_rate(step, self.engine.preset),
                coefficient=clip_coefficient(outcome.norm, self.settings.clip, self.group.world),
                samples=self.group.world * self.engine.preset.micro_batch,
                biases=lambda old: self._biases(old, rows),
                key=key,
            ),
            self.engine.link,
            self.division,
        )
        self.doubt.settle(record)
        return record

    def _capture(self, record: SlotRecord) -> None:
        self._enter(record.step, "capture")
        self.strike(record.step, "capture")
        if record.step % self.spec.checkpoint_every == 0 or record.step == self.spec.steps:
            self.checkpoints.start(record, self.transaction.state)

    def _biases(self, old: Tensor, rows: list[Row]) -> Tensor:
        """Router biases after the step, from all ranks' counts (arXiv 2412.19437, section 2.1.2)."""
        counts = torch.tensor([row.counts for row in rows]).sum(0).view(old.shape)
        return torch.stack([updated_bias(b, c, self.settings.bias_gamma) for b, c in zip(old, counts, strict=True)])

    def _hold(self, held: Held, outcome: Outcome) -> str:
        """Nothing is committed until every suspect has a verdict; afterwards the step is redone, in the trace given."""
        self._enter(held.step, "verdict")  # what a rank replays itself it enters for itself
        trace, heard = self.hearing.hear(held, outcome)
        rulings = [judged.ruling for judged in heard]
        if any(finding.alarm.sensor == AT_REST for finding in held.findings):
            self._enter(held.step, "restore")
            self.recovery.mend()
        if stays := next((r for r in rulings if r.verdict is Verdict.CORRUPT and r.recurrent), None):
            self._enter(held.step, "verdict")
            self._await_replacement(stays)
        if refused := next((r for r in rulings if r.verdict is Verdict.SOFTWARE), None):
            raise StepRefused(f"step {held.step}: {refused.reason}")
        return trace

    def _await_replacement(self, ruling: Ruling) -> None:
        """The blamed device must go: the controller ends this worker. Only a lost controller lets this return."""
        self.daemon.wait_vote(-1, -1, REPLACEMENT_S)
        raise Awaiting(f"{ruling.blamed_node} was not replaced within {REPLACEMENT_S:.0f} s: {ruling.reason}")

    def _roll_back(self, rows: list[Row]) -> None:
        """States of the last commit differ: go back one step, and redo it."""
        record = self.transaction.record
        step = record.step
        if self.doubt.times(step) == MAX_ATTEMPTS:
            raise StepRefused(f"ranks committed different states at step {step} {MAX_ATTEMPTS + 1} times")
        self._enter(step, "restore")
        self.checkpoints.discard(step)
        self.doubt.roll_back(record, rows, self.own, self.hearing.begin_trace(0, "disagreement", step))

    def _enter(self, step: int, phase: str) -> None:
        self.phase = (step, phase)
        self.slots.enter(self.seat.generation, step, phase)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """An exchange within a phase: whoever stands still in it is not to blame."""
        step, phase = self.phase
        if phase not in WAITING:
            self.slots.enter(self.seat.generation, step, "exchange")
        yield
        if phase not in WAITING:
            self.slots.enter(self.seat.generation, step, phase)
