"""What being looked at costs operators that no check is drawn for: a budget must bear that too.

The most of it is timed as it happens: between operators that take milliseconds, looking takes two or three times as
long as in a loop of small ones, since nothing of it is left in the caches.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from functools import cache

import torch
from torch import nn

from diagnostics.sensors.aside import standing
from diagnostics.sensors.coverage import Coverage
from diagnostics.sensors.inspection import Inspection
from diagnostics.sensors.places import Places
from diagnostics.sensors.readings import ReadingLog
from diagnostics.sensors.sampling import Sampler
from diagnostics.sensors.saved import Saved
from diagnostics.sensors.tolerance import Widening, shipped_table
from diagnostics.sensors.watch import Eyes, Keeper

# Forward and backward of 16 layers run some 300 operators and take 5 ms; the quickest of 5 rounds is one that nobody
# interrupted.
_LAYERS, _ROUNDS = 16, 5


def watching(looking_s: float, operators: int) -> float:
    """Host seconds that it takes to watch so many operators, of which so long (`Inspection.looking`) was timed."""
    return looking_s + operators * beside()


@cache
def beside() -> float:
    """Of that, for an operator, what nobody times: entering a step's modes, its hooks for modules and saved tensors.

    Measured once in a process, as the mean over forward and backward of layers that are too small to take any time
    themselves, with no check drawn.
    """

    def round_of(inspection: Inspection | None = None) -> float:
        begin, looking = time.perf_counter(), 0.0 if inspection is None else inspection.looking
        model(x).sum().backward()
        took = time.perf_counter() - begin
        return took if inspection is None else took - (inspection.looking - looking)

    with torch.random.fork_rng(devices=()), torch.inference_mode(False), torch.enable_grad():
        model = nn.Sequential(*(layer for _ in range(_LAYERS) for layer in (nn.Linear(1, 1), nn.Tanh())))
        x = torch.ones(1, 1)
        round_of()  # the gradients are there from here on
        plain = min(round_of() for _ in range(_ROUNDS))
        places = Places(model)
        inspection = _idle(places)
        with ExitStack() as modes:
            places.begin(modes)
            eyes = modes.enter_context(Eyes(inspection))
            modes.enter_context(Keeper(eyes)).follow(modes)
            modes.enter_context(standing(Saved(inspection, eyes.formulas)))
            watched = min(round_of(inspection) for _ in range(_ROUNDS))
    return max(0.0, watched - plain) / (inspection.operators / _ROUNDS)


def _idle(places: Places) -> Inspection:
    """One that draws nothing."""
    device = torch.device("cpu")
    log, table, widening = ReadingLog(device), shipped_table(), Widening(1.0)
    sampler = Sampler(1.0)
    sampler.share = 1e-12
    return Inspection(0, places, log, Coverage(), sampler, table, widening, device, again=0.0)
