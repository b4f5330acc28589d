"""Copies of rows, sorted by where they go, and the way back: each row sums its copies in one order.

The same plan serves a hop, whose places are ranks, and a rank's own experts, whose places are experts. Unlike the plan
of `agent.model.dispatch`, a row may have fewer copies than others, or none.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Copies(NamedTuple):
    """A buffer of copies of n rows. Invariants: sorted by place, then by row; one copy at most of a row at a place."""

    rows: Tensor  # int64 [copies]: the row that each is a copy of
    places: Tensor  # int64 [copies]: where it goes
    spots: Tensor  # int64 [copies]: where in the buffer it lies
    home: (
        Tensor  # int64 [n, width]: where in the buffer a row's copies lie, by place; ``length`` when there are no more
    )
    sizes: list[int]  # rows of the buffer for each place, padding included; 0 for a place without copies
    length: int  # of the buffer, the sum of sizes

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What of it lies in tensors: what autograd is to keep."""
        return self.rows, self.places, self.spots, self.home


def copies(wanted: Tensor, count: int, multiple: int = 1) -> Copies:
    """Lay out one copy of each row for each place that it wants.

    Args:
        wanted: int64 [n, K], places in [0, count) or -1 for none; a place may be named more than once.
        count: how many places there are.
        multiple: the rows of a place are padded to multiples of this.
    """
    n, width = wanted.shape
    named = wanted.masked_fill(wanted < 0, count)
    asked = torch.zeros(n, count + 1, dtype=torch.bool, device=wanted.device).scatter_(1, named, True)[:, :count]
    places, rows = asked.t().nonzero(as_tuple=True)
    padded = (asked.sum(0) + multiple - 1) // multiple * multiple
    spots = asked.cumsum(0) - 1 + (padded.cumsum(0) - padded)  # [n, count], meaningful where asked
    sizes: list[int] = padded.tolist()
    length = sum(sizes)
    home = spots.masked_fill(~asked, length).sort(1).values[:, : min(width, count)]
    return Copies(rows, places, spots[rows, places], home, sizes, length)


def spread(values: Tensor, layout: Copies) -> Tensor:
    """[n, ...] -> [length, ...]: the copies in their buffer; padding is zero."""
    return placed(values.index_select(0, layout.rows), layout)


def placed(each: Tensor, layout: Copies) -> Tensor:
    """One value for each copy, [copies, ...] -> [length, ...]; padding is zero."""
    if each.shape[0] == layout.length:
        return each
    return each.new_zeros(layout.length, *each.shape[1:]).index_copy_(0, layout.spots, each)


def gathered(buffer: Tensor, layout: Copies, weights: Tensor | None = None) -> Tensor:
    """Each row's sum over its copies, one after another by place: [length, width] -> fp32 [n, width].

    ``weights`` (fp32 [n, most copies of a row]) multiply the copies, in the same order; weights of copies that do not
    exist are not looked at, unless they are not finite.
    """
    padded = torch.cat([buffer, buffer.new_zeros(1, buffer.shape[1])])
    total = torch.zeros(layout.home.shape[0], buffer.shape[1], dtype=torch.float32, device=buffer.device)
    for j, spots in enumerate(layout.home.unbind(1)):
        picked = padded.index_select(0, spots)
        if weights is None:
            total += picked
        else:
            total.addcmul_(picked.float(), weights[:, j : j + 1])
    return total
