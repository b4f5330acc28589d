"""Text from a model: the MTP modules draft, one forward of the main model verifies, and the rest is forgotten."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from agent.model.decoding.choice import Choice
from agent.model.decoding.decoder import Decoder
from agent.model.decoding.drafting import Drafter
from agent.model.v3 import V3


@dataclass(frozen=True, slots=True)
class Generation:
    """What was generated, and what it took."""

    tokens: list[int]
    forwards: int  # of the main model, that of the prompt included
    drafted: int  # tokens that MTP modules proposed
    accepted: int  # of these, how many the main model let stand
    seconds: float  # prompt included

    @property
    def acceptance(self) -> float | None:
        """Share of drafted tokens that stand; None if nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def forwards_per_token(self) -> float:
        """Forwards of the main model for each token; without drafts 1."""
        return self.forwards / len(self.tokens)

    @property
    def tokens_per_second(self) -> float:
        """Tokens generated in a second, prompt included."""
        return len(self.tokens) / self.seconds


def generate(model: V3, prompt: Sequence[int], count: int, choice: Choice, *, draft: bool = True) -> Generation:
    """``count`` tokens after ``prompt``, at least one token long.

    With ``draft`` each of the D MTP modules proposes one token a step and the main model verifies all of them in one
    forward; a model without modules drafts nothing. Without ``draft`` it is the same forward with one token in it: a
    greedy choice gives the same tokens either way (see :class:`Decoder`).

    Raises:
        ValueError: an empty prompt, an id outside the vocabulary, or a count below 1.
    """
    if count < 1:
        raise ValueError(f"count: at least 1, not {count}")
    begin = time.perf_counter()
    depth = len(model.mtp)
    capacity = len(prompt) + count + depth
    decoder = Decoder(model, capacity, together=1 + depth)
    drafter = Drafter(model, capacity, decoder.turns) if draft and depth else None
    device = model.embedding.device
    state = decoder.prefill(torch.tensor(prompt, dtype=torch.int64, device=device))
    known = [*prompt, *choice.settle([], state.logits)]
    drafted, accepted = 0, 0
    while len(known) < len(prompt) + count:
        drafts = drafter.draft(known, state.hidden, choice.draft) if drafter else []
        state = decoder.extend(torch.tensor([known[-1], *drafts], device=device))
        settled = choice.settle(drafts, state.logits)
        known += settled
        decoder.truncate(len(known) - 1)
        state = state._replace(hidden=state.hidden[: len(settled)])
        drafted, accepted = drafted + len(drafts), accepted + len(settled) - 1
    tokens, seconds = known[len(prompt) :][:count], time.perf_counter() - begin
    return Generation(tokens, decoder.forwards, drafted, accepted, seconds)
