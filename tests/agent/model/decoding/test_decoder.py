"""The cached forward against the full one; equal bits alone and in company; what a cache takes."""

from dataclasses import replace

import pytest
import torch
from decoding_models import drawn, filled, ids
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agent.model import PRESETS, V3, V3Config, Yarn, huggingface
from agent.model.decoding import Decoder, LatentCache, cache_bytes
from agent.model.decoding import decoder as decoder_module

PUBLISHED = huggingface.config(huggingface.DEEPSEEK_V3)


def difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def full(model: V3, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens.unsqueeze(0)).logits[0]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), cuts=st.lists(st.integers(1, 9), min_size=1, max_size=5), prompt=st.integers(1, 20))
def test_equals_the_full_forward_however_many_tokens_come_at_once(seed: int, cuts: list[int], prompt: int) -> None:
    config = drawn(seed)
    model = filled(config, seed)
    tokens = ids(config, prompt + sum(cuts), seed)
    wanted = full(model, tokens)
    decoder = Decoder(model, len(tokens))
    assert difference(decoder.prefill(tokens[:prompt]).logits, wanted[prompt - 1 : prompt]) < 1e-5
    for part in tokens[prompt:].split(cuts):
        start = decoder.length
        found = decoder.extend(part)
        assert difference(found.logits, wanted[start : decoder.length]) < 1e-5
    assert decoder.length == len(tokens)


@pytest.mark.parametrize("q_lora_rank", [None, 13])
@pytest.mark.parametrize("yarn", [None, Yarn(factor=40.0, original_max_position_embeddings=32)])
def test_every_kind_of_attention_is_the_full_one(q_lora_rank: int | None, yarn: Yarn | None) -> None:
    config = replace(drawn(1), q_lora_rank=q_lora_rank, yarn=yarn)
    model, tokens = filled(config), ids(config, 50)
    decoder = Decoder(model, 50)
    decoder.prefill(tokens[:10])
    assert difference(decoder.extend(tokens[10:]).logits, full(model, tokens)[10:]) < 1e-5
    decoder.truncate(20)
    decoder.turns = decoder.turns.roll(1, 0)  # one position off: the comparison fails
    assert difference(decoder.extend(tokens[20:]).logits, full(model, tokens)[20:]) > 1e-3


def test_bf16_is_as_far_from_the_full_forward_as_rounding_makes_it() -> None:
    config = replace(PRESETS["tiny"].config, first_k_dense_replace=3)  # without routing, which rounding would change
    model, tokens = filled(config, dtype=torch.bfloat16), ids(config, 40)
    decoder = Decoder(model, 40)
    decoder.prefill(tokens[:10])
    assert decoder.cache.rows[0].dtype == torch.bfloat16
    assert 1e-4 < difference(decoder.extend(tokens[10:]).logits, full(model, tokens)[10:]) < 3e-2


def test_rejected_tokens_leave_nothing_behind() -> None:
    config = drawn(5)
    model, tokens = filled(config), ids(config, 30)
    decoder, clean = Decoder(model, 30, together=4), Decoder(model, 30, together=4)
    for each in (decoder, clean):
        each.prefill(tokens[:12])
    decoder.extend((tokens[12:20] + 1) % config.vocab_size)
    decoder.truncate(12)
    wanted = clean.extend(tokens[12:16])
    assert torch.equal(decoder.extend(tokens[12:16]).logits, wanted.logits)
    decoder.truncate(12)
    decoder.extend((tokens[12:14] + 1) % config.vocab_size)  # kept this time
    assert difference(decoder.extend(tokens[14:16]).logits, wanted.logits[2:]) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("together", [2, 3, 4, 7])
def test_a_token_has_the_same_bits_alone_and_with_others(name: str, together: int, dtype: torch.dtype) -> None:
    config = PRESETS[name].config
    decoder = Decoder(filled(config, dtype=dtype), 400, together)
    decoder.prefill(ids(config, 21))
    for seed in range(3):
        assert decoder.rows_agree(ids(config, together, seed))
        assert decoder.length == 21


def test_whatever_the_widths_a_token_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    def agree(seed: int) -> bool:
        config = drawn(seed)
        decoder = Decoder(filled(config, seed), 20, 4)
        decoder.prefill(ids(config, 9, seed))
        return decoder.rows_agree(ids(config, 4, seed + 1))

    assert all(agree(seed) for seed in range(30))
    monkeypatch.setattr(decoder_module, "_WIDTHS", ())
    assert not all(agree(seed) for seed in range(30))


def test_without_tiles_of_one_shape_the_bits_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Decoder, "extend", lambda self, tokens: self._forward(tokens, None))
    decoder = Decoder(filled(PRESETS["tiny"].config), 60)
    decoder.prefill(ids(PRESETS["tiny"].config, 21))
    assert not decoder.rows_agree(ids(PRESETS["tiny"].config, 2))
    monkeypatch.undo()
    monkeypatch.setattr(decoder_module, "TILE", 4)
    assert Decoder(decoder.model, 60, 5).tile == 8


def test_a_cache_holds_latent_and_rotated_key_and_nothing_else() -> None:
    config = PRESETS["small"].config
    cache = Decoder(V3(config), 100).cache
    assert [rows.shape for rows in cache.rows] == [(100, config.kv_lora_rank + config.qk_rope_head_dim)] * 4
    assert {key: type(value) for key, value in vars(cache).items()} == {"rows": list, "capacity": int, "length": int}
    for rows in cache.rows:
        assert rows.data_ptr() % 64 == 0


def test_bytes_of_a_token_at_the_published_shape() -> None:
    found = cache_bytes(PUBLISHED)
    assert found.mla == (512 + 64) * 2 * 61 == 70_272
    assert found.gqa == 2 * 8 * 128 * 2 * 61 == 249_856
    assert found.mha == 2 * 128 * 128 * 2 * 61 == 3_997_696
    config, model = PRESETS["small"].config, V3(PRESETS["small"].config, torch.bfloat16)
    rows = Decoder(model, 10).cache.rows
    assert sum(each.nbytes for each in rows) == 10 * cache_bytes(config).mla


@pytest.mark.parametrize(
    ("tokens", "told"),
    [
        (torch.zeros(2, dtype=torch.int32), "int64"),
        (torch.zeros(1, 2, dtype=torch.int64), "int64"),
        (torch.zeros(0, dtype=torch.int64), "at least 1"),
        (torch.tensor([264]), "outside the vocabulary 0..263"),
        (torch.tensor([-1]), "outside the vocabulary"),
        (torch.zeros(9, dtype=torch.int64), "9 more than 0 do not fit into 8"),
    ],
)
def test_what_cannot_be_taken_is_refused(tokens: Tensor, told: str) -> None:
    decoder = Decoder(V3(PRESETS["tiny"].config), 8)
    for take in (decoder.prefill, decoder.extend):
        with pytest.raises(ValueError, match=told):
            take(tokens)
        decoder.truncate(0)


def test_only_what_is_held_can_be_forgotten() -> None:
    cache = LatentCache(PUBLISHED, 1, 4, torch.float32, torch.device("cpu"))
    for length in (-1, 1):
        with pytest.raises(ValueError, match="length"):
            cache.truncate(length)


def test_the_room_may_be_filled_to_its_last_place() -> None:
    config: V3Config = drawn(2)
    decoder, tokens = Decoder(filled(config), 9, together=4), ids(config, 9)
    decoder.prefill(tokens[:8])
    assert difference(decoder.extend(tokens[8:]).logits, full(decoder.model, tokens)[8:]) < 1e-5
