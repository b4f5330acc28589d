"""Where in a plane of a result values go wrong: one element, lanes, runs, a row, a column, a tile."""

from __future__ import annotations

import random
from typing import Any

import torch

# A warp's share of an output tile, and the distance of stuck lanes: the shape in which faults were seen.
TILE = 16
# Wrong values that follow each other in a run; what was seen on GPUs.
RUN = 4
# Distances of runs, along both axes: widths of a vector load, of a warp, and of two.
PERIODS = (8, 16, 32, 64)

#: Rows and columns of a plane: slices, or index tensors that broadcast against each other.
Region = tuple[Any, Any]


def element(rows: int, columns: int, rng: random.Random) -> Region:
    """One value, each alike."""
    row, column = rng.randrange(rows), rng.randrange(columns)
    return slice(row, row + 1), slice(column, column + 1)


def lanes(rows: int, columns: int, rng: random.Random) -> Region:
    """Every TILE-th column from a drawn one on."""
    return slice(None), slice(rng.randrange(min(TILE, columns)), None, TILE)


def runs(rows: int, columns: int, rng: random.Random) -> Region:
    """Runs of RUN values, repeated at one period along both axes."""
    period = rng.choice(PERIODS)
    top, left = rng.randrange(min(period, rows)), rng.randrange(min(period, columns))
    starts = torch.arange(left, columns, period)
    across = (starts[:, None] + torch.arange(RUN)).flatten()
    return torch.arange(top, rows, period)[:, None], across[across < columns]


def row(rows: int, columns: int, rng: random.Random) -> Region:
    """One whole row."""
    at = rng.randrange(rows)
    return slice(at, at + 1), slice(None)


def column(rows: int, columns: int, rng: random.Random) -> Region:
    """One whole column."""
    at = rng.randrange(columns)
    return slice(None), slice(at, at + 1)


def tile(rows: int, columns: int, rng: random.Random) -> Region:
    """The TILE x TILE tile around a drawn value; at the edges what there is of it."""
    return tile_at(rng.randrange(rows), rng.randrange(columns))


def tile_at(at_row: int, at_column: int) -> Region:
    """The tile that holds this value."""
    top, left = at_row // TILE * TILE, at_column // TILE * TILE
    return slice(top, top + TILE), slice(left, left + TILE)
