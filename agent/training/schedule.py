"""The learning rate of a step: a function of the step alone, so that a run extended later is bit-identical so far."""

from __future__ import annotations

from agent.model.presets import Preset


def learning_rate(step: int, preset: Preset) -> float:
    """Linear warm-up over ``preset.warmup_steps``, then ``preset.peak_lr`` for ever (V3 section 4.2 without its decay).

    Args:
        step: 1 for the first step.
        preset: gives the peak and the warm-up.

    Raises:
        ValueError: a step below 1.
    """
    if step < 1:
        raise ValueError(f"step: counted from 1, not {step}")
    if step >= preset.warmup_steps:
        return preset.peak_lr
    return preset.peak_lr * step / preset.warmup_steps
