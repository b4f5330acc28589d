"""How a constant follows from clean readings: what it may not fall below or exceed, and how much room it leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

import torch

# Clean readings stay below half the tolerance. The worst of some thousand products bounds noise that is systematic (a
# sum that drifts with its data) only as far as their kinds go; the factor of two is for kinds that are not among them.
SHARE = 0.5

# The size of one rounding is known, and what may come on top is bounded: chance, which over a million rows reaches 5 of
# z = 7 deviations, or rows whose elements are equal and round alike. Leaving more room would only hide faults.
ROUNDED_SHARE = 0.75

# Where the identity itself allows each element its exact rounding, a clean reading is that rounding: up to 1.
EXACT_SHARE = 1.0

# The kernel's result and the check's own are each rounded to fp32 once, by at most 2^-24 = 6e-8: together, in root mean
# square, less than this.
LEAST_ACCUMULATE = 1e-7

# What no clean kernel needs: tensor cores that keep 14 bits of a sum (FP8 on Hopper) stray by 2^-14 = 6e-5.
# A device that needs more is not to be calibrated around.
MOST_ACCUMULATE = 1e-4
# But for FP8: a tensor core cuts its sum off to 14 bits at each of the 4 steps of 32 terms between two promotions,
# always towards zero, so that where all terms have one sign the four errors add up. A constant leaves room for twice.
MOST_ACCUMULATE_FP8 = 4 * 2.0**-14 / SHARE

# A constant of roundings may be this many times that of one: kernels that add in 16 bits needed 3 of them.
MOST_ROUNDINGS = 8.0


#: By the names that tables have for them; those of kernels' results.
DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
)


class Rounding(Enum):
    """What happens to a 16-bit result beside the fp32 sums, and so which of its constants is measured."""

    ONCE = "each element is rounded once"
    OFTEN = "the kernel rounds before its sums, or adds in 16 bits"
    EXACT = "the identity allows each element its rounding"
    ITSELF = "the constant stands for a 16-bit kernel's own arithmetic"
    NEVER = "there is no 16-bit result"


@dataclass(frozen=True, slots=True)
class Least:
    """What a kernel's constants are not below, because data or a machine that is not at hand needed it.

    output: bf16's. accumulate: fp32's. On CPUs each is the largest reading there, times the constant of then, over
    SHARE.
    """

    because: str
    output: float = 0.0
    accumulate: float = 0.0


@dataclass(frozen=True, slots=True)
class Rule:
    """One kernel's.

    least: on CPUs. subnormals: whether its tolerance allows for fp16's, whose rounding is no share of their size.
    on_gpu: on GPUs. most: what no clean kernel's sums need.
    """

    rounding: Rounding
    least: Least = Least("")
    subnormals: bool = True
    on_gpu: Least = Least("")
    most: float = MOST_ACCUMULATE

    def least_on(self, device_class: str) -> Least:
        """What the constants on such devices are not below."""
        return self.least if device_class == "cpu" else self.on_gpu

    def lacks(self, dtype: torch.dtype) -> str:
        """Why there can be no constant for a dtype, or nothing."""
        if self.rounding is Rounding.NEVER and dtype != torch.float32:
            return "its constant is for fp32 results"
        if dtype == torch.float16 and not self.subnormals:
            return "its tolerance does not allow for the rounding of float16's subnormals"
        return ""


# Readings of 2026-11 under the constants of then, on an x86-64 CPU with AVX-512 and, but for the last four, AMX, whose
# kernels round otherwise; torch 2.13.0, one thread.
_AMX = "what operators read on a CPU with AMX"
_GPT2 = "what training GPT-2's layers read on a CPU with AMX"
_OTHER = "what other data read"
# Sums of equal terms, whose roundings are alike: a few draws in a thousand, of which a seed may have none.
_ALIKE = "what equal rows of other seeds read"
# Two roundings of bf16 in root mean square, where training `tiny` read 1.0005 of one's (an H200, one row of 1e7).
_TWICE = Least("torch's kernel rounds p g before it sums it", output=0.00231)

RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "mm": Rule(Rounding.ONCE, Least(_AMX, accumulate=2e-7)),  # 0.25 of 4e-7
        "fp8": Rule(
            Rounding.NEVER,
            Least("what training small read on a CPU with AMX", accumulate=1.92e-7),  # 0.24
            most=MOST_ACCUMULATE_FP8,
        ),
        "softmax": Rule(Rounding.EXACT),
        "log_softmax": Rule(Rounding.EXACT),
        "softmax_backward": Rule(
            Rounding.ONCE,
            Least(_AMX, accumulate=1.28e-7),
            subnormals=False,
            on_gpu=_TWICE,  # 0.32 of 2e-7
        ),
        "nll_loss": Rule(Rounding.OFTEN, Least(_ALIKE, output=0.00718), subnormals=False),
        "sdpa": Rule(Rounding.OFTEN, Least(_GPT2, 0.00276, 1.29e-7)),  # 0.46 of 0.003, 0.43 of 1.5e-7
        "sdpa_exp": Rule(Rounding.ITSELF),
        # 0.48 of 0.005, 0.39 of 4e-7
        "sdpa_backward": Rule(Rounding.OFTEN, Least(_GPT2, 0.0048, 3.12e-7), subnormals=False),
        # 0.64 of 0.0035, in rows of a few outliers, whose roundings are not Gaussian; 0.37 of 2.5e-7
        "layer_norm": Rule(Rounding.OFTEN, Least(_GPT2, 0.00448, 1.85e-7), subnormals=False),
        "rms_norm": Rule(Rounding.OFTEN, Least(_OTHER, 0.00275, 2.1e-7), subnormals=False),  # 0.55, 0.42 of 2.5e-7
        "norm_weight": Rule(Rounding.NEVER, Least(_GPT2, accumulate=2.72e-7)),  # 0.34 of 4e-7
        "cumsum": Rule(Rounding.EXACT, subnormals=False),
        "gates": Rule(Rounding.NEVER),
        "sums": Rule(Rounding.OFTEN, Least(_ALIKE, 0.00912, 4.03e-7), subnormals=False),
    }
)


def rounded_once(dtype: torch.dtype) -> float:
    """The rms of rounding to `dtype` over mantissas, relative: 0.72 eps / sqrt(12); fp32 counts as 0."""
    return 0.0 if dtype == torch.float32 else 0.72 * torch.finfo(dtype).eps / 12**0.5


@dataclass(slots=True)
class Constant:
    """A kernel's constants in one dtype while they are measured.

    Invariant: output and accumulate only grow. worst: the largest reading so far under the constants as they are.
    """

    rule: Rule
    dtype: torch.dtype
    output: float
    accumulate: float
    readings: int = 0
    calls: int = 0
    worst: float = 0.0
    refused: str = ""  # why no constant is given

    @classmethod
    def floor(cls, rule: Rule, dtype: torch.dtype, accumulate: float, device_class: str) -> Constant:
        """Where measuring begins."""
        rounds = rule.rounding in (Rounding.ONCE, Rounding.OFTEN)
        output = up(rounded_once(dtype)) if rounds else 0.0
        least = rule.least_on(device_class)
        output = max(output, least.output) if dtype == torch.bfloat16 else output
        accumulate = max(accumulate, least.accumulate) if dtype == torch.float32 else accumulate
        return cls(rule, dtype, output, max(accumulate, LEAST_ACCUMULATE))

    @property
    def once(self) -> float:
        """The rms of one rounding to the dtype."""
        return rounded_once(self.dtype)

    @property
    def share(self) -> float:
        """What clean readings stay below."""
        if self.dtype == torch.float32:
            return SHARE
        return {Rounding.ONCE: ROUNDED_SHARE, Rounding.EXACT: EXACT_SHARE}.get(self.rule.rounding, SHARE)

    def admit(self, reading: float) -> bool:
        """Note a clean call's largest reading; True if it asked for a larger constant and its call is to be read again.

        A reading that is not a number is a check that failed, or a device: no constant is given then.
        """
        if self.refused or reading <= self.share:
            self.worst = max(self.worst, reading)
            return False
        if not reading < float("inf"):
            self.refused = f"a finite result read {reading}"
            return False
        # A limit that the constant makes up only in part falls slower than the constant grows: it is asked again.
        factor = max(reading / self.share, 1.02)
        self.worst = 0.0
        if self.output:
            self.output = up(self.output * factor)
        else:
            self.accumulate = up(self.accumulate * factor)
        self._bound()
        return not self.refused

    def _bound(self) -> None:
        kind, value, most = "accumulate", self.accumulate, self.rule.most
        if self.output:
            kind, value, most = "output", self.output, MOST_ROUNDINGS * self.once
        if value > most:
            self.refused = f"clean results would need {kind} {value:.2g}; no rounding needs more than {most:.2g}"


def up(value: float) -> float:
    """Rounded up to three digits: a table that people read, and never a smaller constant than was measured."""
    if value == 0:
        return 0.0
    digits = f"{value:.2e}"
    rounded = float(digits)
    if rounded >= value:
        return rounded
    mantissa, exponent = digits.split("e")
    return float(f"{float(mantissa) + 0.01:.2f}e{exponent}")
