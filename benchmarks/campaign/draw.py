"""What the campaign draws: fault number i of a seed is always the same one, in whichever process it is tried.

Operations are drawn with equal chances, so that each has an interval of its own; within one, the operator, the model,
its strength and its place are. An overall recall is therefore the mean over operations, not over operators.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from diagnostics.faults.bits import width_of
from diagnostics.faults.models import OF_ROWS, Fault, models_for
from diagnostics.faults.sites import Site

PRECISIONS = ("fp32", "bf16", "fp8")
#: Precisions of the blocks, in turn: a fault in FP8 takes as long as four in the others, for its emulation.
TURN = ("fp32", "bf16", "fp8", "fp32", "bf16")
#: Faults that are tried one after another in one process, and the unit of what is kept.
BLOCK = 50
#: A strength is 10^U: from below every floor to far above any value.
STRENGTHS = (-5.0, 3.0)
#: Share of faults that come back when their device repeats the step.
RECURRENT = 0.25

#: Operators of a step, by what they do.
IN_STEP = (
    "fprop",
    "dgrad",
    "wgrad",
    "attention",
    "softmax",
    "heads",
    "norm",
    "element-wise",
    "embedding",
    "router",
    "dispatch",
    "loss",
    "accumulation",
    "quantisation",
)
#: What is not an operator's result in forward or backward.
AROUND = ("saved activation", "optimizer", "state at rest", "sent gradient", "reduced gradient")
OPERATIONS = IN_STEP + AROUND

_TOKEN_ORDER = ("sort", "cumsum", "floor_divide", "index_copy", "index_select", "embedding_bag", "bmm", "cat", "arange")
_BESIDE_ROUTING = ("add", "zeros_like", "ones_like", "silu", "silu_backward", "_to_copy")
_ROTATION = ("arange", "neg", "pow", "full_like", "polar")


@dataclass(frozen=True, slots=True)
class Coordinates:
    """One fault. site: the operator, None for what is around the step. result: which of the site's results.

    part: what is struck where there is no site: parameters, exp_avg or exp_avg_sq of the state; gradients.
    ordinal: of what the forward saved. model: a fault model, or "triggered". recurrent: whether a replay on the same
    device meets the fault again.
    """

    index: int
    precision: str
    point: int
    operation: str
    model: str
    fault: Fault
    recurrent: bool
    site: Site | None = None
    result: int = 0
    part: str = ""
    ordinal: int = 0


def operation_of(site: Site, quantising: Container[str] = ()) -> str:
    """Which of IN_STEP an operator of the V3 model belongs to, from its name and the module it ran in.

    quantising: names of the linears that multiply in FP8; what they do beside their products is quantisation.
    """
    name, module = site.operator.split(".")[1].rstrip("_"), site.module.rsplit(".", 1)[-1]
    if site.pass_ in ("fprop", "dgrad", "wgrad"):
        return site.pass_
    if "AccumulateGrad" in site.node:
        return "accumulation"
    if module.endswith("norm"):
        return "norm"
    if module == "attention":
        return _of_attention(name)
    if module == "router":
        return "router"
    if module == "moe":
        return _of_experts(site, name)
    if module == "":
        return _of_model(site, name)
    return "quantisation" if site.module in quantising else "element-wise"


def _of_attention(name: str) -> str:
    if name in ("bmm", "baddbmm"):
        return "attention"
    return "softmax" if "softmax" in name else "heads"


def _of_experts(site: Site, name: str) -> str:
    """Bringing tokens to experts and home, the experts' SwiGLU and the sum of outputs, or the router's balance loss."""
    whole_numbers = not site.results[0].dtype.is_floating_point
    if whole_numbers or any(part in name for part in _TOKEN_ORDER) or "Combine" in site.node or "Dispatch" in site.node:
        return "dispatch"
    in_experts = "Experts" in site.node or site.operator.startswith("aten.mul_.")
    return "element-wise" if in_experts or name in _BESIDE_ROUTING else "router"


def _of_model(site: Site, name: str) -> str:
    if "embedding" in name or "Embedding" in site.node:
        return "embedding"
    return "element-wise" if site.pass_ == "forward" and name in _ROTATION else "loss"


class Drawing:
    """Draws faults for one precision and point, from the operators that a clean step there has."""

    def __init__(
        self,
        seed: int,
        precision: str,
        point: int,
        step: Iterable[Site],
        update: Iterable[Site],
        quantising: Container[str] = (),
    ) -> None:
        self._seed = seed
        self._precision = precision
        self._point = point
        self._sites: dict[str, list[Site]] = defaultdict(list)
        for site in step:
            self._sites[operation_of(site, quantising)].append(site)
        self._sites["optimizer"] = [site for site in update if site.results[0].dtype.is_floating_point]
        self.operations = tuple(name for name in OPERATIONS if self._sites.get(name) or name in AROUND)

    @property
    def sites(self) -> Mapping[str, Sequence[Site]]:
        """The operators by operation."""
        return self._sites

    def fault(self, index: int) -> Coordinates:
        """Fault number `index`."""
        rng = random.Random(f"{self._seed}/{self._precision}/{self._point}/{index}")
        operation = rng.choice(self.operations)
        strength = 10.0 ** rng.uniform(*STRENGTHS)
        seed, recurrent = rng.getrandbits(62), rng.random() < RECURRENT
        base = (index, self._precision, self._point, operation)
        if operation in AROUND and operation != "optimizer":
            return self._around(rng, base, strength, seed, recurrent)
        site = rng.choice(self._sites[operation])
        result = 0 if "embedding_bag" in site.operator else rng.randrange(len(site.results))
        shape, dtype = site.results[result]
        models = _fitting(operation, models_for(dtype, shape[-2] if len(shape) > 1 else 1))
        model = rng.choice(models)
        kind = "bitflip" if model == "triggered" else model
        bit = rng.randrange(width_of(dtype)) if kind == "bitflip" else None
        return Coordinates(*base, model, Fault(kind, seed, strength, bit), recurrent, site, result)

    def _around(
        self, rng: random.Random, base: tuple[int, str, int, str], strength: float, seed: int, recurrent: bool
    ) -> Coordinates:
        models = ("bitflip", "multibit", "runs", "value") if "gradient" in base[3] else ("bitflip", "multibit")
        model = rng.choice(models)
        part = rng.choice(("parameters", "exp_avg", "exp_avg_sq")) if base[3] == "state at rest" else ""
        ordinal = rng.getrandbits(30)
        return Coordinates(*base, model, Fault(model, seed, strength), recurrent, None, 0, part, ordinal)


def _fitting(operation: str, models: tuple[str, ...]) -> tuple[str, ...]:
    """Tokens are lost or misdirected where tokens move; only results of products and such have operands to trigger."""
    if operation not in ("dispatch", "embedding"):
        models = tuple(model for model in models if model not in OF_ROWS)
    triggering = operation in ("fprop", "dgrad", "wgrad", "attention", "norm", "element-wise")
    return (*models, "triggered") if triggering and len(models) > 1 else models


def placed(index: int, points: int) -> tuple[str, int]:
    """Precision and point of fault number `index`: whole blocks share them."""
    block = index // BLOCK
    return TURN[block % len(TURN)], block // len(TURN) % points
