"""Guarded training inside Hugging Face's Trainer and Lightning: the same weights when clean, no commit when not."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning
import torch
import transformers
from bare_lightning import bare_trainer
from struck import Struck, product
from test_public_guard import llama
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import assay
from diagnostics.sensors import loops
from diagnostics.sensors.agreement import Agreement

STEPS = 4


@pytest.fixture(autouse=True)
def _without_their_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both libraries warn about their own use of torch
        yield


class Samples(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 2 * STEPS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(0, 64, (16,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def by_trainer(
    folder: Path, callbacks: list[Any], around: Callable[[], Any] | None, save: bool = False
) -> list[Tensor]:
    model: Any = llama()
    if around is not None:
        model.forward = _corrupted(model.forward, around)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        report_to=[],
        save_strategy="steps" if save else "no",
        save_steps=1,
        use_cpu=True,
        disable_tqdm=True,
    )
    transformers.Trainer(model=model, args=arguments, train_dataset=Samples(), callbacks=callbacks).train()
    return [p.detach().clone() for p in model.parameters()]


def by_lightning(
    folder: Path, callbacks: list[Any], around: Callable[[], Any] | None, save: bool = False
) -> list[Tensor]:
    class Module(pytorch_lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = llama()
            if around is not None:
                self.net.forward = _corrupted(self.net.forward, around)

        def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
            loss: Tensor = self.net(**batch).loss
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    module = Module()
    trainer = bare_trainer(folder, callbacks, STEPS, accumulate_grad_batches=2, enable_checkpointing=save)
    trainer.fit(module, DataLoader(Samples(), batch_size=1))
    assert trainer.global_step == STEPS or trainer.should_stop
    return [p.detach().clone() for p in module.parameters()]


def _corrupted(forward: Callable[..., Any], around: Callable[[], Any]) -> Callable[..., Any]:
    @functools.wraps(forward)  # the Trainer reads the signature to choose columns
    def run(*args: Any, **kwargs: Any) -> Any:
        with around():
            return forward(*args, **kwargs)

    return run


class SecondForward:
    """Corrupts a product of the second micro-batch: of the first step."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Struck:
        self.calls += 1
        return product(3 if self.calls == 2 else -1)


