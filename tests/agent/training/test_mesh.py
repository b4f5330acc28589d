"""Four real ranks on a mesh: the same training as with whole copies, and faults that leave no trace in the bits."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from ranks import flip_state, train

from agent.model import PRESETS, V3
from agent.model.parallel import Echo, ExpertParallel
from agent.training.shards import ShardLayout
from agent.training.spec import Mesh

Reports = list[list[dict[str, Any]]]
PAIRS = {"world": 4, "steps": 4, "checkpoint_every": 2, "mesh": {"dp": 4, "ep": 2}}
NODES = {"world": 4, "steps": 3, "checkpoint_every": 2, "mesh": {"dp": 4, "ep": 4, "local": 2}}
FINE = [0, 0, 0, 0]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mesh")


@pytest.fixture(scope="module")
def clean(home: Path) -> Reports:
    """Four undisturbed steps: experts over pairs of ranks, each expert on two ranks."""
    codes, reports = train(home / "clean", **PAIRS)
    assert codes == FINE
    return reports


def end(reports: Reports) -> str:
    ends = {(r[-1]["digest"], r[-1]["chain"]) for r in reports if r[-1]["report"] == "end"}
    assert len(ends) == 1, reports
    return "/".join(ends.pop())


def kinds(reports: Reports, kind: str) -> list[dict[str, Any]]:
    return [entry for rank in reports for entry in rank if entry["report"] == kind]


def sdc(step: int, rank: int, **params: str) -> dict[str, Any]:
    return {"id": f"drill-{step}", "kind": "sdc", "step": step, "rank": rank, "params": params}


def test_it_trains_as_whole_copies_do(home: Path, clean: Reports) -> None:
    """Other sums in another order: measured on these steps, losses differ by 1e-7 of themselves, norms by 1e-8."""
    codes, whole = train(home / "whole", **{**PAIRS, "mesh": None})
    assert codes == FINE
    assert end(whole) != end(clean)
    pairs = zip(kinds(whole, "step"), kinds(clean, "step"), strict=True)
    for one, other in pairs:
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        assert other["expert_load"] == one["expert_load"] or one["step"] > 1


def test_a_rank_holds_half_of_the_experts_and_a_quarter_of_the_optimizer(home: Path, clean: Reports) -> None:
    held = kinds(clean, "resumed")
    assert len({tuple(entry[f"{kind}_bytes"] for kind in ("expert", "optimizer")) for entry in held}) == 1
    experts = [p for n, p in V3(PRESETS["tiny"].config).named_parameters() if ".experts." in n]
    everything = sum(p.numel() for p in V3(PRESETS["tiny"].config).parameters())
    assert held[0]["expert_bytes"] == 4 * sum(p.numel() for p in experts) / 2
    assert held[0]["optimizer_bytes"] == pytest.approx(8 * everything / 4, rel=0.01)


def test_what_crosses_between_nodes_is_on_record(clean: Reports) -> None:
    """Whole tokens, each at most once to the other node in each of three layers (`tiny` has two and an MTP module)."""
    token = 4 * PRESETS["tiny"].config.hidden_size
    for entry in kinds(clean, "step"):
        for kind in ("crossing_bytes", "unlimited_bytes"):
            assert 0 < entry[kind] <= 3 * entry["tokens"] * token
            assert entry[kind] % token == 0


def test_transient_corruptions_of_each_pass_are_caught_and_leave_no_trace(home: Path, clean: Reports) -> None:
    drills = [
        sdc(2, 1, op="fprop", bit="30"),
        sdc(3, 2, op="wgrad", fault="stuck", layer="1"),
        sdc(4, 3, op="dgrad", fault="tile", layer="2"),
    ]
    codes, reports = train(home / "sdc", drills=drills, **PAIRS)
    assert (codes, end(reports)) == (FINE, end(clean))
    rulings = sorted(kinds(reports, "replay_result"), key=lambda ruling: ruling["step"])
    assert [(r["step"], r["verdict"], r["blamed_node"], r["recurrent"]) for r in rulings] == [
        (2, "CORRUPT", "n1", False),
        (3, "CORRUPT", "n2", False),
        (4, "CORRUPT", "n3", False),
    ]
    assert [[vote["node"] for vote in r["votes"]] for r in rulings] == [
        ["n1", "n1", "n2"],
        ["n2", "n2", "n3"],
        ["n3", "n3", "n0"],
    ]


def test_without_sensors_a_corruption_commits(home: Path, clean: Reports) -> None:
    """The negative control."""
    drills = [sdc(3, 2, op="wgrad", fault="stuck", layer="1")]
    codes, reports = train(home / "unguarded", drills=drills, **{**PAIRS, "sensors": False})
    assert codes == FINE
    assert kinds(reports, "drill_fired")
    assert end(reports) != end(clean)


def test_a_persistent_corruption_is_outvoted_by_two_other_ranks(home: Path) -> None:
    codes, reports = train(home / "persistent", drills=[sdc(2, 1, op="fprop", persistent="1")], **NODES)
    assert codes == [3, 3, 3, 3]
    (ruling,) = kinds(reports, "replay_result")
    assert (ruling["verdict"], ruling["blamed_node"], ruling["recurrent"]) == ("CORRUPT", "n1", True)
    assert [vote["node"] for vote in ruling["votes"]] == ["n1", "n1", "n2", "n3"]
    assert max(entry["step"] for entry in kinds(reports, "step")) == 1


def test_a_lost_node_is_made_good_by_its_neighbour_and_two_by_a_checkpoint(home: Path, clean: Reports) -> None:
    kill = [{"id": "k", "kind": "kill", "step": 4, "rank": 2, "params": {"phase": "commit"}}]
    codes, _ = train(home / "lost", drills=kill, **PAIRS)
    assert codes == [4, 4, -9, 4]
    shutil.copytree(home / "lost", home / "lost-two")
    shutil.rmtree(home / "lost" / "n2")
    codes, reports = train(home / "lost", generation=2, drills=kill, **PAIRS)
    assert (codes, end(reports)) == (FINE, end(clean))
    assert [(e["source"], e["step"]) for e in kinds(reports, "resumed")] == [
        ("live", 3),
        ("live", 3),
        ("replica", 3),
        ("live", 3),
    ]
    assert not kinds(reports, "digest_disagreement")
    for node in ("n2", "n3"):
        shutil.rmtree(home / "lost-two" / node)
    flip_state(home / "lost-two" / "n0" / "job.slots")  # is told, though no memory helps any more
    storage = str(home / "lost-two" / "checkpoints")
    codes, reports = train(home / "lost-two", generation=2, drills=kill, **{**PAIRS, "storage": storage})
    assert (codes, end(reports)) == (FINE, end(clean))
    assert {(e["source"], e["step"]) for e in kinds(reports, "resumed")} == {("checkpoint", 2)}
    assert [(e["step"], e["blamed_rank"]) for e in kinds(reports, "digest_disagreement")] == [(3, 0)]


def layout_of(rank: int) -> ShardLayout:
    place = ExpertParallel(rank % 2, Echo(2), Echo(1))
    return ShardLayout(V3(PRESETS["tiny"].config, parallel=place), Mesh(4, 2), rank)


def test_a_replica_that_changed_in_memory_casts_no_vote(home: Path, clean: Reports) -> None:
    """Rank 2 would repeat rank 1's step with experts that are not rank 1's any more, and accuse it."""
    byte = 4 * layout_of(2).words + 4096
    drills = [sdc(3, 1, op="fprop", bit="30")]
    codes, reports = train(home / "replica", drills=drills, flip=(2, 3, "forward"), byte=byte, **PAIRS)
    assert (codes, end(reports)) == (FINE, end(clean))
    (ruling,) = kinds(reports, "replay_result")
    assert (ruling["verdict"], ruling["blamed_node"]) == ("UNDECIDED", "")
    assert [vote["node"] for vote in ruling["votes"]] == ["n1", "n1"]


def test_an_expert_that_changed_in_memory_is_rolled_back_and_blamed(home: Path, clean: Reports) -> None:
    byte = 4 * layout_of(1).dense + 4096
    codes, reports = train(home / "flipped", flip=(1, 3, "forward"), byte=byte, **PAIRS)
    assert (codes, end(reports)) == (FINE, end(clean))
    (found,) = kinds(reports, "digest_disagreement")
    assert (found["step"], found["blamed_rank"]) == (2, 1)
    assert "in memory: the state of n1 hashes to" in found["reason"]


@pytest.fixture(scope="module")
def clean_fp8(home: Path) -> str:
    """Experts over two nodes of two ranks: both hops, and FP8 rows on their way."""
    codes, reports = train(home / "clean-fp8", precision="fp8", **NODES)
    assert codes == FINE
    assert not kinds(reports, "gate_alarm")
    return end(reports)


def test_fp8_over_two_hops_is_repeatable_and_guarded(home: Path, clean_fp8: str) -> None:
    drills = [sdc(2, 1, op="fprop", fault="tile", layer="2")]
    codes, reports = train(home / "sdc-fp8", precision="fp8", drills=drills, **NODES)
    assert (codes, end(reports)) == (FINE, clean_fp8)
    (ruling,) = kinds(reports, "replay_result")
    assert (ruling["verdict"], ruling["blamed_node"]) == ("CORRUPT", "n1")
