"""Dropping a step whose gradients a GradScaler has not seen yet: training goes on, and nothing moves the weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning
import torch
from bare_lightning import bare_trainer
from struck import largest, product
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader

import assay
from diagnostics.sensors import loops

STRUCK = 2
STEPS = 5

MAKE: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda model: SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda model: AdamW(model.parameters(), lr=0.1, weight_decay=0.1),
    "adamw, fused": lambda model: AdamW(model.parameters(), lr=0.1, weight_decay=0.1, fused=True),
}


def without_the_scaler(optimizer: Optimizer, scaler: Any) -> None:
    """As gradients were dropped before."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


class Job:
    """A loop like the Trainer's: accelerate's wrapper holds the optimizer and the scaler."""

    def __init__(self, make: Callable[[nn.Module], Optimizer], clip: bool = False) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(8, 4)
        self.optimizer = make(self.model)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
        self.wrapped = SimpleNamespace(optimizer=self.optimizer, scaler=self.scaler)
        self.clip = clip
        self.callback = assay.TrainerCallback()
        self.callback.on_train_begin(None, None, None, model=self.model, optimizer=self.wrapped)
        self.weights = [self._weights()]

    def step(self, fault: Any) -> None:
        self.callback.on_step_begin(None, None, None)
        with fault:
            self.scaler.scale(self.model(torch.ones(6, 8)).square().mean()).backward()
        if self.clip:
            self.scaler.unscale_(self.optimizer)
        self.callback.on_pre_optimizer_step(None, None, None, optimizer=self.wrapped)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.weights.append(self._weights())

    def steps(self, error: float = 8.0) -> list[bool]:
        """Whether each of them moved the weights."""
        for number in range(STEPS):
            self.step(product(0 if number == STRUCK else -1, largest(error)))
        pairs = zip(self.weights[:-1], self.weights[1:], strict=True)
        return [not torch.equal(before, after) for before, after in pairs]

    def _weights(self) -> Tensor:
        return torch.cat([p.detach().flatten().clone() for p in self.model.parameters()])


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("make", MAKE)
def test_training_goes_on_after_a_dropped_step_and_nothing_moved_in_it(make: str, clip: bool) -> None:
    job = Job(MAKE[make], clip)
    assert job.steps() == [number != STRUCK for number in range(STEPS)]
    assert job.callback.dropped == 1
    assert job.scaler.get_scale() == 1024.0


@pytest.mark.parametrize("make", MAKE)
def test_a_dropped_step_that_overflowed_lowers_the_scale_as_any_does(make: str) -> None:
    job = Job(MAKE[make])
    assert job.steps(error=float("inf")) == [number != STRUCK for number in range(STEPS)]
    assert job.callback.dropped == 1
    assert job.scaler.get_scale() == 512.0


@pytest.mark.parametrize("make", MAKE)
def test_a_scaler_that_has_not_seen_the_gradients_ends_the_training(make: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    monkeypatch.setattr(loops, "_drop", without_the_scaler)
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        Job(MAKE[make]).steps()


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_lightning_in_16_bits_goes_on_after_a_dropped_step(
    fused: bool, seen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning leaves it to fused optimizers to unscale. Control: there the scaler has not seen what is dropped."""
    if not seen:
        monkeypatch.setattr(loops, "_drop", without_the_scaler)

    class Module(pytorch_lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(8, 4)
            self.losses = 0

        def training_step(self, batch: Tensor, _: int) -> Tensor:
            self.losses += 1
            with product(0 if self.losses == STRUCK else -1):
                loss: Tensor = self.net(batch).float().square().mean()
            return loss

        def configure_optimizers(self) -> Optimizer:
            return AdamW(self.parameters(), lr=0.1, fused=fused)

    callback = assay.lightning_callback()
    plugins = [pytorch_lightning.plugins.MixedPrecision("16-mixed", "cpu")]
    trainer = bare_trainer(tmp_path, [callback], STEPS, plugins=plugins)
    module = Module()
    samples: Any = [torch.ones(8) * number for number in range(1, STEPS + 1)]
    fit = functools.partial(trainer.fit, module, DataLoader(samples))
    if fused and not seen:
        with pytest.raises(AssertionError, match="No inf checks were recorded"):
            fit()
    else:
        fit()
        assert module.losses == STEPS
    assert callback.dropped == 1
