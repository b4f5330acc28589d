"""The executor: everything reaches its agent while it matters, whatever happens to links; nothing overruled does."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.core.actions import Action, AskHuman, EndJob, PrepareStandby, StartGeneration, StopGeneration
from controller.executor import Executor


class Links:
    """Streams that are up or down, and what went through them."""

    def __init__(self, *up: str) -> None:
        self.up = set(up)
        self.sent: list[tuple[str, str]] = []

    async def send(self, node: str, action: Action) -> bool:
        if node in self.up:
            self.sent.append((node, action.id))
        return node in self.up


class Here:
    """What the controller carried out itself."""

    def __init__(self) -> None:
        self.done: list[str] = []

    async def __call__(self, action: Action) -> None:
        self.done.append(action.id)


def stop(name: str, node: str = "n0", generation: int = 1, deadline: float = 20.0) -> Action:
    return StopGeneration(id=name, node=node, job="run", generation=generation, deadline=deadline, reason="")


def start(name: str, node: str = "n0", generation: int = 1) -> Action:
    return StartGeneration(
        id=name, node=node, job="run", generation=generation, deadline=20.0, reason="", spec="", ranks=(),
        rendezvous="", drills=(),
    )  # fmt: skip


def prepare(name: str) -> Action:
    return PrepareStandby(id=name, node="n0", job="run", generation=0, deadline=20.0, reason="", spec="")


def end(name: str) -> Action:
    return EndJob(id=name, node="n0", job="run", generation=1, deadline=20.0, reason="", outcome="failed")


def made(links: Links) -> tuple[Executor, Here]:
    here = Here()
    return Executor(links, here), here


def ids(actions: Sequence[Action]) -> list[str]:
    return [action.id for action in actions]


async def test_what_agents_do_is_sent_and_what_the_controller_does_is_done() -> None:
    links = Links("n0")
    executor, here = made(links)
    ask = AskHuman(id="ask", node="", job="run", generation=1, deadline=20.0, reason="", question="?")
    await executor.submit([stop("a"), ask, stop("b", "n1")])
    assert (links.sent, here.done) == ([("n0", "a")], ["ask"])
    assert ids(executor.pending()) == ["a", "b"]
    executor.on_result("a")
    executor.on_result("a")
    assert ids(executor.pending()) == ["b"]


async def test_an_agent_that_comes_back_gets_what_it_has_not_done() -> None:
    links = Links()
    executor, _ = made(links)
    await executor.submit([stop("a"), stop("b"), stop("c", "n1")])
    links.up = {"n0", "n1"}
    await executor.on_hello("n0", ["a"])
    assert links.sent == [("n0", "b")]
    assert ids(executor.pending()) == ["a", "b", "c"], "the answer to a is on its way"


async def test_an_order_is_pending_once_however_often_it_is_submitted() -> None:
    links = Links("n0")
    executor, _ = made(links)
    await executor.submit([stop("a")])
    await executor.submit([stop("a")])
    assert links.sent == [("n0", "a")]


async def test_what_was_not_answered_by_its_deadline_is_unknown() -> None:
    executor, _ = made(Links())
    await executor.submit([stop("a", deadline=5.0), stop("b", deadline=9.0)])
    assert executor.next_deadline() == 5.0
    assert executor.expire(4.9) == []
    (result,) = executor.expire(5.0)
    assert (result.action_id, result.outcome, result.node, result.time) == ("a", "unknown", "n0", 5.0)
    assert executor.next_deadline() == 9.0


@pytest.mark.parametrize(
    ("order", "left"),
    [
        (stop("x"), ["newer", "other", "prepare", "x"]),
        (start("x", generation=3), ["other", "prepare", "x"]),
        (end("x"), ["other", "x"]),
        (stop("x", "n2"), ["newer", "other", "prepare", "x"]),
    ],
)
async def test_an_overruled_order_is_never_sent_later(order: Action, left: list[str]) -> None:
    links = Links()
    executor, _ = made(links)
    await executor.submit(
        [start("older"), start("newer", generation=2), start("other", "n1"), prepare("prepare"), order]
    )
    assert ids(executor.pending()) == left
    links.up = {"n0"}
    await executor.on_hello("n0", [])
    assert {name for _, name in links.sent} == {action.id for action in executor.pending() if action.node == "n0"}
    dropped = {"older", "newer", "other", "prepare"} - set(left)
    assert {result.action_id for result in executor.expire(0.0)} == dropped
    assert executor.expire(0.0) == []


orders = st.lists(
    st.tuples(
        st.sampled_from(["submit", "result", "hello", "up", "down"]), st.integers(0, 5), st.sampled_from(["n0", "n1"])
    ),
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(orders)
async def test_whatever_links_do_all_that_is_pending_arrives_in_the_end(told: list[tuple[str, int, str]]) -> None:
    links = Links()
    executor, _ = made(links)
    submitted: set[str] = set()
    answered: set[str] = set()
    for what, number, node in told:
        name = f"{node}-{number}"
        if what == "submit" and name not in submitted:
            submitted.add(name)
            await executor.submit([stop(name, node, number)])
        elif what == "result" and name in submitted:
            answered.add(name)
            executor.on_result(name)
        elif what == "down":
            links.up.discard(node)
        elif what in ("hello", "up"):
            links.up.add(node)
            await executor.on_hello(node, [])
    links.up = {"n0", "n1"}
    links.sent.clear()
    for node in ("n0", "n1"):
        await executor.on_hello(node, [])
    assert {name for _, name in links.sent} == submitted - answered
