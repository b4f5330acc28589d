"""Runs incident transcripts: commands with their times, and below each "----" what core decided, for people to read.

`python tests/controller/core/scenario_runner.py` writes what core decides now into all transcripts; read the diff.

A block is a line of one command (with its arguments as `word` or `key=value`), "----", and the outcome up to an
empty line. A time stands before the command as "+SECONDS" (after the one before) or "SECONDS" (since the start).
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import story

from controller.core.actions import (
    Action,
    AskHuman,
    DeliverVote,
    EndJob,
    InjectDrill,
    PrepareStandby,
    PromoteCheckpoint,
    Quarantine,
    Replay,
    RevokeCheckpoints,
    StartGeneration,
)
from controller.core.incidents import incident_document
from controller.core.machine import next_deadline
from controller.core.policy import Policy
from controller.core.state import State

FOLDER = Path(__file__).parents[2] / "scenarios"
RULER = "----"
NOTHING = "nothing to do"


def run(text: str) -> str:
    """The transcript with its outcomes replaced by what core decides now."""
    teller = Teller()
    return "\n".join(teller.tell(block) for block in text.strip().split("\n\n")) + "\n"


class Teller:
    """One story, told block by block."""

    def __init__(self) -> None:
        self.story = story.Story()

    def tell(self, block: str) -> str:
        """The block with its outcome; a block of comments only stays as it is."""
        lines = block.splitlines()
        comments = [line for line in lines if line.startswith("#")]
        commands = [line for line in lines if line and not line.startswith("#")]
        if not commands:
            return "\n".join([*comments, ""])
        outcome = list(self._obey(commands[0])) or [NOTHING]
        return "\n".join([*comments, commands[0], RULER, *outcome, ""])

    def _obey(self, line: str) -> Iterator[str]:
        words = line.split()
        if words[0][0] in "+0123456789":
            when = words.pop(0)
            self.story.now = self.story.now + float(when) if when[0] == "+" else story.START + float(when)
        name, arguments = words[0].replace("-", "_"), words[1:]
        if name == "show":
            yield from _show(self.story.state, arguments[0])
            return
        before = self.story.state
        keyed = dict(word.split("=", 1) for word in arguments if "=" in word)
        plain = [_value(word) for word in arguments if "=" not in word]
        if name == "policy":
            self.story = story.Story(Policy().changed({key: float(value) for key, value in keyed.items()}))
            return
        actions = _method(self.story, name, keyed)(*plain, **{key: _value(item) for key, item in keyed.items()})
        yield from _told(before, self.story.state, actions)


def _method(teller: story.Story, name: str, keyed: dict[str, str]) -> Callable[..., list[Action]]:
    if name != "voted":
        found: Callable[..., list[Action]] = getattr(teller, name)
        return found

    def voted(node: str, **rest: Any) -> list[Action]:
        replay = teller.of(Replay)[-1]
        return teller.voted(node, rest["step"], rest["rank"], replay.id)

    return voted


def _value(word: str) -> Any:
    if word in ("yes", "no"):
        return word == "yes"
    try:
        return int(word)
    except ValueError:
        pass
    try:
        return float(word)
    except ValueError:
        return word


def _told(before: State, after: State, actions: list[Action]) -> Iterator[str]:
    yield from (f"> {_order(action)}" for action in actions)
    for name, node in sorted(after.nodes.items()):
        old = before.nodes.get(name)
        if old is None or old.state is not node.state:
            yield f"node {name}: {old.state if old else 'new'} -> {node.state}"
    for key, job in sorted(after.jobs.items()):
        gone = before.jobs.get(key)
        was = f"{gone.status} generation {gone.generation}" if gone else "new"
        now = f"{job.status} generation {job.generation}"
        if was != now:
            yield f"job {key}: {was} -> {now}{f': {job.explanation}' if job.explanation else ''}"
    for key, incident in sorted(after.incidents.items()):
        known = before.incidents.get(key)
        head = f"{key} {incident.kind}{f' on {incident.node}' if incident.node else ''}"
        for note in incident.timeline[len(known.timeline) if known else 0 :]:
            yield f"{head}: {note.text}"
    if next_deadline(after) != next_deadline(before) and (wake := next_deadline(after)) is not None:
        yield f"looks again at {wake - story.START:g}"


def _order(action: Action) -> str:
    name = type(action).__name__
    where = f" {action.node}" if action.node else ""
    return f"{name}{where}{_details(action)}: {action.reason}"


def _details(action: Action) -> str:
    match action:
        case StartGeneration():
            ranks = ", ".join(f"rank {place.rank} = {place.standby}" for place in action.ranks)
            drills = f", drills {', '.join(drill.id for drill in action.drills)}" if action.drills else ""
            return f" generation {action.generation} ({ranks}, rendezvous {action.rendezvous}{drills})"
        case Replay():
            return (
                f" step {action.step} of rank {action.rank} (state of rank {action.source_rank} from {action.source})"
            )
        case DeliverVote():
            return f" step {action.step} of rank {action.rank} ({len(action.votes)} votes)"
        case Quarantine():
            return f" {action.target}"
        case RevokeCheckpoints():
            return f" from {action.since_step} on"
        case PromoteCheckpoint():
            return f" {action.step}"
        case AskHuman():
            return f" ({action.question})"
        case EndJob():
            return f" {action.outcome}"
        case InjectDrill():
            return f" {action.drill.id}"
        case PrepareStandby():
            return ""
    return f" generation {action.generation}"


def _show(state: State, key: str) -> Iterator[str]:
    """An incident as it is published, or the fields of a job that people ask for."""
    if key in state.incidents:
        document = incident_document(state.incidents[key])
        if not document["evidence"]:
            del document["evidence"]
        for name in ("actions", "timeline", "votes"):
            document[name] = f"{len(document[name])} of them"
        yield from (
            f"{name}: {value:g}" if isinstance(value, float) else f"{name}: {value}" for name, value in document.items()
        )
        return
    job = state.jobs[key]
    shown = ("status", "generation", "committed_step", "fruitless", "exits", "proofs", "explanation")
    yield from (f"{item.name}: {getattr(job, item.name)}" for item in fields(job) if item.name in shown)


if __name__ == "__main__":
    for path in [Path(name) for name in sys.argv[1:]] or sorted(FOLDER.glob("*.txt")):
        path.write_text(run(path.read_text()))
