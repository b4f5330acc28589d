"""Speculative sampling has the main model's distribution exactly: chi-square against probabilities worked out whole."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from decoding_models import filled
from torch import Tensor

from agent.model import PRESETS, V3
from agent.model.decoding import Greedy, Sampling, generate


class Credulous(Sampling):
    """The negative control: every draft stands."""

    def settle(self, drafts: list[int], logits: Tensor) -> list[int]:
        self._drafted = []
        return [*drafts, self._draw(self._distribution(logits[-1]))]


class Redrawing(Sampling):
    """Another: a rejected draft's place is taken by a draw from p itself, not from what q left of it."""

    def settle(self, drafts: list[int], logits: Tensor) -> list[int]:
        settled = super().settle(drafts, logits)
        if settled[:-1] == drafts:
            return settled
        return [*settled[:-1], self._draw(self._distribution(logits[len(settled) - 1]))]


def critical(freedom: int, z: float = 3.719) -> float:
    """The chi-square that chance exceeds once in 10,000 times (Wilson and Hilferty, PNAS 1931, eq. 8)."""
    spread = 2 / (9 * freedom)
    return float(freedom * (1 - spread + z * spread**0.5) ** 3)


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    expected = probabilities * counts.sum()
    assert float(expected.min()) >= 5  # Cochran's rule: the statistic means nothing below
    return float(((counts - expected) ** 2 / expected).sum())


P = torch.tensor([[0.5, -0.4, 0.1, 1.2, 0.0], [1.0, 0.3, -0.6, 0.2, -0.1], [0.2, 0.1, 0.6, -0.5, 0.4]])
Q = torch.tensor([[-0.6, 1.0, 0.3, 0.0, 0.2], [0.2, -0.5, 0.9, 0.7, 0.1]])


def first_tokens(choice: Sampling, rounds: int) -> tuple[Tensor, Tensor]:
    """How often each token came first, and second where the first draft stood."""
    first, second = torch.zeros(5), torch.zeros(5)
    for _ in range(rounds):
        drafts = [choice.draft(Q[0]), choice.draft(Q[1])]
        settled = choice.settle(drafts, P)
        first[settled[0]] += 1
        if len(settled) > 1:
            second[settled[1]] += 1
    return first, second


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_tokens_are_distributed_as_the_main_model_says(temperature: float) -> None:
    wanted = (P.double() / temperature).softmax(-1)
    for counts, p in zip(first_tokens(Sampling(temperature, 5), 6000), wanted[:2], strict=True):
        assert chi_square(counts, p) < critical(4)


@pytest.mark.parametrize("control", [Credulous, Redrawing])
def test_shortcuts_change_the_distribution(control: type[Sampling]) -> None:
    counts, _ = first_tokens(control(1.0, 5), 6000)
    assert chi_square(counts, P[0].double().softmax(-1)) > 3 * critical(4)


def text_model() -> tuple[V3, list[int]]:
    """Three tokens, of which none is rare after any other, and two modules that think otherwise."""
    shape = replace(
        PRESETS["tiny"].config,
        vocab_size=3,
        hidden_size=16,
        num_hidden_layers=1,
        first_k_dense_replace=0,
        num_attention_heads=2,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        q_lora_rank=None,
        kv_lora_rank=8,
        moe_intermediate_size=16,
        mtp_depth=2,
    )
    return filled(shape, 3), [0, 2, 1]


def text_probabilities(model: V3, prompt: list[int], texts: list[tuple[int, ...]], temperature: float) -> Tensor:
    """Of each text, from whole forwards."""
    rows = torch.tensor([[*prompt, *text] for text in texts])
    with torch.no_grad():
        each = (model(rows[:, :-1]).logits.double() / temperature).softmax(-1)[:, len(prompt) - 1 :]
    return each.gather(2, rows[:, len(prompt) :, None]).prod(1).squeeze(1)


def texts_drawn(model: V3, prompt: list[int], choice: Sampling, count: int, draft: bool) -> Counter[tuple[int, ...]]:
    return Counter(tuple(generate(model, prompt, 3, choice, draft=draft).tokens) for _ in range(count))


@pytest.mark.parametrize(
    ("choice", "draft", "holds"), [(Sampling, True, True), (Sampling, False, True), (Credulous, True, False)]
)
def test_whole_texts_are_distributed_as_the_main_model_says(choice: type[Sampling], draft: bool, holds: bool) -> None:
    model, prompt = text_model()
    texts = list(itertools.product(range(3), repeat=3))
    wanted = text_probabilities(model, prompt, texts, 1.5)
    found = texts_drawn(model, prompt, choice(1.5, 11), 1000, draft)
    assert (chi_square(torch.tensor([float(found[text]) for text in texts]), wanted) < critical(26)) == holds


def test_a_seed_gives_the_same_text_again() -> None:
    model, prompt = text_model()
    one, two, other = (generate(model, prompt, 40, Sampling(1.0, seed)).tokens for seed in (1, 1, 2))
    assert one == two
    assert one != other


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_a_temperature_is_above_zero(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        Sampling(temperature, 0)


def test_greedy_keeps_drafts_up_to_the_first_that_it_would_not_have_chosen() -> None:
    logits = torch.eye(5)[[3, 1, 2]]
    assert Greedy().settle([3, 1], logits) == [3, 1, 2]
    assert Greedy().settle([3, 0], logits) == [3, 1]
    assert Greedy().settle([0, 1], logits) == [3]
    assert Greedy().draft(torch.tensor([0.0, 2.0, 2.0])) == 1
