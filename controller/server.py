"""Puts the controller together: store, lease, decisions, services and pages; and takes it apart again."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import grpc.aio
import uvicorn
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from assay import telemetry
from controller import lease as leasing
from controller.active import ActiveController
from controller.config import ControllerConfig
from controller.feed import StoreFeed
from controller.loading import load_ingest, load_state
from controller.recorder import Recorder
from controller.rpc import agents, operators
from controller.rpc.checks import MESSAGE_BYTES
from controller.store.leases import resign_lease
from controller.store.opening import Store, open_store
from controller.store.queries import Queries
from controller.store.writer import Writer
from controller.telemetry import Metrics, Traces

log = logging.getLogger(__name__)

# Written when a controller is ready, for whoever started it: port 0 becomes a real one only here.
READY_FILE = "controller.json"
# Seconds for calls in progress when a controller ends in order; streams are ended after it.
GRACE_S = 0.5
PAGE_GRACE_S = 1  # uvicorn takes whole seconds
SERVER_OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    # Two controllers must not share a port without knowing it.
    ("grpc.so_reuseport", 0),
    # Agents ping every 10 s, so that a vanished host is noticed; gRPC's default would call that an attack.
    ("grpc.http2.min_ping_interval_without_data_ms", 5000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 10000),
    ("grpc.keepalive_timeout_ms", 5000),
    # What ends the stream of a peer that does not answer a ping: by default a minute, whatever the line above says.
    ("grpc.http2.ping_timeout_ms", 5000),
    # By default gRPC slows pings down to one a minute once two went out without data.
    ("grpc.http2.max_pings_without_data", 0),
]

WebApp = Callable[[StoreFeed], Starlette]


class StartError(Exception):
    """The controller cannot start; the message is one clear line for an operator."""


class _Pages(uvicorn.Server):
    """uvicorn in a loop that is not its own: signals are ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the process's signal handlers alone."""
        yield


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where a running controller listens."""

    grpc: str
    web: str


async def serve(config: ControllerConfig, web: WebApp, stop: asyncio.Event) -> None:
    """Run a controller until `stop` is set. Raises StartError or StoreError, with one line for an operator."""
    page_socket = _bind(config.host, config.web_port)
    server, grpc_port = _listen(config)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(page_socket.close)
        tracing = telemetry.setup("assay-controller", config.trace_file, config.otlp_endpoint)
        stack.push_async_callback(asyncio.to_thread, tracing.close)
        store = open_store(config.database)
        stack.callback(store.close)
        metrics = Metrics()
        active = await stack.enter_async_context(_active(store, metrics, Traces(tracing.tracer)))
        queries = Queries(store)
        feed = StoreFeed(queries)
        await stack.enter_async_context(_services(server, active, queries))
        await stack.enter_async_context(_pages(feed, web, metrics, page_socket))
        await stack.enter_async_context(_background(feed.serve(active.changed)))
        endpoints = Endpoints(f"{config.host}:{grpc_port}", f"http://{config.host}:{page_socket.getsockname()[1]}")
        _announce(config.directory, endpoints, active.epoch())
        await _until(stop, active)


def install_signals(stop: asyncio.Event) -> None:
    """Let SIGTERM and SIGINT set `stop`."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)


@contextlib.asynccontextmanager
async def _active(store: Store, metrics: Metrics, traces: Traces) -> AsyncIterator[ActiveController]:
    """Take the lease and go on where the controller before stopped; resign in the end, if all was stored."""
    lease = await asyncio.to_thread(leasing.acquire, store, time.sleep)
    state, seq = load_state(store)
    writer = Writer(store, leasing.NAME, lease.epoch, metrics.committed)
    recorder = Recorder(state, seq, load_ingest(store, state), time.time, metrics, traces)
    active = ActiveController(store, lease, writer, recorder, metrics)
    try:
        await active.start()
        yield active
    finally:
        await active.close()
        await asyncio.to_thread(writer.close)
    resign_lease(store, leasing.NAME, lease.epoch)


def _listen(config: ControllerConfig) -> tuple[grpc.aio.Server, int]:
    """Make the gRPC server and take its port, before the lease is taken; it answers once it is started."""
    server = grpc.aio.server(options=SERVER_OPTIONS)
    try:
        return server, server.add_insecure_port(f"{config.host}:{config.grpc_port}")
    except RuntimeError as error:
        raise StartError(_port_taken(config.host, config.grpc_port)) from error


@contextlib.asynccontextmanager
async def _services(server: grpc.aio.Server, active: ActiveController, queries: Queries) -> AsyncIterator[None]:
    """Serve gRPC."""
    agent_service = agents.AgentService(active, active.sessions)
    operator_service = operators.OperatorService(active, queries)
    server.add_generic_rpc_handlers((agent_service.handler(), operator_service.handler()))
    servicer = cast(Any, health).aio.HealthServicer()  # the stubs do not know of it
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    await server.start()
    for service in ("", agents.SERVICE, operators.SERVICE):
        await servicer.set(service, health_pb2.HealthCheckResponse.SERVING)
    try:
        yield
    finally:
        active.closing()
        await servicer.enter_graceful_shutdown()
        await server.stop(GRACE_S)


@contextlib.asynccontextmanager
async def _pages(feed: StoreFeed, web: WebApp, metrics: Metrics, listening: socket.socket) -> AsyncIterator[None]:
    """Serve the pages and /metrics."""

    async def show_metrics(_request: Request) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    app = web(feed)
    app.router.routes.insert(0, Route("/metrics", show_metrics))
    server = _Pages(
        uvicorn.Config(
            app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=PAGE_GRACE_S
        )
    )
    task = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        yield
    finally:
        await feed.end()
        server.should_exit = True
        await task


@contextlib.asynccontextmanager
async def _background(work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _until(stop: asyncio.Event, active: ActiveController) -> None:
    """Wait for the wish to stop, or for the failure that makes going on pointless; raises the latter."""
    stopped = asyncio.create_task(stop.wait())
    failed = asyncio.create_task(active.failed())
    done, _ = await asyncio.wait({stopped, failed}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if failed in done:
        failed.result()
    failed.cancel()


def _bind(host: str, port: int) -> socket.socket:
    """Take the pages' port early: a port in use must stop a controller before it takes the lease."""
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen()
    except OSError as error:
        listening.close()
        raise StartError(
            f"port {port} of {host} is in use or not allowed: choose another ({error.strerror})"
        ) from error
    return listening


def _port_taken(host: str, port: int) -> str:
    return f"port {port} of {host} is in use or not allowed: choose another"


def _announce(directory: Path, endpoints: Endpoints, epoch: int) -> None:
    """Write the ready file at once or not at all."""
    document = {
        "schema": "assay.controller/1",
        "pid": os.getpid(),
        "grpc": endpoints.grpc,
        "web": endpoints.web,
        "epoch": epoch,
    }
    temporary = directory / f".{READY_FILE}.{os.getpid()}"
    temporary.write_text(json.dumps(document))
    temporary.replace(directory / READY_FILE)
    log.info("ready: agents and operators at %s, pages at %s", endpoints.grpc, endpoints.web)
