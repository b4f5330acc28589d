"""How tokens are chosen, and how drafted ones are judged so that drafting never shows in what comes out."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Choice(Protocol):
    """One way to choose; it remembers what it drafted until that is settled."""

    def draft(self, logits: Tensor) -> int:
        """A token that may come, from a drafter's fp32 ``logits`` [vocab_size]."""

    def settle(self, drafts: list[int], logits: Tensor) -> list[int]:
        """The drafts that stay, in order, and one token more.

        ``logits``, fp32 [drafts + 1, vocab_size], are the main model's where each draft stands, and behind the last.
        """


class Greedy:
    """The likeliest token; of equals the one with the lowest id."""

    def draft(self, logits: Tensor) -> int:
        """As :class:`Choice` says."""
        return int(logits.argmax())

    def settle(self, drafts: list[int], logits: Tensor) -> list[int]:
        """As :class:`Choice` says: a draft stays while it is what would have been chosen."""
        best: list[int] = logits.argmax(-1).tolist()
        stay = next((at for at, draft in enumerate(drafts) if draft != best[at]), len(drafts))
        return best[: stay + 1]


class Sampling:
    """Draws from softmax(logits / temperature); what comes out has that distribution whatever was drafted.

    Speculative sampling (Leviathan et al., arXiv 2211.17192, section 2.3): a draft x, drawn from q, stays with
    probability min(1, p(x) / q(x)); otherwise the token is drawn from the normed max(0, p - q), and nothing behind it
    stays. Appendix A.1 there proves that the result is distributed as p.
    """

    def __init__(self, temperature: float, seed: int) -> None:
        """Raises ValueError for a temperature that is not above 0."""
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature: must be above 0, not {temperature}")
        self.temperature = temperature
        self.generator = torch.Generator().manual_seed(seed)
        self._drafted: list[Tensor] = []

    def draft(self, logits: Tensor) -> int:
        """As :class:`Choice` says."""
        drafted = self._distribution(logits)
        self._drafted.append(drafted)
        return self._draw(drafted)

    def settle(self, drafts: list[int], logits: Tensor) -> list[int]:
        """As :class:`Choice` says."""
        asked, self._drafted = self._drafted, []
        for at, (draft, q) in enumerate(zip(drafts, asked, strict=True)):
            p = self._distribution(logits[at])
            if self._uniform() * float(q[draft]) >= float(p[draft]):
                return [*drafts[:at], self._draw((p - q).clamp_(min=0))]
        return [*drafts, self._draw(self._distribution(logits[-1]))]

    def _distribution(self, logits: Tensor) -> Tensor:
        """fp64 on the CPU, where the generator is: [vocab_size]."""
        return (logits.double().cpu() / self.temperature).softmax(-1)

    def _draw(self, weights: Tensor) -> int:
        return int(torch.multinomial(weights, 1, generator=self.generator))

    def _uniform(self) -> float:
        return float(torch.rand((), dtype=torch.float64, generator=self.generator))
