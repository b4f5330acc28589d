"""The status pages: one page that redraws itself from server-sent events, one per incident, and the same as JSON."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from controller.web.deltas import History
from controller.web.feed import StatusFeed
from controller.web.picture import clean, picture
from controller.web.security import Guard

HERE = Path(__file__).parent
#: A comment on a quiet stream: proxies and browsers give up on silent connections after half a minute and more.
KEEP_ALIVE_S = 15.0
#: At most this many pictures a second, however much changes: a person cannot see more.
MIN_INTERVAL_S = 0.25
#: Streams at once; each costs a task and some kilobytes.
MAX_STREAMS = 64

Endpoint = Callable[[Request], Awaitable[Response]]


def create_app(feed: StatusFeed, hosts: Iterable[str] = (), keep_alive: float = KEEP_ALIVE_S) -> Starlette:
    """The read-only pages over `feed`. Loopback's names are served, and `hosts` besides.

    Routes: /, /incidents/{id}, /api/status, /api/incidents/{id}, /events, /healthz, /static.
    """
    pages = Pages(feed, keep_alive)
    return Starlette(
        routes=[
            Route("/", pages.overview),
            Route("/incidents/{ident:path}", pages.incident),
            Route("/api/status", pages.status),
            Route("/api/incidents/{ident:path}", pages.incident_document),
            Route("/events", pages.events),
            Route("/healthz", pages.health),
            Mount("/static", StaticFiles(directory=HERE / "static")),
        ],
        middleware=[Middleware(Guard, hosts=tuple(hosts))],
    )


class Pages:
    """The endpoints, and the history of pictures that all streams share."""

    def __init__(self, feed: StatusFeed, keep_alive: float) -> None:
        self._feed = feed
        self._keep_alive = keep_alive
        self._history = History(life=secrets.token_hex(4))
        self._streams = 0
        self._templates = Environment(
            loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined
        )

    async def overview(self, request: Request) -> Response:
        """The page; its contents come by /events."""
        return self._page("overview.html")

    async def incident(self, request: Request) -> Response:
        """One incident's page, complete without a script."""
        document = await asyncio.to_thread(self._feed.incident, request.path_params["ident"])
        if document is None:
            return PlainTextResponse("there is no such incident", status_code=404)
        return self._page("incident.html", incident=document, phases=phases(document))

    async def status(self, request: Request) -> Response:
        """The documents that the page is made of."""
        return JSONResponse(clean(self._feed.snapshot()))

    async def incident_document(self, request: Request) -> Response:
        """One incident as JSON."""
        document = await asyncio.to_thread(self._feed.incident, request.path_params["ident"])
        if document is None:
            return JSONResponse({"error": "there is no such incident"}, status_code=404)
        return JSONResponse(clean(document))

    async def health(self, request: Request) -> Response:
        """Answers as long as the controller serves."""
        return PlainTextResponse("ok\n")

    async def events(self, request: Request) -> Response:
        """Server-sent events: first what the page missed since its Last-Event-ID, then each change."""
        if self._streams >= MAX_STREAMS:
            return PlainTextResponse("too many streams", status_code=503, headers={"retry-after": "10"})
        seen = request.headers.get("last-event-id", "")
        return StreamingResponse(
            self._stream(seen), media_type="text/event-stream", headers={"cache-control": "no-store"}
        )

    async def _stream(self, seen: str) -> AsyncIterator[str]:
        self._streams += 1
        pictures = self._feed.deltas()
        waiting = asyncio.ensure_future(anext(pictures, None))
        try:
            while True:
                done, _ = await asyncio.wait({waiting}, timeout=self._keep_alive)
                if not done:
                    yield ": still here\n\n"
                    continue
                if (newest := waiting.result()) is None:
                    return
                self._history.add(picture(newest))
                for event in self._history.since(seen):
                    yield event
                seen = self._history.mark()
                waiting = asyncio.ensure_future(_later(pictures))
        finally:
            self._streams -= 1
            waiting.cancel()

    def _page(self, name: str, **values: object) -> HTMLResponse:
        return HTMLResponse(self._templates.get_template(name).render(**values), headers={"cache-control": "no-store"})


def phases(incident: dict[str, Any]) -> list[dict[str, object]]:
    """An incident's timeline with each entry's seconds after the first."""
    entries = incident.get("timeline") or []
    return [{"after": entry["time"] - entries[0]["time"], "text": entry["text"]} for entry in entries]


async def _later(pictures: AsyncIterator[dict[str, Any]]) -> dict[str, Any] | None:
    """The next picture, not sooner than MIN_INTERVAL_S from now; None when there will be none."""
    await asyncio.sleep(MIN_INTERVAL_S)
    return await anext(pictures, None)
