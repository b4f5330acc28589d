"""How large a model is and what one rank of a mesh has to hold, counted on the meta device: nothing is allocated.

Activations, buffers of collectives and the KV cache are not in it: they depend on batch, length and recomputation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType

import torch

from agent.model.config import ConfigError, V3Config
from agent.model.huggingface.blocks import scale_shape
from agent.model.v3 import V3

_FP8_LEAVES_OUT = ("embedding", "head.", "router.")  # section 3.3.1: these, norms and biases stay bf16


@dataclass(frozen=True, slots=True)
class Precision:
    """Bytes per element of what a rank holds. ``master`` 0: the weights are the masters themselves."""

    weight: int  # of the weights a product reads
    gradient: int
    master: int
    moments: int  # both of them
    fp8: bool = False  # matrices of the blocks are E4M3, with an fp32 scale for each block of 128 x 128

    def stored(self, name: str, shape: tuple[int, ...]) -> int:
        """Bytes of one parameter's weights."""
        elements = prod(shape)
        if self.fp8 and len(shape) == 2 and not any(part in name for part in _FP8_LEAVES_OUT):
            return elements + 4 * prod(scale_shape(shape))
        return elements * self.weight


#: Section 3.3.3 for fp8: masters and gradients fp32, moments bf16. bf16 keeps fp32 moments, fp32 is as we train here.
PRECISIONS: Mapping[str, Precision] = MappingProxyType(
    {
        "fp8": Precision(weight=2, gradient=4, master=4, moments=4, fp8=True),
        "bf16": Precision(weight=2, gradient=4, master=4, moments=8),
        "fp32": Precision(weight=4, gradient=4, master=0, moments=8),
    }
)


@dataclass(frozen=True, slots=True)
class Mesh:
    """dp * pp ranks: ``pp`` stages of blocks, in each of them ``dp`` ranks with data of their own.

    Experts are spread over ``ep`` of a stage's ranks: every expert exists dp / ep times, all other parameters dp times
    (section 3.2: 16 stages, and experts over 64 of the 128 ranks of each). Masters and moments are divided among the
    ranks that hold the same parameter (ZeRO-1), so a rank optimises a dp-th of its stage.

    Raises:
        ConfigError: ``ep`` does not divide ``dp``.
    """

    dp: int = 1
    ep: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        if self.dp % self.ep:
            raise ConfigError("ep", f"{self.dp} data-parallel ranks do not divide into groups of {self.ep}")

    @property
    def ranks(self) -> int:
        """How many there are."""
        return self.dp * self.pp


@dataclass(frozen=True, slots=True)
class Count:
    """Parameters; router biases are buffers and not among them."""

    total: int  # embedding, blocks, final norm and head; without MTP modules
    mtp: int  # what the MTP modules add; they share embedding and head
    active: (
        int  # of total, what one token uses: one row of the embedding, num_experts_per_tok experts a layer, the rest
    )


@dataclass(frozen=True, slots=True)
class Share:
    """Bytes one rank of a stage holds; ``master`` and ``moments`` after division by ZeRO-1."""

    stage: int
    parameters: int
    weights: int
    gradients: int
    master: int
    moments: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.master + self.moments


def parameters(config: V3Config) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by name."""
    with torch.device("meta"):
        model = V3(config)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def count(config: V3Config, shapes: Mapping[str, tuple[int, ...]]) -> Count:
    """Sizes of the model whose parameters have these shapes."""
    main = {name: prod(shape) for name, shape in shapes.items() if not name.startswith("mtp.")}
    total = sum(main.values())
    experts = sum(size for name, size in main.items() if _is_expert(name))
    idle = experts - experts * config.num_experts_per_tok // config.n_routed_experts
    unread = main["embedding"] - config.hidden_size
    return Count(total, sum(map(prod, shapes.values())) - total, total - idle - unread)


def shares(config: V3Config, shapes: Mapping[str, tuple[int, ...]], mesh: Mesh, kind: Precision) -> list[Share]:
    """What a rank holds, stage by stage.

    Stages are runs of blocks whose lengths differ by at most one, longer ones first. The embedding is on the first
    stage; final norm, head and MTP modules, with a copy of the embedding if there are any, on the last.

    Raises:
        ConfigError: the model does not divide into the mesh.
    """
    if config.n_routed_experts % mesh.ep:
        raise ConfigError("ep", f"{config.n_routed_experts} routed experts do not divide among {mesh.ep} ranks")
    if mesh.pp > config.num_hidden_layers:
        raise ConfigError("pp", f"{mesh.pp} stages of {config.num_hidden_layers} layers")
    first = config.n_routed_experts // mesh.ep
    held = [name for name in shapes if not _is_expert(name) or _expert(name) < first]  # every rank holds as much
    return [_share(stage, names, shapes, mesh, kind) for stage, names in enumerate(_stages(config, held, mesh.pp))]


def _share(stage: int, names: list[str], shapes: Mapping[str, tuple[int, ...]], mesh: Mesh, kind: Precision) -> Share:
    held = weights = optimised = 0
    for name in names:
        size = prod(shapes[name])
        held += size
        weights += kind.stored(name, shapes[name])
        optimised += -(-size // (mesh.dp // mesh.ep if _is_expert(name) else mesh.dp))
    return Share(stage, held, weights, held * kind.gradient, optimised * kind.master, optimised * kind.moments)


def _stages(config: V3Config, names: list[str], stages: int) -> list[list[str]]:
    """Names of the parameters on each stage."""
    least, longer = divmod(config.num_hidden_layers, stages)
    home = [stage for stage in range(stages) for _ in range(least + (stage < longer))]
    placed: list[list[str]] = [[] for _ in range(stages)]
    for name in names:
        layer = re.match(r"layers\.(\d+)\.", name)
        stage = home[int(layer[1])] if layer else 0 if name == "embedding" else stages - 1
        placed[stage].append(name)
    if stages > 1 and config.mtp_depth:
        placed[-1].append("embedding")
    return placed


def _is_expert(name: str) -> bool:
    return ".experts." in name


def _expert(name: str) -> int:
    return int(name.partition(".experts.")[2].partition(".")[0])
