"""What a controller is told when it starts; the environment is read here, once, and nowhere else."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from controller.store.opening import database_url


@dataclass(frozen=True, slots=True)
class ControllerConfig:
    """Where a controller keeps its things and where it listens; port 0 means any free one."""

    directory: Path
    database: str
    host: str
    grpc_port: int
    web_port: int
    trace_file: Path
    otlp_endpoint: str | None


def from_arguments(
    directory: Path, database: str | None, host: str, grpc_port: int, web_port: int, environment: Mapping[str, str]
) -> ControllerConfig:
    """Make the configuration from the command line and the process's environment."""
    return ControllerConfig(
        directory=directory,
        database=database or database_url(directory),
        host=host,
        grpc_port=grpc_port,
        web_port=web_port,
        trace_file=directory / "trace.jsonl",
        otlp_endpoint=environment.get("OTEL_EXPORTER_OTLP_ENDPOINT") or None,
    )
