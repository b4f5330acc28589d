"""Weights through files: Hugging Face reads what we write, we read what it writes, and a bad file leaves nothing."""

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_reference import YARN, base, difference, published, reference
from hypothesis import given, settings
from hypothesis import strategies as st
from on_disk import checkpoint, saved
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.deepseek_v3 import DeepseekV3ForCausalLM

from agent.model import PRESETS, V3, huggingface, tool
from agent.model.files import writing
from agent.model.files.reading import INDEX, open_folder
from agent.model.files.transfer import read_model

D = base(attention_bias=True, rope_scaling=YARN)


def call(*arguments: object) -> int:
    return tool.main([str(argument) for argument in arguments])


def made(mtp: int = 1) -> V3:
    model = V3(huggingface.config(D, mtp=mtp))
    model.initialise(3)
    for router in model.routers():
        router.router_bias.normal_(generator=torch.Generator().manual_seed(4))
    return model


def exported(tmp_path: Path, model: V3, *options: str) -> Path:
    """A Hugging Face folder of several shards."""
    source, out = saved(tmp_path / "model.safetensors", model), tmp_path / "hf"
    assert call("export", source, out, "--shard-size", "64KB", *options) == 0
    return out


def test_hugging_face_reads_what_we_write(tmp_path: Path) -> None:
    model = made(mtp=1)
    folder = exported(tmp_path, model)
    theirs = DeepseekV3ForCausalLM.from_pretrained(folder).eval()  # it leaves the MTP module's layer out
    tokens = torch.randint(0, 96, (2, 30))
    with torch.no_grad():
        assert difference(theirs(tokens).logits, model(tokens).logits) < 1e-5
        theirs.model.norm.weight.mul_(1.01)
        assert difference(theirs(tokens).logits, model(tokens).logits) > 1e-3


@pytest.mark.parametrize("shards", ["40KB", "1GB"])
def test_we_read_what_hugging_face_writes(tmp_path: Path, shards: str) -> None:
    theirs = reference(D)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size=shards)
    assert (tmp_path / "hf" / INDEX).exists() == (shards == "40KB")
    assert call("import", tmp_path / "hf", tmp_path / "out") == 0
    model = read_model(tmp_path / "out")
    wanted = published(theirs.state_dict())
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in huggingface.export(model).items())
    assert model.config == huggingface.config(D)


