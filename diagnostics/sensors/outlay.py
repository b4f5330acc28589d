"""What being looked at costs an operator that no check is drawn for: a budget must bear that too."""

from __future__ import annotations

import time
from contextlib import ExitStack
from functools import cache

import torch
from torch import nn

from diagnostics.sensors.coverage import Coverage
from diagnostics.sensors.inspection import Inspection
from diagnostics.sensors.places import Places
from diagnostics.sensors.readings import ReadingLog
from diagnostics.sensors.sampling import Sampler
from diagnostics.sensors.tolerance import Widening, shipped_table
from diagnostics.sensors.watch import Eyes, Keeper

# 256 operators under the modes take 2 ms; the quickest of 5 rounds is one that nobody interrupted.
_OPERATORS, _ROUNDS = 256, 5


@cache
def seconds_an_operator() -> float:
    """Host seconds that the modes of a step and its account take for each operator, measured once in a process."""
    x = torch.zeros(1)  # no bytes to speak of: what remains is the way to the kernel

    def round_of() -> float:
        begin = time.perf_counter()
        for _ in range(_OPERATORS):
            x.neg()
        return time.perf_counter() - begin

    plain = min(round_of() for _ in range(_ROUNDS))
    with ExitStack() as modes:
        places = Places(nn.Identity())
        places.begin(modes)
        watching = modes.enter_context(Eyes(_idle(places)))
        modes.enter_context(Keeper(watching))
        watched = min(round_of() for _ in range(_ROUNDS))
    return max(0.0, watched - plain) / _OPERATORS


def _idle(places: Places) -> Inspection:
    """One that runs nothing again: `neg` has no identity, so all of its calls are passed by."""
    device = torch.device("cpu")
    log, table, widening = ReadingLog(device), shipped_table(), Widening(1.0)
    return Inspection(0, places, log, Coverage(), Sampler(None), table, widening, device, again=0.0)