LOOPS = {
    "trainer": (by_trainer, assay.TrainerCallback),
    "lightning": (by_lightning, assay.lightning_callback),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_a_clean_run_ends_with_the_same_weights(loop: str, tmp_path: Path) -> None:
    run, make = LOOPS[loop]
    callback = make()
    plain, guarded = run(tmp_path, [], None), run(tmp_path, [callback], None)
    assert all(torch.equal(a, b) for a, b in zip(plain, guarded, strict=True))
    assert callback.dropped == 0
    products = [row for row in callback.guard.coverage() if row.operation in ("mm", "bmm")]
    assert products
    assert all(row.checked == 1 for row in products)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_corrupted_step_is_not_committed(loop: str, tmp_path: Path) -> None:
    run, make = LOOPS[loop]
    told: list[assay.GuardedStep] = []
    callback = make(on_alarm=told.append)
    unguarded = run(tmp_path, [], SecondForward())
    guarded = run(tmp_path, [callback], SecondForward())
    assert callback.dropped == len(told) == 1
    assert told[0].alarms[0].sensor == "gemm"
    # The control: without the callback the same fault is committed and all weights differ from here on.
    clean = run(tmp_path, [], None)
    assert any(not torch.equal(a, b) for a, b in zip(unguarded, clean, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(unguarded, guarded, strict=True))


@pytest.mark.parametrize("loop", LOOPS)
def test_a_step_that_alarmed_on_another_rank_is_not_committed(
    loop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The ranks' agreement is put in its place; `test_ranks_agree.py` has real ones."""
    monkeypatch.setattr(loops, "agree", lambda _: Agreement(3, None))
    run, make = LOOPS[loop]
    told: list[assay.GuardedStep] = []
    callback = make(on_alarm=told.append)
    weights = run(tmp_path, [callback], None)
    assert all(torch.equal(a, b) for a, b in zip(weights, llama().parameters(), strict=True))
    assert callback.dropped == STEPS
    assert told == []
    lines = [record.getMessage() for record in caplog.records if record.name == "assay"]
    assert lines == ["step not committed: it alarmed on rank 3, not on this one"] * STEPS


def flip(model: nn.Module) -> None:
    """The lowest bit of one weight."""
    weight = next(p for p in model.parameters() if p.dim() == 2)
    weight.data.view(torch.int32)[0, 0] ^= 1


class FlipsForTrainer(transformers.TrainerCallback):  # type: ignore[misc]
    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == 2:
            flip(given["model"])


class FlipsForLightning(pytorch_lightning.Callback):  # type: ignore[misc]
    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step == 2:
            flip(module)


def kept(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder."""
    saved = [*folder.glob("checkpoint-*"), *folder.glob("*.ckpt")]
    return sorted(int("".join(letter for letter in path.name if letter.isdigit())) for path in saved)


@pytest.mark.parametrize("guarded", [True, False])
def test_the_trainer_stops_and_saves_nothing_once_the_state_is_wrong(
    guarded: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Control: without the callback all steps are made from the flipped weight, and saved."""
    callback = assay.TrainerCallback()
    by_trainer(tmp_path, [FlipsForTrainer(), *([callback] if guarded else [])], None, save=True)
    assert kept(tmp_path) == ([1, 2] if guarded else [1, 2, 3, 4])
    assert callback.corrupted is guarded
    if guarded:
        assert callback.dropped == 1  # the third, after which training stopped
        lines = [record.getMessage() for record in caplog.records if record.levelname == "CRITICAL"]
        assert len(lines) == 1
        assert "model.embed_tokens.weight first (at rest), 1 in all" in lines[0]
        assert "Restore a checkpoint from before the last update" in lines[0]


@pytest.mark.parametrize("guarded", [True, False])
def test_lightning_stops_and_saves_nothing_once_the_state_is_wrong(
    guarded: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = assay.lightning_callback()
    checkpoints = pytorch_lightning.callbacks.ModelCheckpoint(
        dirpath=tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1
    )
    callbacks = [FlipsForLightning(), *([callback] if guarded else []), checkpoints]
    refused = pytest.raises(RuntimeError, match="not saved: the state itself is corrupted")
    with refused if guarded else nullcontext():
        by_lightning(tmp_path, callbacks, None, save=True)
    assert kept(tmp_path) == ([1, 2] if guarded else [1, 2, 3, 4])
    assert callback.corrupted is guarded
    assert sum(record.levelname == "CRITICAL" for record in caplog.records) == guarded


def test_lightning_that_saves_nothing_stops_without_an_error(tmp_path: Path) -> None:
    callback = assay.lightning_callback()
    by_lightning(tmp_path, [FlipsForLightning(), callback], None)
    assert callback.dropped == 1
    assert callback.corrupted


@pytest.mark.parametrize("loop", LOOPS)
def test_a_write_on_purpose_that_is_forgotten_stops_nothing(loop: str, tmp_path: Path) -> None:
    run, make = LOOPS[loop]
    callback = make()

    class ForTrainer(FlipsForTrainer):
        def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            super().on_step_begin(args, state, control, **given)
            callback.guard.forget()

    class ForLightning(FlipsForLightning):
        def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            super().on_train_batch_start(trainer, module)
            callback.guard.forget()

    run(tmp_path, [ForTrainer() if loop == "trainer" else ForLightning(), callback], None)
    assert (callback.dropped, callback.corrupted) == (0, False)


def test_options_reach_the_guard(tmp_path: Path) -> None:
    callback = assay.TrainerCallback(budget=0.05, again=0.5)
    by_trainer(tmp_path, [callback], None)
    assert callback.guard is not None
    assert callback.guard.sampler.budget == 0.05
    assert callback.guard.again == 0.5


def test_training_that_begins_anew_after_an_error_leaves_no_step_open() -> None:
    callback = assay.TrainerCallback()
    model = nn.Linear(2, 2)
    for _ in range(2):
        callback.on_train_begin(None, None, None, model=model)
        assert torch._C._len_torch_dispatch_stack() == 0
        callback.on_step_begin(None, None, None)
        assert torch._C._len_torch_dispatch_stack() == 1  # and the library's loop raises
    callback.on_train_end(None, None, None)
    assert torch._C._len_torch_dispatch_stack() == 0


def test_modules_of_lightning_are_named() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 4)

    holder = Holder()
    guard = assay.Guard(holder)
    with guard.step():
        holder.net(torch.ones(2, 4)).sum().backward()
    assert {row.module for row in guard.coverage() if row.operation == "addmm"} == {"net"}
