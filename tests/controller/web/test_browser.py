"""The page in a real browser: it fills itself, and what nodes say never becomes code."""

import asyncio
import contextlib
import html
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from sample_feed import EVIL, SampleFeed

from controller.web.app import create_app

pytestmark = pytest.mark.browser
#: Time of the page's own clock, which runs ahead while nothing is left to do.
BUDGET_MS = 3000


class Quiet(uvicorn.Server):
    """A server on another thread; signals are the test's own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class OneShot(SampleFeed):
    """Its stream ends after the first picture: the browser's clock runs ahead only while no request is open."""

    async def deltas(self):  # type: ignore[no-untyped-def]
        yield self.snapshot()


@pytest.fixture
def served() -> Iterator[str]:
    server = Quiet(uvicorn.Config(create_app(OneShot()), host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    while not server.started:
        thread.join(0.01)
        assert thread.is_alive()
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def dump(url: str, profile: Path) -> str:
    """The document as Chromium has it after the page's scripts ran."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    assert browser, "this test needs Chromium: apt-get install chromium"
    command = [
        browser,
        "--headless",
        "--no-sandbox",  # tests may run as root in a container; the page is our own
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={profile}",
        f"--virtual-time-budget={BUDGET_MS}",
        "--dump-dom",
        url,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def test_the_page_fills_itself_and_runs_nothing_that_nodes_said(served: str, tmp_path: Path) -> None:
    page = dump(served, tmp_path)
    assert "<title>job-1 - Assay</title>" in page
    assert "4 of 40" in page
    assert 'class="curve"' in page
    assert "0.136" in page
    assert "1 fault, 3 false alarms, last " in page
    assert f"<li>✗ sensors of cpu-n0 fail: {html.escape(EVIL, quote=False)}</li>" in page
    assert html.escape(EVIL, quote=False) in page
    assert "<img" not in page


def test_the_incident_page_runs_nothing_that_nodes_said(served: str, tmp_path: Path) -> None:
    page = dump(f"{served}/incidents/inc-0001", tmp_path)
    assert "<title>Incident inc-0001</title>" in page
    assert "<img" not in page


def test_the_browser_would_run_it_if_it_were_markup(tmp_path: Path) -> None:
    """The negative control: the same text, unescaped and without our headers, takes the page over."""
    file = tmp_path / "page.html"
    file.write_text(f"<!doctype html><title>safe</title><body>{EVIL}</body>")
    assert "<title>owned</title>" in dump(file.as_uri(), tmp_path / "profile")
