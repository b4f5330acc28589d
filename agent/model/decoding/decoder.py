"""The main model over its latent cache: new tokens in, logits and hidden states out, rejected tokens forgotten."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from agent.model.block import Block
from agent.model.config import V3Config
from agent.model.decoding.cache import LatentCache
from agent.model.decoding.layers import block_cached
from agent.model.rope import rotation
from agent.model.v3 import V3

#: Rows of a verifying product come in multiples of this. Measured here (AMX, MKL, 1 and 2 threads, 13 shapes): with 4,
#: 8 and 16 rows a row's bits do not depend on its place or on the other rows; with 2 or 3 they may, and one row alone
#: never has the same.
TILE = 4
#: All of these must be multiples of _STEP for tokens to share a tile. Rows of other widths begin anywhere in a vector,
#: where MKL takes other kernels, and torch's loops over 32 elements (two vectors of 64 bytes) end in single ones, for
#: which it has another exp. Measured: with odd widths 49 of 150 random models had bits that depend on a token's place,
#: with multiples of 8 none of 80, on one thread and on two. The published models and our presets have such widths.
_WIDTHS = (
    "hidden_size",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "q_lora_rank",
    "kv_lora_rank",
    "intermediate_size",
    "moe_intermediate_size",
    "n_routed_experts",
)
_STEP = 8


class Extended(NamedTuple):
    """What the main model says of new tokens."""

    logits: Tensor  # fp32 [tokens, vocab_size], or of the last token only: [1, vocab_size]
    hidden: Tensor  # fp32 [tokens, hidden_size]: h^0, what the first MTP module is given


class Decoder:
    """One sequence. ``prefill`` takes a prompt, ``extend`` any number of tokens after it, ``truncate`` forgets.

    ``extend`` computes in tiles of always ``tile`` rows, filled up if there are fewer tokens, and lets each token
    attend by itself: so a token's logits and cached rows have the same bits whether it comes alone or with others,
    provided that the machine's matrix products treat all rows of one shape alike. :meth:`rows_agree` finds out. Where
    they cannot (see ``_WIDTHS``) each token has a tile of its own, and ``extend`` takes a forward for each.
    """

    def __init__(self, model: V3, capacity: int, together: int = 1) -> None:
        """Make room for ``capacity`` tokens, up to ``together`` of which share a tile.

        Raises:
            ValueError: the model holds a share of its experts only.
        """
        if model.parallel is not None and model.parallel.ep > 1:
            raise ValueError(f"model: holds experts of one of {model.parallel.ep} ranks; decode with a whole model")
        config = model.config
        self.model = model
        self.tile = -(-together // TILE) * TILE
        self.sharing = self.tile if _alike(config) else 1
        self.forwards = 0  # so far, the prompt's included
        device = model.embedding.device
        self.cache = LatentCache(config, config.num_hidden_layers, capacity, model.head.compute_dtype, device)
        self.turns = rotation(config, capacity, device)

    @property
    def length(self) -> int:
        """Positions in the cache."""
        return self.cache.length

    def truncate(self, length: int) -> None:
        """Forget all positions from ``length`` on: the tokens there were rejected."""
        self.cache.truncate(length)

    def prefill(self, tokens: Tensor) -> Extended:
        """Take int64 ``tokens`` [tokens], all in one forward; logits of the last one only.

        Raises:
            ValueError: no tokens, an id outside the vocabulary, or more than there is room for.
        """
        self._check(tokens)
        with torch.inference_mode():
            return self._forward(tokens, None)

    def extend(self, tokens: Tensor) -> Extended:
        """Take int64 ``tokens`` [tokens]; the logits of each.

        Raises:
            ValueError: as in :meth:`prefill`.
        """
        self._check(tokens)
        with torch.inference_mode():
            parts = [self._forward(part, len(part)) for part in torch.split(tokens, self.sharing)]
            return Extended(torch.cat([p.logits for p in parts]), torch.cat([p.hidden for p in parts]))

    def rows_agree(self, tokens: Tensor) -> bool:
        """Whether ``tokens`` have the same bits together and one by one, in logits and cache; it is left as it was.

        Then no draft can change what greedy decoding says, not even its ties.
        """
        start = self.length
        together, wide = self.extend(tokens), self._rows(start)
        self.truncate(start)
        alone, single = [self.extend(token) for token in torch.split(tokens, 1)], self._rows(start)
        self.truncate(start)
        return torch.equal(together.logits, torch.cat([each.logits for each in alone])) and torch.equal(wide, single)

    def _rows(self, start: int) -> Tensor:
        return torch.stack([rows[start : self.length] for rows in self.cache.rows])

    def _forward(self, tokens: Tensor, real: int | None) -> Extended:
        model, start, count = self.model, self.length, len(tokens)
        if real is not None:
            tokens = F.pad(tokens, (0, self.tile - count))
        turns = self.turns[start : start + len(tokens)]
        turns = F.pad(turns, (0, 0, 0, len(tokens) - len(turns)))  # the filling may lie beyond the capacity
        x = F.embedding(tokens, model.embedding)
        for block, rows in zip(cast(Iterable[Block], model.layers), self.cache.rows, strict=True):
            x = block_cached(block, x, turns, rows, start, real)
        self.cache.length += count
        self.forwards += 1
        normed = model.norm(x)
        logits = model.head(normed[-1:] if real is None else normed).float()
        hidden = normed if model.config.mtp_after_norm else x
        return Extended(logits[:count], hidden[:count])

    def _check(self, tokens: Tensor) -> None:
        if tokens.dtype != torch.int64 or tokens.dim() != 1 or len(tokens) < 1:
            raise ValueError(f"tokens: int64 [at least 1] expected, not {tokens.dtype} {list(tokens.shape)}")
        low, high = (int(end) for end in tokens.aminmax())
        if low < 0 or high >= self.model.config.vocab_size:
            raise ValueError(f"tokens: ids {low}..{high} outside the vocabulary 0..{self.model.config.vocab_size - 1}")
        if len(tokens) > self.cache.capacity - self.length:
            raise ValueError(f"tokens: {len(tokens)} more than {self.length} do not fit into {self.cache.capacity}")


def _alike(config: V3Config) -> bool:
    return all((getattr(config, name) or 0) % _STEP == 0 for name in _WIDTHS)  # q_lora_rank may be None
