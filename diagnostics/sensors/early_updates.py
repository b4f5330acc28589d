"""Knows what updates parameters within the backward, or of gradients of its own: there no step can be held back.

Those whose names are known are refused when training begins. Others show themselves: what changes a parameter between
the first gradient of a step's last backward and the optimizer's step has updated early. What changes one before that
gradient is the forward (`max_norm` of an embedding, what a first batch initialises), or a write between micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from diagnostics.sensors.quiet import quiet

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
_INSTEAD = (
    "train with DistributedDataParallel or FSDP and an optimizer that steps after the backward, or do without Assay's "
    "callback"
)

CORNER = 16  # elements of each parameter: an update changes nearly all of them, and one of any parameter is enough


def refuse_early_updates(model: nn.Module, *others: object) -> None:
    """Raises RuntimeError where the model, its engine or an optimizer updates before a step can be held back."""
    found = next((name for each in (model, *others) for name in _early(each)), None)
    if found is None and any(hasattr(parameter, _TORCHS) for parameter in model.parameters()):
        found = "torch.distributed.optim's _apply_optimizer_in_backward"
    if found is not None:
        raise RuntimeError(
            f"{found} updates parameters within the backward, or of gradients that it keeps to itself, so a corrupted "
            f"step would be committed before it could be dropped: {_INSTEAD}"
        )


def _early(thing: Any) -> Iterator[str]:
    """Names of classes, of the thing or of what it wraps, that are known to."""
    for each in (thing, getattr(thing, "optimizer", None)):
        for kind in type(each).__mro__:
            if kind.__name__ in _NAMES or kind.__module__.startswith(_ENGINES):
                yield type(each).__name__


class EarlyUpdates:
    """Keeps a corner of each parameter at the first gradient of every backward, and compares before the optimizer.

    Once parameters have changed in the optimizer's step, and not before it, nothing is kept any more.

    Values and not torch's counters of versions: engines write through `.data`, which leaves those alone.
    Does not see: parameters that no gradient reaches as they stand in the model (FSDP's shards) and tensor subclasses.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = [(name, p) for name, p in model.named_parameters() if _readable(p)]
        self._kept: list[_Corners] = []
        self._settled: list[_Corners] = []  # before the optimizer's last step
        self._backwards: set[int] = set()
        self._hooks = [p.register_hook(self._gradient) for _, p in self._parameters]  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        """A step begins."""
        settled, self._settled = self._settled, []
        if settled and _changed(settled, self._corners()):
            self.close()
        self._kept = []
        self._backwards.clear()

    def refuse(self) -> None:
        """Raises RuntimeError where a parameter is not what it was when the last backward had its first gradient."""
        kept, self._kept = self._kept, []
        if not kept:
            return
        self._settled = self._corners()
        if changed := _changed(kept, self._settled):
            raise RuntimeError(
                f"{len(changed)} of {len(self._parameters)} parameters, the first of them {changed[0]}, changed within "
                "the backward, or after it and before the optimizer's step. What updates so early commits a corrupted "
                f"step before it can be dropped: {_INSTEAD}"
            )

    def close(self) -> None:
        """Nothing is looked at any more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _gradient(self, _: Tensor) -> None:
        backward = torch._C._current_graph_task_id()
        if backward not in self._backwards:
            self._backwards.add(backward)
            self._kept = self._corners()

    def _corners(self) -> list[_Corners]:
        """Copies, one tensor for each device and type."""
        groups: dict[tuple[torch.device, torch.dtype], list[tuple[str, Tensor]]] = {}
        with quiet():
            for name, p in self._parameters:
                if p.layout is torch.strided and not p.is_meta and p.untyped_storage().size() and p.numel():
                    groups.setdefault((p.device, p.dtype), []).append((name, p.detach()))
            return [
                _Corners([(name, p.shape) for name, p in group], torch.cat([_corner(p) for _, p in group]))
                for group in groups.values()
            ]


def _readable(p: Any) -> bool:
    return bool(p.requires_grad) and not is_traceable_wrapper_subclass(p)


class _Corners(NamedTuple):
    """Of parameters with these names and shapes, one after the other."""

    of: list[tuple[str, torch.Size]]
    values: Tensor


def _corner(p: Tensor) -> Tensor:
    while p.dim() > 1:
        p = p[0]
    return p.reshape(-1)[:CORNER]


def _changed(before: list[_Corners], now: list[_Corners]) -> list[str]:
    """Names of what has other bits. What moved or has another shape (a shard, gathered and let go) is not compared."""
    changed = []
    for old, new in zip(before, now, strict=False):
        then, values = old.values, new.values
        if (old.of, then.dtype, then.device) != (new.of, values.dtype, values.device):
            continue
        with quiet():
            differs = then.view(torch.uint8) != values.view(torch.uint8)  # a NaN is what it was
            if differs.any():
                width = then.element_size()
                parts = torch.split(differs, [width * min(CORNER, shape[-1] if shape else 1) for _, shape in old.of])
                changed += [name for (name, _), part in zip(old.of, parts, strict=True) if part.any()]
    return changed
