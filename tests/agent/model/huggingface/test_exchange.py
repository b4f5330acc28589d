"""Weights under their published names: a round trip loses no bit, and what does not fit changes nothing."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hf_reference import base
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agent.model import V3, V3Config, huggingface
from agent.model.huggingface import WeightsError, dequantised

D = base(attention_bias=True)
LAYERS = D["num_hidden_layers"]


def made(seed: int, mtp: int = 1, **changes: Any) -> V3:
    model = V3(huggingface.config(base(attention_bias=True, **changes), mtp=mtp))
    generator = torch.Generator().manual_seed(seed)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.normal_(0.0, 1.0, generator=generator)
    return model


def state(model: V3) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(tensor.view(torch.int32), other[key].view(torch.int32)) for key, tensor in one.items()
    )


@pytest.mark.parametrize("mtp", [0, 1, 2])
@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None, "n_shared_experts": 0}, {"first_k_dense_replace": 3}])
def test_a_round_trip_is_bit_equal(mtp: int, changes: dict[str, Any]) -> None:
    one, other = made(1, mtp, **changes), made(2, mtp, **changes)
    weights = huggingface.export(one)
    assert not equal(state(one), state(other))
    huggingface.load(other, weights)
    assert equal(state(one), state(other))
    assert equal(huggingface.export(other), weights)


def test_names_are_the_published_ones() -> None:
    found = huggingface.export(made(1)).keys()
    for key in (
        "model.embed_tokens.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.2.mlp.experts.7.gate_proj.weight",
        "model.layers.2.mlp.shared_experts.up_proj.weight",
        "model.layers.2.self_attn.kv_a_proj_with_mqa.bias",
        f"model.layers.{LAYERS}.embed_tokens.weight",
        f"model.layers.{LAYERS}.enorm.weight",
        f"model.layers.{LAYERS}.hnorm.weight",
        f"model.layers.{LAYERS}.eh_proj.weight",
        f"model.layers.{LAYERS}.shared_head.norm.weight",
        f"model.layers.{LAYERS}.shared_head.head.weight",
        f"model.layers.{LAYERS}.mlp.experts.0.down_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ):
        assert key in found
    names = set(huggingface.keys(made(1).config).values())
    assert names == made(1).state_dict().keys()


def test_an_export_is_a_copy() -> None:
    model = made(1)
    weights = huggingface.export(model)
    before = state(model)
    for tensor in weights.values():
        tensor.zero_()
    assert equal(state(model), before)


def test_gradients_have_the_keys_of_the_parameters_that_hold_one() -> None:
    model = made(1)
    assert huggingface.export(model, grads=True) == {}
    model.layers[0].ffn.up.weight.grad = torch.ones_like(model.layers[0].ffn.up.weight)
    model.embedding.grad = torch.ones_like(model.embedding)
    found = huggingface.export(model, grads=True)
    mtp_copy = f"model.layers.{LAYERS}.embed_tokens.weight"
    assert found.keys() == {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", mtp_copy}
    assert all(bool((tensor == 1).all()) for tensor in found.values())


def refused(weights: dict[str, Any], model: V3 | None = None) -> WeightsError:
    """The error, after which the model is as it was."""
    model = model or made(2)
    before = state(model)
    with pytest.raises(WeightsError) as caught:
        huggingface.load(model, weights)
    assert equal(state(model), before)
    return caught.value


def test_every_missing_and_extra_key_is_named() -> None:
    weights = huggingface.export(made(1))
    gone = [key for key in weights if ".experts.3." in key]
    for key in gone:
        del weights[key]
    weights |= {"model.layers.0.rotary_emb.inv_freq": torch.ones(1), "extra": torch.ones(1)}
    error = refused(weights)
    assert error.missing == tuple(gone)
    assert error.extra == ("model.layers.0.rotary_emb.inv_freq", "extra")
    assert all(key in str(error) for key in (*error.missing, *error.extra))
    assert len(gone) == 9
    assert "and 4 more" in error.brief


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_wrong_key_shape_or_type_is_named_and_nothing_changes(data: st.DataObject) -> None:
    weights = huggingface.export(made(1))
    key = data.draw(st.sampled_from(sorted(weights)))
    good = weights.pop(key)
    bad: dict[str, Any] = {
        "missing": None,
        "longer": torch.cat([good, good]),
        "flat": good.unsqueeze(0),
        "double": good.double(),
        "whole": good.long(),
        "list": good.tolist(),
        "meta": good.to("meta"),
    }
    kind = data.draw(st.sampled_from(sorted(bad)))
    if kind != "missing":
        weights[key] = bad[kind]
    assert key in str(refused(weights))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrower_weights_are_widened_exactly(dtype: torch.dtype) -> None:
    weights = {key: tensor.to(dtype) for key, tensor in huggingface.export(made(1)).items()}
    model = made(2)
    huggingface.load(model, weights)
    assert equal(huggingface.export(model), {key: tensor.float() for key, tensor in weights.items()})


@pytest.mark.parametrize("ending", ["embed_tokens.weight", "shared_head.head.weight"])
def test_a_copy_that_differs_from_its_original_is_refused(ending: str) -> None:
    weights = huggingface.export(made(1))
    key = f"model.layers.{LAYERS}.{ending}"
    weights[key] = weights[key].clone()
    weights[key][0, 0] += 1
    assert str(refused(weights)).startswith(f"{key}: differs from")


def test_mtp_weights_without_mtp_modules_are_explained() -> None:
    error = refused(huggingface.export(made(1, mtp=1)), made(2, mtp=0))
    assert f"model.layers.{LAYERS}.eh_proj.weight" in error.extra
    assert "made with mtp=0" in str(error)


def test_a_model_without_memory_is_not_loaded() -> None:
    weights = huggingface.export(made(1))
    with torch.device("meta"):
        model = V3(made(1).config)
    with pytest.raises(ValueError, match="meta device"):
        huggingface.load(model, weights)


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Block by block and number by number: nothing of the code under test."""
    rows, columns = weight.shape
    scales = torch.empty(-(-rows // 128), -(-columns // 128))
    out = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(i * 128, (i + 1) * 128), slice(j * 128, (j + 1) * 128))
            scales[i, j] = weight[block].abs().max() / 448
            out[block] = (weight[block] / scales[i, j]).to(torch.float8_e4m3fn)
    return out, scales


@pytest.mark.parametrize("shape", [(128, 128), (200, 300), (7, 129)])
def test_quantised_weights_come_back_within_a_step_of_e4m3(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * torch.linspace(0.01, 3, shape[1])
    out, scales = quantised(weight)
    whole = dequantised(out, scales)
    for i, j in ((0, 0), (shape[0] - 1, shape[1] - 1)):
        assert float(whole[i, j]) == float(out[i, j].float() * scales[i // 128, j // 128])
    steps = 2.0**-4 * weight.abs() + 2.0**-10 * scales.max()
    assert bool(((whole - weight).abs() <= steps).all())
    if scales.numel() > 1:  # with another block's scale it is another weight
        assert not bool(((dequantised(out, scales.flip(-1).flip(0)) - weight).abs() <= steps).all())


def quantised_weights(model: V3) -> dict[str, Tensor]:
    """As published: matrices of attention, networks and experts in FP8 with their scales, the rest as it is."""
    weights = {}
    for key, tensor in huggingface.export(model).items():
        if tensor.dim() == 2 and ("_proj" in key):
            weights[key], weights[f"{key}_scale_inv"] = quantised(tensor)
        else:
            weights[key] = tensor
    return weights


def test_a_quantised_checkpoint_is_loaded_whole() -> None:
    one, other = made(1, hidden_size=160), made(2, hidden_size=160)
    weights = quantised_weights(one)
    huggingface.load(other, weights)
    found = huggingface.export(other)
    key = "model.layers.1.mlp.experts.0.down_proj.weight"
    assert torch.equal(found[key], dequantised(weights[key], weights[f"{key}_scale_inv"]))
    assert torch.equal(found["lm_head.weight"], weights["lm_head.weight"])


@pytest.mark.parametrize("fault", ["missing", "shape", "dtype", "needless"])
def test_scales_that_do_not_fit_are_named(fault: str) -> None:
    weights = quantised_weights(made(1, hidden_size=160))
    key = "model.layers.0.mlp.down_proj.weight"
    scale = f"{key}_scale_inv"
    if fault == "missing":
        del weights[scale]
    elif fault == "shape":
        weights[scale] = weights[scale].t()
    elif fault == "dtype":
        weights[scale] = weights[scale].bfloat16()
    else:
        weights[key] = weights[key].float()
    error = refused(weights, made(2, hidden_size=160))
    assert scale in str(error)
    assert (error.missing, error.extra) == {
        "missing": ((scale,), ()),
        "needless": ((), (scale,)),
    }.get(fault, ((), ()))


def test_transformers_is_never_imported() -> None:
    script = "import sys, agent.model.tool\nsys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_trained_models_keep_their_constants() -> None:
    config: V3Config = replace(huggingface.config(D), balance_alpha=1e-4, bias_update_speed=0.02)
    huggingface.load(V3(config), huggingface.export(made(1, mtp=0)))
