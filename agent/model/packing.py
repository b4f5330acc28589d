"""Packed windows: several documents in one sequence, of which none may reach another."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """What a block must know of the documents in its sequences."""

    apart: Tensor  # bool [batch, time, time]: key position j belongs to another document than query position i
    member: Tensor  # fp32 [batch, documents, time]: 1 where a position counts as one of a document, else 0


class Spans:
    """Where the documents of packed windows lie; without documents it answers None, and each sequence is whole.

    Position i of the main model is given t_i; that of MTP module k is given t_{i+k} beside it. So a position counts in
    module k only while t_{i+k} is still of its own document: later ones mix two documents, nothing that counts attends
    to them, and they are left out of every loss.
    """

    def __init__(self, documents: Tensor | None, tokens: Tensor, time: int) -> None:
        """A document is a run of equal numbers in ``documents``, which has the shape of ``tokens`` [batch, time+1+D].

        Best given on the CPU, as ``Batch`` has it: how many documents there are must be known to the host.

        Raises:
            ValueError: a wrong dtype or shape.
        """
        self._numbers: Tensor | None = None
        self._time = time
        if documents is None:
            return
        if documents.dtype != torch.int64 or documents.shape != tokens.shape:
            told = f"not {documents.dtype} {list(documents.shape)}"
            raise ValueError(f"documents: int64 {list(tokens.shape)} expected, as tokens, {told}")
        starts = documents.diff(dim=1).ne(0).cumsum(1)
        self._count = int(starts[:, -1].max()) + 1
        self._numbers = torch.nn.functional.pad(starts, (1, 0)).to(tokens.device)
        own = self._numbers[:, :time]
        self._apart = own.unsqueeze(2) != own.unsqueeze(1)

    def within(self, ahead: int) -> Tensor | None:
        """Whether t_{i+ahead} is of the document of t_i: bool [batch, time]."""
        if self._numbers is None:
            return None
        return self._numbers[:, ahead : ahead + self._time] == self._numbers[:, : self._time]

    def packed(self, ahead: int) -> Packed | None:
        """For the blocks of MTP module ``ahead``, or with 0 of the main model."""
        counts = self.within(ahead)
        if self._numbers is None or counts is None:
            return None
        every = torch.arange(self._count, device=counts.device)
        member = self._numbers[:, None, : self._time] == every[:, None]
        return Packed(self._apart, (member & counts.unsqueeze(1)).float())
