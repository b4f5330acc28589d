"""Samples are a pure function of their coordinates, batches are the corpus's bytes, and unusable corpora say why."""

import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.training import corpus_cache
from agent.training.data import BatchCorrupted, Corpus, CorpusError, _tokens_digest, sample_ids
from agent.training.sampling import philox

WORD = st.integers(0, 2**32 - 1)
SEED = st.integers(0, 2**64 - 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "text"
    (root / "b").mkdir(parents=True)
    (root / "z.txt").write_bytes(b"last ")
    (root / "b" / "one.txt").write_bytes(b"middle ")
    (root / "a.txt").write_bytes(b"first ")
    (root / ".hidden").write_bytes(b"no")
    return root


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    path = tmp_path / "bytes.bin"
    path.write_bytes(bytes(range(256)) * 20)
    return Corpus.open(path, tmp_path / "cache")


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # known answers published with Random123 (kat_vectors, philox4x32 10)
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(
    counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, int, int, int]
) -> None:
    assert philox(counter, key) == words


@given(seed=SEED, step=WORD, rank=WORD, microbatch=WORD, count=st.integers(0, 9), total=st.integers(1, 2**63))
def test_ids_are_in_range_and_have_no_history(
    seed: int, step: int, rank: int, microbatch: int, count: int, total: int
) -> None:
    ids = sample_ids(seed, step, rank, microbatch, count, total)
    assert len(ids) == count
    assert all(0 <= i < total for i in ids)
    sample_ids(seed ^ 1, step, rank, microbatch, 3, total)
    assert sample_ids(seed, step, rank, microbatch, count, total) == ids
    assert sample_ids(seed, step, rank, microbatch, count + 2, total)[:count] == ids


@given(seed=SEED, step=WORD, rank=WORD, microbatch=WORD, which=st.integers(0, 3))
def test_every_coordinate_matters(seed: int, step: int, rank: int, microbatch: int, which: int) -> None:
    coordinates = [seed, step, rank, microbatch]
    here = sample_ids(*coordinates, 2, 2**63)
    coordinates[which] ^= 1
    assert sample_ids(*coordinates, 2, 2**63) != here


def test_ids_cover_the_corpus_evenly() -> None:
    bins = [0] * 64
    for step in range(1, 501):
        for rank in range(2):
            for i in sample_ids(7, step, rank, 0, 8, 6400):
                bins[i // 100] += 1
    expected = 500 * 2 * 8 / 64
    chi_square = sum((n - expected) ** 2 / expected for n in bins)
    assert 30 < chi_square < 110  # 63 degrees of freedom: both ends lie beyond 4 standard deviations


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ((-1, 1, 0, 0, 1, 9), "seed"),
        ((2**64, 1, 0, 0, 1, 9), "seed"),
        ((0, 2**32, 0, 0, 1, 9), "step"),
        ((0, 1, -1, 0, 1, 9), "rank"),
        ((0, 1, 0, 2**32, 1, 9), "microbatch"),
        ((0, 1, 0, 0, -1, 9), "count"),
        ((0, 1, 0, 0, 1, 0), "total"),
    ],
)
def test_coordinates_out_of_range_are_named(arguments: tuple[int, int, int, int, int, int], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}"):
        sample_ids(*arguments)


