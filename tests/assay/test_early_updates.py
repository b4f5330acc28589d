"""Engines and optimizers that update before a step can be dropped are refused when training begins; others are not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning
import torch
import transformers
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from test_public_guard import Corrupt
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.optim import SGD
from torch.utils.data import DataLoader
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

import assay
from diagnostics.sensors import loops

MODEL = nn.Linear(2, 2)
REFUSED = r"updates parameters within the backward.*train with DistributedDataParallel or FSDP"


class Lomo(SGD):
    """As lomo_optim's: it updates in hooks of the backward, and its step does nothing."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        for group in self.param_groups:
            for p in group["params"]:
                p.register_post_accumulate_grad_hook(self._update)

    def _update(self, p: Tensor) -> None:
        p.data.add_(p.grad, alpha=-0.1)  # type: ignore[arg-type]
        p.grad = None

    def step(self, closure: Any = None) -> None:
        pass


def of_package(name: str, base: type = SGD) -> Any:
    """An optimizer whose class lies in somebody's package."""
    kind: Any = type("Adam", (base,), {"__module__": name})
    return kind(MODEL.parameters(), lr=0.1)


def deepspeed_wrapped() -> Any:
    wrapped = DeepSpeedOptimizerWrapper.__new__(DeepSpeedOptimizerWrapper)
    wrapped.optimizer = of_package("deepspeed.runtime.zero.stage_1_and_2")
    return wrapped


EARLY = {
    "accelerate's DeepSpeed": deepspeed_wrapped,
    "ZeRO, wrapped": lambda: SimpleNamespace(optimizer=of_package("deepspeed.runtime.zero.stage3")),
    "LOMO": lambda: Lomo(nn.Linear(2, 2).parameters()),
    "LOMO, wrapped": lambda: SimpleNamespace(optimizer=Lomo(nn.Linear(2, 2).parameters())),
    "layer-wise": lambda: LayerWiseDummyOptimizer(lr=0.1),
}


@pytest.mark.parametrize("kind", EARLY)
def test_what_updates_early_is_refused_when_training_begins(kind: str) -> None:
    callback = assay.TrainerCallback()
    with pytest.raises(RuntimeError, match=REFUSED):
        callback.on_train_begin(None, None, None, model=MODEL, optimizer=EARLY[kind]())
    assert callback.guard is None
    callback = assay.lightning_callback()
    trainer = SimpleNamespace(strategy=object(), optimizers=[EARLY[kind]()])
    with pytest.raises(RuntimeError, match=REFUSED):
        callback.on_train_start(trainer, MODEL)


def test_without_the_refusal_a_dropped_step_has_been_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    model = nn.Linear(4, 4)
    before = model.weight.detach().clone()
    optimizer = Lomo(model.parameters())
    callback = assay.TrainerCallback()
    monkeypatch.setattr(loops, "refuse_early_updates", lambda *_: None)
    callback.on_train_begin(None, None, None, model=model, optimizer=optimizer)
    callback.on_step_begin(None, None, None)
    with Corrupt(0):
        model(torch.ones(3, 4)).square().sum().backward()
    callback.on_pre_optimizer_step(None, None, None, optimizer=optimizer)
    optimizer.step()
    assert callback.dropped == 1
    assert not torch.equal(model.weight, before)


def test_an_engine_is_refused_whatever_the_optimizer() -> None:
    class DeepSpeedEngine(nn.Module):
        pass

    with pytest.raises(RuntimeError, match=f"DeepSpeedEngine {REFUSED}"):
        assay.TrainerCallback().on_train_begin(None, None, None, model=DeepSpeedEngine(), optimizer=None)
    trainer = SimpleNamespace(
        strategy=pytorch_lightning.strategies.DeepSpeedStrategy.__new__(pytorch_lightning.strategies.DeepSpeedStrategy),
        optimizers=[SGD(MODEL.parameters(), lr=0.1)],
    )
    with pytest.raises(RuntimeError, match=f"DeepSpeedStrategy {REFUSED}"):
        assay.lightning_callback().on_train_start(trainer, MODEL)


def test_torchs_own_optimizers_in_the_backward_are_refused() -> None:
    model = nn.Linear(2, 2)
    _apply_optimizer_in_backward(SGD, model.parameters(), {"lr": 0.1})
    with pytest.raises(RuntimeError, match=f"_apply_optimizer_in_backward {REFUSED}"):
        assay.TrainerCallback().on_train_begin(None, None, None, model=model, optimizer=None)


@pytest.mark.parametrize("package", ["torch.optim.adam", "deepspeed.ops.adam.cpu_adam", "bitsandbytes.optim"])
def test_optimizers_that_step_after_the_backward_are_not_refused(package: str) -> None:
    callback = assay.TrainerCallback()
    optimizer = SimpleNamespace(optimizer=of_package(package))
    callback.on_train_begin(None, None, None, model=MODEL, optimizer=optimizer)
    assert callback.guard is not None


def test_both_libraries_let_the_refusal_through(tmp_path: Path) -> None:
    class Module(pytorch_lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 2)

        def training_step(self, batch: Tensor, _: int) -> Tensor:
            out: Tensor = self.net(batch).sum()
            return out

        def configure_optimizers(self) -> Any:
            return Lomo(self.parameters())

    samples: Any = [torch.ones(2)] * 4
    lightning = pytorch_lightning.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[assay.lightning_callback()],
        default_root_dir=str(tmp_path),
    )
    with pytest.raises(RuntimeError, match=f"Lomo {REFUSED}"):
        lightning.fit(Module(), DataLoader(samples))
    model = nn.Linear(2, 2)
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), max_steps=2, use_cpu=True, report_to=[])
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=samples,
        optimizers=(Lomo(model.parameters()), None),
        callbacks=[assay.TrainerCallback()],
    )
    with pytest.raises(RuntimeError, match=f"Lomo {REFUSED}"):
        trainer.train()
