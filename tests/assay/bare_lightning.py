"""Lightning's trainer with nothing of its own on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning


def bare_trainer(folder: Path, callbacks: list[Any], steps: int, **options: Any) -> pytorch_lightning.Trainer:
    """On the CPU, writing nothing unless `enable_checkpointing` is given."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pytorch_lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        enable_model_summary=False,
        callbacks=callbacks,
        default_root_dir=str(folder),
        **(quiet | options),
    )
