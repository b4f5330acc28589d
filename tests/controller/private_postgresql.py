"""Starts a PostgreSQL server of the tests' own, on a free loopback port, with its data in a temporary folder."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
from sqlalchemy.engine import URL

USER = "assay"
START_S = 20.0
#: An immediate shutdown takes milliseconds.
STOP_S = 10.0
INSTALL = (
    "these tests need a PostgreSQL server: no initdb on PATH or in /usr/lib/postgresql/*/bin; "
    "install one (Debian: apt-get install postgresql)"
)


class MissingServerError(Exception):
    """No PostgreSQL server is installed; says what to install."""


@contextmanager
def private_postgresql() -> Iterator[URL]:
    """Run a server; gives the URL of its maintenance database. Raises MissingServerError."""
    programs = _programs()
    folder = Path(tempfile.mkdtemp(prefix="assay-postgresql-"))
    data = folder / "data"
    become = _unprivileged(folder)
    try:
        made = [
            *become,
            str(programs / "initdb"),
            "-D",
            str(data),
            "-U",
            USER,
            "-A",
            "trust",
            "--no-sync",
            "-E",
            "UTF8",
        ]
        subprocess.run(made, check=True, capture_output=True, cwd=folder)
        port = _free_port()
        settings = ["listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off", "shared_buffers=16MB"]
        flags = [word for setting in settings for word in ("-c", setting)]
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(
                [*become, str(programs / "postgres"), "-D", str(data), "-p", str(port), *flags],
                stdout=log,
                stderr=log,
                cwd=folder,
            )
        try:
            url = URL.create("postgresql", USER, host="127.0.0.1", port=port, database="postgres")
            _wait(url, server, folder / "log")
            yield url
        finally:
            _stop(server)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _stop(server: "subprocess.Popen[bytes]") -> None:
    """SIGQUIT ends PostgreSQL at once and, unlike SIGKILL, takes its shared memory along."""
    server.send_signal(signal.SIGQUIT)
    try:
        server.wait(STOP_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def create_database(server: URL, name: str) -> URL:
    """Make an empty database and give its URL."""
    with psycopg.connect(server.render_as_string(hide_password=False), autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"'.encode())
    return server.set(database=name)


def _programs() -> Path:
    found = shutil.which("initdb")
    if found and shutil.which("postgres"):
        return Path(found).resolve().parent
    for folder in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True):
        if (folder / "initdb").exists():
            return folder
    raise MissingServerError(INSTALL)


def _unprivileged(folder: Path) -> list[str]:
    """PostgreSQL refuses to run as root: give the folder to another user, and the words that run a program as it.

    The server dies with whoever started it (`--pdeathsig`), however that ends.
    """
    if os.geteuid() != 0:
        return ["setpriv", "--pdeathsig", "KILL"]
    names = {entry.pw_name for entry in pwd.getpwall()}
    user = "postgres" if "postgres" in names else "nobody"
    shutil.chown(folder, user)
    return [
        "setpriv",
        f"--reuid={user}",
        "--regid",
        str(pwd.getpwnam(user).pw_gid),
        "--clear-groups",
        "--pdeathsig",
        "KILL",
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait(url: URL, server: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            psycopg.connect(url.render_as_string(hide_password=False), connect_timeout=1).close()
            return
        except psycopg.OperationalError as error:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not start: {log.read_text()}") from error
