"""What `assay run` starts on one machine: processes, addresses and configurations, decided before anything runs."""

import json
import os
import secrets
import shutil
import socket
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SCHEMA = "assay.plan/1"
#: -P: an `agent` folder where the user happens to stand must not shadow ours.
PYTHON = (sys.executable, "-P")
#: Object store of each raylet: Ray's smallest is 75 MiB, and evidence is small.
OBJECT_STORE_BYTES = 80_000_000
#: Processor slots of a node; its workers ask for none. Ray keeps as many idle workers warm, one start-up saved each.
NODE_CPUS = 1
#: Ray replaces 127.0.0.1 by the machine's outside address (`resolve_ip_for_localhost`), but no other of loopback's.
HEAD_IP = "127.0.1.1"


@dataclass(frozen=True, slots=True)
class Node:
    """One simulated host: its own loopback address, raylet and agent."""

    name: str
    ip: str
    spare: bool
    config: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything the supervisor needs. `runtime` holds sockets, slots and Ray's session, and goes at the end."""

    directory: str
    runtime: str
    database: str
    grpc: str
    web: str
    ray: str
    ray_client: int  # Ray cannot be told not to serve its client, nor not to start a dashboard process:
    ray_dashboard: int  # their default ports would be shared by every run
    token: str
    nodes: tuple[Node, ...]
    otlp_endpoint: str | None = None

    @property
    def status_url(self) -> str:
        """Where the status page is."""
        return f"http://{self.web}"

    def to_json(self) -> str:
        """For the supervisor."""
        return json.dumps({"schema": SCHEMA, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The inverse of `to_json`."""
        document = json.loads(text)
        if document.pop("schema") != SCHEMA:
            raise ValueError(f"not {SCHEMA}")
        nodes = tuple(Node(**node) for node in document.pop("nodes"))
        return cls(nodes=nodes, **document)


def make_plan(directory: Path, database: str, nodes: int, spares: int, web_port: int, otlp: str | None) -> Plan:
    """Choose free ports and addresses. Nodes are n0, n1, ..., the spares last, at 127.0.0.2, 127.0.0.3, ..."""
    runtime = Path("/dev/shm") / f"assay-{secrets.token_hex(4)}"
    return Plan(
        directory=str(directory),
        runtime=str(runtime),
        database=database,
        grpc=f"127.0.0.1:{free_port()}",
        web=f"127.0.0.1:{web_port or free_port()}",
        ray=f"{HEAD_IP}:{free_port()}",
        ray_client=free_port(),
        ray_dashboard=free_port(),
        token=secrets.token_hex(32),
        nodes=tuple(
            Node(f"n{i}", f"127.0.0.{i + 2}", i >= nodes, str(directory / "nodes" / f"n{i}" / "agent.json"))
            for i in range(nodes + spares)
        ),
        otlp_endpoint=otlp,
    )


def agent_config(plan: Plan, node: Node) -> dict[str, Any]:
    """The agent's configuration file."""
    home = Path(plan.directory) / "nodes" / node.name
    return {
        "node": node.name,
        "spare": node.spare,
        "controller": plan.grpc,
        "node_ip": node.ip,
        "ray_address": plan.ray,
        "runtime": f"{plan.runtime}/{node.name}",
        "state": str(home / "state"),
        "logs": str(Path(plan.directory) / "logs"),
        "trace": str(Path(plan.directory) / "trace.jsonl"),
        "otlp_endpoint": plan.otlp_endpoint,
    }


def controller_command(plan: Plan) -> list[str]:
    """The controller's command line; its ports stay the same over restarts."""
    return [
        *PYTHON,
        "-m",
        "controller.main",
        "serve",
        "--dir",
        plan.directory,
        "--grpc-port",
        plan.grpc.rpartition(":")[2],
        "--web-port",
        plan.web.rpartition(":")[2],
        "--db",
        plan.database,
    ]


def agent_command(node: Node) -> list[str]:
    """The agent's command line."""
    return [*PYTHON, "-m", "agent.daemon", "--config", node.config]


def ray_head_command(plan: Plan) -> list[str]:
    """GCS and a raylet without resources: no node's end takes the cluster's memory with it."""
    return [
        *_ray_start(HEAD_IP, cpus=0, session=f"{plan.runtime}/ray"),
        "--head",
        f"--port={plan.ray.rpartition(':')[2]}",
        f"--ray-client-server-port={plan.ray_client}",
        f"--dashboard-port={plan.ray_dashboard}",
        "--include-dashboard=false",
        "--no-monitor",
    ]


def raylet_command(plan: Plan, node: Node) -> list[str]:
    """One node's raylet. Raylets that start at once in one session folder race for the names of their sockets."""
    return [*_ray_start(node.ip, cpus=NODE_CPUS, session=f"{plan.runtime}/{node.name}-ray"), f"--address={plan.ray}"]


def ray_environment(plan: Plan) -> dict[str, str]:
    """Ray is remote execution, so it takes a token; and its memory survives a restart of the GCS."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": plan.token,
        "RAY_gcs_storage": "rocksdb",
        "RAY_gcs_storage_path": f"{plan.runtime}/gcs",
        "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
        "RAY_enable_metrics_collection": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
    }


def free_port() -> int:
    """A TCP port of loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def port_is_free(port: int) -> bool:
    """Whether loopback's `port` can be listened on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _ray_start(ip: str, cpus: int, session: str) -> list[str]:
    beside = Path(sys.executable).with_name("ray")
    ray = str(beside) if beside.exists() else shutil.which("ray") or "ray"
    return [
        ray,
        "start",
        "--block",
        f"--node-ip-address={ip}",
        f"--num-cpus={cpus}",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        "--disable-usage-stats",
        "--include-log-monitor=false",
        "--dashboard-agent-listen-port=0",
        "--min-worker-port=0",
        "--max-worker-port=0",
        f"--temp-dir={session}",
    ]


def write_atomically(path: Path, text: str) -> None:
    """Readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text)
    aside.rename(path)
