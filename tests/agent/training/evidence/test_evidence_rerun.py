"""A held step's evidence suffices to compute it again, and only it: other weights, samples or rows are told apart."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import SPEC, train

from agent.checkpoint.manifest import TensorEntry
from agent.checkpoint.storage import Storage, tensor_digest
from agent.training.engine import Engine
from agent.training.evidence import tool
from agent.training.evidence.bundle import Bundle, read, write
from agent.training.evidence.leave import Left, leave, tidy
from agent.training.fingerprint import described
from agent.training.held import Held, Member
from agent.training.layout import State
from agent.training.replay import recompute
from agent.training.spec import EvidenceSettings, JobSpec
from diagnostics.verify.votes import Vote, decide

STEP, RANK = 3, 1
WRONG = "00000000deadbeef"
Document = dict[str, Any]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evidence")
    (folder / "text").write_text("".join(f"line {i} of what is trained on\n" for i in range(900)))
    (folder / "other").write_text("".join(f"line {i} of something else\n" for i in range(900)))
    return folder


def an_engine(home: Path, **changes: Any) -> Engine:
    paths = {"storage": str(home / "checkpoints"), "cache": str(home / "cache"), "corpus": str(home / "text")}
    return Engine(JobSpec.from_json(json.dumps({**SPEC, **paths, **changes})))


def bound(engine: Engine) -> State:
    """The state before the first step, which the engine computes from."""
    made = engine.layout.view(memoryview(bytearray(engine.layout.nbytes)))
    engine.initialise(made)
    engine.bind(made)
    return made


def ballot(engine: Engine) -> list[Vote]:
    """A run that went wrong, and two replays that did not."""
    gradients = torch.zeros(engine.layout.flat)
    right = recompute(engine, gradients, STEP, RANK, Member("n1", "cpu-n1", 1), "suspect")
    original = replace(right, role="original", digest=WRONG, alarm=True)
    return [original, right, replace(right, role="peer", node="n0", device="cpu-n0")]


def left_by(engine: Engine, state: State, cast: list[Vote], folder: Path, **settings: Any) -> Left:
    engine.spec = replace(engine.spec, evidence=EvidenceSettings(str(folder), **settings))
    held = Held(1, STEP, 1, engine.compute(STEP, RANK, 1, engine.gradients), WRONG, state)
    return leave(engine, held, RANK, Member("n1", "cpu-n1", 1), cast, decide(cast), ())


@pytest.fixture(scope="module")
def engine(home: Path) -> Engine:
    """The suspect's."""
    return an_engine(home)


@pytest.fixture(scope="module")
def state(engine: Engine) -> State:
    return bound(engine)


@pytest.fixture(scope="module")
def votes(engine: Engine, state: State) -> list[Vote]:
    return ballot(engine)


@pytest.fixture(scope="module")
def bundle(home: Path, engine: Engine, state: State, votes: list[Vote]) -> Callable[..., Left]:
    """Leaves evidence of the held step with some settings; the bundle lies in home / NAME / job."""

    def made(name: str, ballots: list[Vote] | None = None, **settings: Any) -> Left:
        return left_by(engine, state, votes if ballots is None else ballots, home / name, **settings)

    return made


@pytest.fixture(scope="module")
def whole(home: Path, bundle: Callable[..., Left]) -> Path:
    return home / "whole" / "job" / bundle("whole").name


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Document]:
    code = tool.main([str(argument) for argument in arguments])
    return code, json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = tool.main([str(argument) for argument in arguments])
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    return code, told.err


