"""The figures of a campaign: shares with what their counts prove, by operation, by model and over all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from agent.training.spec import AGAIN
from benchmarks._figures import Figure
from benchmarks.campaign.draw import OPERATIONS, PRECISIONS
from benchmarks.campaign.intervals import wilson
from benchmarks.campaign.verdict import STRUCK

Line = Mapping[str, Any]
#: What the product must reach (docs/campaign.md's table), by the kind of share.
TARGETS = {"harmful": 0.999, "above the floor": 0.99, "before commit": 0.99, "attribution": 1.0}
#: Sensors that look only where a call or a kept tensor is drawn (`again`): all that a guard has without an identity.
DRAWN = frozenset({"recompute", "moves", "saved"})
#: Sensors that make a result once more as it was made: a device that repeats its fault repeats it there.
REPEATING = frozenset({"recompute", "moves"})
#: Fewer than this in a class say nothing: its interval is wider than 0.2.
FEWEST = 20


def harmful(line: Line) -> bool:
    """Its update deviates by more than three natural floors."""
    return bool(line["harmful"])


def unmasked(line: Line) -> bool:
    """There is an update to commit, and it is not the clean one, bit for bit."""
    return not line["masked"] and not line["stopped"]


def above(line: Line) -> bool:
    """Unmasked, and above what the check that covers it publishes."""
    return unmasked(line) and line["above"] is True


def caught(line: Line) -> bool:
    """Some sensor, the gate, the digests or torch itself saw it."""
    return bool(line["caught"])


def by_identity(line: Line) -> bool:
    """Caught, and not only by what is drawn."""
    return caught(line) and not (line["sensors"] and set(line["sensors"]) <= DRAWN)


def share(
    name: str, lines: Iterable[Line], hit: Callable[[Line], bool], target: float | None = None, unit: str = "share"
) -> Figure:
    """The share of lines that `hit`, with its interval in `coverage`; unknown where there are no lines.

    A target is met when the share reaches it, however few the lines: what they prove says `proven`.
    """
    found = [hit(line) for line in lines]
    if not found:
        return Figure(name, None, unit, "higher", target, samples=0)
    low, high = wilson(sum(found), len(found))
    coverage = f"95 % interval {low:.4f} to {high:.4f}"
    return Figure(name, sum(found) / len(found), unit, "higher", target, coverage=coverage, samples=len(found))


def proven(name: str, lines: Sequence[Line], hit: Callable[[Line], bool], target: float) -> Figure:
    """The lower end of the share's interval, against the target."""
    hits = sum(hit(line) for line in lines)
    return Figure(name, wilson(hits, len(lines))[0], "share", "higher", target, samples=len(lines))


def figures(lines: Sequence[Line], audit: float) -> Iterator[Figure]:
    """All figures of a campaign. audit: the chance that a spare recomputes a given rank's step."""
    yield from _overall(lines)
    for precision in PRECISIONS:
        part = [line for line in lines if line["precision"] == precision]
        yield share(f"recall, harmful, {precision}", filter(harmful, part), caught)
        yield share(f"recall, unmasked, {precision}", filter(unmasked, part), caught)
        yield share(f"recall, unmasked and above the floor, {precision}", filter(above, part), caught)
        yield _identities_alone(f", {precision}", part)
    for operation in OPERATIONS:
        part = [line for line in lines if line["operation"] == operation]
        yield from _by_class(f"operation {operation}", part, audit)
        for precision in PRECISIONS:
            alike = [line for line in part if line["precision"] == precision]
            yield share(f"recall, harmful, operation {operation}, {precision}", filter(harmful, alike), caught)
            yield _identities_alone(f", operation {operation}, {precision}", alike)
    for model in sorted({line["model"] for line in lines}):
        yield from _by_class(f"model {model}", [line for line in lines if line["model"] == model], audit)


def _overall(lines: Sequence[Line]) -> Iterator[Figure]:
    seen = [line for line in lines if caught(line)]
    bad = list(filter(harmful, lines))
    visible = list(filter(above, lines))
    judged = [line for line in seen if unmasked(line) and line.get("verdict")]
    yield share("stopped: torch refuses, or the process ends", lines, _stopped)
    yield share("unmasked", lines, unmasked)
    yield share("harmful", lines, harmful)
    yield share("recall, harmful", bad, caught, TARGETS["harmful"])
    yield proven("recall, harmful, 95 % lower bound", bad, caught, TARGETS["harmful"])
    yield share("recall, harmful, nothing drawn", bad, by_identity)
    yield _drawn(bad)
    yield share("recall, harmful to any tensor of the state", filter(_harms_state, lines), caught)
    yield share("recall, harmful, recurrent faults not by recomputation alone", bad, _independently)
    yield share("recall, unmasked", filter(unmasked, lines), caught)
    yield share("recall, unmasked and above the floor", visible, caught, TARGETS["above the floor"])
    yield proven("recall, unmasked and above the floor, 95 % lower bound", visible, caught, TARGETS["above the floor"])
    yield _identities_alone("", lines)
    early = [line for line in seen if harmful(line)]
    yield share("caught before the commit, of harmful that were caught", early, _before, TARGETS["before commit"])
    yield share("device found, of unmasked with a verdict", judged, _right, TARGETS["attribution"])
    replays = max((int(line["replays"]) for line in judged), default=None)
    yield Figure("replays for a verdict, at most", replays, "replays", "lower", 3.0, samples=len(judged))
    yield share("alarms that name the module, of those of the struck operator", filter(_names, seen), _named)


