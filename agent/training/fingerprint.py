"""What a job's bits depend on besides the job itself, and how a checkpoint describes both."""

import json

import torch

from agent.checkpoint.manifest import Manifest
from agent.training.engine import Engine


def fingerprint(threads: int) -> str:
    """Instruction set, threads, library versions."""
    return json.dumps(
        {"isa": torch.backends.cpu.get_cpu_capability(), "threads": threads, "torch": torch.__version__},
        sort_keys=True,
    )


def described(engine: Engine, generation: int, parent_step: int) -> Manifest:
    """The manifest of the job's checkpoints, but for what differs from step to step."""
    spec = engine.spec
    return Manifest(
        job=spec.job,
        generation=generation,
        step=0,
        parent_step=parent_step,
        digest="",
        chain="",
        preset=spec.preset,
        seed=spec.seed,
        world=spec.world,
        precision=spec.precision,
        threads=spec.threads,
        corpus=engine.corpus.digest,
        fingerprint=fingerprint(spec.threads),
        created=0.0,
        tensors=(),
        vocab_size=engine.preset.config.vocab_size,
        pack=spec.pack,
        mesh=str(spec.mesh or ""),
    )
