"""Every kind of corpus gives its ids, documents and checked batches; what cannot be trained on says so in one line."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import KINDS, TEXTS, folder, one_file, through_tokenizer, token_file, tokenizer
from tokenizers import Tokenizer

from agent.training import corpora, tokenised
from agent.training import tokens as tokens_module
from agent.training.corpora import open_tokens
from agent.training.corpus_cache import CorpusError
from agent.training.data import BatchCorrupted, Corpus
from agent.training.token_file import DTYPES, Writer


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_its_ids_and_documents(kind: str, tmp_path: Path) -> None:
    path, by, documents = KINDS[kind](tmp_path)
    tokens = open_tokens(path, tmp_path / "cache", by)
    ids = [i for document in documents for i in document]
    assert tokens.ids.tolist() == ids
    assert [tokens.ids[a:b].tolist() for a, b in zip(tokens.documents, tokens.documents[1:], strict=False)] == documents
    assert (tokens.low, tokens.high) == (min(ids), max(ids))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kinds_batches_are_checked_against_it(kind: str, tmp_path: Path) -> None:
    path, by, documents = KINDS[kind](tmp_path)
    corpus = Corpus.open(path, tmp_path / "cache", by)
    batch = corpus.batch([0, 650, 3], 64, documents=True)
    ids = [i for document in documents for i in document]
    owners = [number for number, document in enumerate(documents) for _ in document]
    assert batch.documents is not None
    for row, numbers, start in zip(batch.tokens, batch.documents, (0, 650, 3), strict=True):
        assert row.tolist() == ids[start : start + 64]
        same = torch.tensor(owners[start : start + 64])
        assert torch.equal(numbers[:, None] == numbers, same[:, None] == same)
    for damaged in (batch.tokens, batch.documents):
        for bit in (0, 9, 40):
            damaged[1, 5] ^= 1 << bit
            with pytest.raises(BatchCorrupted):
                batch.verify()
            damaged[1, 5] ^= 1 << bit
    assert batch.verify() is batch.tokens


def test_a_token_file_has_three_names(tmp_path: Path) -> None:
    path = token_file(tmp_path).path
    digests = {open_tokens(Path(f"{path}{end}"), tmp_path / "c").digest for end in ("", ".bin", ".idx")}
    assert len(digests) == 1


def test_what_exists_under_its_own_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder beside PREFIX.bin or with a name like one, the folder one stands in, and a .bin that has no .idx."""
    path = token_file(tmp_path).path
    path.mkdir()
    (path / "a").write_text("text")
    assert bytes(open_tokens(path, tmp_path / "c").ids) == b"text"
    folder(tmp_path).rename(tmp_path / "texts.idx")
    assert len(open_tokens(tmp_path / "texts.idx", tmp_path / "c").documents) == len(TEXTS) + 1
    monkeypatch.chdir(folder(tmp_path))
    assert len(open_tokens(Path(), tmp_path / "c").documents) == len(TEXTS) + 1
    lone = tmp_path / "lone.bin"
    lone.write_bytes(b"\1\2")
    assert open_tokens(lone, tmp_path / "c").ids.tolist() == [1, 2]


def test_the_digest_follows_contents_and_documents(tmp_path: Path) -> None:
    path = token_file(tmp_path).path
    digest = open_tokens(path, tmp_path / "c").digest
    assert open_tokens(path, tmp_path / "other").digest == digest
    with Writer(tmp_path / "split", DTYPES[8]) as writer:
        ids = open_tokens(path, tmp_path / "c").ids
        writer.add(ids[:500])
        writer.add(ids[500:])
    split = open_tokens(tmp_path / "split", tmp_path / "c")
    assert split.ids.tolist() == ids.tolist()
    assert split.digest != digest


def test_a_token_file_is_read_once_and_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []
    whole = corpora.scan
    monkeypatch.setattr(corpora, "scan", lambda file: seen.append(file.data) or whole(file))
    path = token_file(tmp_path).path
    first = open_tokens(path, tmp_path / "c")
    assert open_tokens(path, tmp_path / "c").digest == first.digest
    assert len(seen) == 1
    content = bytearray(Path(f"{path}.bin").read_bytes())
    content[0] ^= 1
    Path(f"{path}.bin").write_bytes(content)
    assert open_tokens(path, tmp_path / "c").digest != first.digest
    assert len(seen) == 2


def test_tokenised_text_is_cached_by_the_digests_of_text_and_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Path] = []
    whole = tokenised._build
    monkeypatch.setattr(tokenised, "_build", lambda *a: built.append(a[2]) or whole(*a))
    path, by, _ = through_tokenizer(tmp_path)
    assert by is not None
    cache = tmp_path / "cache"
    first = open_tokens(path, cache, by)
    moved = by.rename(tmp_path / "moved.json")
    assert open_tokens(path, cache, moved).digest == first.digest
    assert len(built) == 1
    prefix = built[0]
    for damaged in (f"{prefix}.bin", f"{prefix}.idx", f"{prefix}.json"):
        content = bytearray(Path(damaged).read_bytes())
        content[-3] ^= 1
        Path(damaged).write_bytes(content)
        assert open_tokens(path, cache, moved).digest == first.digest
    assert len(built) == 4
    (path / "0.txt").write_text("another text\n" * 9)
    assert open_tokens(path, cache, moved).digest != first.digest
    changed = json.loads(moved.read_text())
    changed["post_processor"] = None
    moved.write_text(json.dumps(changed))
    open_tokens(path, cache, moved)
    assert len(set(built)) == 3


