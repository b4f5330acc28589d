"""What the pages need of the controller: a picture of now, one incident, and each new picture."""

from collections.abc import AsyncIterator
from typing import Any, Protocol


class StatusFeed(Protocol):
    """Read-only; everything in JSON types. A picture is "assay.status/1" with lists `incidents` and `checkpoints`."""

    def snapshot(self) -> dict[str, Any]:
        """The newest picture, at once; empty before the first."""

    def incident(self, incident: str) -> dict[str, Any] | None:
        """One incident, "assay.incident/1", or None. May read the database: called on a thread."""

    def deltas(self) -> AsyncIterator[dict[str, Any]]:
        """Each new picture, the newest first and at once; ends when the server stops."""
