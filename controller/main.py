"""`assay-controller`: serves a cluster, or decides a recorded history again and compares."""

import asyncio
import logging
import os
import sys
from pathlib import Path
from typing import NoReturn

import click

from controller.config import ControllerConfig, from_arguments
from controller.loading import replay as replay_history
from controller.server import StartError, install_signals, serve
from controller.store.errors import StoreError
from controller.store.opening import database_url, open_store
from controller.web.app import create_app

# The command line's exit codes (docs/cli.md): 1 the check failed, 5 a condition is not met.
FAILED = 1
NOT_MET = 5

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


@click.group()
@click.version_option(package_name="assay")
def main() -> None:
    """The controller of an Assay cluster."""


@main.command("serve")
@click.option("--dir", "directory", required=True, type=click.Path(path_type=Path, file_okay=False))
@click.option("--db", "database", default=None, help="Database URL; default: a SQLite file in the directory.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--grpc-port", type=click.IntRange(0, 65535), default=0, help="For agents and operators; 0: any.")
@click.option("--web-port", type=click.IntRange(0, 65535), default=0, help="For the pages and /metrics; 0: any.")
def serve_command(directory: Path, database: str | None, host: str, grpc_port: int, web_port: int) -> None:
    """Serve until SIGTERM. Writes DIR/controller.json when ready."""
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, stream=sys.stderr)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        asyncio.run(_serve(from_arguments(directory, database, host, grpc_port, web_port, os.environ)))
    except (StartError, StoreError) as error:
        _refuse(str(error))
    except OSError as error:
        _refuse(f"{error.filename or directory} cannot be used: {error.strerror}")


@main.command("replay")
@click.option("--dir", "directory", required=True, type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option("--db", "database", default=None, help="Database URL; default: the SQLite file in the directory.")
def replay_command(directory: Path, database: str | None) -> None:
    """Decide every recorded event again; exit 1 unless the very actions that are stored come out."""
    try:
        store = open_store(database or database_url(directory), create=False)
    except StoreError as error:
        _refuse(str(error))
    try:
        outcome = replay_history(store)
    finally:
        store.close()
    if outcome.difference is not None:
        click.echo(f"differs after {outcome.events} events: {outcome.difference}")
        sys.exit(FAILED)
    click.echo(f"{outcome.events} events decided again, {outcome.actions} actions equal")


async def _serve(config: ControllerConfig) -> None:
    stop = asyncio.Event()
    install_signals(stop)
    await serve(config, create_app, stop)


def _refuse(line: str) -> NoReturn:
    """End with one line on stderr."""
    click.echo(f"assay-controller: {line}", err=True)
    sys.exit(NOT_MET)


if __name__ == "__main__":
    main()