def test_the_computation_is_the_voters_and_not_the_runs(whole: Path, votes: list[Vote], capsys: Any) -> None:
    code, document = run(capsys, whole, "--times", "2")
    assert (code, document["upholds"], document["verdict"]) == (0, True, "CORRUPT")
    assert document["digests"] == [votes[1].digest] * 2
    assert [(vote["role"], vote["agrees"]) for vote in document["votes"]] == [
        ("original", False),
        ("suspect", True),
        ("peer", True),
    ]


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"precision": "fp8", "pack": "documents"}])
def test_other_precisions_and_packed_documents_are_computed_again_alike(
    home: Path, changes: dict[str, str], capsys: Any
) -> None:
    engine = an_engine(home, **changes)
    state = bound(engine)
    cast = ballot(engine)
    folder = home / changes["precision"]
    code, document = run(capsys, folder / "job" / left_by(engine, state, cast, folder).name)
    assert (code, document["digest"]) == (0, cast[1].digest)


def test_coordinates_and_sources_are_in_it(whole: Path, engine: Engine) -> None:
    facts = read(whole).facts
    assert (facts["job"], facts["step"], facts["rank"], facts["generation"], facts["attempt"]) == ("job", 3, 1, 1, 1)
    assert facts["samples"]["ids"] == engine.samples(STEP, RANK)
    assert facts["corpus"]["digest"] == engine.corpus.digest
    assert facts["spec"]["precision"] == "fp32"
    assert facts["model"]["hidden_size"] == engine.preset.config.hidden_size
    assert facts["state"]["step"] == STEP - 1
    assert set(facts["fingerprint"]) == {"isa", "threads", "torch"}
    assert facts["left_out"] == {}


def test_other_weights_give_other_bits(whole: Path, tmp_path: Path, capsys: Any) -> None:
    """The negative control: the replay computes from what is in the bundle."""
    found = read(whole)
    name = next(name for name in found.parts["weights"] if name.endswith("norm.weight"))
    found.parts["weights"][name][0] += np.float32(0.01)
    write(tmp_path, whole.name, found)
    code, document = run(capsys, tmp_path / whole.name)
    assert (code, document["upholds"]) == (1, False)
    assert not any(vote["agrees"] for vote in document["votes"])


def test_what_agrees_with_the_blamed_alone_upholds_nothing(
    home: Path, bundle: Callable[..., Left], votes: list[Vote], capsys: Any
) -> None:
    """Here the run was right, and those who outvoted it were not."""
    run_, suspect, peer = votes
    third = replace(suspect, role="third", node="n2", device="cpu-n2", digest=WRONG)
    ballots = [replace(run_, digest=suspect.digest), suspect, replace(peer, digest=WRONG), third]
    left = bundle("outvoted", ballots)
    code, document = run(capsys, home / "outvoted" / "job" / left.name)
    assert (document["verdict"], document["blamed_device"]) == ("CORRUPT", "cpu-n1")
    assert (code, document["upholds"]) == (1, False)


@pytest.mark.parametrize("same", [True, False])
def test_a_check_that_alarmed_once_is_upheld_by_the_bits_that_all_computed(
    home: Path, bundle: Callable[..., Left], votes: list[Vote], capsys: Any, same: bool
) -> None:
    """Control: where this machine computes others, it upholds nothing."""
    digest = votes[1].digest if same else WRONG
    raised = {"original": frozenset({"gemm at head (mm, fprop)"})}
    ballots = [replace(vote, digest=digest, alarmed=raised.get(vote.role, frozenset())) for vote in votes]
    ballots = [replace(vote, alarm=bool(vote.alarmed)) for vote in ballots]
    left = bundle(f"once-{same}", ballots)
    code, document = run(capsys, home / f"once-{same}" / "job" / left.name)
    assert (document["verdict"], document["blamed_device"]) == ("CORRUPT", "cpu-n1")
    assert (code, document["upholds"]) == ((0, True) if same else (1, False))


def test_a_false_alarm_is_upheld_by_the_runs_own_bits(
    home: Path, bundle: Callable[..., Left], votes: list[Vote], capsys: Any
) -> None:
    ballots = [replace(vote, digest=votes[1].digest, alarm=True) for vote in votes]
    left = bundle("false", ballots)
    code, document = run(capsys, home / "false" / "job" / left.name)
    assert (code, document["verdict"], document["upholds"]) == (0, "FALSE_ALARM", True)


