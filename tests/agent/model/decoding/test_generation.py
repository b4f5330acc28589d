"""Drafting never shows: greedy text is the same without it, and drafts are what the modules learnt to say."""

from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from decoding_models import drawn, filled, ids, trained
from torch import Tensor

from agent.model import V3, V3Config
from agent.model.decoding import Choice, Decoder, Drafter, Generation, Greedy, generate
from agent.model.rope import rotation

#: Small, with sizes that are multiples of 8, as those of every model that anybody trains.
SHAPE = replace(
    drawn(0),
    vocab_size=64,
    hidden_size=64,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    num_attention_heads=2,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    kv_lora_rank=16,
    q_lora_rank=24,
    intermediate_size=96,
    moe_intermediate_size=32,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_shared_experts=1,
    n_group=4,
    topk_group=2,
    initializer_range=0.03,
    yarn=None,
)


@cache
def briefly_trained(depth: int) -> tuple[V3, list[float], list[float]]:
    return trained(replace(SHAPE, mtp_depth=depth))


def both(model: V3, prompt: list[int], count: int) -> tuple[Generation, Generation]:
    return generate(model, prompt, count, Greedy()), generate(model, prompt, count, Greedy(), draft=False)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_modules_of_every_depth_learn(depth: int) -> None:
    _, main, mtp = briefly_trained(depth)
    assert main[-1] < 0.7 * main[0]
    assert mtp[-1] < 0.8 * mtp[0]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_trained_models_say_the_same_with_and_without_drafts_and_sooner(depth: int) -> None:
    model, _, _ = briefly_trained(depth)
    for seed in range(6):
        drafting, plain = both(model, ids(model.config, 1 + 5 * seed, seed).tolist(), 60)
        assert drafting.tokens == plain.tokens
        assert plain.forwards_per_token == 1.0
        assert plain.acceptance is None
        assert drafting.forwards_per_token < 0.85
        assert drafting.acceptance is not None
        assert drafting.acceptance > 0.25


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("after_norm", [True, False])
def test_untrained_models_say_the_same_with_and_without_drafts(depth: int, after_norm: bool) -> None:
    for seed in range(8):
        model = filled(replace(SHAPE, mtp_depth=depth, mtp_after_norm=after_norm), seed)
        drafting, plain = both(model, ids(model.config, 1 + 3 * seed, seed).tolist(), 60)
        assert drafting.tokens == plain.tokens


@pytest.mark.parametrize("depth", [1, 2])
def test_ties_are_broken_alike(depth: int) -> None:
    model = filled(replace(SHAPE, mtp_depth=depth), 1)
    model.head.weight.data[1::2] = model.head.weight.data[::2]  # every token has a twin
    drafting, plain = both(model, [1, 2, 3], 80)
    assert drafting.tokens == plain.tokens
    assert not any(token % 2 for token in plain.tokens)


def test_drafts_that_always_stand_are_noticed() -> None:
    class Credulous(Greedy):
        def settle(self, drafts: list[int], logits: Tensor) -> list[int]:
            return [*drafts, int(logits[-1].argmax())]

    model, _, _ = briefly_trained(1)
    prompt = ids(model.config, 9).tolist()
    assert generate(model, prompt, 60, Credulous()).tokens != generate(model, prompt, 60, Greedy(), draft=False).tokens


def test_one_rejected_draft_that_stays_in_the_cache_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = filled(replace(SHAPE, mtp_depth=1), 3)
    drafting, plain = both(model, [1, 2, 3], 40)
    assert drafting.tokens == plain.tokens
    forget, lengths = Decoder.truncate, []

    def forget_later(self: Decoder, length: int) -> None:
        lengths.append(length)
        forget(self, self.length if len(lengths) == 1 else length)

    monkeypatch.setattr(Decoder, "truncate", forget_later)
    drafting, _ = both(model, [1, 2, 3], 40)
    assert lengths[0] == 4  # the first draft was rejected
    assert drafting.tokens != plain.tokens


def chain(model: V3, tokens: list[int]) -> list[Tensor]:
    """Logits of every module at the last position, by whole forwards as in training; two tokens more for each."""
    depth = len(model.mtp)
    time = len(tokens) - depth
    row = torch.tensor(tokens)
    turns = rotation(model.config, time)
    found = []
    with torch.no_grad():
        raw, _ = model._trunk(row[None, :time])
        normed = model.norm(raw)
        for k, module in enumerate(model.mtp, start=1):
            hidden = normed if model.config.mtp_after_norm else raw
            raw, normed, _ = module(hidden, F.embedding(row[k : time + k], model.embedding), turns)
            found.append(model.head(normed)[-1])
    return found


class Recording(Greedy):
    """Greedy, with a note of what each module said."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []

    def draft(self, logits: Tensor) -> int:
        self.logits.append(logits)
        return super().draft(logits)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_modules_over_their_caches_say_what_whole_forwards_say(depth: int, seed: int) -> None:
    config = drawn(seed, depth)
    model = filled(config, seed)
    tokens = ids(config, 24 + depth, seed).tolist()
    decoder = Decoder(model, 40, 1 + depth)
    drafter = Drafter(model, 40, decoder.turns)
    given = 5
    state = decoder.prefill(torch.tensor(tokens[:given]))
    # What is decided next follows `tokens`, whatever was drafted: some drafts stand, by hand, others do not.
    for stand in (0, 1, depth, 0, 1, depth, 0):
        known, recording = tokens[: given + 1], Recording()
        drafts = drafter.draft(known, state.hidden, recording.draft)
        wanted = chain(model, [*known, *drafts[: depth - 1]])
        for found, expected in zip(recording.logits, wanted, strict=True):
            assert float((found - expected).norm() / expected.norm()) < 1e-5
        tokens[given + 1 : given + 1 + stand] = drafts[:stand]
        state = decoder.extend(torch.tensor([known[-1], *drafts]))
        state = state._replace(hidden=state.hidden[: stand + 1])
        given += stand + 1
        decoder.truncate(given)


def test_a_model_without_modules_drafts_nothing() -> None:
    model = filled(replace(SHAPE, mtp_depth=0))
    drafting, plain = both(model, [1], 10)
    assert drafting.tokens == plain.tokens
    assert (drafting.drafted, drafting.forwards) == (0, 10)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_as_many_tokens_come_as_were_asked_for(count: int) -> None:
    model, _, _ = briefly_trained(3)
    assert len(generate(model, [1, 2], count, Greedy()).tokens) == count


@pytest.mark.parametrize(
    ("prompt", "count", "told"), [([], 3, "tokens"), ([64], 3, "outside the vocabulary"), ([1], 0, "count")]
)
def test_what_makes_no_sense_is_refused(prompt: list[int], count: int, told: str) -> None:
    config: V3Config = SHAPE
    choice: Choice = Greedy()
    with pytest.raises(ValueError, match=told):
        generate(V3(config), prompt, count, choice)
