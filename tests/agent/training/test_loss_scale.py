"""The FP8 backward starts from a scaled loss: fewer gradients vanish, and no other bit knows of it."""

import random
from pathlib import Path

import pytest
import torch

from agent.training.computation import Computation
from agent.training.engine import Engine
from agent.training.spec import JobSpec


def computed(folder: Path, precision: str, loss_scale: float | None) -> tuple[Computation, torch.Tensor]:
    """One step of `tiny` on 64 KiB of bytes; None: the scale that the engine chose."""
    corpus = folder / "corpus"
    corpus.write_bytes(random.Random(1).randbytes(1 << 16))
    spec = JobSpec(
        job="job",
        preset="tiny",
        seed=1,
        steps=1,
        world=1,
        precision=precision,
        corpus=str(corpus),
        sensors=False,
        tolerance_scale=1.0,
        checkpoint_every=1,
        storage=str(folder / "storage"),
        threads=1,
        cache=str(folder / "cache"),
    )
    engine = Engine(spec)
    if loss_scale is not None:
        engine._loss_scale = loss_scale
    state = engine.layout.view(memoryview(bytearray(engine.layout.nbytes)))
    engine.initialise(state)
    engine.bind(state)
    return engine.compute(1, 0, 1, engine.gradients), engine.gradients


def test_fewer_gradients_vanish(tmp_path: Path) -> None:
    scaled, gradients = computed(tmp_path, "fp8", None)
    plain, without = computed(tmp_path, "fp8", 1.0)
    assert scaled.loss == plain.loss
    assert scaled.fp8[:2] == plain.fp8[:2]
    assert (scaled.fp8[2].tensor, plain.fp8[2].tensor) == ("gradient", "gradient")
    assert scaled.fp8[2].underflow < 0.5 * plain.fp8[2].underflow
    assert float((gradients - without).norm() / without.norm()) < 0.05  # scaled back: the same gradients but for FP8


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_power_of_two_changes_no_bit_where_nothing_vanishes(tmp_path: Path, precision: str) -> None:
    _, plain = computed(tmp_path, precision, None)
    _, scaled = computed(tmp_path, precision, 512.0)
    assert torch.equal(plain, scaled)
