"""Samples survive a restart: every kind of corpus, both packings, and each packed window exactly once in an epoch."""

import json
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import KINDS, through_tokenizer, token_file
from ranks import SPEC, train

from agent.checkpoint.manifest import Manifest
from agent.checkpoint.storage import ShardRefused, read
from agent.training import engine as engine_module
from agent.training.corpus_cache import CorpusError
from agent.training.engine import Engine
from agent.training.recovery import check_same_job
from agent.training.sampling import shuffled, window_ids
from agent.training.spec import JobSpec, SpecError

SEED = st.integers(0, 2**64 - 1)
WORLD = 2


def spec(folder: Path, **changes: Any) -> JobSpec:
    document = {**SPEC, "storage": str(folder / "checkpoints"), "cache": str(folder / "cache"), **changes}
    return JobSpec.from_json(json.dumps(document))


def digests(engine: Engine, steps: range) -> list[str]:
    return [engine.batch(step, rank).digest for step in steps for rank in range(WORLD)]


@settings(max_examples=60, deadline=None)
@given(seed=SEED, epoch=st.integers(0, 2**64 - 1), total=st.integers(1, 120))
def test_an_epochs_order_is_a_permutation(seed: int, epoch: int, total: int) -> None:
    assert sorted(shuffled(seed, epoch, index, total) for index in range(total)) == list(range(total))


@given(seed=SEED, epoch=st.integers(0, 2**64 - 1), total=st.integers(1, 2**64 - 1), data=st.data())
def test_a_place_in_a_huge_corpus_is_in_range(seed: int, epoch: int, total: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, total - 1))
    assert 0 <= shuffled(seed, epoch, index, total) < total


