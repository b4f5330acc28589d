"""`assay model plan` and how the commands complain."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hf_reference import base

from agent.model import PRESETS, V3, V3Config, huggingface, tool
from agent.model.memory import PRECISIONS, Mesh, count, parameters, shares
from controller.cli.main import call


def planned(*arguments: str, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    assert tool.main(["plan", *arguments, "-o", "json"]) == 0
    document: dict[str, object] = json.loads(capsys.readouterr().out)
    return document


def test_the_published_model_has_671_and_37_billion(capsys: pytest.CaptureFixture[str]) -> None:
    document = planned("671b", "--mesh", "dp=128,ep=64,pp=16", capsys=capsys)
    assert document["parameters"] == {"total": 671_026_404_352, "active_per_token": 36_625_610_752, "mtp": 0}
    assert document["cache_bytes_per_token"] == {"mla": 70_272, "gqa": 249_856, "mha": 3_997_696}
    assert document["mesh"] == {"dp": 128, "ep": 64, "pp": 16, "ranks": 2048}


@pytest.mark.parametrize("name", PRESETS)
def test_counts_are_those_of_a_real_model(name: str) -> None:
    config = PRESETS[name].config
    model = V3(config)
    size = count(config, parameters(config))
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    assert size.total + size.mtp == sum(sizes.values())
    assert size.mtp == sum(p.numel() for p in model.mtp.parameters())
    chosen = range(config.num_experts_per_tok)
    used = [n for n in sizes if ".experts." not in n or int(n.split(".experts.")[1].split(".")[0]) in chosen]
    active = sum(sizes[n] for n in used if not n.startswith(("mtp.", "embedding"))) + config.hidden_size
    assert size.active == active


@pytest.mark.parametrize("kind", PRECISIONS)
@pytest.mark.parametrize("mesh", [Mesh(), Mesh(dp=2), Mesh(dp=4, ep=4), Mesh(pp=3), Mesh(dp=4, ep=2, pp=2)])
def test_all_ranks_together_hold_the_model(kind: str, mesh: Mesh) -> None:
    config = PRESETS["tiny"].config
    shapes = parameters(config)
    found = shares(config, shapes, mesh, PRECISIONS[kind])
    sizes = {name: shape[0] * (shape[1] if len(shape) > 1 else 1) for name, shape in shapes.items()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    again = sizes["embedding"] if mesh.pp > 1 else 0  # the MTP module's copy on the last stage
    rest = sum(sizes.values()) - experts + again
    assert len(found) == mesh.pp
    assert sum(share.parameters for share in found) == experts // mesh.ep + rest
    everywhere = 4 * (experts + rest) // mesh.dp
    if kind != "fp32":  # each tensor is divided by itself, so a rank may hold one element more of each
        assert 0 <= sum(share.master for share in found) - everywhere <= 4 * len(shapes)


def test_fp8_weights_take_a_byte_and_their_scales() -> None:
    fp8 = PRECISIONS["fp8"]
    assert fp8.stored("layers.0.ffn.up.weight", (256, 300)) == 256 * 300 + 4 * 2 * 3
    assert fp8.stored("head.weight", (256, 300)) == 2 * 256 * 300
    assert fp8.stored("layers.0.moe.router.centroids.weight", (16, 256)) == 2 * 16 * 256
    assert fp8.stored("norm.weight", (256,)) == 512


def test_a_configuration_on_disk_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(base()))
    by_file = planned(str(tmp_path / "config.json"), "--mtp", "1", capsys=capsys)
    by_folder = planned(str(tmp_path), "--mtp", "1", capsys=capsys)
    assert by_file["parameters"] == by_folder["parameters"]
    config: V3Config = huggingface.config(base(), mtp=1)
    assert sum(V3(config).state_dict()[n].numel() for n in parameters(config)) == sum(
        size
        for name, size in by_file["parameters"].items()
        if name != "active_per_token"  # type: ignore[attr-defined]
    )


def test_a_table_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["plan", "tiny", "--mesh", "pp=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tiny, dp=1, ep=1, pp=2, ranks: 2"
    assert sum(line.split()[:1] == ["bf16"] for line in lines) == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["plan", "nowhere"], "nowhere: does not exist"),
        (["plan", "671b", "--mesh", "dp=0"], "--mesh: must be a whole number >= 1, not '0'"),
        (["plan", "671b", "--mesh", "tp=2"], "'tp=2'"),
        (["plan", "671b", "--mesh", "dp=2,dp=2"], "may be given once"),
        (["plan", "tiny", "--mesh", "dp=3,ep=3"], "8 routed experts do not divide"),
        (["plan", "tiny", "--mesh", "dp=3,ep=2"], "3 data-parallel ranks do not divide"),
        (["plan", "tiny", "--mesh", "pp=4"], "4 stages of 3 layers"),
        (["plan", "671b", "--mtp", "-1"], "--mtp"),
        (["import", "nowhere", "out"], "nowhere: is not a folder"),
        (["export", "nowhere", "out"], "nowhere: does not exist"),
        (["export", ".", "out"], "holds neither manifest.json"),
        (["export", "x", "out", "--shard-size", "0"], "--shard-size"),
        (["export", "x", "out", "--shard-size", "5XB"], "--shard-size"),
        (["export", "x", "out", "--dtype", "fp8"], "--dtype"),
        (["fly"], "invalid choice: 'fly'"),
        ([], "COMMAND"),
    ],
)
def test_a_wrong_command_is_one_line_and_2(
    arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = tool.main(arguments)
    except SystemExit as stopped:  # argparse's way to end
        code = int(stopped.code or 0)
    shown = capsys.readouterr()
    assert (code, shown.out) == (2, "")
    assert shown.err.startswith("assay: ")
    assert shown.err.count("\n") == 1
    assert told in shown.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5KiB", 1536), ("300", 300), ("2 MB", 2 * 10**6)])
def test_sizes_are_read_as_written(text: str, size: int) -> None:
    assert tool._size(text) == size


def test_the_command_passes_words_output_and_code_along(capfd: pytest.CaptureFixture[str]) -> None:
    assert call(["model", "plan", "tiny", "-o", "json"]) == 0
    assert json.loads(capfd.readouterr().out)["schema"] == "assay.model-plan/1"
    assert call(["model", "plan", "tiny", "--mesh", "dp=3,ep=3"]) == 2
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "assay: tiny: ep: 8 routed experts do not divide among 3 ranks\n")


def test_help_is_the_tool_s() -> None:
    command = [sys.executable, "-P", "-m", "controller.cli.main", "model", "export", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "--shard-size" in done.stdout
