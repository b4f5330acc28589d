"""`assay model generate`: text from whatever a model lies in on disk, and how it complains."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from on_disk import checkpoint, saved
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from agent.model import PRESETS, V3, tool
from agent.model import generate as command
from agent.model.decoding import Decoder, Greedy, Sampling, generate
from agent.model.presets import BYTE_VOCAB
from controller.cli.main import call

TINY = replace(PRESETS["tiny"].config, initializer_range=0.1)  # large weights: the text is not one byte for ever


def made(vocab_size: int = BYTE_VOCAB) -> V3:
    model = V3(replace(TINY, vocab_size=vocab_size))
    model.initialise(2)
    return model


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model") / "tiny", made())


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[dict[str, Any], str]:
    """The JSON document, and stderr."""
    assert tool.main(["generate", *map(str, arguments), "-o", "json"]) == 0
    shown = capsys.readouterr()
    document: dict[str, Any] = json.loads(shown.out)
    assert document["schema"] == "assay.model-generate/1"
    return document, shown.err


def test_bytes_after_a_prompt_with_and_without_drafts(model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drafting, spoken = told(capsys, model_file, "--prompt", "déf f(", "--tokens", 30)
    wanted = generate(made(), list("déf f(".encode()), 30, Greedy())
    assert drafting["tokens"] == wanted.tokens
    assert drafting["text"] == bytes(i for i in wanted.tokens if i < 256).decode(errors="replace")
    assert drafting["same_bits"] is True
    assert drafting["drafted"] == wanted.drafted > 0
    assert f"of {wanted.drafted} drafts accepted, {wanted.forwards_per_token:.3f} forwards a token, " in spoken
    plain, spoken = told(capsys, model_file, "--prompt", "déf f(", "--tokens", 30, "--no-draft")
    assert plain["tokens"] == drafting["tokens"]
    assert (plain["acceptance"], plain["forwards_per_token"], plain["same_bits"]) == (None, 1.0, None)
    assert spoken.startswith("no drafts, 1.000 forwards a token, ")


def test_drawn_text_depends_on_its_seed(model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--prompt", "x", "--tokens", 20, "--temperature", 0.9]
    texts = [told(capsys, model_file, *options, "--seed", seed)[0]["tokens"] for seed in (4, 4, 5)]
    assert texts[0] == texts[1] == generate(made(), [120], 20, Sampling(0.9, 4)).tokens
    assert texts[0] != texts[2]


def test_a_table_is_the_text_alone_and_steers_no_terminal(
    model_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = replace(generate(made(), [1], 1, Greedy()), tokens=[*b"a\n\tb\x1b[2J", 260])
    monkeypatch.setattr(command, "generated", lambda *_, **__: said)
    assert tool.main(["generate", str(model_file), "--prompt", "x"]) == 0
    assert capsys.readouterr().out == "a\n\tb\\x1b[2J\n"


def test_places_that_matter_are_told(
    model_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Decoder, "rows_agree", lambda self, tokens: False)
    document, spoken = told(capsys, model_file, "--prompt", "x", "--tokens", 3)
    assert document["same_bits"] is False
    assert "last bits depend on its place on this machine" in spoken


def letters(path: Path, ids: int) -> Path:
    """A tokenizer.json of so many ids whose first are letters."""
    vocabulary = {chr(ord("a") + i) if i < 26 else f"<{i}>": i for i in range(ids)}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.Fuse()
    made.save(str(path))
    return path


def test_a_checkpoint_is_read_with_the_tokenizer_of_its_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path / "checkpoints", made(40))
    tokenizer = letters(tmp_path / "letters.json", 38)
    wanted = generate(made(40), [7, 8], 12, Greedy())
    text = Tokenizer.from_file(str(tokenizer)).decode(wanted.tokens)
    assert tool.main(["generate", str(folder), "--prompt", "hi"]) == 2  # nobody says which tokenizer
    assert "has 40 ids, which are not bytes: name its tokenizer.json by --tokenizer" in capsys.readouterr().err
    for arguments in (["--tokenizer", tokenizer], []):
        document, _ = told(capsys, folder, "--prompt", "hi", "--tokens", 12, *arguments)
        assert (document["tokens"], document["text"]) == (wanted.tokens, text)
        (tmp_path / "run.json").write_text(json.dumps({"spec": {"tokenizer": str(tokenizer)}}))


def test_a_checkpoint_of_bytes_needs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"spec": {"tokenizer": None}}))
    folder = checkpoint(tmp_path / "checkpoints", made())
    document, _ = told(capsys, folder, "--prompt", "hi", "--tokens", 5)
    assert document["tokens"] == generate(made(), list(b"hi"), 5, Greedy()).tokens


def test_a_published_folder_is_read_with_the_tokenizer_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = saved(tmp_path / "own", made(40))
    assert tool.main(["export", str(source), str(tmp_path / "hf")]) == 0
    letters(tmp_path / "hf" / "tokenizer.json", 38)
    capsys.readouterr()
    document, _ = told(capsys, tmp_path / "hf", "--prompt", "hi", "--tokens", 12)
    assert document["tokens"] == generate(made(40), [7, 8], 12, Greedy()).tokens
    assert document["drafted"] > 0  # the MTP module is in the folder too


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--prompt", ""], "--prompt: at least one token"),
        (["--prompt", "x", "--tokens", "0"], "--tokens: must be a whole number >= 1"),
        (["--prompt", "x", "--temperature", "-1"], "--temperature: must be a number >= 0"),
        (["--prompt", "x", "--temperature", "nan"], "--temperature: must be a number >= 0"),
        (["--prompt", "x", "--seed", "one"], "--seed"),
        (["--prompt", "x", "--tokenizer", "nowhere.json"], "nowhere.json cannot be read"),
        (["--prompt", "x", "--tokenizer", "LARGE"], "knows 300 ids, the model 264"),
        (["--prompt", "x", "--tokenizer", "MODEL"], "is no tokenizer.json"),
        ([], "--prompt"),
    ],
)
def test_a_wrong_command_is_one_line_and_2(
    model_file: Path, tmp_path: Path, arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    named = {"LARGE": letters(tmp_path / "large.json", 300), "MODEL": model_file}
    try:
        code = tool.main(["generate", str(model_file), *(str(named.get(word, word)) for word in arguments)])
    except SystemExit as stopped:  # argparse's way to end
        code = int(stopped.code or 0)
    shown = capsys.readouterr()
    assert (code, shown.out) == (2, "")
    assert shown.err.startswith("assay: ")
    assert shown.err.count("\n") == 1
    assert reason in shown.err


def test_a_damaged_checkpoint_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path, made())
    shard = folder / "shard-0.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1000] ^= 1
    shard.write_bytes(content)
    assert tool.main(["generate", str(folder), "--prompt", "x"]) == 2
    assert "its manifest says" in capsys.readouterr().err


def test_the_command_has_it(model_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert call(["model", "generate", str(model_file), "--prompt", "x", "--tokens", "4", "-o", "json"]) == 0
    shown = capfd.readouterr()
    assert json.loads(shown.out)["tokens"] == generate(made(), [120], 4, Greedy()).tokens
    assert "tokens/s" in shown.err