def test_without_the_note_a_damaged_token_file_would_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the above."""
    path, by, documents = through_tokenizer(tmp_path)
    open_tokens(path, tmp_path / "cache", by)
    (data,) = (tmp_path / "cache").glob("tokens-*.bin")
    data.write_bytes(b"\7\0" + data.read_bytes()[2:])
    monkeypatch.setattr(tokenised, "_noted", lambda prefix, source, size: tokenised._opened(prefix, source, size))
    assert open_tokens(path, tmp_path / "cache", by).ids[:2].tolist() == [7, documents[0][1]]


def test_an_unfinished_token_file_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, by, _ = through_tokenizer(tmp_path)

    def torn(self: Writer, ids: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "add", torn)
        with pytest.raises(KeyboardInterrupt):
            open_tokens(path, tmp_path / "cache", by)
    assert not list((tmp_path / "cache").glob("*tokens*"))
    assert open_tokens(path, tmp_path / "cache", by).high > 255


def test_truncation_and_padding_of_the_file_do_not_cut_documents(tmp_path: Path) -> None:
    path, by, documents = through_tokenizer(tmp_path)
    assert by is not None
    assert Tokenizer.from_file(str(by)).truncation["max_length"] == 8
    assert np.diff(open_tokens(path, tmp_path / "cache", by).documents).tolist() == [len(d) for d in documents]


def test_a_tokenizers_vocabulary_counts_its_largest_id(tmp_path: Path) -> None:
    made = tokenizer(tmp_path / "t.json")
    assert tokenised.vocabulary(made) == 300
    made.add_tokens(["extra"])
    assert tokenised.vocabulary(made) == 301


def test_large_texts_come_in_several_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, by, documents = through_tokenizer(tmp_path)
    whole = open_tokens(path, tmp_path / "one", by)
    monkeypatch.setattr(tokenised, "_BATCH", len(TEXTS[0]) + 1)
    assert open_tokens(path, tmp_path / "two", by).digest == whole.digest
    assert len(whole.documents) == len(documents) + 1


def test_ids_outside_the_vocabulary_are_named_with_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "_CHUNK", 2)
    with Writer(tmp_path / "x", DTYPES[4]) as writer:
        writer.add([1, 2, 3])
        writer.add([263, 264, 9])
    tokens = open_tokens(tmp_path / "x", tmp_path / "c")
    tokens.check_vocabulary(265)
    told = r"x has id 264 at token 4 \(document 1\), outside the vocabulary of 264: train with --vocab-size 265 or more"
    with pytest.raises(CorpusError, match=told):
        tokens.check_vocabulary(264)
    with Writer(tmp_path / "y", DTYPES[4]) as writer:
        writer.add([5, -1])
    with pytest.raises(CorpusError, match=r"id -1 at token 1 .*no vocabulary has negative ids"):
        open_tokens(tmp_path / "y", tmp_path / "c").check_vocabulary(264)


def test_a_tokenizer_asks_for_all_of_its_ids(tmp_path: Path) -> None:
    path, by, _ = through_tokenizer(tmp_path)
    tokens = replace(open_tokens(path, tmp_path / "c", by), vocabulary=5000)
    with pytest.raises(CorpusError, match="train with --vocab-size 5000 or more"):
        tokens.check_vocabulary(264)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "is no tokenizer.json"),
        (b"\xff\xfe\x00", "is no tokenizer.json"),
        (b"{}", "is no tokenizer.json: Cannot instantiate"),
        (b'{"version":"1.0","model":{"type":"BPE","vocab":{},"merges":[]}}', "gave no token"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_named(tmp_path: Path, content: bytes | None, told: str) -> None:
    by = tmp_path / "t.json"
    if content is not None:
        by.write_bytes(content)
    with pytest.raises(CorpusError, match=told) as caught:
        open_tokens(folder(tmp_path), tmp_path / "cache", by)
    assert "\n" not in str(caught.value)


@settings(max_examples=40, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_tokenizer_cut_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, share: float) -> None:
    by = tmp_path_factory.mktemp("cut") / "t.json"
    tokenizer(by)
    content = by.read_bytes()
    by.write_bytes(content[: int(share * len(content.rstrip()))])
    with pytest.raises(CorpusError, match=r"is no tokenizer\.json"):
        tokenised.load(by)


def test_text_that_is_not_utf8_is_named_with_its_byte(tmp_path: Path) -> None:
    path, by, _ = through_tokenizer(tmp_path)
    (path / "1.txt").write_bytes(b"plain \xe9t\xe9")
    with pytest.raises(CorpusError, match=r"file 1\.txt is not UTF-8 text: byte 6 is 0xe9"):
        open_tokens(path, tmp_path / "cache", by)
    assert not list((tmp_path / "cache").glob("*tokens*"))
    assert open_tokens(path, tmp_path / "cache").high == 0xE9  # as bytes it can be trained on


def test_a_tokenizer_is_not_for_a_token_file(tmp_path: Path) -> None:
    tokenizer(tmp_path / "t.json")
    with pytest.raises(CorpusError, match="holds ids already"):
        open_tokens(token_file(tmp_path).path, tmp_path / "c", tmp_path / "t.json")


def test_half_a_token_file_is_not_taken_for_something_else(tmp_path: Path) -> None:
    path = token_file(tmp_path).path
    Path(f"{path}.bin").unlink()
    for name in (path, Path(f"{path}.idx")):
        with pytest.raises(CorpusError, match=r"\.bin does not exist"):
            open_tokens(name, tmp_path / "c")


def test_the_library_is_loaded_only_when_it_is_used(tmp_path: Path) -> None:
    path = one_file(tmp_path).path
    script = (
        "import sys\nfrom pathlib import Path\nfrom agent.training.corpora import open_tokens\n"
        f"open_tokens(Path({str(path)!r}), Path({str(tmp_path / 'c')!r}))\n"
        "sys.exit(bool({'tokenizers', 'torch'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
