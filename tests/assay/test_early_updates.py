"""Engines and optimizers that update before a step can be dropped are refused when training begins; others are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning
import torch
import transformers
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from bare_lightning import bare_trainer
from struck import product
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

import assay
from diagnostics.sensors import loops
from diagnostics.sensors.early_updates import EarlyUpdates

MODEL = nn.Linear(2, 2)
CHANGED = r"parameters, the first of them .*weight, changed within the backward.*train with DistributedDataParallel"
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
    """The control, also of what is known by the change."""
    model = nn.Linear(4, 4)
    before = model.weight.detach().clone()
    optimizer = Lomo(model.parameters())
    callback = assay.TrainerCallback()
    monkeypatch.setattr(loops, "refuse_early_updates", lambda *_: None)
    monkeypatch.setattr(EarlyUpdates, "refuse", lambda _: None)
    callback.on_train_begin(None, None, None, model=model, optimizer=optimizer)
    callback.on_step_begin(None, None, None)
    with product(0):
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


class Early(SGD):
    """Of a name that nobody knows: it updates in the backward as `update` does."""

    def __init__(self, parameters: Any, update: Callable[[Tensor, float], object], lr: float = 0.1) -> None:
        super().__init__(parameters, lr=lr)
        for group in self.param_groups:
            for p in group["params"]:
                p.register_post_accumulate_grad_hook(lambda p, group=group: update(p, group["lr"]))

    def step(self, closure: Any = None) -> None:
        if closure is not None:
            closure()


def in_place(p: Tensor, lr: float) -> None:
    with torch.no_grad():
        p.add_(p.grad, alpha=-lr)  # type: ignore[arg-type]
    p.grad = None


def in_data(p: Tensor, lr: float) -> None:
    p.data.add_(p.grad, alpha=-lr)  # type: ignore[arg-type]


def in_new_memory(p: Tensor, lr: float) -> None:
    p.data = p.data - lr * p.grad  # type: ignore[operator]
    p.grad = None


def by_an_optimizer(p: Tensor, lr: float) -> None:
    SGD([p], lr=lr).step()


UPDATES = (in_place, in_data, in_new_memory, by_an_optimizer)


def steps(callback: Any, model: nn.Module, optimizer: Any, number: int, x: Any = None, between: Any = None) -> None:
    """A loop like the Trainer's, of two micro-batches a step; `between` is called after the first of them."""
    callback.on_train_begin(None, None, None, model=model, optimizer=optimizer)
    for _ in range(number):
        callback.on_step_begin(None, None, None)
        for micro in range(2):
            model(torch.ones(3, 4) if x is None else x).square().mean().backward()
            if between is not None and micro == 0:
                between(model)
        callback.on_pre_optimizer_step(None, None, None, optimizer=optimizer)
        optimizer.step()
        optimizer.zero_grad()
    callback.on_train_end(None, None, None)


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.second, self.reentrant = layers(), layers(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        out = x.clone().requires_grad_()
        for part in (self.first, self.second):
            out = checkpoint(part, out, use_reentrant=self.reentrant)
        return out


@pytest.mark.parametrize("make", [layers, lambda: Checkpointed(True), lambda: Checkpointed(False)])
@pytest.mark.parametrize("update", UPDATES)
def test_what_updates_early_is_known_by_the_change(update: Callable[[Tensor, float], object], make: Any) -> None:
    model = make()
    with pytest.raises(RuntimeError, match=CHANGED):
        steps(assay.TrainerCallback(), model, Early(model.parameters(), update), 1)


def test_it_is_known_in_the_first_step_that_changes_anything() -> None:
    model = layers()
    optimizer = Early(model.parameters(), in_data, lr=0.0)
    callback = assay.TrainerCallback()
    steps(callback, model, optimizer, 2)  # as a warm-up begins
    optimizer.param_groups[0]["lr"] = 0.1
    with pytest.raises(RuntimeError, match=CHANGED):
        steps(callback, model, optimizer, 1)


def test_nothing_is_left_with_the_parameters_when_training_ends() -> None:
    model = layers()
    steps(assay.TrainerCallback(), model, SGD(model.parameters(), lr=0.1), 1)
    assert not any(p._backward_hooks for p in model.parameters())


@pytest.mark.parametrize(("lr", "looks"), [(0.1, 2 + 1 + 1), (0.0, 4 * (2 + 1) + 3)])
def test_the_looking_ends_with_the_first_step_in_which_the_optimizer_updates(
    lr: float, looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two backwards a step, the comparison, and, as the next step begins, what the optimizer did."""
    looked, corners = [], EarlyUpdates._corners
    monkeypatch.setattr(EarlyUpdates, "_corners", lambda self: (looked.append(1), corners(self))[1])
    model = layers()
    steps(assay.TrainerCallback(), model, SGD(model.parameters(), lr=lr), 4)
    assert len(looked) == looks


class Normalised(nn.Module):
    """Every forward writes to every weight; the first one writes to all parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.begun = layers(), False

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for p in self.inner.parameters():
                if p.dim() == 2:
                    p.div_(p.norm(dim=1, keepdim=True))
                elif not self.begun:
                    p.fill_(0.5)
        self.begun = True
        out: Tensor = self.inner(x)
        return out


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.table(x))
        return out


class Teacher(nn.Module):
    """A mean of the weights that the forward writes, as momentum encoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = layers(), layers().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for mean, p in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            mean.data = 0.9 * mean.data + 0.1 * p.data
        out: Tensor = self.student(x) - self.teacher(x)
        return out


def frozen() -> nn.Module:
    model = layers()
    next(model.parameters()).requires_grad_(False)
    return model


def not_finite() -> nn.Module:
    model = layers()
    next(model.parameters()).data[0, 1] = torch.nan
    return model


IDS = torch.tensor([[0, 3, 5]])
WRITERS: dict[str, tuple[Callable[[], nn.Module], Tensor | None]] = {
    "max_norm": (lambda: nn.Sequential(nn.Embedding(8, 4, max_norm=0.1), nn.Linear(4, 4)), IDS),
    "normalised in the forward": (Normalised, None),
}
OTHERS: dict[str, tuple[Callable[[], nn.Module], Tensor | None]] = {
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), None),
    "spectral norm of old": (lambda: nn.utils.spectral_norm(nn.Linear(4, 4)), None),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), None),
    "batch norm": (lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), None),
    "tied": (Tied, IDS),
    "frozen": (frozen, None),
    "teacher": (Teacher, None),
    "NaN": (not_finite, None),
    "checkpointed": (lambda: Checkpointed(False), None),
    "checkpointed, reentrant": (lambda: Checkpointed(True), None),
    "no corner": (lambda: nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 4)), None),
    "two types": (lambda: nn.Sequential(nn.Linear(4, 4), Bf16()), None),
}


class Bf16(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x.bfloat16()).float()
        return out


@pytest.mark.parametrize("kind", [*WRITERS, *OTHERS])
def test_what_a_forward_writes_or_leaves_alone_is_no_early_update(kind: str) -> None:
    torch.manual_seed(0)
    make, x = (WRITERS | OTHERS)[kind]
    model = make()
    for lr in (0.1, 0.0):  # with 0 no step shows that the optimizer is what updates, and all are looked at
        steps(assay.TrainerCallback(), model, SGD([p for p in model.parameters() if p.requires_grad], lr), 3, x)


def test_what_is_written_between_micro_batches_is_no_early_update() -> None:
    def clamp(model: nn.Module) -> None:
        for p in model.parameters():
            p.data.clamp_(-0.1, 0.1)

    model = layers()
    for lr in (0.1, 0.0):
        steps(assay.TrainerCallback(), model, SGD(model.parameters(), lr), 3, between=clamp)


@pytest.mark.parametrize("kind", WRITERS)
def test_from_the_begin_of_the_step_it_would_be(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    monkeypatch.setattr(EarlyUpdates, "_gradient", lambda *_: None)
    monkeypatch.setattr(EarlyUpdates, "begin", lambda self: setattr(self, "_kept", self._corners()))
    torch.manual_seed(0)
    make, x = WRITERS[kind]
    model = make()
    with pytest.raises(RuntimeError, match=CHANGED):
        steps(assay.TrainerCallback(), model, SGD(model.parameters(), lr=0.1), 1, x)


@pytest.mark.parametrize(
    ("make", "told"),
    [(Lomo, f"Lomo {REFUSED}"), (lambda parameters: Early(parameters, in_data), CHANGED)],
    ids=["by its name", "by the change"],
)
def test_both_libraries_let_the_refusal_through(make: Callable[[Any], Any], told: str, tmp_path: Path) -> None:
    class Module(pytorch_lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 2)

        def training_step(self, batch: Tensor, _: int) -> Tensor:
            out: Tensor = self.net(batch).sum()
            return out

        def configure_optimizers(self) -> Any:
            return make(self.parameters())

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": self.net(x).sum()}

    samples: Any = [torch.ones(2)] * 4
    lightning = bare_trainer(tmp_path, [assay.lightning_callback()], 2)
    with pytest.raises(RuntimeError, match=told):
        lightning.fit(Module(), DataLoader(samples))
    model = Model()
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), max_steps=2, use_cpu=True, report_to=[])
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"x": x} for x in samples],
        optimizers=(make(model.parameters()), None),
        callbacks=[assay.TrainerCallback()],
    )
    with pytest.raises(RuntimeError, match=told):
        trainer.train()