@settings(max_examples=50, deadline=None)
@given(length=st.integers(1, 300), data=st.data())
def test_a_batch_is_the_bytes_at_its_ids(
    tmp_path_factory: pytest.TempPathFactory, length: int, data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("corpus")
    content = data.draw(st.binary(min_size=length, max_size=length + 50).filter(any))
    (root / "file").write_bytes(content)
    corpus = Corpus.open(root / "file", root / "cache")
    assert len(corpus) == len(content)
    total = corpus.total(length)
    ids = data.draw(st.lists(st.integers(0, total - 1), min_size=1, max_size=5))
    batch = corpus.batch(ids, length)
    assert batch.tokens.dtype == torch.int64
    assert [bytes(row) for row in batch.tokens.tolist()] == [content[i : i + length] for i in ids]
    assert batch.verify() is batch.tokens


@given(row=st.integers(0, 2), column=st.integers(0, 39), bit=st.integers(0, 62))
def test_any_flipped_bit_of_a_token_is_found(corpus_40: Corpus, row: int, column: int, bit: int) -> None:
    batch = corpus_40.batch([3, 400, 77], 40)
    batch.verify()
    batch.tokens[row, column] ^= 1 << bit
    with pytest.raises(BatchCorrupted, match="77") as caught:
        batch.verify()
    assert caught.value.ids == (3, 400, 77)
    assert caught.value.expected == batch.digest != caught.value.found


@pytest.fixture(scope="module")
def corpus_40(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    root = tmp_path_factory.mktemp("forty")
    (root / "file").write_bytes(bytes(range(256)) * 4)
    return Corpus.open(root / "file", root / "cache")


def test_a_digest_taken_from_the_tokens_themselves_would_find_nothing(corpus: Corpus) -> None:
    batch = corpus.batch([3, 400], 40)
    batch.tokens[1, 5] ^= 1
    blind = replace(batch, digest=_tokens_digest(batch.ids, batch.tokens))
    assert blind.verify() is batch.tokens
    with pytest.raises(BatchCorrupted):
        batch.verify()


def test_the_digest_tells_apart_samples_and_shapes(corpus: Corpus) -> None:
    digests = {corpus.batch(ids, n).digest for ids, n in [([0], 16), ([256], 16), ([0, 0], 16), ([0], 32), ([0, 8], 8)]}
    assert len(digests) == 5  # samples 0 and 256 hold the same bytes


@pytest.mark.parametrize("ids", [[], [-1], [5120 - 16 + 1], [0, 10**9]])
def test_ids_outside_the_corpus_are_refused(corpus: Corpus, ids: list[int]) -> None:
    with pytest.raises(ValueError, match="ids"):
        corpus.batch(ids, 16)


def test_a_folder_is_its_files_by_relative_path(folder: Path, tmp_path: Path) -> None:
    corpus = Corpus.open(folder, tmp_path / "cache")
    batch = corpus.batch([0], len(corpus))
    assert bytes(batch.tokens[0].tolist()) == b"first middle last "


def test_the_digest_is_of_names_and_contents_only(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    digest = Corpus.open(folder, cache).digest
    assert Corpus.open(folder, cache).digest == digest
    assert Corpus.open(str(folder), tmp_path / "other cache").digest == digest
    moved = folder.rename(tmp_path / "moved")
    os.utime(moved / "a.txt", (1, 1))
    assert Corpus.open(moved, cache).digest == digest
    (moved / "a.txt").write_bytes(b"First ")
    assert Corpus.open(moved, cache).digest != digest
    (moved / "a.txt").write_bytes(b"first ")
    assert Corpus.open(moved, cache).digest == digest
    (moved / "a.txt").rename(moved / "aa.txt")
    assert Corpus.open(moved, cache).digest != digest


def test_an_open_corpus_does_not_follow_its_files(folder: Path, tmp_path: Path) -> None:
    corpus = Corpus.open(folder, tmp_path / "cache")
    (folder / "a.txt").write_bytes(b"other ")
    assert bytes(corpus.batch([0], 6).tokens[0].tolist()) == b"first "


@pytest.mark.parametrize("damage", ["blob", "note", "note_digest", "lost"])
def test_a_damaged_cache_is_built_anew(folder: Path, tmp_path: Path, damage: str) -> None:
    cache = tmp_path / "cache"
    whole = Corpus.open(folder, cache)
    digest, (blob,), (note,) = whole.digest, list(cache.glob("*.bin")), list(cache.glob("*.json"))
    if damage == "blob":
        content = bytearray(blob.read_bytes())
        content[3] ^= 4
        blob.write_bytes(content)
    elif damage == "note":
        note.write_text("{")
    elif damage == "note_digest":
        note.write_text(note.read_text().replace(digest, "0" * 64))
    else:
        blob.unlink()
    again = Corpus.open(folder, cache)
    assert again.digest == digest
    assert bytes(again.batch([0], len(again)).tokens[0].tolist()) == b"first middle last "


def test_without_the_hash_check_a_damaged_cache_would_be_used(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    digest = Corpus.open(folder, cache).digest
    (blob,) = cache.glob("*.bin")
    blob.write_bytes(b"First middle last ")
    monkeypatch.setattr(corpus_cache, "_noted_digest", lambda _blob, _note: digest)
    assert bytes(Corpus.open(folder, cache).batch([0], 5).tokens[0].tolist()) == b"First"


def test_many_may_open_at_once(folder: Path, tmp_path: Path) -> None:
    cache, digests = tmp_path / "cache", []
    threads = [threading.Thread(target=lambda: digests.append(Corpus.open(folder, cache).digest)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(digests) == 8
    assert len(set(digests)) == 1
    assert sorted(p.suffix for p in cache.iterdir()) == [".bin", ".json"]


def test_the_default_corpus_is_pythons_own_sources(tmp_path: Path) -> None:
    first = Corpus.open(None, tmp_path)
    assert len(first) > 5_000_000
    begin = time.perf_counter()
    second = Corpus.open(None, tmp_path)
    assert time.perf_counter() - begin < 2.0  # 0.1 s when nothing else runs; far from reading every file again
    assert second.digest == first.digest
    text = bytes(first.batch([0], 4000).tokens[0].tolist())
    assert b"import" in text
    assert b"site-packages" not in b"".join(note.read_bytes() for note in tmp_path.glob("*.json"))


def unusable(kind: str, tmp_path: Path) -> Path:
    path = tmp_path / "thing"
    if kind == "an empty file":
        path.touch()
    elif kind == "an empty folder":
        path.mkdir()
    elif kind == "a folder of empty files":
        path.mkdir()
        (path / "a").touch()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "below a file":
        path.touch()
        path = path / "x"
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("nothing", "does not exist"),
        ("an empty file", "is empty"),
        ("an empty folder", "is empty"),
        ("a folder of empty files", "is empty"),
        ("a pipe", "neither a file nor a folder"),
        ("below a file", "cannot be read: Not a directory"),
    ],
)
def test_an_unusable_corpus_says_why_in_one_line(tmp_path: Path, kind: str, reason: str) -> None:
    path = unusable(kind, tmp_path)
    with pytest.raises(CorpusError, match=reason) as caught:
        Corpus.open(path, tmp_path / "cache")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unreadable_file_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Path.open

    def refuse(path: Path, mode: str = "r") -> object:
        if path.name == "one.txt":
            raise PermissionError(13, "Permission denied")
        return plain(path, mode)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CorpusError, match=r"one\.txt cannot be read: Permission denied"):
        Corpus.open(folder, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_too_short_a_corpus_says_so(corpus: Corpus) -> None:
    assert corpus.total(5120) == 1
    with pytest.raises(CorpusError, match="too short: 5120 tokens, one sample needs 5121"):
        corpus.total(5121)
