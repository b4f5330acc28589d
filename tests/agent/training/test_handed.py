"""Who holds something else than its owner wrote, from what the ranks of a mesh say of a state they have just made."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.training.handed import Told, Wrong, wrong_in
from agent.training.spec import Mesh

MASK = 2**64 - 1
DIGESTS = st.integers(0, MASK)


def told(mesh: Mesh, written: list[tuple[int, int, int]]) -> list[Told]:
    """What ranks say when all hold what was written: (dense, experts, moments) by each."""
    dense = sum(one[0] for one in written) & MASK
    rows = []
    for rank, (own_dense, own_experts, moments) in enumerate(written):
        experts = sum(one[1] for one in written[rank % mesh.ep :: mesh.ep]) & MASK
        rows.append(Told(own_dense, own_experts, moments, dense, experts, 5, 0, repeats=True))
    return [
        replace(row, replica=(rows[rank - 1].experts + rows[rank - 1].moments) & MASK) for rank, row in enumerate(rows)
    ]


@pytest.mark.parametrize("mesh", [Mesh(2), Mesh(2, 2), Mesh(4, 2), Mesh(4, 4)])
@given(data=st.data())
def test_only_what_differs_is_wrong_and_where_it_is_held(mesh: Mesh, data: st.DataObject) -> None:
    written = data.draw(st.lists(st.tuples(DIGESTS, DIGESTS, DIGESTS), min_size=mesh.dp, max_size=mesh.dp))
    rows = told(mesh, written)
    assert wrong_in(rows, mesh) == []
    rank, flip = data.draw(st.integers(0, mesh.dp - 1)), data.draw(st.integers(1, MASK))
    for what in ("dense", "replica"):
        changed = list(rows)
        changed[rank] = replace(rows[rank], **{what: getattr(rows[rank], what) ^ flip})
        assert wrong_in(changed, mesh) == [Wrong(what, rank)]
    changed = list(rows)
    changed[rank] = replace(rows[rank], repeats=False)
    assert wrong_in(changed, mesh) == [Wrong("update", rank)]


def test_wrong_experts_are_wrong_for_whoever_keeps_their_replica_unless_it_took_them_too() -> None:
    mesh = Mesh(4, 2)
    rows = told(mesh, [(1, 2, 3)] * 4)
    rows[1] = replace(rows[1], experts=99)
    assert wrong_in(rows, mesh) == [Wrong("experts", 1), Wrong("replica", 2)]
    rows[2] = replace(rows[2], replica=99 + 3)
    assert wrong_in(rows, mesh) == [Wrong("experts", 1)]


def test_a_sum_that_changed_before_its_use_is_wrong_before_the_update_made_of_it() -> None:
    rows = told(Mesh(4), [(1, 2, 3)] * 4)
    rows[2] = replace(rows[2], added=7, used=8)
    rows[3] = replace(rows[3], repeats=False)
    assert wrong_in(rows, Mesh(4)) == [Wrong("sum", 2), Wrong("update", 3)]


@given(st.lists(DIGESTS, min_size=9, max_size=9), st.booleans())
def test_it_survives_its_packing(digests: list[int], repeats: bool) -> None:
    one = Told(*digests[:7], repeats=repeats, added=digests[7], used=digests[8])  # type: ignore[misc]
    values = one.pack()
    assert all(-(2**63) <= value < 2**63 for value in values)
    assert Told.unpack(values) == one
