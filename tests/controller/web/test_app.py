"""The pages over HTTP: what they hold, what they refuse, and the stream that keeps them live."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from sample_feed import EVIL, SampleFeed
from starlette.types import ASGIApp, Message

from controller.web.app import create_app

READ_ONLY = ("/", "/incidents/inc-0001", "/healthz", "/api/status", "/api/incidents/inc-0001", "/static/app.js")


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=create_app(SampleFeed()))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as made:
        yield made


@pytest.mark.parametrize("path", READ_ONLY)
async def test_every_answer_forbids_foreign_code(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.get(path)
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ["/", "/incidents/inc-0001"])
async def test_pages_hold_no_inline_code_and_load_nothing_from_elsewhere(client: httpx.AsyncClient, path: str) -> None:
    text = (await client.get(path)).text
    assert "://" not in text.replace("http://www.w3.org", "")
    assert "<style" not in text
    assert " style=" not in text
    assert all("src=" in part.split(">")[0] for part in text.split("<script")[1:])


async def test_text_from_nodes_is_text(client: httpx.AsyncClient) -> None:
    text = (await client.get("/incidents/inc-0001")).text
    assert EVIL not in text
    assert "<img" not in text
    assert "&lt;script&gt;" in text


@pytest.mark.parametrize("path", READ_ONLY)
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
async def test_nothing_can_be_changed(client: httpx.AsyncClient, method: str, path: str) -> None:
    assert (await client.request(method, path)).status_code == 405


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost@evil", "", "[::2]:80", "127.0.0.2"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
async def test_a_foreign_host_is_refused(client: httpx.AsyncClient, host: str, method: str) -> None:
    answer = await client.request(method, "/api/status", headers={"host": host})
    assert answer.status_code == 421
    assert "job-1" not in answer.text


@pytest.mark.parametrize("host", ["127.0.0.1:1", "localhost:8000", "LOCALHOST", "[::1]:80"])
async def test_loopback_is_served_by_all_its_names(client: httpx.AsyncClient, host: str) -> None:
    assert (await client.get("/healthz", headers={"host": host})).status_code == 200


async def test_a_foreign_origin_is_refused(client: httpx.AsyncClient) -> None:
    for origin, status in (("http://evil.example", 421), ("null", 421), ("http://127.0.0.1:8000", 200)):
        assert (await client.get("/api/status", headers={"origin": origin})).status_code == status


async def test_a_configured_host_is_served() -> None:
    transport = httpx.ASGITransport(app=create_app(SampleFeed(), hosts=["assay.lab"]))
    async with httpx.AsyncClient(transport=transport, base_url="http://assay.lab:8000") as client:
        assert (await client.get("/healthz")).status_code == 200


async def test_what_is_not_there_is_404(client: httpx.AsyncClient) -> None:
    for path in ("/incidents/none", "/api/incidents/none", "/nowhere", "/static/../app.py", "/static/%2e%2e/app.py"):
        assert (await client.get(path)).status_code == 404, path


async def test_the_document_is_strict_json(client: httpx.AsyncClient) -> None:
    document = (await client.get("/api/status")).json()
    assert document["job"]["loss"][2] == [3, None]


async def test_a_feed_without_a_picture_yet_is_served() -> None:
    feed = SampleFeed({})
    feed.picture = {}
    events = await _stream(create_app(feed), feed, [])
    assert [name for name, _, _ in events] == ["picture"]


async def test_the_stream_begins_with_the_picture_and_goes_on_with_what_changed() -> None:
    feed = SampleFeed()
    events = await _stream(create_app(feed), feed, [{"nodes": []}])
    assert [name for name, _, _ in events] == ["picture", "delta"]
    assert events[0][2]["job"]["status"] == "RUNNING"
    assert events[1][2] == {"nodes": []}


async def test_a_page_that_comes_back_gets_only_what_it_missed() -> None:
    feed = SampleFeed()
    app = create_app(feed)
    mark = (await _stream(app, feed, []))[0][1]
    feed.picture = {**feed.picture, "checkpoints": []}
    assert [(name, data) for name, _, data in await _stream(app, feed, [], mark)] == [("delta", {"checkpoints": []})]
    assert [name for name, _, _ in await _stream(app, feed, [], "")] == ["picture"]  # the control: without the mark


async def test_a_quiet_stream_shows_that_it_lives() -> None:
    feed = SampleFeed()
    seen = await _collect(create_app(feed, keep_alive=0.05), feed, until=": still here")
    assert seen.startswith("id: ")


async def _collect(
    app: ASGIApp, feed: SampleFeed, until: str, mark: str = "", changes: list[dict] | None = None
) -> str:
    """The stream's text until `until` was seen, with `changes` made one after the other as answers come."""
    text, waiting = "", list(changes or [])
    done, gone = asyncio.Event(), asyncio.Event()
    headers = [(b"host", b"127.0.0.1"), (b"last-event-id", mark.encode())]
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "GET",
        "path": "/events",
        "raw_path": b"/events",
        "query_string": b"",
        "headers": headers,
        "scheme": "http",
        "server": ("127.0.0.1", 80),
        "client": ("127.0.0.1", 1),
    }

    async def receive() -> Message:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        nonlocal text
        text += message.get("body", b"").decode()
        if until and until in text:
            done.set()
        elif message.get("body") and waiting:
            await feed.show(**waiting.pop(0))
        elif message.get("body") and not until and not waiting:
            await feed.end()

    task = asyncio.create_task(app(scope, receive, send))
    done_task = asyncio.create_task(done.wait())
    await asyncio.wait({task, done_task}, timeout=5, return_when=asyncio.FIRST_COMPLETED)
    gone.set()
    await asyncio.wait_for(task, 5)
    done_task.cancel()
    return text


async def _stream(
    app: ASGIApp, feed: SampleFeed, changes: list[dict], mark: str = ""
) -> list[tuple[str, str, dict[str, Any]]]:
    """(name, id, data) of each event up to the stream's end."""
    feed._ended = False
    text = await _collect(app, feed, until="", mark=mark, changes=changes)
    events = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line and not line.startswith(":"))
        if "event" in fields:
            events.append((fields["event"], fields["id"], json.loads(fields["data"])))
    return events
