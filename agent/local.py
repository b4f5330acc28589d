"""The daemon's Unix socket, on which this node's gang child and workers report and take their orders."""

import asyncio
import json
import logging
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

log = logging.getLogger(__name__)

#: One JSON object a line. The largest message is a gate's alarm with its votes, a few KiB; the limit bounds memory.
LINE_BYTES = 64 << 10
#: What may wait in our memory for one client that does not read (a stopped worker): thousands of orders.
BACKLOG_BYTES = 1 << 20
_UCRED = struct.Struct("3i")  # pid, uid, gid: unix(7), SO_PEERCRED

Message = dict[str, Any]


class Connection:
    """One client. `role` is "gang" or "worker"; `pid` is the kernel's word, not the client's."""

    def __init__(self, writer: asyncio.StreamWriter, role: str, pid: int, standby: str) -> None:
        self.role = role
        self.pid = pid
        self.standby = standby
        self._writer = writer

    def send(self, message: Message) -> bool:
        """Queue a message without waiting. False if the client is gone, or reads so little that it is cut off."""
        if self._writer.is_closing():
            return False
        if self._writer.transport.get_write_buffer_size() > BACKLOG_BYTES:
            log.warning("%s %d does not read; its connection is closed", self.role, self.pid)
            self._writer.transport.abort()
            return False
        self._writer.write(encode(message))
        return True

    def close(self) -> None:
        """End the connection after what is queued."""
        self._writer.close()


class Clients(Protocol):
    """Who is told about the clients, in the order of things."""

    def welcome(self) -> Message:
        """The fields of the answer to a hello."""

    def joined(self, client: Connection) -> None:
        """A client said hello and has its welcome."""

    def received(self, client: Connection, message: Message) -> None:
        """A client sent a message."""

    def left(self, client: Connection) -> None:
        """A client's connection ended; everything it had sent was received before."""


class LocalServer:
    """Serves the socket at `path` to processes of this agent's own user."""

    def __init__(self, path: Path, clients: Clients) -> None:
        self._path = path
        self._clients = clients
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        """Bind the socket, replacing what a former life left there."""
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, self._path, limit=LINE_BYTES)
        self._path.chmod(0o600)

    async def close(self) -> None:
        """Stop listening and end every connection."""
        if self._server is not None:
            self._server.close()
            for writer in list(self._open):
                writer.close()
            await self._server.wait_closed()
            self._path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            client = await self._greet(reader, writer)
            if client is not None:
                await self._converse(reader, client)
        except (OSError, asyncio.IncompleteReadError) as error:
            log.debug("a local client broke off: %s", error)
        finally:
            self._open.discard(writer)
            writer.close()

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Connection | None:
        pid, uid = _credentials(writer)
        if uid != os.geteuid():
            log.warning("process %d of user %d may not report here", pid, uid)
            return None
        hello = await _read(reader)
        if hello is None or hello.get("t") != "hello" or hello.get("role") not in ("gang", "worker"):
            log.warning("process %d did not begin with a hello", pid)
            return None
        client = Connection(writer, hello["role"], pid, str(hello.get("standby", "")))
        client.send({"t": "welcome", **self._clients.welcome()})
        return client

    async def _converse(self, reader: asyncio.StreamReader, client: Connection) -> None:
        self._clients.joined(client)
        try:
            while (message := await _read(reader)) is not None:
                self._clients.received(client, message)
        finally:
            self._clients.left(client)


def encode(message: Message) -> bytes:
    """One message as a line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Message | None:
    """The message in a line, or None if it is not an object with a type."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) and isinstance(message.get("t"), str) else None


async def _read(reader: asyncio.StreamReader) -> Message | None:
    """The next message; None at the end of the stream, which a line that cannot be understood also is."""
    try:
        line = await reader.readline()
    except ValueError:  # longer than the limit
        log.warning("a local client sent a line longer than %d bytes", LINE_BYTES)
        return None
    if not line.endswith(b"\n"):  # the end, or a line cut off by the client's death
        return None
    message = decode(line)
    if message is None:
        log.warning("a local client sent what is not a message: %.80r", line)
    return message


def _credentials(writer: asyncio.StreamWriter) -> tuple[int, int]:
    """Process id and user id of the other end, as the kernel saw them when it connected."""
    raw = writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, _ = _UCRED.unpack(raw)
    return pid, uid


def dispatch(handlers: dict[str, Callable[[Connection, Message], None]], client: Connection, message: Message) -> None:
    """Hand a message to the handler of its type; an unknown type, or missing fields, are logged and forgotten."""
    handler = handlers.get(message["t"])
    if handler is None:
        log.warning("%s %d sent a message of unknown type %.40r", client.role, client.pid, message["t"])
        return
    try:
        handler(client, message)
    except (KeyError, TypeError, ValueError) as error:
        log.warning("%s %d sent a %s that cannot be used: %r", client.role, client.pid, message["t"], error)
