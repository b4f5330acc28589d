"""The plan: names, addresses, configurations, and that runs do not meet each other."""

import json
import socket
from pathlib import Path

from agent.config import parse
from controller.local.plan import (
    Plan,
    agent_config,
    free_port,
    make_plan,
    port_is_free,
    ray_environment,
    ray_head_command,
    raylet_command,
)


def test_names_nodes_in_order_with_spares_last(plan: Plan) -> None:
    assert [(node.name, node.ip, node.spare) for node in plan.nodes] == [
        ("n0", "127.0.0.2", False),
        ("n1", "127.0.0.3", False),
        ("n2", "127.0.0.4", True),
    ]


def test_survives_the_trip_to_the_supervisor(plan: Plan) -> None:
    assert Plan.from_json(plan.to_json()) == plan


def test_agents_accept_their_configuration(plan: Plan) -> None:
    for node in plan.nodes:
        config = parse(json.loads(json.dumps(agent_config(plan, node))))
        assert (config.node, config.spare, config.node_ip) == (node.name, node.spare, node.ip)


def test_no_two_raylets_share_a_session_folder(plan: Plan) -> None:
    commands = [ray_head_command(plan), *(raylet_command(plan, node) for node in plan.nodes)]
    folders = [part for command in commands for part in command if part.startswith("--temp-dir=")]
    assert len(set(folders)) == len(commands)


def test_two_runs_share_no_port_folder_or_token(plan: Plan, tmp_path: Path) -> None:
    other = make_plan(tmp_path / "other", "sqlite:///x", 2, 1, 0, None)
    names = ("runtime", "grpc", "web", "ray", "ray_client", "ray_dashboard", "token")
    assert all(getattr(plan, name) != getattr(other, name) for name in names)


def test_ray_takes_only_our_token(plan: Plan) -> None:
    environment = ray_environment(plan)
    assert environment["RAY_AUTH_MODE"] == "token"
    assert len(bytes.fromhex(environment["RAY_AUTH_TOKEN"])) == 32


def test_sees_a_port_in_use() -> None:
    port = free_port()
    assert port_is_free(port)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        assert not port_is_free(port)
