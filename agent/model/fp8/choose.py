"""Which back end multiplies on which device."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module

import torch

from agent.model.fp8.emulation import Emulation
from agent.model.fp8.recipe import Backend, Recipe

#: Compute capability of Hopper, the only one whose matrix library has 1x128 and 128x128 scales (torch 2.13 with
#: cuBLASLt 12.9: every other device is refused there).
HOPPER = (9, 0)
#: The first capability whose tensor cores multiply E4M3 (Ada); Triton compiles no E4M3 for older ones.
LEAST_CAPABILITY = (8, 9)


class BackendUnavailable(RuntimeError):
    """No back end can make FP8 products here; the message says what is missing."""


def kind_for(device_type: str, capability: tuple[int, int] | None) -> str:
    """The back end's name: "emulation", "native" (torch's own) or "triton". Raises BackendUnavailable."""
    if device_type == "cpu":
        return "emulation"
    if device_type != "cuda" or capability is None:
        raise BackendUnavailable(f"fp8: no back end for {device_type}; use cpu or cuda, or --precision bf16")
    if capability < LEAST_CAPABILITY:
        found = ".".join(map(str, capability))
        raise BackendUnavailable(f"fp8: compute capability {found} has no E4M3, 8.9 or newer has; use --precision bf16")
    return "native" if capability == HOPPER else "triton"


@lru_cache  # back ends hold nothing but their recipe
def backend_for(device: torch.device, recipe: Recipe | None = None) -> Backend:
    """The back end for tensors on `device`. Raises BackendUnavailable."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    kind = kind_for(device.type, capability)
    if kind == "emulation":
        return Emulation(recipe)
    try:  # Triton comes with CUDA builds of torch only, so its kernels are imported where they are needed
        module = import_module(f"agent.model.fp8.{kind}")
    except ModuleNotFoundError as error:
        raise BackendUnavailable(f"fp8 on {device}: {error.name} is not installed; a CUDA build has it") from error
    made: Backend = module.BACKEND(recipe)
    return made