def _identities_alone(name: str, lines: Iterable[Line]) -> Figure:
    """What identities alone see of the faults above their floor."""
    found = [line for line in lines if above(line) and line["floor"]]
    return share(f"recall, unmasked and above an identity's floor, nothing drawn{name}", found, by_identity)


def _by_class(name: str, lines: Sequence[Line], audit: float) -> Iterator[Figure]:
    yield share(f"recall, harmful, {name}", filter(harmful, lines), caught)
    yield share(f"recall, unmasked, {name}", filter(unmasked, lines), caught)
    yield share(f"recall, unmasked and above the floor, {name}", filter(above, lines), caught)
    missed = [line for line in lines if unmasked(line) and not caught(line)]
    audited = audit * sum(bool(line["auditable"]) for line in missed) / len(missed) if missed else None
    label = f"audit's chance a step, of unmasked that no sensor saw, {name}"
    yield Figure(
        label, audited, "share", "higher", coverage=f"a spare audits a step with {audit:g}", samples=len(missed)
    )


def _drawn(bad: Sequence[Line]) -> Figure:
    """What a job would see of these faults, which draws only some of what has no identity."""
    expected = sum(1.0 if by_identity(line) else AGAIN * caught(line) for line in bad) / len(bad) if bad else None
    name = f"recall, harmful, {AGAIN:g} drawn as in a job, expected"
    return Figure(name, expected, "share", "higher", samples=len(bad))


def _independently(line: Line) -> bool:
    """Caught, and if the device repeats its fault, not by having it repeat the operator: that repeats the fault."""
    return caught(line) and not (line["recurrent"] and line["sensors"] and set(line["sensors"]) <= REPEATING)


def _harms_state(line: Line) -> bool:
    return bool(line["harms_state"])


def _stopped(line: Line) -> bool:
    return bool(line["stopped"])


def _before(line: Line) -> bool:
    return bool(line["before_commit"])


def _right(line: Line) -> bool:
    return line.get("blamed") == STRUCK


def _names(line: Line) -> bool:
    return line.get("named") is not None


def _named(line: Line) -> bool:
    return bool(line["named"])


def outside(mine: Iterable[Figure], theirs: Iterable[Mapping[str, Any]]) -> list[str]:
    """Shares of another seed's campaign (a document's figures) that lie outside of the intervals of this one's.

    An interval is of one campaign's counts; another campaign's share has noise of its own, so of 95 % intervals about
    one share in six lies outside when both have as many faults. Compared is therefore whether the intervals meet.
    """
    found = []
    shares = [figure for figure in theirs if figure["unit"] == "share"]
    others = {figure["name"]: figure for figure in shares if (figure["coverage"] or "").startswith("95 %")}
    for figure in mine:
        other, n = others.get(figure.name), figure.samples or 0
        if other is None or figure.value is None or other["value"] is None or n < FEWEST:
            continue
        low, high = wilson(round(figure.value * n), n)
        least, most = wilson(round(other["value"] * other["samples"]), other["samples"])
        if high < least or low > most:
            found.append(f"{figure.name}: {low:.4f} to {high:.4f}, there {least:.4f} to {most:.4f}")
    return found


def table(lines: Sequence[Line]) -> str:
    """Markdown: recall on harmful by operation and precision, with hits of tries and the interval."""
    cells: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for line in filter(harmful, lines):
        for key in ((line["operation"], line["precision"]), ("all", line["precision"])):
            cells[key].append(caught(line))
    rows = ["| operation | " + " | ".join(PRECISIONS) + " |", "| --- |" + " --- |" * len(PRECISIONS)]
    for operation in (*OPERATIONS, "all"):
        if any((operation, precision) in cells for precision in PRECISIONS):
            texts = [_cell(cells.get((operation, precision), [])) for precision in PRECISIONS]
            rows.append(f"| {operation} | " + " | ".join(texts) + " |")
    return "\n".join(rows)


def _cell(found: Sequence[bool]) -> str:
    if not found:
        return "-"
    low, high = wilson(sum(found), len(found))
    return f"{sum(found)} of {len(found)} ({100 * low:.1f} to {100 * high:.1f} %)"
