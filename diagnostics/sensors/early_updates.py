"""Knows what updates parameters within the backward, or of gradients of its own: there no step can be held back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

# By name, as the libraries need not be there. DeepSpeed's engine steps within accelerate's backward, and its ZeRO
# optimizers take gradients out of buffers of their own; Megatron's steps in the forward of accelerate's wrapper; LOMO,
# and layer-wise optimizers in Hugging Face's Trainer, update each parameter as soon as its gradient is there.
_NAMES = frozenset(
    (
        "DeepSpeedEngine",
        "DeepSpeedEngineWrapper",
        "DeepSpeedOptimizerWrapper",
        "DeepSpeedStrategy",
        "MegatronLMOptimizerWrapper",
        "Lomo",
        "AdaLomo",
        "LayerWiseDummyOptimizer",
    )
)
_ENGINES = "deepspeed.runtime"  # deepspeed.ops has optimizers that step after the backward, as torch's do
_TORCHS = "_in_backward_optimizers"  # what torch.distributed.optim leaves with each parameter


def refuse_early_updates(model: nn.Module, *others: object) -> None:
    """Raises RuntimeError where the model, its engine or an optimizer updates before a step can be held back."""
    found = next((name for each in (model, *others) for name in _early(each)), None)
    if found is None and any(hasattr(parameter, _TORCHS) for parameter in model.parameters()):
        found = "torch.distributed.optim's _apply_optimizer_in_backward"
    if found is not None:
        raise RuntimeError(
            f"{found} updates parameters within the backward, or of gradients that it keeps to itself, so a corrupted "
            "step would be committed before Assay's callback could drop it: train with DistributedDataParallel or FSDP "
            "and an optimizer that steps after the backward, or leave the callback out"
        )


def _early(thing: Any) -> Iterator[str]:
    """Names of classes, of the thing or of what it wraps, that are known to."""
    for each in (thing, getattr(thing, "optimizer", None)):
        for kind in type(each).__mro__:
            if kind.__name__ in _NAMES or kind.__module__.startswith(_ENGINES):
                yield type(each).__name__