def test_orders_differ_by_seed_and_epoch_and_spread_evenly() -> None:
    orders = [[shuffled(seed, epoch, i, 97) for i in range(97)] for seed in (1, 2) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    bins = [0] * 16
    for epoch in range(400):
        bins[shuffled(3, epoch, 5, 64) // 4] += 1
    chi_square = sum((n - 25) ** 2 / 25 for n in bins)
    assert 2 < chi_square < 45  # 15 degrees of freedom: beyond both ends lies less than 1 in 5,000


@pytest.mark.parametrize(
    ("arguments", "field"),
    [((-1, 0, 0, 9), "seed"), ((0, -1, 0, 9), "epoch"), ((0, 0, 9, 9), "index"), ((0, 0, 0, 0), "total")],
)
def test_places_out_of_range_are_named(arguments: tuple[int, int, int, int], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}"):
        shuffled(*arguments)


@settings(max_examples=40, deadline=None)
@given(seed=SEED, count=st.integers(1, 5), world=st.integers(1, 4), windows=st.integers(1, 40))
def test_every_window_comes_once_in_each_epoch(seed: int, count: int, world: int, windows: int) -> None:
    steps = -(-2 * windows // (count * world))
    drawn = [
        w
        for step in range(1, steps + 1)
        for rank in range(world)
        for w in window_ids(seed, step, rank, count, world, windows)
    ]
    for epoch in (0, 1):
        assert sorted(drawn[epoch * windows : (epoch + 1) * windows]) == list(range(windows))
    assert window_ids(seed, 0, 0, count, world, windows) == drawn[:count]


@pytest.mark.parametrize("pack", ["stream", "documents"])
@pytest.mark.parametrize("kind", ["default", *KINDS])
def test_a_new_process_goes_on_with_the_same_samples(kind: str, pack: str, tmp_path: Path) -> None:
    path, by, _ = KINDS[kind](tmp_path) if kind != "default" else (None, None, [])
    one = spec(
        tmp_path,
        corpus=path and str(path),
        tokenizer=by and str(by),
        vocab_size=304 if by else None,
        pack=pack,
    )
    whole = digests(Engine(one), range(1, 7))
    resumed = Engine(one)  # knows nothing of the steps before
    assert digests(resumed, range(4, 7)) == whole[3 * WORLD :]
    assert digests(resumed, range(1, 4)) == whole[: 3 * WORLD]
    assert len(set(whole)) > len(whole) // 2


def test_packed_windows_cover_each_position_once_in_an_epoch(tmp_path: Path) -> None:
    path = token_file(tmp_path).path
    engine = Engine(spec(tmp_path, corpus=str(path), pack="documents"))
    time, total = engine.preset.seq_len, len(engine.corpus)
    windows = (total - engine.preset.sample_len) // time + 1
    starts = [
        start for step in range(1, 2 * windows + 1) for rank in range(WORLD) for start in engine.samples(step, rank)
    ]
    epochs = len(starts) // windows
    assert epochs > 3
    positions = Counter(start + i for start in starts[: epochs * windows] for i in range(time))
    assert set(positions.values()) == {epochs}
    assert len(positions) == windows * time > total - engine.preset.sample_len
    stream = Engine(spec(tmp_path, corpus=str(path)))
    drawn = [
        start for step in range(1, 2 * windows + 1) for rank in range(WORLD) for start in stream.samples(step, rank)
    ]
    assert len(set(Counter(start + i for start in drawn for i in range(time)).values())) > 1  # drawn with replacement


def test_only_packed_samples_carry_documents(tmp_path: Path) -> None:
    path = token_file(tmp_path).path
    for pack in ("stream", "documents"):
        assert (Engine(spec(tmp_path, corpus=str(path), pack=pack)).batch(1, 0).documents is None) == (pack == "stream")


Reports = list[list[dict[str, Any]]]


def end(result: tuple[list[int | None], Reports]) -> tuple[str, str]:
    codes, reports = result
    assert codes == [0, 0], reports
    return reports[0][-1]["digest"], reports[0][-1]["chain"]


def test_a_run_resumed_from_a_checkpoint_ends_in_the_bits_of_the_whole_one(tmp_path: Path) -> None:
    """The chain covers every rank's sample ids of every step, the digest the state that they made."""
    path, by, _ = through_tokenizer(tmp_path)
    job: dict[str, Any] = {"corpus": str(path), "tokenizer": str(by), "vocab_size": 304, "pack": "documents"}
    whole = end(train(tmp_path / "whole", **job))
    train(tmp_path / "halves", steps=3, **job)
    for slots in (tmp_path / "halves").glob("*/job.slots"):
        slots.unlink()
    codes, reports = train(tmp_path / "halves", generation=2, **job)
    assert {entry["source"] for rank in reports for entry in rank if entry["report"] == "resumed"} == {"checkpoint"}
    assert end((codes, reports)) == whole
    _cursor_and_manifest(tmp_path / "whole")


def _cursor_and_manifest(folder: Path) -> None:
    """The cursor in the state says how many samples were taken, which is where the next step's begin."""
    for path in (folder / "checkpoints" / "job").glob("step-*"):
        manifest, arrays = read(path)
        assert (manifest.vocab_size, manifest.pack) == (304, "documents")
        assert arrays["meta"][1:3].tolist() == [manifest.step, manifest.step * WORLD * 4]


@pytest.mark.parametrize("changes", [{"pack": "documents"}, {"vocab_size": 272}, {"corpus": None}])
def test_a_checkpoint_of_other_data_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = token_file(tmp_path).path
    engine = Engine(spec(tmp_path, corpus=str(path)))
    names = ("job", "digest", "chain", "precision", "fingerprint")
    numbers = ("generation", "step", "parent_step", "world", "threads", "created")
    manifest = Manifest(
        preset="tiny",
        seed=7,
        corpus=engine.corpus.digest,
        tensors=(),
        vocab_size=264,
        pack="stream",
        **dict.fromkeys(names, ""),
        **dict.fromkeys(numbers, 0),
    )
    other = Engine(spec(tmp_path, **{"corpus": str(path), **changes}))
    for one, refused in ((engine, False), (other, True)):
        with pytest.raises(ShardRefused, match="pack") if refused else nullcontext():
            check_same_job(one, tmp_path, manifest)


def test_a_vocabulary_follows_into_model_and_layout(tmp_path: Path) -> None:
    path, by, _ = through_tokenizer(tmp_path)
    wide = Engine(spec(tmp_path, corpus=str(path), tokenizer=str(by), vocab_size=304))
    plain = Engine(spec(tmp_path, corpus=str(path)))
    assert wide.model.head.weight.shape[0] == wide.model.embedding.shape[0] == 304
    assert wide.layout.flat - plain.layout.flat == 2 * 40 * 128


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"vocab_size": 264}, "has id 2.. at token .*train with --vocab-size 300 or more"),
        (
            {"vocab_size": 304, "corpus_digest": "0" * 64},
            "is not the one that the job was given: the job's has digest 0000",
        ),
    ],
)
def test_a_rank_refuses_a_corpus_that_does_not_fit(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    path, by, _ = through_tokenizer(tmp_path)
    with pytest.raises(CorpusError, match=told):
        Engine(spec(tmp_path, corpus=str(path), tokenizer=str(by), **changes))


def test_without_the_scan_an_id_outside_would_reach_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: then the run would start, and end in its first step."""
    path, by, _ = through_tokenizer(tmp_path)
    monkeypatch.setattr("agent.training.tokens.Tokens.check_vocabulary", lambda self, size: None)
    engine = Engine(spec(tmp_path, corpus=str(path), tokenizer=str(by)))
    with pytest.raises(ValueError, match="outside the vocabulary"):
        engine.model.loss(engine.batch(1, 0).tokens)


def test_a_specification_from_before_these_choices_has_the_old_ones(tmp_path: Path) -> None:
    one = spec(tmp_path)
    assert (one.tokenizer, one.vocab_size, one.pack, one.corpus_digest) == (None, None, "stream", None)
    assert JobSpec.from_json(one.to_json()) == one
    assert engine_module.preset_of(one).config.vocab_size == 264


@pytest.mark.parametrize(("field", "value"), [("pack", "loose"), ("vocab_size", 0)])
def test_a_wrong_choice_is_named(tmp_path: Path, field: str, value: object) -> None:
    with pytest.raises(SpecError, match=field):
        spec(tmp_path, **{field: value})
