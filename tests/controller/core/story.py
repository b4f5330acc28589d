"""A cluster told event by event: short words for events, and every promise of core checked after each of them."""

import json
from dataclasses import replace

from controller.core import events
from controller.core.actions import Action
from controller.core.codec import decode, decode_state, encode, encode_state
from controller.core.events import Alarm, Device, Drill, Event, Process, Vote
from controller.core.invariants import broken_steps, invariants
from controller.core.machine import decide
from controller.core.policy import Policy
from controller.core.state import State

START = 1000.0  # seconds since 1970: any time will do, a round one reads well
SPEC = '{"schema": "assay.job/1"}'


class Story:
    """Feeds events to core and remembers what it ordered."""

    def __init__(self, policy: Policy | None = None, job: str = "run") -> None:
        self.state = State(policy=policy or Policy())
        self.now = START
        self.job = job
        self.actions: list[Action] = []
        self.fed: list[tuple[Event, float]] = []
        self.epochs: dict[str, int] = {}
        self.standbys: dict[str, int] = {}
        self.fired: list[str] = []

    def feed(self, event: Event) -> list[Action]:
        """Decide one event, check every promise, and give the actions it led to."""
        before = self.state
        kept = encode_state(before)
        after, actions = decide(before, event, self.now)
        again = decide(before, event, self.now)
        assert (after, actions) == again, "the same input gave another output"
        assert encode_state(before) == kept, "the state before was altered"
        broken = [*invariants(after), *broken_steps(before, after)]
        assert not broken, f"after {event}: {broken}"
        items: list[Event | Action] = [event, *actions]
        for item in items:
            assert decode(json.loads(json.dumps(encode(item), allow_nan=False))) == item
        stored = json.loads(json.dumps(encode_state(after), allow_nan=False))
        assert decode_state(stored) == after, "a snapshot does not hold the whole state"
        known = {action.id for action in self.actions}
        assert not known & {action.id for action in actions}, "an action id was given twice"
        assert len({action.id for action in actions}) == len(actions)
        self.state, self.fed = after, [*self.fed, (event, self.now)]
        self.actions += actions
        return actions

    def of(self, kind: type[Action]) -> list[Action]:
        """The actions of one kind so far."""
        return [action for action in self.actions if isinstance(action, kind)]

    # Words for events. Each feeds one and gives the actions.

    def hello(self, node: str, *, new: bool = False, spare: bool | None = None, running: str = "") -> list[Action]:
        """`new`: a new life of the agent. `running`: "GENERATION/RANK" of a worker that it still runs."""
        if new or node not in self.epochs:
            self.epochs[node] = self.epochs.get(node, 0) + 1
        known = self.state.nodes.get(node)
        is_spare = spare if spare is not None else bool(known and known.spare)
        standbys = known.standbys.values() if known else ()
        processes = [Process("agent", 1), *(Process("standby", item.pid, item.job) for item in standbys)]
        if running:
            generation, rank = running.split("/")
            processes.append(Process("worker", 7, self.job, int(generation), int(rank)))
        return self.feed(
            events.AgentHello(
                time=self.now,
                node=node,
                epoch=self.epochs[node],
                boot_id="boot",
                version="0.1.0",
                fingerprint="cpu",
                highest_controller_epoch=self.state.controller_epoch,
                devices=(Device(f"cpu-{node}", f"serial-{node}", "cpu"),),
                processes=tuple(processes),
                peer_endpoint=f"{node}:9000",
                spare=is_spare,
            )
        )

    def ready(self, node: str, fingerprint: str = "cpu") -> list[Action]:
        count = self.standbys[node] = self.standbys.get(node, 0) + 1
        return self.feed(
            events.WorkerReady(
                time=self.now,
                node=node,
                job=self.job,
                standby=f"{node}-s{count}",
                pid=100 * (int(node[1:]) + 1) + count,
                device=f"cpu-{node}",
                rendezvous=f"{node}:{7000 + count}",
                fingerprint=fingerprint,
            )
        )

    def failed(self, node: str, detail: str = "broken") -> list[Action]:
        """A standby could not be made; `detail` is one word of the transcript."""
        count = self.standbys[node] = self.standbys.get(node, 0) + 1
        return self.feed(
            events.WorkerExited(
                time=self.now,
                node=node,
                job=self.job,
                generation=0,
                rank=-1,
                pid=1,
                cause="error",
                detail=detail,
                step=0,
                phase="",
                standby=f"{node}-s{count}",
            )
        )

    def submit(self, steps: int = 40, world: int = 2, drills: str = "") -> list[Action]:
        """`drills`: "kill@25:0,sdc@12:1"."""
        made = [drill_of(text) for text in drills.split(",") if text]
        return self.feed(
            events.JobSubmitted(
                time=self.now,
                job=self.job,
                spec=SPEC,
                steps=steps,
                world=world,
                drills=tuple(made),
                actor="ada",
                reason="r",
            )
        )

    def exit(self, rank: int, cause: str, step: int, phase: str = "backward", generation: int = 0) -> list[Action]:
        generation = generation or self.state.jobs[self.job].generation
        return self.feed(
            events.WorkerExited(
                time=self.now,
                node=self.home(rank),
                job=self.job,
                generation=generation,
                rank=rank,
                pid=1,
                cause=cause,
                detail="",
                step=step,
                phase=phase,
            )
        )

    def stalled(
        self,
        rank: int,
        step: int,
        phase: str = "backward",
        seconds: float = 2.0,
        waiting: bool = False,
        process: str = "S",
    ) -> list[Action]:
        return self.feed(
            events.ProgressStalled(
                time=self.now,
                node=self.home(rank),
                job=self.job,
                generation=self.state.jobs[self.job].generation,
                rank=rank,
                pid=1,
                step=step,
                phase=phase,
                stalled_s=seconds,
                deadline_s=1.0,
                process_state=process,
                waiting=waiting,
            )
        )

    def link_lost(self, node: str) -> list[Action]:
        return self.feed(events.LinkLost(time=self.now, node=node, epoch=self.epochs[node]))

    def resumed(self, rank: int, step: int, source: str) -> list[Action]:
        job = self.state.jobs[self.job]
        return self.feed(
            events.Resumed(
                time=self.now,
                node=self.home(rank),
                job=self.job,
                generation=job.generation,
                rank=rank,
                step=step,
                source=source,
                digest=f"d{step}",
                checkpoint="",
            )
        )

    def final(self, step: int, generation: int = 0, chain: str = "") -> list[Action]:
        return self.feed(
            events.StepFinal(
                time=self.now,
                job=self.job,
                generation=generation or self.state.jobs[self.job].generation,
                step=step,
                digest=f"d{step}",
                chain=chain or f"c{step}",
                loss=3.0,
            )
        )

    def alarm(self, rank: int, step: int, attempt: int = 1, third: bool = False, peer: str = "") -> list[Action]:
        """`third`: the gate waits for a spare's vote. `peer`: the node whose vote as the peer it has already."""
        home = self.home(rank)
        if not peer and self.state.jobs[self.job].world > 1:
            peer = self.home(1 - rank)
        votes = (self.vote("original", home, "bad"), self.vote("suspect", home, "bad"))
        return self.feed(
            events.GateAlarm(
                time=self.now,
                node=self.home(rank),
                job=self.job,
                generation=self.state.jobs[self.job].generation,
                step=step,
                rank=rank,
                device=f"cpu-{self.home(rank)}",
                attempt=attempt,
                alarms=(Alarm("gemm", "layers.1.moe.experts.3.gate", "linear", "fprop", 41.5, "row 7"),),
                votes=(*votes, self.vote("peer", peer, "good")) if third and peer else votes[:1],
                needs_third=third,
                evidence="",
            )
        )

    def voted(self, node: str, step: int, rank: int, action: str) -> list[Action]:
        """A spare's vote."""
        return self.feed(self._replayed(node, step, rank, (self.vote("third", node, "good"),), action=action))

    def verdict(
        self,
        verdict: str,
        *,
        rank: int,
        step: int,
        blamed: str = "",
        recurrent: bool = False,
        by: int | None = None,
        evidence: tuple[str, str] = ("", ""),
        attempt: int = 0,
        first: int = 0,
        voters: str = "",
    ) -> list[Action]:
        """`attempt`, and the `first` of this try: 0 is what an agent of before says. `voters`: "n0,n2", beside it."""
        reporter = self.home(rank if by is None else by)
        suspect = self.home(rank)
        votes = (self.vote("original", suspect, "bad"), self.vote("suspect", suspect, "bad" if recurrent else "good"))
        votes += tuple(self.vote(r, n, "good") for r, n in zip(("peer", "third"), voters.split(","), strict=False) if n)
        told = self._replayed(reporter, step, rank, votes, verdict=verdict, blamed=blamed, recurrent=recurrent)
        told = replace(told, evidence=evidence[0], evidence_note=evidence[1])
        return self.feed(replace(told, attempt=attempt, first_attempt=first))

    def disagreement(self, step: int, blamed: int, times: int = 0, memory: bool = False) -> list[Action]:
        """Of committed states: the records' comparison, or what the ranks found, for how many times.

        `memory`: they were the same when they were committed.
        """
        ranks = range(self.state.jobs[self.job].world)
        digests = {rank: "bad" if rank == blamed % len(ranks) and not memory else "good" for rank in ranks}
        return self.feed(
            events.DigestDisagreement(
                time=self.now,
                job=self.job,
                generation=self.state.jobs[self.job].generation,
                step=step,
                digests=digests,
                blamed_rank=blamed,
                reason="in memory: its state hashes to b, it was a" if memory else "the other ranks agree",
                times=times,
            )
        )

    def captured(self, step: int) -> list[Action]:
        generation = self.state.jobs[self.job].generation
        return self.feed(
            events.CheckpointCaptured(
                time=self.now, node="n0", job=self.job, generation=generation, step=step, digest="d", stall_s=0.01
            )
        )

    def durable(self, step: int, chain: str = "") -> list[Action]:
        return self.feed(
            events.CheckpointDurable(
                time=self.now,
                node="n0",
                job=self.job,
                generation=self.state.jobs[self.job].generation,
                step=step,
                digest="d",
                chain=chain or f"c{step}",
                path=f"step-{step:08d}",
                bytes=1,
                parent_step=0,
                write_s=0.1,
            )
        )

    def refused(self, step: int, rank: int = 0) -> list[Action]:
        return self.feed(
            events.ShardRefused(
                time=self.now,
                node=self.home(rank),
                job=self.job,
                generation=self.state.jobs[self.job].generation,
                step=step,
                path=f"step-{step:08d}",
                shard="shard-0.safetensors",
                expected="aa",
                found="ab",
                reason="digest ab is not aa",
            )
        )

    def drill_fired(self, drill: str, at: float | None = None) -> list[Action]:
        made = drill_of(drill)
        return self.feed(
            events.DrillFired(
                time=self.now,
                node=self.home(made.rank) if made.rank >= 0 else "",
                drill=made.id,
                job=self.job,
                kind=made.kind,
                step=made.step,
                rank=made.rank,
                fired_at=START + at if at is not None else self.now,
                detail="",
            )
        )

    def result(self, kind: str, node: str, outcome: str = "done") -> list[Action]:
        """The outcome of the newest unanswered action of that kind on `node`."""
        action = [
            item for item in self.state.outstanding.values() if type(item).__name__ == kind and item.node == node
        ][-1]
        return self.feed(events.ActionResult(time=self.now, node=node, action_id=action.id, outcome=outcome, detail=""))

    def lease(self, epoch: int, unclean: bool = False) -> list[Action]:
        return self.feed(events.LeaseAcquired(time=self.now, epoch=epoch, unclean=unclean, last_seen=self.now - 1.5))

    def tick(self) -> list[Action]:
        return self.feed(events.Tick(time=self.now))

    def cancel(self) -> list[Action]:
        return self.feed(events.JobCancelled(time=self.now, job=self.job, actor="ada", reason="enough"))

    def cluster(self, members: int = 2, spares: int = 1, steps: int = 40, drills: str = "") -> list[Action]:
        """Bring a job of `members` ranks to its first committed step."""
        seen: list[Action] = self.lease(1)
        for index in range(members + spares):
            seen += self.hello(f"n{index}", spare=index >= members)
        seen += self.submit(steps, members, drills)
        for index in range(members + spares):
            seen += self.ready(f"n{index}")
        for rank in range(members):
            seen += self.result("StartGeneration", f"n{rank}")
            seen += self.resumed(rank, 0, "init")
        seen += self.final(1)
        for rank in range(members):
            seen += self.ready(f"n{rank}")
        return seen

    def home(self, rank: int) -> str:
        """The node of a rank."""
        place = self.state.jobs[self.job].placed(rank)
        return place.node if place else "n0"

    def vote(self, role: str, node: str, digest: str) -> Vote:
        return Vote(role, node, f"cpu-{node}", 1, digest, digest == "bad")

    def _replayed(
        self,
        node: str,
        step: int,
        rank: int,
        votes: tuple[Vote, ...],
        *,
        verdict: str = "",
        blamed: str = "",
        recurrent: bool = False,
        action: str = "",
    ) -> events.ReplayResult:
        return events.ReplayResult(
            time=self.now,
            node=node,
            job=self.job,
            generation=self.state.jobs[self.job].generation,
            step=step,
            rank=rank,
            votes=votes,
            verdict=verdict,
            blamed_node=blamed,
            blamed_device=f"cpu-{blamed}" if blamed else "",
            recurrent=recurrent,
            reason=REASONS.get(verdict, ""),
            action_id=action,
        )


REASONS = {
    "CORRUPT": "the votes of others agree against it",
    "FALSE_ALARM": "all votes are equal: the tolerance is too tight",
    "UNDECIDED": "there is no second device to compare on",
    "SOFTWARE": "every device computes something else",
}


def drill_of(text: str) -> Drill:
    """The drill of "KIND@STEP:RANK" or "KIND@STEP:RANK+persistent"; its text is its id."""
    told, _, more = text.partition("+")
    kind, _, rest = told.partition("@")
    step, _, rank = rest.partition(":")
    return Drill(text, kind, int(step), int(rank or -1), params={more: "true"} if more else {})


def trained(policy: Policy | None = None, members: int = 2, spares: int = 1, drills: str = "") -> Story:
    """A job of `members` ranks that has trained for a while, with `spares` beside it."""
    story = Story(policy)
    story.cluster(members, spares, drills=drills)
    story.now += 20.0
    return story


def started(story: Story) -> list[tuple[int, str]]:
    """(rank, node) of the newest generation."""
    job = story.state.jobs["run"]
    return [(place.rank, place.node) for place in job.placements]