def test_there_and_back_is_bit_equal(tmp_path: Path) -> None:
    model = made(mtp=1)
    folder = exported(tmp_path, model)
    index = json.loads((folder / INDEX).read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 5
    assert files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["weight_map"].keys() == huggingface.keys(model.config).keys()
    assert index["metadata"]["total_size"] == sum(4 * t.numel() for t in huggingface.export(model).values())
    assert all(path.stat().st_size < 64_000 + 4_000 for path in folder.glob("*.safetensors"))
    assert call("import", folder, tmp_path / "back") == 0
    other = read_model(tmp_path / "back")
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in model.state_dict().items())
    assert other.config == model.config
    direct = read_model(folder).state_dict()
    assert all(torch.equal(t, direct[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("there", [0, 1, 2])
def test_a_stated_number_of_mtp_modules_must_be_there(there: int, tmp_path: Path) -> None:
    folder = exported(tmp_path, made(mtp=there))
    for asked in range(3):
        assert call("import", folder, tmp_path / f"{asked}", "--mtp", str(asked)) == (0 if asked == there else 2)
    assert call("import", folder, tmp_path / "out") == 0
    assert read_model(tmp_path / "out").config.mtp_depth == there


def test_bf16_keeps_router_biases_wide(tmp_path: Path) -> None:
    folder = exported(tmp_path, made(mtp=0), "--dtype", "bf16")
    found = open_folder(folder).described
    assert {key for key, is_ in found.items() if is_.dtype == torch.float32} == {
        key for key in found if key.endswith("e_score_correction_bias")
    }
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    tensors = {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}
    wanted = huggingface.export(made(mtp=0))
    assert all(torch.equal(tensor, wanted[key].to(tensor.dtype)) for key, tensor in tensors.items())


def test_quantised_blocks_are_made_whole(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    weights: dict[str, Tensor] = huggingface.export(made(mtp=0))
    key = "model.layers.0.self_attn.kv_b_proj.weight"
    weights[key] = torch.full_like(weights[key], 3.0).to(torch.float8_e4m3fn)
    weights[f"{key}_scale_inv"] = torch.tensor([[0.5]])
    save_file(weights, folder / "model.safetensors")
    quantisation = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps({**D, "quantization_config": quantisation}))
    assert call("import", folder, tmp_path / "out") == 0
    assert bool((read_model(tmp_path / "out").layers[0].attention.kv_b.weight == 1.5).all())


@pytest.mark.parametrize("vocabulary", [264, 320])
def test_a_checkpoint_of_a_run_is_exported(tmp_path: Path, vocabulary: int) -> None:
    """Whatever vocabulary its corpus asked for."""
    model = V3(replace(PRESETS["tiny"].config, vocab_size=vocabulary))
    model.initialise(7)
    model.routers()[0].router_bias[3] = 0.25
    folder = checkpoint(tmp_path, model)
    assert call("export", folder, tmp_path / "hf") == 0
    assert call("import", tmp_path / "hf", tmp_path / "back", "--mtp", "1") == 0
    other = read_model(tmp_path / "back").state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in model.state_dict().items())


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path, V3(PRESETS["tiny"].config))
    shard = folder / "shard-0.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1000] ^= 1
    shard.write_bytes(content)
    assert call("export", folder, tmp_path / "hf") == 2
    one_line(capsys, "its manifest says")
    assert not (tmp_path / "hf").exists()


def one_line(capsys: pytest.CaptureFixture[str], told: str) -> None:
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert shown.err.startswith("assay: ")
    assert told in shown.err


def reindexed(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    document = json.loads((folder / INDEX).read_text())
    change(document["weight_map"])
    (folder / INDEX).write_text(json.dumps(document))


def rewritten(folder: Path, key: str, value: Tensor) -> None:
    path = folder / json.loads((folder / INDEX).read_text())["weight_map"][key]
    save_file({**load_file(path), key: value}, path)


def reconfigured(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


FIRST = "model-00001-of"
HEAD = "lm_head.weight"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda f: next(f.glob(f"{FIRST}*")).unlink(), f"names {FIRST}"),
    "index of other files": (lambda f: reindexed(f, lambda m: m.update({HEAD: "absent.safetensors"})), "absent.saf"),
    "index that leads away": (lambda f: reindexed(f, lambda m: m.update({HEAD: "../x.safetensors"})), "'../x.saf"),
    "index of a wrong shard": (
        lambda f: reindexed(f, lambda m: m.update({HEAD: m["model.embed_tokens.weight"]})),
        "which it does",
    ),
    "index that forgets": (lambda f: reindexed(f, lambda m: m.pop(HEAD)), "does not name lm_head.weight"),
    "index without a map": (lambda f: (f / INDEX).write_text("{}"), "has no weight_map"),
    "index that is no JSON": (lambda f: (f / INDEX).write_text("{"), "is not JSON"),
    "no weights": (lambda f: (f / INDEX).unlink(), "neither model.safetensors nor"),
    "whole numbers": (lambda f: rewritten(f, "model.norm.weight", torch.ones(48, dtype=torch.int64)), "torch.int64"),
    "doubles": (lambda f: rewritten(f, "model.norm.weight", torch.ones(48).double()), "torch.float64"),
    "a wrong shape": (lambda f: rewritten(f, "model.norm.weight", torch.ones(47)), "shape [47], not [48]"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "config.json: does not exist"),
    "configuration of lists": (lambda f: (f / "config.json").write_text("[]"), "is not a JSON object"),
    "impossible groups": (lambda f: reconfigured(f, n_group=3), "n_group: "),
    "another depth": (lambda f: reconfigured(f, num_hidden_layers=2), "extra keys"),
    "another width": (lambda f: reconfigured(f, hidden_size=64), "shape "),
    "more experts": (lambda f: reconfigured(f, n_routed_experts=16), "missing keys"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_is_not_whole_is_one_line_and_2(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = exported(tmp_path, made(mtp=0))
    spoil, told = FAULTS[fault]
    spoil(folder)
    capsys.readouterr()
    assert call("import", folder, tmp_path / "out") == 2
    one_line(capsys, told)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "model.safetensors"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = exported(tmp_path_factory.mktemp("whole"), made(mtp=0))
    shard = next(folder.glob(f"{FIRST}*"))
    return shard, shard.read_bytes()


@settings(max_examples=40, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True), grow=st.booleans())
def test_a_shard_of_any_other_length_is_refused(whole: tuple[Path, bytes], share: float, grow: bool) -> None:
    shard, content = whole
    cut = int(share * len(content))
    shard.write_bytes(content + content[: cut + 1] if grow else content[:cut])
    out = shard.parent / "out"
    try:
        assert call("import", shard.parent, out) == 2
    finally:
        shard.write_bytes(content)
    assert not out.exists()


def test_that_shard_was_good(whole: tuple[Path, bytes]) -> None:
    """The negative control of the above."""
    shard, _ = whole
    assert call("import", shard.parent, shard.parent / "out") == 0
    (shard.parent / "out").unlink()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: struct.pack("<Q", 2**40) + content[8:],
        lambda content: content.replace(b'"F32"', b'"F99"', 1),
        lambda content: content.replace(b"assay.model/1", b"assay.model/9", 1),
        lambda content: content.replace(b'\\"n_group\\": 4', b'\\"n_group\\": 3', 1),
        lambda content: content.replace(b'\\"n_group\\"', b'\\"n_groop\\"', 1),
        lambda content: content.replace(b"norm.weight", b"norm.heavyt", 1),
        lambda content: content[:-1],
        lambda content: b"",
    ],
)
def test_a_damaged_model_file_is_one_line_and_2(
    spoil: Callable[[bytes], bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path / "model", made(mtp=0))
    content = path.read_bytes()
    assert spoil(content) != content
    path.write_bytes(spoil(content))
    assert call("export", path, tmp_path / "hf") == 2
    one_line(capsys, str(path))
    assert not (tmp_path / "hf").exists()


def test_nothing_is_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = exported(tmp_path, made(mtp=0))
    (tmp_path / "out").write_text("mine")
    capsys.readouterr()
    assert call("import", folder, tmp_path / "out") == 2
    one_line(capsys, "exists already")
    assert (tmp_path / "out").read_text() == "mine"
    assert call("export", tmp_path / "model.safetensors", folder) == 2


def test_no_room_or_no_place_is_5(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = saved(tmp_path / "model", made(mtp=0))
    assert call("export", source, tmp_path / "nowhere" / "hf") == 5
    one_line(capsys, "nowhere")
    assert call("export", source, "/proc/hf") == 5
    one_line(capsys, "/proc")
    usage = writing.shutil.disk_usage("/")
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert call("export", source, tmp_path / "hf") == 5
    one_line(capsys, "no room")


@pytest.mark.parametrize("cause", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_breaks_off_leaves_nothing(cause: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, calls, whole = saved(tmp_path / "model", made(mtp=0)), [], writing.os.fsync

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 3:
            assert list(tmp_path.glob(".hf.writing-*/*.safetensors"))
            raise cause
        whole(descriptor)

    monkeypatch.setattr(writing.os, "fsync", fsync)
    assert call("export", source, tmp_path / "hf", "--shard-size", "64KB") == (5 if isinstance(cause, OSError) else 130)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
