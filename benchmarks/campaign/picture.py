"""The campaign as a picture, in SVG by hand: recall against how wrong the result was, and by operation and model.

A plotting library would bring eight packages for two charts.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from benchmarks.campaign.draw import OPERATIONS, PRECISIONS
from benchmarks.campaign.intervals import wilson
from benchmarks.campaign.report import by_identity, caught, harmful, unmasked

#: Decades of the deviation that the curve shows; what is beyond is counted at the ends.
DECADES = range(-8, 5)
#: Colours that the colour-blind tell apart (Okabe and Ito's).
COLOURS = dict(zip(PRECISIONS, ("#0072b2", "#d55e00", "#009e73"), strict=True))
WIDTH, CURVE, LEFT, TOP, CELL = 980, 300, 150, 40, 22
_INK = "#333"


def picture(lines: Sequence[Mapping[str, Any]]) -> str:
    """An SVG document of both charts."""
    models = sorted({line["model"] for line in lines})
    height = TOP + CURVE + 110 + CELL * len(OPERATIONS) + 110
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="12" fill="{_INK}">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        *_curves(lines),
        *_grid(lines, models, TOP + CURVE + 80),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _text(x: float, y: float, text: str, anchor: str = "start", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(text)}</text>'


def _curves(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Recall of unmasked faults by decade of deviation, one line a precision, its interval as a band.

    Dashed: what is caught where nothing is drawn (`report.DRAWN`).
    """
    width, bottom = WIDTH - LEFT - 40, TOP + CURVE
    step = width / (len(DECADES) - 1)
    parts = [
        _text(
            LEFT,
            24,
            "Unmasked faults caught, by L2 of a row's difference / its rms element (dashed: nothing drawn)",
        )
    ]
    for tenth in range(0, 11, 2):
        y = bottom - CURVE * tenth / 10
        parts.append(f'<line x1="{LEFT}" x2="{LEFT + width}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        parts.append(_text(LEFT - 8, y + 4, f"{10 * tenth} %", "end"))
    for index, decade in enumerate(DECADES):
        parts.append(_text(LEFT + index * step, bottom + 18, f"1e{decade}", "middle"))
    counts, of_identities = _by_decade(lines, caught), _by_decade(lines, by_identity)
    for number, precision in enumerate(PRECISIONS):
        colour = COLOURS[precision]
        points = _points(counts, precision, step)
        if points:
            band = [(x, low) for x, _, low, _ in points] + [(x, high) for x, _, _, high in reversed(points)]
            parts.append(f'<polygon points="{_path(band)}" fill="{colour}" opacity="0.15"/>')
            parts.append(_line(points, f'stroke="{colour}" stroke-width="2"'))
            alone = _points(of_identities, precision, step)
            parts.append(_line(alone, f'stroke="{colour}" stroke-width="1.5" stroke-dasharray="5 4"'))
        x = LEFT + 20 + 80 * number
        parts.append(f'<rect x="{x}" y="{bottom + 32}" width="12" height="12" fill="{colour}"/>')
        parts.append(_text(x + 18, bottom + 42, precision))
    return parts


def _points(
    counts: Mapping[tuple[str, int], tuple[int, int]], precision: str, step: float
) -> list[tuple[float, float, float, float]]:
    """x of a decade, y of the share that was caught and of its interval; decades that have no fault are left out."""
    found = []
    for index, decade in enumerate(DECADES):
        hits, tries = counts[precision, decade]
        if tries:
            y, low, high = (TOP + CURVE * (1 - share) for share in (hits / tries, *wilson(hits, tries)))
            found.append((LEFT + index * step, y, low, high))
    return found


def _line(points: Iterable[tuple[float, float, float, float]], style: str) -> str:
    return f'<polyline points="{_path((x, y) for x, y, _, _ in points)}" fill="none" {style}/>'


def _by_decade(
    lines: Iterable[Mapping[str, Any]], hit: Callable[[Mapping[str, Any]], bool]
) -> dict[tuple[str, int], tuple[int, int]]:
    """(hits, tries) by precision and decade of deviation."""
    found: dict[tuple[str, int], tuple[int, int]] = defaultdict(lambda: (0, 0))
    for line in filter(unmasked, lines):
        size = line.get("deviation")
        if size:
            exponent = DECADES[-1] if math.isinf(size) else math.floor(math.log10(size))
            key = line["precision"], min(max(exponent, DECADES[0]), DECADES[-1])
            hits, tries = found[key]
            found[key] = hits + hit(line), tries + 1
    return found


def _grid(lines: Iterable[Mapping[str, Any]], models: Sequence[str], top: float) -> list[str]:
    """Recall of harmful faults by operation and model, as a shade and a number."""
    cells: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for line in filter(harmful, lines):
        cells[line["operation"], line["model"]].append(caught(line))
    wide = (WIDTH - LEFT - 40) / max(1, len(models))
    parts = [_text(LEFT, top - 14, "Harmful faults caught, by operation and fault model (per cent; empty: none)")]
    for row, operation in enumerate(OPERATIONS):
        y = top + row * CELL
        parts.append(_text(LEFT - 8, y + 15, operation, "end"))
        for column, model in enumerate(models):
            found = cells.get((operation, model))
            if found:
                recall, x = sum(found) / len(found), LEFT + column * wide
                parts.append(_cell(x, y, wide, recall))
    bottom = top + len(OPERATIONS) * CELL + 12
    for column, model in enumerate(models):
        x = LEFT + (column + 0.5) * wide
        parts.append(_text(x, bottom, model, "end", f'transform="rotate(-40 {x:.1f} {bottom:.1f})"'))
    return parts


def _cell(x: float, y: float, wide: float, recall: float) -> str:
    """From orange (missed) to blue (caught); a share is rounded down, so that 100 means all."""
    red, green, blue = (round(a + (b - a) * recall) for a, b in ((240, 86), (150, 160), (60, 220)))
    box = f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide - 2:.1f}" height="{CELL - 2}" fill="rgb({red},{green},{blue})"/>'
    return box + _text(x + wide / 2, y + 15, f"{math.floor(100 * recall)}", "middle")


def _path(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
