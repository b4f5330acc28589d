"""The benchmark of the hash: its faults are what XOR folds and plain sums miss, and its ratio is of equal work."""

import numpy as np
import pytest

from benchmarks import hash_speed
from benchmarks._figures import Figure


def figure(kind: str, peer: str, trials: int) -> Figure:
    (found,) = [made for made in hash_speed.misses(kind, trials) if made.peer == peer]
    return found


@pytest.mark.parametrize(
    ("kind", "peer"),
    [
        ("one bit in 32 lanes", "XOR fold"),
        ("one bit at the hash's own period", "XOR fold"),
        ("stuck bit of a lane", "XOR fold"),
        ("runs of four", "plain sum"),
        ("permutation", "plain sum"),
        ("swap", "plain sum"),
    ],
)
def test_the_controls_miss_what_the_hash_does_not(kind: str, peer: str) -> None:
    made = figure(kind, peer, 60)
    assert (made.value, made.met, made.samples) == (0, True, 60)
    assert made.peer_value is not None
    assert made.peer_value > 0


def test_a_hash_that_misses_does_not_meet_its_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hash_speed, "digest_words", lambda words: int(np.bitwise_xor.reduce(words)))
    assert figure("permutation", "XOR fold", 20).met is False


def test_the_ratio_is_of_the_figures_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hash_speed, "WORDS", 4096)
    hashed, ratio = hash_speed.speeds(2, 3)
    assert hashed.value is not None
    assert ratio.value is not None
    assert ratio.peer_value is not None
    assert ratio.value * ratio.peer_value == pytest.approx(hashed.value)
    assert ratio.met == (ratio.value >= hash_speed.TARGET)


def test_the_parts_copied_are_the_whole() -> None:
    source = np.arange(64, dtype=np.uint32)
    work = hash_speed.Work(source, np.zeros_like(source))
    for part in (slice(0, 32), slice(32, 64)):
        work.copy(part)
    assert np.array_equal(work.target, source)
