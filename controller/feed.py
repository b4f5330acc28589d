"""What the status page is fed: the whole picture at first, then again each time something was stored."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from controller.store.errors import UnknownIdError
from controller.store.queries import Queries

# A page need not be newer than this; many changes in between are one reading of the database.
PERIOD_S = 0.5


class StoreFeed:
    """Reads for the pages, on another thread. One reader at a time serves all viewers (`serve`)."""

    def __init__(self, queries: Queries) -> None:
        """Read through `queries`."""
        self._queries = queries
        self._newest: dict[str, Any] = {}
        self._number = 0
        self._ended = False
        self._news = asyncio.Condition()

    def snapshot(self) -> dict[str, Any]:
        """Give the newest picture: "assay.status/1" with the incidents and checkpoints of the newest job."""
        return self._newest

    def incident(self, incident: str) -> dict[str, Any] | None:
        """Give one incident; None if there is none of this id."""
        try:
            return self._queries.incident(incident)
        except UnknownIdError:
            return None

    async def deltas(self) -> AsyncIterator[dict[str, Any]]:
        """Give each new picture, as whole documents: the newest at once if there is one, then what follows."""
        seen = 0
        while not self._ended:
            async with self._news:
                while self._number == seen and not self._ended:
                    await self._news.wait()
                seen, newest = self._number, self._newest
            if not self._ended:
                yield newest

    async def end(self) -> None:
        """End every iteration of `deltas`: a server cannot stop while pages hang on it."""
        async with self._news:
            self._ended = True
            self._news.notify_all()

    async def serve(self, changed: asyncio.Event) -> None:
        """Read the picture whenever `changed` was set, at most once in a period; runs until cancelled."""
        while True:
            changed.clear()
            picture = await asyncio.to_thread(self._read)
            if picture != self._newest:
                async with self._news:
                    self._newest = picture
                    self._number += 1
                    self._news.notify_all()
            await asyncio.sleep(PERIOD_S)
            await changed.wait()

    def _read(self) -> dict[str, Any]:
        status = self._queries.status()
        job = self._queries.newest_job() or ""
        return {
            **status,
            "incidents": self._queries.incidents(job)["incidents"],
            "checkpoints": self._queries.checkpoints(job)["checkpoints"],
        }