def test_without_data_there_is_none_in_it_and_the_corpus_gives_it_back(
    home: Path, bundle: Callable[..., Left], whole: Path, engine: Engine, votes: list[Vote], capsys: Any
) -> None:
    left = bundle("no-data", data=False)
    path = home / "no-data" / "job" / left.name
    assert "without samples (training data is left out of evidence)" in left.note
    assert sorted(file.name for file in path.iterdir()) == ["evidence.json", "weights.safetensors"]
    tokens = engine.batch(STEP, RANK).tokens
    forms = [tokens[0, :16].to(dtype).numpy().tobytes() for dtype in (torch.int64, torch.int32, torch.uint8)]

    def shown(folder: Path) -> bool:
        return any(form in file.read_bytes() for form in forms for file in folder.iterdir())

    assert not shown(path)
    assert shown(whole)  # the negative control: this is what data looks like in a bundle
    code, document = run(capsys, path, "--corpus", home / "text")
    assert (code, document["digest"]) == (0, votes[1].digest)
    assert run(capsys, path)[0] == 0  # its own corpus is still where it was
    code, told = refused(capsys, path, "--corpus", home / "other")
    assert code == 2
    assert "is not the one that the job was given" in told
    (home / "text").rename(home / "moved")
    try:
        code, told = refused(capsys, path)
    finally:
        (home / "moved").rename(home / "text")
    assert code == 5
    assert "give it with --corpus PATH" in told


def test_weights_beyond_the_limit_come_from_the_checkpoint_of_that_state(
    home: Path, bundle: Callable[..., Left], engine: Engine, state: State, votes: list[Vote], capsys: Any
) -> None:
    left = bundle("small", bundle_bytes=100_000)
    path = home / "small" / "job" / left.name
    assert "without weights (" in left.note
    code, told = refused(capsys, path, "--checkpoints", home / "nowhere")
    assert code == 5
    assert "there is no checkpoint of step 2" in told
    parts = [(name, word, np.ascontiguousarray(tensor.numpy())) for name, word, tensor in engine.layout.parts(state)]
    entries = [
        TensorEntry(name, str(array.dtype), array.shape, word, f"{tensor_digest(array, word):016x}", "")
        for name, word, array in parts
    ]
    told_digest = f"{engine.layout.digest(state):016x}"
    entries = [replace(entry, shard="shard-0.safetensors") for entry in entries]
    manifest = replace(described(engine, 1, 0), step=STEP - 1, digest=told_digest, tensors=tuple(entries))
    storage = Storage(home / "checkpoints", "job")
    storage.publish(storage.write(manifest, {name: array for name, _, array in parts}), manifest)
    # The held state's digest is not this checkpoint's: refused, however well it reads.
    code, told = refused(capsys, path, "--checkpoints", storage.folder)
    assert (code, f"has digest {told_digest}, not 0000000000000000" in told) == (5, True)
    found = read(path)
    again = Bundle({**found.facts, "state": {**found.facts["state"], "digest": told_digest}}, found.parts)
    write(home / "again", path.name, again)
    code, document = run(capsys, home / "again" / path.name, "--checkpoints", storage.folder)
    assert (code, document["digest"]) == (0, votes[1].digest)


def test_a_generation_begins_by_removing_what_has_grown_too_old(
    home: Path, bundle: Callable[..., Left], engine: Engine
) -> None:
    left = bundle("old")
    path = home / "old" / "job" / left.name
    tidy(engine.spec, STEP, 2)
    assert path.is_dir()
    os.utime(path, (1.0, 1.0))
    tidy(engine.spec, STEP - 1, 2)
    assert path.is_dir()  # its step is not committed yet
    tidy(engine.spec, STEP, 2)
    assert not path.exists()
    tidy(replace(engine.spec, evidence=None), STEP, 2)


