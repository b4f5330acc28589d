"""The sum of both ranks' gradients, checked as a job without a mesh checks it before it commits."""

from __future__ import annotations

import torch
from torch import Tensor

from agent.training.collective import buckets
from benchmarks.campaign.verdict import PEER, STRUCK
from diagnostics.sensors.collectives import TOTAL, Weights, checksums, reduction_readings
from diagnostics.sensors.digest import digest
from diagnostics.verify.between import Copy, sum_ruling
from diagnostics.verify.votes import Ruling


def parts(struck: Tensor, peer: Tensor, key: int) -> Tensor:
    """Both ranks' checksums before anything is sent, float64 [2, buckets, 2]."""
    weights = Weights(key)
    return torch.stack([checksums(buckets(gradients), weights) for gradients in (struck, peer)])


def on_sum(given: Tensor, ours: Tensor, peers: Tensor, key: int) -> Ruling | None:
    """The ruling on what the ranks hold after the sum; None where both copies are one and like their parts."""
    copies = [_copy(given, summed, device, key) for summed, device in ((ours, STRUCK), (peers, PEER))]
    if all(copy.sound for copy in copies) and copies[0].hash == copies[1].hash:
        return None
    return sum_ruling(copies)[0]


def _copy(given: Tensor, summed: Tensor, device: str, key: int) -> Copy:
    readings = reduction_readings(given, checksums(buckets(summed), Weights(key))[:, TOTAL])
    return Copy(device, device, float(readings.amax()), digest(summed))
