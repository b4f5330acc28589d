"""A mesh's shards: together they are the whole state, each element is optimised once, one lost rank is no loss."""

import json
from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from little_v3 import CONFIG

from agent.model import V3
from agent.model.parallel import Echo, ExpertParallel
from agent.training.layout import StateLayout
from agent.training.shards import ShardLayout
from agent.training.spec import JobSpec, Mesh, SpecError
from diagnostics.sensors.digest import digest

MASK = 2**64 - 1
SIZES = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (6, 2), (8, 8), (3, 1)]
MOMENTS = [torch.float32, torch.bfloat16]


@cache
def layouts(dp: int, ep: int, moments: torch.dtype) -> list[ShardLayout]:
    mesh = Mesh(dp, ep)
    models = [V3(CONFIG, parallel=ExpertParallel(e, Echo(ep), Echo(1))) for e in range(ep)]
    return [ShardLayout(models[rank % ep], mesh, rank, moments) for rank in range(dp)]


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize(("dp", "ep"), SIZES)
def test_the_shards_tile_the_whole_state(dp: int, ep: int, moments: torch.dtype) -> None:
    ranks = layouts(dp, ep, moments)
    assert len({layout.nbytes for layout in ranks}) == 1
    places = [range(r.place, r.place + r.stop - r.start) for layout in ranks for r in layout.regions]
    covered = sorted({(p.start, p.stop) for p in places})
    assert covered[0][0] == 0
    assert all(before[1] == after[0] for before, after in pairwise(covered))


@pytest.mark.parametrize(("dp", "ep"), SIZES)
def test_each_parameter_is_optimised_by_one_rank(dp: int, ep: int) -> None:
    ranks = layouts(dp, ep, torch.float32)
    seen: list[int] = []
    for layout in ranks:
        for piece in layout.pieces:
            seen += range(layout.place(piece.start), layout.place(piece.stop - 1) + 1)
        assert sum(piece.stop - piece.start for piece in layout.pieces) == layout.region
    assert sorted(seen) == list(range(ranks[0].dense + ep * ranks[0].expert))


@pytest.mark.parametrize(("dp", "ep"), SIZES)
def test_weight_decay_goes_to_matrices_alone_as_without_a_mesh(dp: int, ep: int) -> None:
    for layout in layouts(dp, ep, torch.float32):
        for span in layout.spans:
            for piece in layout.pieces:
                if max(piece.start, span.start) < min(piece.stop, span.start + span.size):
                    assert piece.decay == span.decay


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize(("dp", "ep"), SIZES)
def test_a_rank_holds_a_share_of_experts_and_optimizer(dp: int, ep: int, moments: torch.dtype) -> None:
    whole = StateLayout(V3(CONFIG), moments).held_bytes()
    held = layouts(dp, ep, moments)[0].held_bytes()
    assert held["expert_bytes"] == pytest.approx(whole["expert_bytes"] / ep, rel=0.01)
    assert held["optimizer_bytes"] == pytest.approx(whole["optimizer_bytes"] / dp, rel=0.02)
    assert held["parameter_bytes"] == pytest.approx(whole["parameter_bytes"], rel=0.02)
    assert (held["replica_bytes"] == 0) == (dp == 1)
    if ep == dp:  # nothing but padding comes on top
        assert held["expert_bytes"] * ep >= whole["expert_bytes"]


@given(st.sampled_from(SIZES), st.sampled_from(MOMENTS), st.integers(0, 2**32))
def test_digests_of_the_parts_add_up_to_that_of_the_whole(
    sizes: tuple[int, int], moments: torch.dtype, seed: int
) -> None:
    dp, ep = sizes
    ranks = layouts(dp, ep, moments)
    total = max(r.place + r.stop - r.start for layout in ranks for r in layout.regions)
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randint(-(2**31), 2**31 - 1, (total,), dtype=torch.int32, generator=generator)
    states = [layout.view(memoryview(bytearray(layout.nbytes))) for layout in ranks]
    for layout, state in zip(ranks, states, strict=True):
        for r in layout.regions:
            state.words[r.start : r.stop] = whole[r.place : r.place + r.stop - r.start]
    for layout, state in zip(ranks, states, strict=True):
        before = (layout.rank - 1) % dp
        if dp > 1:
            state.replica.copy_(states[before].words[ranks[before].unique])
            kept = ranks[before].own_experts(states[before]) + ranks[before].own_moments(states[before])
            assert layout.digest_replica(state) == kept & MASK
    summed = ranks[0].dense_digest(states[0]) + ranks[0].tail_digest(states[0])
    summed += sum(ranks[e].own_experts(states[e]) for e in range(ep))
    summed += sum(layout.own_moments(state) for layout, state in zip(ranks, states, strict=True))
    assert summed & MASK == digest(whole)


@pytest.mark.parametrize(("dp", "ep"), SIZES)
def test_every_part_is_written_into_a_checkpoint_once(dp: int, ep: int) -> None:
    names: list[str] = []
    for layout in layouts(dp, ep, torch.float32):
        state = layout.view(memoryview(bytearray(layout.nbytes)))
        names += [name for name, _, _ in layout.parts(state) if layout.writes(name)]
    assert len(set(names)) == len(names)
    whole = StateLayout(V3(CONFIG))
    parts = {n for n, _, _ in whole.parts(whole.view(memoryview(bytearray(whole.nbytes))))}
    assert {name for name in names if not name.startswith("exp_avg")} == {
        name for name in parts if not name.startswith("exp_avg")
    }


SPEC = {
    "schema": "assay.job/1",
    "job": "j",
    "preset": "tiny",
    "seed": 1,
    "steps": 1,
    "world": 4,
    "precision": "fp32",
    "corpus": None,
    "sensors": True,
    "tolerance_scale": 1.0,
    "checkpoint_every": 1,
    "storage": "s",
    "threads": 1,
    "cache": "c",
}


@pytest.mark.parametrize(
    ("mesh", "told"),
    [
        ({"dp": 4, "ep": 3}, "mesh.ep is 3; it must divide mesh.dp, which is 4"),
        ({"dp": 4, "ep": 4, "local": 3}, "mesh.local is 3"),
        ({"dp": 2}, "mesh.dp is 2; it must be world, which is 4"),
        ({"ep": 2}, "mesh lacks dp"),
        ({"dp": 4, "tp": 2}, "unknown key 'tp'"),
        ({"dp": 4, "ep": "2"}, "mesh.ep is '2'"),
        ({"dp": 0}, "mesh.dp is 0"),
        (True, "mesh is True; it must be an object"),
    ],
)
def test_a_mesh_that_cannot_be_names_its_field(mesh: object, told: str) -> None:

    with pytest.raises(SpecError, match=told):
        JobSpec.from_json(json.dumps({**SPEC, "mesh": mesh}))


def test_a_specification_with_a_mesh_survives_its_json() -> None:

    spec = JobSpec.from_json(json.dumps({**SPEC, "mesh": {"dp": 4, "ep": 2}}))
    assert spec.mesh == Mesh(4, 2, 1)
    assert JobSpec.from_json(spec.to_json()) == spec
    assert str(spec.mesh) == "dp=4,ep=2,local=1"
