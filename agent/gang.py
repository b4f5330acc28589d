"""The node's Ray driver: keeps warm workers, promotes them on the daemon's word, and owns them, so they end with it."""

import argparse
import ctypes
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from agent import actor
from agent.actor import WorkerActor
from agent.client import DaemonClient

Message = dict[str, Any]
_PR_SET_PDEATHSIG = 1
#: A raylet that starts on a busy machine needs several seconds; after this long it is not coming.
RAYLET_S = 60.0
_ROOT = str(Path(__file__).resolve().parent.parent)


class Gang:
    """Warm and promoted workers of one node, by the name of the standby they began as."""

    def __init__(self, runtime: Path, node: str, node_ip: str, ray_address: str) -> None:
        self._socket = runtime / "sock"
        self._node = node
        self._node_ip = node_ip
        self._ray_address = ray_address
        self._actors: dict[str, Any] = {}
        self._inbox: queue.Queue[Message] = queue.Queue()
        self._client = DaemonClient(self._socket, "gang", on_message=self._inbox.put, on_lost=_exit_with_daemon)

    def serve(self) -> None:
        """Connect to this node's raylet and carry out what the daemon asks until it says shutdown."""
        self._connect()
        handlers: dict[str, Callable[[Message], None]] = {
            "prepare": self._prepare,
            "promote": self._promote,
            "replay": self._replay,
            "discard": self._discard,
        }
        while (message := self._inbox.get()).get("t") != "shutdown":
            handler = handlers.get(str(message.get("t")))
            if handler is not None:
                threading.Thread(target=handler, args=(message,), daemon=True).start()
        ray.shutdown()

    def _connect(self) -> None:
        """Ray is given its address explicitly: it must never attach to somebody else's cluster."""
        cloudpickle.register_pickle_by_value(actor)  # type: ignore[no-untyped-call]
        deadline = time.monotonic() + RAYLET_S
        while True:
            try:
                ray.init(
                    address=self._ray_address,
                    namespace="assay",
                    log_to_driver=False,
                    configure_logging=False,
                    _node_ip_address=self._node_ip,
                )
                return
            except (ConnectionError, RuntimeError, ValueError):  # no raylet on this address yet
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def _prepare(self, message: Message) -> None:
        standby = str(message["standby"])
        spec = str(message["spec"])
        try:
            self._actors[standby] = worker = self._create(standby, spec)
            ready = ray.get(worker.prepare.remote(spec))
        except RayError as error:
            self._exited(standby, "error", error)
            return
        self._client.send({"t": "ready", "standby": standby, **ready})

    def _create(self, standby: str, spec: str) -> Any:
        threads = str(json.loads(spec)["threads"])
        environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        if self._node_ip.startswith("127."):
            environment["GLOO_SOCKET_IFNAME"] = "lo"
        options = {
            "num_cpus": 0,
            "name": f"{json.loads(spec)['job']}/standby/{standby}",
            "max_restarts": 0,
            "max_task_retries": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(
                node_id=ray.get_runtime_context().get_node_id(), soft=False
            ),
        }
        remote = ray.remote(WorkerActor).options(**options)
        return remote.remote(_ROOT, environment, (str(self._socket), standby, self._node_ip))

    def _promote(self, message: Message) -> None:
        standby = str(message["standby"])
        worker = self._actors.get(standby)
        if worker is None:
            self._client.send({"t": "exited", "standby": standby, "cause": "error", "detail": "no such standby"})
            return
        try:
            result = ray.get(worker.run.remote(message["assignment"]))
        except RayError as error:
            self._exited(standby, "signal" if isinstance(error, RayActorError) else "error", error)
            return
        self._client.send({"t": "exited", "standby": standby, **result})
        self._end(standby)

    def _replay(self, message: Message) -> None:
        standby = str(message["standby"])
        request = message["request"]
        answer: Message = {"t": "replayed", "standby": standby, "action_id": request.get("action_id", "")}
        try:
            body = ray.get(self._actors[standby].replay.remote(request))
            self._client.send({**answer, "body": body, "error": ""})
        except (RayError, KeyError) as error:
            self._client.send({**answer, "body": None, "error": f"{type(error).__name__}: {error}"[:500]})

    def _discard(self, message: Message) -> None:
        self._end(str(message["standby"]))

    def _exited(self, standby: str, cause: str, error: Exception) -> None:
        failed: object = error
        if isinstance(error, RayTaskError):  # an error of our own: all of it goes to the log, the report takes one line
            traceback.print_exception(error)
            failed = error.cause
        detail = f"{type(failed).__name__}: {failed}"[:500]
        self._client.send({"t": "exited", "standby": standby, "cause": cause, "detail": detail})
        self._end(standby)

    def _end(self, standby: str) -> None:
        worker = self._actors.pop(standby, None)
        if worker is not None:
            ray.kill(worker)


def _exit_with_daemon() -> None:
    os._exit(1)


def main(arguments: list[str] | None = None) -> None:
    """Run the gang of one node; started by the daemon, and ended with it."""
    parser = argparse.ArgumentParser(prog="agent.gang", description="the node's Ray driver; the daemon starts it")
    parser.add_argument("--runtime", type=Path, required=True)
    parser.add_argument("--node", required=True)
    parser.add_argument("--node-ip", required=True)
    parser.add_argument("--ray-address", required=True)
    options = parser.parse_args(arguments)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    Gang(options.runtime, options.node, options.node_ip, options.ray_address).serve()


if __name__ == "__main__":
    main(sys.argv[1:])
