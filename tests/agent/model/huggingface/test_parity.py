"""Logits, loss and every gradient equal those of Hugging Face's DeepSeek-V3, and stop doing so when one idea is off."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hf_reference import YARN, base, difference, drawn, gradients, published, reference, starve
from torch import Tensor
from transformers.models.deepseek_v3 import DeepseekV3ForCausalLM

from agent.model import V3, Yarn, huggingface
from agent.model.fused import heads as heads_module

LOGITS = 1e-5
GRADIENTS = 1e-4
#: With one normalised expert per token every gate is 1 and its gradient 0: both sides have rounding noise alone, some
#: 1e-9 of the largest gradient, and no two noises are equal. Below this share of the largest norm, noise is nothing.
NOISE = 1e-7
BATCH, TIME = 2, 40


@dataclass
class Differences:
    logits: float
    loss: float
    gradient: float
    compared: int


def tokens_for(d: dict[str, Any], seed: int = 0) -> Tensor:
    return torch.randint(0, d["vocab_size"], (BATCH, TIME), generator=torch.Generator().manual_seed(seed))


def ours_of(theirs: DeepseekV3ForCausalLM, d: dict[str, Any], **changes: Any) -> V3:
    model = V3(replace(huggingface.config(d), **changes))
    huggingface.load(model, published(theirs.state_dict()))
    return model


def apart(theirs: DeepseekV3ForCausalLM, ours: V3, tokens: Tensor) -> float:
    """How far apart the logits are."""
    with torch.no_grad():
        return difference(ours(tokens).logits, theirs(input_ids=tokens).logits)


def compare(theirs: DeepseekV3ForCausalLM, ours: V3, tokens: Tensor) -> Differences:
    """All of one forward and backward; experts without tokens have no gradient here and a zero one there."""
    theirs.zero_grad()
    ours.zero_grad()
    wanted = theirs(input_ids=tokens, labels=tokens)
    wanted.loss.backward()
    loss = ours.loss(tokens).total
    loss.backward()
    found, expected = huggingface.export(ours, grads=True), gradients(theirs)
    assert found.keys() <= expected.keys()
    assert not any(expected[key].any() for key in expected.keys() - found.keys())
    least = NOISE * max(float(gradient.norm()) for gradient in expected.values())
    worst = max(difference(found[key], expected[key], least) for key in found)
    return Differences(apart(theirs, ours, tokens), difference(loss.detach(), wanted.loss.detach()), worst, len(found))


def holds(d: dict[str, Any], seed: int = 0) -> Differences:
    theirs = reference(d, seed)
    found = compare(theirs, ours_of(theirs, d), tokens_for(d, seed))
    assert found.logits < LOGITS, found
    assert found.loss < LOGITS, found
    assert found.gradient < GRADIENTS, found
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": None},
        {"q_lora_rank": None, "attention_bias": True},
        {"attention_bias": True},
        {"rope_scaling": YARN},
        {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
        {"rope_scaling": {**YARN, "mscale": 0.6, "mscale_all_dim": 1.4}},
        {"rope_scaling": {**YARN, "mscale_all_dim": 1.0}},
        {"rope_scaling": {**YARN, "attention_factor": 1.3, "truncate": False}},
        {"rope_scaling": None, "rope_parameters": {**YARN, "rope_type": "yarn", "rope_theta": 500.0}},
        {"first_k_dense_replace": 3},
        {"first_k_dense_replace": 9},
        {"first_k_dense_replace": 0},
        {"norm_topk_prob": False},
        {"n_group": 1, "topk_group": 1},
        {"n_group": 4, "topk_group": 4},
        {"num_experts_per_tok": 1},
        {"n_shared_experts": 2},
        {"n_shared_experts": 0},
        {"rms_norm_eps": 1e-2},
        {"rope_theta": 100.0},
    ],
    ids=str,
)
def test_every_variant_equals_hugging_face(changes: dict[str, Any]) -> None:
    holds(base(**changes))


@pytest.mark.parametrize("seed", range(24))
def test_random_configurations_equal_hugging_face(seed: int) -> None:
    holds(drawn(seed), seed)


@pytest.mark.parametrize("groups", [{}, {"n_group": 1, "topk_group": 1}])
def test_an_expert_without_tokens_changes_nothing_else(groups: dict[str, int]) -> None:
    d = base(**groups)
    theirs = reference(d)
    starve(theirs, expert=5)
    ours = ours_of(theirs, d)
    found = compare(theirs, ours, tokens_for(d))
    assert found.logits < LOGITS
    assert found.gradient < GRADIENTS
    held = huggingface.export(ours, grads=True)
    assert not any(".experts.5." in key for key in held)
    assert any(".experts.0." in key for key in held)


def test_transformers_own_dictionary_is_understood() -> None:
    d = base(rope_scaling={**YARN, "mscale": 0.5, "mscale_all_dim": 0.9}, attention_bias=True)
    assert huggingface.config(reference(d).config.to_dict()) == huggingface.config(d)


def switched_off(d: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yarn = huggingface.config(d).yarn
    assert yarn is not None
    yield "yarn", {"yarn": None}
    yield "softmax scale", {"yarn": replace(yarn, mscale=yarn.mscale / yarn.mscale_all_dim, mscale_all_dim=0.0)}
    yield "magnitude", {"yarn": replace(yarn, attention_factor=1.0)}
    yield "gates", {"norm_topk_prob": False}
    yield "groups", {"n_group": 1, "topk_group": 1}
    yield "scale", {"routed_scaling_factor": 2.0}
    yield "latent eps", {"latent_norm_eps": 1e-2}
    yield "eps", {"rms_norm_eps": 1e-2}
    yield "theta", {"rope_theta": 9000.0}


def test_the_comparison_fails_when_one_idea_is_off() -> None:
    d = base(rope_scaling={**YARN, "mscale": 0.6, "mscale_all_dim": 1.4}, attention_bias=True)
    theirs, tokens = reference(d), tokens_for(d)
    assert apart(theirs, ours_of(theirs, d), tokens) < LOGITS
    for name, changes in switched_off(d):
        assert apart(theirs, ours_of(theirs, d, **changes), tokens) > 10 * LOGITS, name


def test_the_comparison_fails_without_biases() -> None:
    d = base(attention_bias=True)
    theirs, tokens = reference(d), tokens_for(d)
    for forgotten in ("router_bias", "q_a.bias", "kv_a.bias", "out.bias"):
        ours = ours_of(theirs, d)
        for name, tensor in [*ours.named_parameters(), *ours.named_buffers()]:
            if name.endswith(forgotten):
                tensor.data.zero_()
        assert apart(theirs, ours, tokens) > 10 * LOGITS, forgotten


def test_the_comparison_fails_when_pairs_are_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    d = base()
    theirs, tokens = reference(d), tokens_for(d)
    ours, rotate = ours_of(theirs, d), heads_module.rotate

    def halves(x: Tensor, turns: Tensor) -> Tensor:
        return rotate(x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2), turns)

    monkeypatch.setattr(heads_module, "rotate", halves)
    assert apart(theirs, ours, tokens) > 10 * LOGITS
    theirs.config.rope_interleave = False  # and so it would be, had the weights been made for halves
    assert apart(theirs, ours, tokens) < LOGITS


@contextmanager
def unchanged(model: V3) -> Iterator[None]:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    draws = torch.get_rng_state()
    yield
    assert torch.equal(draws, torch.get_rng_state())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_a_forward_changes_no_state(training: bool) -> None:
    d = base(attention_bias=True, rope_scaling=YARN)
    ours, tokens = ours_of(reference(d), d).train(training), tokens_for(d)
    with unchanged(ours):
        first = ours(tokens).logits
        assert torch.equal(first, ours(tokens).logits)
        assert first.shape == (BATCH, TIME, d["vocab_size"])
        ours.loss(tokens)
    with pytest.raises(AssertionError), unchanged(ours):
        ours.routers()[0].router_bias.add_(1.0)


def test_yarn_of_the_published_weights_keeps_the_length_of_rotated_parts() -> None:
    yarn = huggingface.config(huggingface.DEEPSEEK_V3).yarn
    assert yarn == Yarn()
    assert yarn.magnitude == 1.0
