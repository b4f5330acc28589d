"""One run of the FP8 benchmark: `small` in one variant, from one seed.

One rank and no gate: the loop is the engine's computation and the optimizer's pass, as the main job makes them.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from agent.model.fp8 import Blocks, Emulation, Tally
from agent.model.fp8.emulation import quantised
from agent.model.linear import Linear
from agent.model.router import updated_bias
from agent.training.engine import Engine
from agent.training.layout import State
from agent.training.optimizer import AdamW, Pass, clip_coefficient, update
from agent.training.spec import JobSpec

#: Share of the steps after which the learning rate falls to a tenth by a cosine (section 4.2): at a constant rate the
#: loss still falls by several per cent over the last steps, and being a few steps ahead by chance would count.
CONSTANT = 1 / 3
#: Adding 1.5 * 2^23 times a value's own power of two leaves no bit below the leading one in an fp32 sum (see
#: `agent.model.fp8.emulation`, which adds 1.5 * 2^20 and keeps three).
_NO_BITS = 1.5 * 2.0**23
_EXPONENT = 0x7F800000


class Blockwise(Emulation):
    """The recipe as it is trained with, without the statistics, on which no result depends: less time a step."""

    def along_rows(self, x: Tensor, tally: Tally | None = None) -> Blocks:
        """[rows, k] in 1x128 blocks."""
        return super().along_rows(x)

    def tiles(self, weight: Tensor, tally: Tally | None = None) -> Blocks:
        """[rows, k] in 128x128 blocks."""
        return super().tiles(weight)


class PerTensor(Emulation):
    """A control: the same rounding and products under one scale for each whole tensor."""

    def along_rows(self, x: Tensor, tally: Tally | None = None) -> Blocks:
        """One scale for [rows, k]."""
        return Blocks(self._one_scale(x))

    def along_columns(self, x: Tensor) -> Blocks:
        """One scale for the transpose of [k, columns]."""
        return Blocks(self._one_scale(x).t())

    def tiles(self, weight: Tensor, tally: Tally | None = None) -> Blocks:
        """One scale for [rows, k]."""
        return Blocks(self._one_scale(weight))

    def _one_scale(self, x: Tensor) -> Tensor:
        rows, columns = x.shape
        return quantised(x, rows, columns, self.recipe)


class Coarse(Blockwise):
    """The control that must fail: the recipe's blocks and scales without E4M3's three mantissa bits."""

    def along_rows(self, x: Tensor, tally: Tally | None = None) -> Blocks:
        """[rows, k] in 1x128 blocks."""
        return Blocks(power_of_two(super().along_rows(x).values))

    def along_columns(self, x: Tensor) -> Blocks:
        """The transpose of [k, columns] in 1x128 blocks along k."""
        return Blocks(power_of_two(super().along_columns(x).values))

    def tiles(self, weight: Tensor, tally: Tally | None = None) -> Blocks:
        """[rows, k] in 128x128 blocks."""
        return Blocks(power_of_two(super().tiles(weight).values))


def power_of_two(x: Tensor) -> Tensor:
    """fp32 values rounded to powers of two; 1.5 to 2."""
    step = (x.contiguous().view(torch.int32) & _EXPONENT).view(torch.float32).view_as(x)
    return torch.add(x, step, alpha=_NO_BITS).sub_(step, alpha=_NO_BITS)


@dataclass(frozen=True)
class Variant:
    """precision: of the job. backend: what makes its FP8 products. stirred: see `stir`."""

    precision: str
    backend: type[Emulation] | None = None
    stirred: bool = False


@dataclass(frozen=True)
class Regime:
    """How all variants are trained. The rate rises to `peak_lr` over `warmup` steps; see `learning_rate`."""

    steps: int
    peak_lr: float
    warmup: int


def train(variant: Variant, seed: int, regime: Regime, folder: str) -> list[float]:
    """Losses of the main model, nats a byte, one a step. `folder` holds the corpus's cache."""
    engine = Engine(_spec(variant.precision, seed, regime.steps, folder))
    if variant.backend is not None:
        for module in engine.model.modules():
            if isinstance(module, Linear) and module.fp8 is not None:
                module.fp8.backend = variant.backend()
    states = [engine.layout.view(memoryview(bytearray(engine.layout.nbytes))) for _ in range(2)]
    engine.initialise(states[0])
    if variant.stirred:
        stir(states[0].parameters, seed)
    return [
        _step(engine, states[(step - 1) % 2], states[step % 2], step, learning_rate(step, regime))
        for step in range(1, regime.steps + 1)
    ]


def _step(engine: Engine, old: State, new: State, step: int, lr: float) -> float:
    layout, settings = engine.layout, AdamW()
    engine.bind(old)
    result = engine.compute(step, 0, 1, engine.gradients)
    norm = float(torch.linalg.vector_norm(engine.gradients, dtype=torch.float64))
    coefficient = clip_coefficient(norm, settings.clip, 1)
    update(layout, old, new, engine.gradients, Pass(step, lr, coefficient, settings))
    bias = layout.bias_rows(old.router_bias)
    layout.bias_rows(new.router_bias).copy_(updated_bias(bias, result.counts, settings.bias_gamma))
    return result.loss


def learning_rate(step: int, regime: Regime) -> float:
    """Warm-up, peak, and the paper's decay to a tenth of it."""
    rising = min(1.0, step / regime.warmup)
    done = max(0.0, (step / regime.steps - CONSTANT) / (1 - CONSTANT))
    return regime.peak_lr * rising * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)


def stir(parameters: Tensor, seed: int) -> None:
    """Change each of fp32 [n] in place by up to half a unit in bf16's last place: less than bf16 sees of a weight.

    Rounding the weights to bf16 is no such change: all would lie in the middle of what bf16 rounds to the same value,
    and none would be seen to move in the first steps (measured: the first 25 losses of `small` rose by 0.24 %).
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(parameters.shape, generator=generator).sub_(0.5)
    parameters.mul_(noise.mul_(2.0**-8).add_(1.0))


def _spec(precision: str, seed: int, steps: int, folder: str) -> JobSpec:
    return JobSpec(
        job="fp8-gap",
        preset="small",
        seed=seed,
        steps=steps,
        world=1,
        precision=precision,
        corpus=None,
        sensors=False,
        tolerance_scale=1.0,
        checkpoint_every=steps,
        storage=folder,
        threads=1,
        cache=folder,
    )
