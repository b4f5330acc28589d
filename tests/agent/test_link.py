"""The link against a real gRPC server: nothing is lost over broken connections, no deposed controller is obeyed."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from fake_controller import FakeController
from hypothesis import given
from hypothesis import strategies as st

from agent import convert
from agent.actions import Action, Outcome
from agent.history import History
from agent.link import BATCH_REPORTS, Backoff, Link, Timing
from agent.outbox import Backlog, Outbox, leftovers
from agent.reports import dropped_notice
from assay.v1 import agent_pb2 as pb

QUICK = Timing(batch=0.01, backoff_first=0.01, backoff_cap=0.05)


class Agent:
    """What a link needs, with the orders it was given."""

    def __init__(self, folder: Path, epoch: int = 7) -> None:
        self.outbox = Outbox(folder / "outbox", epoch, dropped_notice)
        self.history = History(folder)
        self.orders: asyncio.Queue[Action] = asyncio.Queue()
        self.link: Link | None = None

    def say(self, detail: str, *, urgent: bool = False) -> None:
        payload = convert.report("probe_result", {"detail": detail}, 1.0)
        self.outbox.append(payload, urgent=urgent)
        if self.link is not None:
            self.link.wake()

    @asynccontextmanager
    async def linked(
        self, controller: FakeController, timing: Timing = QUICK, left: list[Backlog] | None = None
    ) -> AsyncIterator[Link]:
        self.link = Link(
            controller.endpoint,
            self.outbox,
            self.history,
            lambda epoch: pb.AgentMessage(hello=pb.Hello(node="n0", epoch=epoch)),
            self.orders.put_nowait,
            leftovers=left or [],
            timing=timing,
            rng=random.Random(1),
        )
        task = asyncio.create_task(self.link.run())
        try:
            yield self.link
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self.outbox.close()


@pytest.fixture
async def controller() -> AsyncIterator[FakeController]:
    fake = FakeController()
    await fake.start()
    yield fake
    await fake.stop()


def details(controller: FakeController) -> list[str]:
    return [body.detail for body in controller.found("probe_result")]


async def test_reports_go_up_and_acknowledged_ones_are_forgotten(controller: FakeController, tmp_path: Path) -> None:
    agent = Agent(tmp_path)
    agent.say("before the link")
    async with agent.linked(controller) as link:
        agent.say("during")
        await controller.until(lambda: details(controller) == ["before the link", "during"])
        assert await link.drained(5.0)
        assert controller.hellos[0].epoch == 7
    assert agent.outbox.empty


async def test_ordinary_reports_wait_for_company_and_urgent_ones_do_not(
    controller: FakeController, tmp_path: Path
) -> None:
    agent = Agent(tmp_path)
    async with agent.linked(controller, Timing(batch=3600.0)):
        await controller.until(lambda: bool(controller.hellos))
        agent.say("step 1")
        agent.say("step 2")
        agent.say("alarm", urgent=True)
        await controller.until(lambda: bool(controller.batches))
    # One batch: the ordinary ones had waited (for an hour, without the alarm), and went along in order.
    assert [len(batch) for batch in controller.batches] == [3]


async def test_an_ordinary_report_alone_goes_after_the_batch_time(controller: FakeController, tmp_path: Path) -> None:
    agent = Agent(tmp_path)
    async with agent.linked(controller, Timing(batch=0.05)):
        await controller.until(lambda: bool(controller.hellos))
        agent.say("step 1")
        await controller.until(lambda: details(controller) == ["step 1"])


async def test_no_more_reports_are_in_flight_than_credited(tmp_path: Path) -> None:
    controller = FakeController(credits=4, acknowledges=False)
    await controller.start()
    agent = Agent(tmp_path)
    async with agent.linked(controller):
        for number in range(10):
            agent.say(str(number), urgent=True)
        await controller.until(lambda: len(controller.reports) >= 4)
        await controller.acknowledge(7, 2)  # two more may follow: 5 and 6, never 7
        await controller.until(lambda: len(controller.reports) >= 6)
        await controller.acknowledge(7, 6)
        await controller.until(lambda: len(controller.reports) >= 10)
        in_flight = [max(seqs) - acked for seqs, acked in _flights(controller, [(4, 0), (6, 2), (10, 6)])]
        assert max(in_flight) <= 4
    await controller.stop()


def _flights(controller: FakeController, marks: list[tuple[int, int]]) -> list[tuple[list[int], int]]:
    seqs = [report.seq for _, report in controller.reports]
    return [(seqs[:heard], acked) for heard, acked in marks]


async def test_a_long_queue_goes_in_batches_of_a_bounded_size(controller: FakeController, tmp_path: Path) -> None:
    agent = Agent(tmp_path)
    for number in range(2 * BATCH_REPORTS + 1):
        agent.say(str(number))
    async with agent.linked(controller) as link:
        await controller.until(lambda: len(controller.reports) == 2 * BATCH_REPORTS + 1)
        assert max(len(batch) for batch in controller.batches) == BATCH_REPORTS
        assert await link.drained(5.0)


async def test_nothing_is_lost_when_the_controller_dies_before_it_acknowledges(tmp_path: Path) -> None:
    controller = FakeController(acknowledges=False)
    await controller.start()
    agent = Agent(tmp_path)
    async with agent.linked(controller):
        agent.say("one")
        await controller.until(lambda: details(controller) == ["one"])
        await controller.stop()
        agent.say("two")
        controller.acknowledges = True
        await controller.start(controller.port)
        await controller.until(lambda: details(controller) == ["one", "two"])
        # "one" was said twice, under one number: the controller can tell.
        assert sum(report.seq == 1 for _, report in controller.reports) == 2
    await controller.stop()


async def test_what_the_controller_has_already_is_not_repeated(controller: FakeController, tmp_path: Path) -> None:
    agent = Agent(tmp_path)
    agent.say("stored before")
    agent.say("new")
    controller.welcome = {"acknowledged_seq": 1}
    async with agent.linked(controller):
        await controller.until(lambda: details(controller) == ["new"])
    assert len(controller.reports) == 1


async def test_a_deposed_controller_commands_nobody(controller: FakeController, tmp_path: Path) -> None:
    agent = Agent(tmp_path)
    controller.epoch = 5
    async with agent.linked(controller):
        await controller.until(lambda: bool(controller.hellos))
        await controller.order(pb.Action(id="old", controller_epoch=4, end_job=pb.EndJob()))
        await controller.order(pb.Action(id="new", controller_epoch=5, end_job=pb.EndJob()))
        assert (await asyncio.wait_for(agent.orders.get(), 5)).id == "new"
        assert agent.orders.empty()
    assert History(tmp_path).controller_epoch == 5  # the next life refuses it too


async def test_a_deposed_controller_gets_no_reports(controller: FakeController, tmp_path: Path) -> None:
    agent = Agent(tmp_path)
    agent.history.accept(9)
    agent.say("not for you")
    controller.epoch = 8
    async with agent.linked(controller):
        await controller.until(lambda: len(controller.hellos) >= 2)  # it was left, and tried again
        assert controller.reports == []
        controller.epoch = 9
        await controller.until(lambda: details(controller) == ["not for you"])


async def test_an_earlier_life_speaks_first_under_its_own_epoch(controller: FakeController, tmp_path: Path) -> None:
    former = Agent(tmp_path, epoch=6)
    former.say("last words")
    agent = Agent(tmp_path, epoch=7)
    agent.say("hello again")
    left = leftovers(tmp_path / "outbox", 7)
    async with agent.linked(controller, left=left) as link:
        await controller.until(lambda: len(controller.reports) == 2)
        assert [(epoch, r.seq, r.probe_result.detail) for epoch, r in controller.reports] == [
            (6, 1, "last words"),
            (7, 1, "hello again"),
        ]
        assert [hello.epoch for hello in controller.hellos] == [6, 7]
        assert await link.drained(5.0)
    assert leftovers(tmp_path / "outbox", 8) == []
    former.outbox.close()


async def test_an_earlier_life_that_is_refused_is_counted_as_lost(controller: FakeController, tmp_path: Path) -> None:
    former = Agent(tmp_path, epoch=6)
    former.say("last words")
    agent = Agent(tmp_path, epoch=7)
    controller.refuse_epochs = {6}
    async with agent.linked(controller, left=leftovers(tmp_path / "outbox", 7)):
        await controller.until(lambda: [hello.epoch for hello in controller.hellos] == [6, 7])
        agent.say("new life")
        await controller.until(lambda: details(controller) == ["new life"])
        assert [dropped.count for dropped in controller.found("reports_dropped")] == [1]
    former.outbox.close()


async def test_an_earlier_life_that_is_never_acknowledged_does_not_hold_up_this_one(tmp_path: Path) -> None:
    controller = FakeController(acknowledges=False)
    await controller.start()
    former = Agent(tmp_path, epoch=6)
    former.say("last words")
    agent = Agent(tmp_path, epoch=7)
    agent.say("new life")
    left = leftovers(tmp_path / "outbox", 7)
    async with agent.linked(controller, Timing(batch=0.01, backoff_cap=0.05, leftover=0.05), left):
        await controller.until(lambda: "new life" in details(controller))
    await controller.stop()
    former.outbox.close()


@pytest.mark.parametrize("malformed", ["7", ""])
async def test_a_report_that_the_controller_cannot_take_is_found_and_left_out(tmp_path: Path, malformed: str) -> None:
    controller = FakeController()
    controller.malformed = f'detail: "{malformed}"' if malformed else ""
    await controller.start()
    former, agent = Agent(tmp_path, epoch=6), Agent(tmp_path, epoch=7)
    for number in range(10):
        former.say(str(number))
        agent.say(str(number))
    good = [str(number) for number in range(10) if str(number) != malformed]
    left = leftovers(tmp_path / "outbox", 7)
    async with agent.linked(controller, left=left):
        await controller.until(lambda: details(controller) == good + good)
        agent.say("later", urgent=True)
        await controller.until(lambda: "later" in details(controller))
        assert sum(dropped.count for dropped in controller.found("reports_dropped")) == (2 if malformed else 0)
    await controller.stop()
    former.outbox.close()


async def test_draining_does_not_wait_without_a_session(tmp_path: Path) -> None:
    controller = FakeController()
    controller.port = 1  # nobody there
    agent = Agent(tmp_path)
    agent.say("kept")
    async with agent.linked(controller) as link:
        async with asyncio.timeout(5):
            assert not await link.drained(3600.0)


@given(st.integers(), st.integers(1, 60))
def test_waits_stay_between_the_first_and_the_cap_and_grow_at_most_threefold(seed: int, attempts: int) -> None:
    backoff = Backoff(0.05, 2.0, random.Random(seed))
    last = 0.05
    for _ in range(attempts):
        wait = backoff.next()
        assert 0.05 <= wait <= min(2.0, 3 * last)
        last = wait
    backoff.reset()
    assert backoff.next() <= 0.15


def test_agents_do_not_all_call_at_once() -> None:
    waits = {round(_third(Backoff(0.05, 2.0, random.Random(seed)).next), 4) for seed in range(100)}
    assert len(waits) > 90
    assert len({round(_third(Backoff(0.05, 2.0, random.Random(1)).next), 4) for _ in range(100)}) == 1  # one seed does


def _third(draw: Callable[[], float]) -> float:
    return [draw() for _ in range(3)][-1]


def test_the_history_remembers_over_lives_and_is_bounded(tmp_path: Path) -> None:
    history = History(tmp_path, capacity=3)
    for number in range(5):
        history.complete(f"a{number}", Outcome("done", str(number)))
    history.complete("a4", Outcome("failed", "too late to change"))
    again = History(tmp_path, capacity=3)
    assert again.completed() == ["a2", "a3", "a4"]
    assert again.outcome("a4") == Outcome("done", "4")
    assert again.outcome("a1") is None


def test_a_damaged_history_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "actions.json").write_text('{"controller_epoch": 3, "comp')
    history = History(tmp_path)
    assert history.completed() == []
    assert history.accept(1)


async def test_a_link_that_is_ended_in_the_moment_of_the_welcome_ends(tmp_path: Path) -> None:
    """A cancellation must not get lost because what was waited for has come: the daemon would wait for ever."""
    agent = Agent(tmp_path)
    arrives: asyncio.Future[pb.ControllerMessage] = asyncio.get_running_loop().create_future()
    reading = asyncio.Event()

    class Call:
        async def read(self) -> pb.ControllerMessage:
            reading.set()
            return await arrives

    async with agent.linked(FakeController()) as link:  # nobody listens there
        task = asyncio.create_task(link._welcome(Call()))
        await reading.wait()
        arrives.set_result(pb.ControllerMessage(welcome=pb.Welcome(controller_epoch=1)))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