def test_a_disk_that_takes_nothing_ends_no_training(bundle: Callable[..., Left], home: Path) -> None:
    (home / "full").mkdir()
    (home / "full" / "job").write_text("a file where the folder should be")
    assert bundle("full") == Left(note="no evidence was kept: Not a directory")


def test_a_damaged_bundle_is_refused_in_one_line(whole: Path, tmp_path: Path, capsys: Any) -> None:
    write(tmp_path, whole.name, read(whole))
    weights = tmp_path / whole.name / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    code, told = refused(capsys, tmp_path / whole.name)
    assert code == 1
    assert "weights.safetensors has" in told


def test_another_instruction_set_is_no_verdict(whole: Path, tmp_path: Path, capsys: Any) -> None:
    """Bits of another fingerprint may differ without a fault: such a replay says so instead of blaming anybody."""
    found = read(whole)
    facts = {**found.facts, "fingerprint": {"isa": "VSX", "threads": 1, "torch": "1.0"}}
    facts["votes"] = [{**vote, "digest": WRONG} for vote in facts["votes"]]
    write(tmp_path, whole.name, Bundle(facts, found.parts))
    code, document = run(capsys, tmp_path / whole.name)
    assert code == 5
    assert document["fingerprint"] != document["recorded_fingerprint"]


def test_a_suspect_alone_is_asked_as_often_as_the_job_says(home: Path, capsys: Any) -> None:
    """One rank, one product corrupted whatever computes it: the run and both replays agree, and nobody else can be
    asked. The evidence tells afterwards."""
    drill = {"id": "d", "kind": "sdc", "step": 2, "rank": 0, "params": {"persistent": "1"}}
    folder = home / "alone"
    evidence = {"folder": str(home / "alone-evidence")}
    _, (reports,) = train(folder, world=1, steps=2, drills=[drill], corpus=str(home / "text"), evidence=evidence)
    rulings = [entry for entry in reports if entry["report"] == "replay_result"]
    first = rulings[0]
    assert [(vote["role"], vote["number"]) for vote in first["votes"]] == [
        ("original", 1),
        ("suspect", 1),
        ("suspect", 2),
    ]
    assert len({vote["digest"] for vote in first["votes"]}) == 1
    assert (first["verdict"], first["evidence"]) == ("UNDECIDED", "step-00000002-rank-0-generation-1-attempt-1")
    code, document = run(capsys, home / "alone-evidence" / "job" / first["evidence"])
    assert code == 1  # nobody computed what a sound machine computes
    assert not any(vote["agrees"] for vote in document["votes"])


def test_a_rank_of_a_mesh_is_replayed_with_what_it_received(home: Path, capsys: Any) -> None:
    drill = {"id": "d", "kind": "sdc", "step": 2, "rank": 1, "params": {"op": "wgrad", "fault": "tile"}}
    mesh = {"world": 2, "steps": 2, "mesh": {"dp": 2, "ep": 2}, "corpus": str(home / "text")}
    _, reports = train(home / "mesh", drills=[drill], evidence={"folder": str(home / "mesh-evidence")}, **mesh)
    (ruling,) = [entry for rank in reports for entry in rank if entry["report"] == "replay_result"]
    path = home / "mesh-evidence" / "job" / ruling["evidence"]
    code, document = run(capsys, path)
    assert (code, document["upholds"]) == (0, True)
    assert [vote["agrees"] for vote in document["votes"]] == [False, True, True]
    found = read(path)
    assert found.facts["exchanges"]
    left_out = {"received": "training data is left out of evidence"}
    parts = {name: tensors for name, tensors in found.parts.items() if name != "received"}
    write(home / "without", path.name, Bundle({**found.facts, "left_out": left_out}, parts))
    code, told = refused(capsys, home / "without" / path.name)
    assert code == 5
    assert "no rows of other ranks (training data is left out of evidence)" in told
