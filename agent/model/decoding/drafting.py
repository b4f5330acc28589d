"""MTP modules as drafters: each says one more token ahead, from the hidden state of the module before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from agent.model.decoding.cache import LatentCache
from agent.model.decoding.layers import block_cached
from agent.model.mtp import MTPModule
from agent.model.v3 import V3


class _Link:
    """Module k of the chain, with what it remembers.

    Position i is final once token i + k is decided. Invariant after each draft, with ``last`` the newest position of
    the main model: cache.length = last + 2 - k, all final; ``held`` has h^{k-1} of the k - 1 positions from there to
    ``last``, which were computed with drafted tokens and will be computed again.
    """

    def __init__(self, model: V3, k: int, module: MTPModule, capacity: int) -> None:
        self.model, self.k, self.module = model, k, module
        device = model.embedding.device
        self.cache = LatentCache(model.config, 1, capacity, model.head.compute_dtype, device)
        self.held = torch.empty(0, model.config.hidden_size, device=device)

    def advance(self, first: int, fresh: Tensor, tokens: Sequence[int], turns: Tensor) -> tuple[int, Tensor, Tensor]:
        """From h^{k-1} of positions ``first``.. (``fresh``) to h^k; ``tokens`` are all there are, drafts included.

        Returns:
            the first position of h^k, h^k [positions, hidden_size], and fp32 logits [vocab_size] of the last.
        """
        start = self.cache.length
        hidden = torch.cat([self.held[: first - start], fresh])
        end = start + len(hidden)
        ahead = torch.tensor(tokens[start + self.k : end + self.k], device=hidden.device)
        y = self._block(hidden, F.embedding(ahead, self.model.embedding), turns[start:end], start)
        self.cache.length = max(start, end + 1 - self.k)
        self.held = hidden[self.cache.length - start :]
        normed = self.module.norm(y)
        logits = self.model.head(normed[-1:]).float()[0]
        return start, normed if self.model.config.mtp_after_norm else y, logits

    def _block(self, hidden: Tensor, embedded: Tensor, turns: Tensor, start: int) -> Tensor:
        module = self.module
        joined = torch.cat([module.embedding_norm(embedded), module.hidden_norm(hidden)], dim=-1)
        return block_cached(module.block, module.projection(joined).float(), turns, self.cache.rows[0], start, None)


class Drafter:
    """All MTP modules of a model over one sequence; it follows the main model and never leads it."""

    def __init__(self, model: V3, capacity: int, turns: Tensor) -> None:
        """``turns`` are the rotations of ``capacity`` positions, as the decoder has them."""
        self.turns = turns
        self.links = [
            _Link(model, k, module, capacity) for k, module in enumerate(cast(Iterable[MTPModule], model.mtp), start=1)
        ]

    def draft(self, tokens: Sequence[int], fresh: Tensor, choose: Callable[[Tensor], int]) -> list[int]:
        """Say what may come after ``tokens``, one token from each module.

        Args:
            tokens: all that is decided; the last one is what the main model said and has not been given yet.
            fresh: h^0 [positions, hidden_size] of the positions before it that are new since the last call.
            choose: the token to take, from fp32 logits [vocab_size].
        """
        known, first = list(tokens), len(tokens) - 1 - len(fresh)
        with torch.inference_mode():
            for link in self.links:
                first, fresh, logits = link.advance(first, fresh, known, self.turns)
                known.append(choose(logits))
        return known[len(tokens) :]
