"""Pieces of an exchange on their way: what arrives otherwise than it left is found, with both ends, by number."""

from collections.abc import Sequence

import torch
from torch import Tensor

from agent.model.parallel import Echo, ExpertParallel
from agent.training.seals import Garbled, Seals, alarm_of
from agent.training.spec import Mesh

MESH = Mesh(4, 2)


class Line:
    """Two ranks in one thread: what one sends is kept until the other has sent too. `change` acts on the way."""

    world = 2

    def __init__(self) -> None:
        self.sent: list[dict[int, tuple[Tensor, list[int]]]] = []
        self.change: dict[tuple[int, int], tuple[int, int]] = {}

    def end(self, rank: int) -> "End":
        return End(self, rank)


class End:
    """One rank's end of a line, in two passes: the first sends, the second receives."""

    world = 2

    def __init__(self, line: Line, rank: int) -> None:
        self.line = line
        self.rank = rank
        self.number = 0

    def exchange(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        while len(self.line.sent) <= self.number:
            self.line.sent.append({})
        made = self.line.sent[self.number]
        made[self.rank] = (rows.clone(), list(send))
        arrived = []
        for source in range(2):
            if source in made:
                arrived.append(torch.split(*made[source])[self.rank])
            else:
                arrived.append(rows.new_zeros(receive[source], *rows.shape[1:]))
        whole = torch.cat(arrived)
        if (change := self.line.change.get((self.rank, self.number))) is not None:
            whole[change] += 1
        self.number += 1
        return whole


def step(change: dict[tuple[int, int], tuple[int, int]] | None = None) -> list[list[Garbled]]:
    """Ranks 2 and 3 of the job exchange rows three times; both make a first pass whose results do not count."""
    line = Line()
    for _ in range(2):
        line.change = change or {}
        found = []
        for rank in (0, 1):
            seals = Seals(2 + rank)
            place = seals.around(ExpertParallel(rank, line.end(rank), Echo(1)), MESH)
            seals.begin()
            for number in range(3):
                rows = torch.arange(12.0).view(6, 2) + 100 * rank + number
                place.across.exchange(rows, [4, 2] if rank == 0 else [1, 5], [4, 1] if rank == 0 else [2, 5])
            found.append(seals.compare())
            assert seals.count == 6
    return found


def test_pieces_that_arrive_as_they_were_sent_are_not_found() -> None:
    assert step() == [[], []]


def test_a_piece_that_changed_is_found_where_it_arrived() -> None:
    """Rank 3 receives two rows from rank 2, then five from itself."""
    none, (found,) = step({(1, 1): (1, 0)})
    assert not none
    assert (found.number, found.source, found.destination) == (1, 2, 3)
    assert found.announced != found.arrived
    alarm = alarm_of(found)
    assert (alarm.sensor, alarm.module, alarm.location) == ("exchange", "exchange 1", "from rank 2 to rank 3")
    assert not alarm.reading <= 1.0


def test_so_is_one_that_a_rank_gave_itself() -> None:
    _, (found,) = step({(1, 2): (4, 1)})
    assert (found.number, found.source, found.destination) == (2, 3, 3)


def test_the_first_of_several_comes_first() -> None:
    _, found = step({(1, 2): (0, 0), (1, 0): (6, 1)})
    assert [(piece.number, piece.source) for piece in found] == [(0, 3), (2, 2)]


def test_a_hash_that_changed_on_its_way_is_found_too() -> None:
    _, found = step({(1, 3): (0, 0)})
    assert [(piece.number, piece.source) for piece in found] == [(0, 2)]


def test_both_ends_answer_for_a_piece_again_and_others_do_not() -> None:
    line = Line()
    ends = []
    for rank in (0, 1):
        seals = Seals(2 + rank)
        place = seals.around(ExpertParallel(rank, line.end(rank), Echo(1)), MESH)
        seals.begin()
        place.across.exchange(torch.ones(2, 3) * rank, [1, 1], [1, 1])
        ends.append(seals)
    piece = Garbled(0, 2, 3, 1, 2)
    assert ends[0].again(piece) == ends[1].again(piece)
    assert ends[0].again(Garbled(1, 2, 3, 1, 2)) is None
    assert Seals(1).again(piece) is None


def test_hops_have_the_jobs_ranks() -> None:
    """Rank 6 of a group that begins at rank 4: node 1 of two, of two ranks each."""
    seals = Seals(6)
    place = seals.around(ExpertParallel(2, Echo(2), Echo(2)), Mesh(8, 4, 2))
    assert [hop.peers for hop in (place.across, place.within)] == [(4, 6), (6, 7)]  # type: ignore[attr-defined]
