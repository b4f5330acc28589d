"""The local socket: a worker never waits for the daemon, and neither harms the other by dying or talking nonsense."""

import asyncio
import contextlib
import json
import queue
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import local
from agent.client import LINE_BYTES, DaemonClient, DaemonLost
from agent.local import Connection, LocalServer, Message


class Listener:
    """Keeps what clients say, and lets a test wait for it."""

    def __init__(self) -> None:
        self.clients: list[Connection] = []
        self.heard: list[Message] = []
        self.gone: list[Connection] = []
        self._news = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    def welcome(self) -> Message:
        return {"node": "n0"}

    def joined(self, client: Connection) -> None:
        self.clients.append(client)
        self._tell()

    def received(self, client: Connection, message: Message) -> None:
        self.heard.append(message)
        self._tell()

    def left(self, client: Connection) -> None:
        self.gone.append(client)
        self._tell()

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(10), self._news:
            await self._news.wait_for(condition)

    def _tell(self) -> None:
        task = asyncio.create_task(self._notify())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _notify(self) -> None:
        async with self._news:
            self._news.notify_all()


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[tuple[Path, Listener]]:
    listener = Listener()
    server = LocalServer(tmp_path / "sock", listener)
    await server.start()
    yield tmp_path / "sock", listener
    await server.close()


async def connect(path: Path, **options: Any) -> DaemonClient:
    return await asyncio.to_thread(lambda: DaemonClient(path, "worker", "s1", **options))


async def close(client: DaemonClient) -> None:
    await asyncio.to_thread(client.close)


async def test_both_sides_hear_each_other(served: tuple[Path, Listener]) -> None:
    path, listener = served
    client = await connect(path)
    assert client.welcome["node"] == "n0"
    assert client.step("j", 1, 0, {"step": 3})
    assert client.report("drill_fired", {"drill": "d"}, urgent=True)
    await listener.until(lambda: len(listener.heard) == 2)
    assert listener.heard[0] == {"t": "step", "job": "j", "generation": 1, "rank": 0, "record": {"step": 3}}
    assert listener.heard[1]["body"] == {"drill": "d"}
    assert listener.clients[0].standby == "s1"
    assert listener.clients[0].send({"t": "vote", "step": 4})
    assert (await asyncio.to_thread(client.inbox.get, True, 10))["step"] == 4
    await close(client)
    await listener.until(lambda: listener.gone == listener.clients)
    assert not listener.clients[0].send({"t": "vote"})


async def test_what_a_worker_flushed_outlives_it(served: tuple[Path, Listener]) -> None:
    path, listener = served
    client = await connect(path)
    for number in range(1000):
        client.step("j", 1, 0, {"step": number})
    assert await asyncio.to_thread(client.flush, 10.0)
    await close(client)
    await listener.until(lambda: bool(listener.gone))
    assert [message["record"]["step"] for message in listener.heard] == list(range(1000))


async def test_a_dead_daemon_is_noticed(tmp_path: Path) -> None:
    lost = threading.Event()
    server = LocalServer(tmp_path / "sock", Listener())
    await server.start()
    client = await connect(tmp_path / "sock", on_lost=lost.set)
    assert not lost.is_set()
    await server.close()
    assert await asyncio.to_thread(lost.wait, 10)
    assert not client.step("j", 1, 0, {})
    assert client.dropped == 1
    assert not client.flush(10.0)
    await close(client)


def test_no_daemon_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DaemonLost, match="no daemon"):
        DaemonClient(tmp_path / "sock", "worker")


def test_a_daemon_that_does_not_read_costs_reports_but_no_time(tmp_path: Path) -> None:
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "sock"))
    listening.listen()
    accepted: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()
    threading.Thread(target=_greet_only, args=(listening, accepted), daemon=True).start()
    client = DaemonClient(tmp_path / "sock", "worker", capacity=100)
    record = {"expert_load": [1] * 2000}
    results = [client.step("j", 1, 0, record) for _ in range(2000)]  # would block here for ever, if it ever did
    assert not results[-1]
    assert client.dropped == results.count(False) > 0
    assert not client.flush(0.01)
    client.close()
    accepted.get().close()
    listening.close()


