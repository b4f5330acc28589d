"""Makes run.json records for tests."""

from pathlib import Path

from controller.cli.rundir import RunDirectory
from controller.store.opening import database_url


def record(directory: Path, **changes: object) -> RunDirectory:
    """A run.json of `tiny` on two nodes and a spare."""
    spec = {
        "schema": "assay.job/1",
        "job": "job-1",
        "preset": "tiny",
        "seed": 0,
        "steps": 40,
        "world": 2,
        "precision": "fp32",
        "corpus": None,
        "sensors": True,
        "tolerance_scale": 1.0,
        "checkpoint_every": 10,
        "storage": str(directory / "checkpoints"),
        "threads": 1,
        "cache": str(directory / "cache"),
    }
    values: dict[str, object] = {
        "job": "job-1",
        "spec": spec,
        "nodes": 2,
        "spares": 1,
        "status_url": "http://127.0.0.1:1",
        "grpc": "127.0.0.1:1",
        "database": database_url(directory),
        "supervisor_pid": 0,
        "started_at": 1.0,
    }
    return RunDirectory(**{**values, **changes})  # type: ignore[arg-type]
