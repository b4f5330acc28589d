"""Whatever is reported, in whatever order and however often: no promise of core breaks, and replay repeats it."""

import random
from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st
from story import Story

from controller.core.actions import StartGeneration
from controller.core.machine import decide, matters, next_deadline
from controller.core.state import State

MEMBERS, SPARES = 2, 1
NODES = [f"n{index}" for index in range(MEMBERS + SPARES)]
node = st.sampled_from(NODES)
rank = st.integers(0, MEMBERS - 1)
step = st.integers(1, 41)
VERDICTS = ["CORRUPT", "FALSE_ALARM", "UNDECIDED", "SOFTWARE"]

command = st.one_of(
    st.tuples(st.just("exit"), rank, st.sampled_from(["completed", "signal", "collective", "error", "stopped"]), step),
    st.tuples(st.just("stalled"), rank, step, st.booleans()),
    st.tuples(st.just("hello"), node, st.booleans()),
    st.tuples(st.just("ready"), node),
    st.tuples(st.just("ready"), node),
    st.tuples(st.just("link_lost"), node),
    st.tuples(st.just("resumed"), rank, step, st.sampled_from(["live", "spare", "replica", "checkpoint", "init"])),
    st.tuples(st.just("final"), step),
    st.tuples(st.just("alarm"), rank, step, st.integers(1, 3), st.booleans()),
    st.tuples(st.just("verdict"), rank, step, st.sampled_from(VERDICTS), node, st.booleans(), st.integers(0, 3)),
    st.tuples(st.just("disagreement"), step, st.integers(-1, MEMBERS - 1), st.integers(0, 3)),
    st.tuples(st.just("captured"), step),
    st.tuples(st.just("durable"), step, st.sampled_from(["", "other"])),
    st.tuples(st.just("refused"), step, rank),
    st.tuples(st.just("result"), st.integers(0, 50), st.sampled_from(["done", "failed", "unknown"])),
    st.tuples(st.just("drill"), st.sampled_from(["kill@5:0", "hang@9:1", "sdc@3:1", "node@7:1", "controller@8"])),
    st.tuples(st.just("lease"), st.integers(1, 5), st.booleans()),
    st.tuples(st.just("submit"), st.integers(20, 60)),
    st.tuples(st.just("again"), st.integers(0, 200)),
    st.tuples(st.just("tick")),
)
waits = st.sampled_from([0.0, 0.01, 0.4, 1.1, 6.0, 25.0, 61.0])


def obey(story: Story, words: tuple) -> None:  # type: ignore[type-arg]
    match words:
        case ("stalled", who, at, waiting):
            story.stalled(who, at, waiting=waiting)
        case ("hello", name, new):
            story.hello(name, new=new)
        case ("alarm", who, at, attempt, third):
            story.alarm(who, at, attempt, third)
        case ("verdict", who, at, verdict, blamed, recurrent, attempt):
            story.verdict(verdict, rank=who, step=at, blamed=blamed, recurrent=recurrent, attempt=attempt)
        case ("refused", at, who):
            story.refused(at, who)
        case ("result", index, outcome):
            left = list(story.state.outstanding.values())
            if left:
                story.result(type(left[index % len(left)]).__name__, left[index % len(left)].node, outcome)
        case ("drill", text):
            story.drill_fired(text)
        case ("again", index):
            story.feed(story.fed[index % len(story.fed)][0])
        case (name, *arguments):
            getattr(story, name)(*arguments)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(waits, command), max_size=30))
def test_no_promise_breaks_whatever_happens(told: list[tuple[float, tuple]]) -> None:  # type: ignore[type-arg]
    """`Story.feed` checks every invariant after every event."""
    story = Story()
    story.cluster(MEMBERS, SPARES, drills="kill@5:0,sdc@3:1")
    for wait, words in told:
        story.now += wait
        obey(story, words)
        wake = next_deadline(story.state)
        assert wake is None or wake > story.now, "it would be asked to tick for ever"


def troubled() -> Story:
    """A run with a crash, a lost node, a corruption and a refusal, told in order."""
    story = Story()
    story.cluster(MEMBERS, SPARES, drills="kill@25:0")
    told: list[Callable[[], object]] = [
        lambda: story.captured(10),
        lambda: story.final(10),
        lambda: story.durable(10),
        lambda: story.exit(0, "signal", 25),
        lambda: story.exit(1, "collective", 25, generation=1),
        lambda: story.resumed(0, 24, "live"),
        lambda: story.resumed(1, 24, "live"),
        lambda: story.final(25),
        lambda: story.drill_fired("kill@25:0"),
        lambda: story.ready("n0"),
        lambda: story.ready("n1"),
        lambda: story.alarm(1, 30),
        lambda: story.verdict("CORRUPT", rank=1, step=30, blamed="n1"),
        lambda: story.final(30),
        lambda: story.link_lost("n1"),
        lambda: story.exit(0, "collective", 32),
        lambda: story.resumed(0, 31, "live"),
        lambda: story.resumed(1, 31, "replica"),
        lambda: story.final(32),
        lambda: story.final(40),
        lambda: story.exit(0, "completed", 40),
        lambda: story.exit(1, "completed", 40),
    ]
    for tell in told:
        story.now += 0.5
        tell()
    return story


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32))
def test_news_that_is_repeated_and_out_of_order_is_harmless(seed: int) -> None:
    fed = [event for event, _ in troubled().fed]
    mixed = fed + fed
    random.Random(seed).shuffle(mixed)
    story = Story()
    for event in mixed:
        story.now += 0.1
        story.feed(event)


def test_an_order_told_twice_in_place_changes_nothing() -> None:
    once = troubled()
    twice = Story()
    for event, now in once.fed:
        twice.now = now
        twice.feed(event)
        before = twice.state
        assert twice.feed(event) == []
        assert not matters(before, twice.state, []), event
    assert twice.actions == once.actions


def test_replay_of_what_was_recorded_gives_the_very_actions() -> None:
    story = troubled()
    state, actions = State(), []
    for event, now in story.fed:
        state, more = decide(state, event, now)
        actions += more
    assert actions == story.actions
    assert state == story.state
    assert sum(isinstance(action, StartGeneration) for action in actions) == 6


def test_replay_with_other_times_gives_other_actions() -> None:
    """Negative control: the recorded time is part of the input."""
    story = troubled()
    state, actions = State(), []
    for event, now in story.fed:
        state, more = decide(state, event, now + 1.0)
        actions += more
    assert actions != story.actions


def test_only_what_changed_is_copied() -> None:
    story = troubled()
    other = decide(story.state, story.fed[0][0], story.now)[0]
    assert other.jobs["run"] is story.state.jobs["run"]
    assert other.incidents["inc-0001"] is story.state.incidents["inc-0001"]


def test_every_tick_that_is_asked_for_brings_the_story_on() -> None:
    """Left alone with its own wakes, a job that waits for a lost node comes to an end."""
    story = Story()
    story.cluster(2, 0)
    story.link_lost("n1")
    story.exit(0, "collective", 25)
    for _ in range(10):
        wake = next_deadline(story.state)
        if wake is None:
            break
        story.now = wake
        story.tick()
    assert story.state.jobs["run"].status == "FAILED"
    assert "no spare is left" in story.state.jobs["run"].explanation