def test_without_the_bound_nothing_would_be_dropped(tmp_path: Path) -> None:
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "sock"))
    listening.listen()
    accepted: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()
    threading.Thread(target=_greet_only, args=(listening, accepted), daemon=True).start()
    client = DaemonClient(tmp_path / "sock", "worker", capacity=10**9)
    assert all(client.step("j", 1, 0, {"expert_load": [1] * 2000}) for _ in range(2000))
    client.close()
    accepted.get().close()
    listening.close()


def _greet_only(listening: socket.socket, accepted: "queue.SimpleQueue[socket.socket]") -> None:
    connection, _ = listening.accept()
    connection.recv(4096)
    connection.sendall(b'{"t":"welcome"}\n')
    accepted.put(connection)


async def test_what_is_too_long_is_dropped_and_said_later(served: tuple[Path, Listener]) -> None:
    path, listener = served
    client = await connect(path)
    assert not client.report("gate_alarm", {"evidence": "x" * LINE_BYTES})
    assert client.report("gate_alarm", {"step": 1})
    await listener.until(lambda: len(listener.heard) == 2)
    assert listener.heard[1]["kind"] == "reports_dropped"
    assert listener.heard[1]["body"]["count"] == 1
    await close(client)


@pytest.mark.parametrize(
    "first",
    [
        b"\n",
        b"{}\n",
        b"[1]\n",
        b'{"t":"hello","role":"king"}\n',
        b"\xff\xfe\n",
        b"x" * 100_000,
        b"[" * 50_000 + b"\n",
        b"",
    ],
)
async def test_who_does_not_say_hello_is_shown_out(served: tuple[Path, Listener], first: bytes) -> None:
    path, listener = served
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(first)
    writer.write_eof()
    with contextlib.suppress(ConnectionResetError):  # it may close with our line unread
        assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()
    assert listener.clients == []
    client = await connect(path)  # and others are served as before
    await close(client)


async def test_nonsense_ends_that_client_only(served: tuple[Path, Listener]) -> None:
    path, listener = served
    good = await connect(path)
    _, writer = await asyncio.open_unix_connection(path)
    writer.write(b'{"t":"hello","role":"worker"}\n{"t":"step"}\nnonsense\n{"t":"step"}\n')
    await listener.until(lambda: len(listener.gone) == 1)
    assert [message["t"] for message in listener.heard] == ["step"]
    assert good.send({"t": "step"})
    await listener.until(lambda: len(listener.heard) == 2)
    writer.close()
    await close(good)


async def test_a_client_that_does_not_read_is_cut_off(served: tuple[Path, Listener]) -> None:
    path, listener = served
    _, writer = await asyncio.open_unix_connection(path, limit=1024)
    writer.write(b'{"t":"hello","role":"worker"}\n')
    await listener.until(lambda: len(listener.clients) == 1)
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    sent = 0
    while listener.clients[0].send({"t": "vote", "votes": ["x" * 10_000]}):
        sent += 1
    assert sent * 10_000 < 4 * local.BACKLOG_BYTES
    await listener.until(lambda: len(listener.gone) == 1)
    writer.close()


@given(st.binary())
def test_any_line_is_a_message_or_none(line: bytes) -> None:
    message = local.decode(line)
    assert message is None or isinstance(message["t"], str)


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.none() | st.floats(allow_nan=False)))
def test_messages_survive_the_way(fields: dict[str, Any]) -> None:
    message = {**fields, "t": "report"}
    line = local.encode(message)
    assert line.count(b"\n") == 1
    assert local.decode(line) == message
    assert json.loads(line) == message


async def test_messages_of_unknown_types_or_without_their_fields_are_survived(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[int] = []
    handlers: dict[str, Any] = {"step": lambda _client, message: heard.append(message["step"])}
    client = Connection.__new__(Connection)
    client.role, client.pid = "worker", 1
    for message in ({"t": "what"}, {"t": "step"}, {"t": "step", "step": 3}):
        local.dispatch(handlers, client, message)
    assert heard == [3]
    assert len(caplog.records) == 2
