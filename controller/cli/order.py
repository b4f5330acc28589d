"""What an `assay run` is to train, on how many nodes and where: checked, before anything is touched."""

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controller.cli import checks, drills, evidence, tolerances
from controller.cli.errors import ConditionError, UsageError
from controller.cli.presets import AGAIN, LAYERS, REPLAYS
from controller.cli.rundir import load, unused
from controller.core.events import Drill
from controller.store.opening import database_url

SPEC_SCHEMA = "assay.job/1"
#: torch threads of a rank. Bits depend on it, so it must not follow the machine's number of cores.
THREADS = 1
#: Addresses 127.0.0.2 to 127.0.0.254.
MOST_NODES = 250
#: Options that a resumed run takes from the run directory; given again, they must agree.
_FROZEN = (
    "preset",
    "seed",
    "precision",
    "corpus",
    "tokenizer",
    "vocab_size",
    "pack",
    "sensors",
    "tolerance_scale",
    "tolerances",
    "checkpoint_every",
    "mesh",
    "replays",
    "again",
)
#: What run.json lacks if the run is older than the choice.
_BEFORE = {
    "tokenizer": None,
    "vocab_size": None,
    "pack": "stream",
    "corpus_digest": None,
    "mesh": None,
    "replays": REPLAYS,
    "again": AGAIN,
    "evidence": None,
    "tolerances": None,
}


@dataclass(frozen=True, slots=True)
class Order:
    """A run that was checked: what to train, on how many nodes, and where."""

    directory: Path
    database: str
    spec: dict[str, Any]
    nodes: int
    spares: int
    port: int | None
    drills: tuple[Drill, ...]

    @property
    def job(self) -> str:
        """The job's id."""
        return str(self.spec["job"])


def ranks(mesh: dict[str, int], nodes: int | None) -> int:
    """How many nodes a mesh takes: each has one rank. Raises UsageError if another number was asked for."""
    if nodes not in (None, mesh["dp"]):
        raise UsageError(f"--nodes {nodes} is not dp={mesh['dp']} of --mesh: each node has one rank")
    return mesh["dp"]


def new_order(options: dict[str, Any], texts: tuple[str, ...]) -> Order:
    """Check the options of a fresh run. Raises UsageError."""
    checks.preset(options["preset"])
    checks.experts(options["mesh"], options["preset"])
    job = f"job-{secrets.token_hex(4)}"
    directory = (options["directory"] or Path("assay-runs") / job).absolute()
    unused(directory)
    spec = {
        **_BEFORE,
        "schema": SPEC_SCHEMA,
        "job": job,
        "steps": options["steps"],
        "world": options["nodes"],
        **_frozen(options),
        "storage": str(directory / "checkpoints"),
        "threads": THREADS,
        "cache": str(directory / "cache"),
        "evidence": evidence.settings(options["evidence"], directory),
    }
    database = options["db"] or database_url(directory)
    return _order(directory, database, spec, options, texts)


def resumed_order(options: dict[str, Any], given: set[str], texts: tuple[str, ...]) -> Order:
    """Take the job from its directory; options that are given must agree, only steps may grow. Raises UsageError."""
    directory = options["resume"].absolute()
    run = load(directory)
    if run.running:
        raise ConditionError(f"the run in {directory} is still running")
    if "directory" in given and options["directory"].absolute() != directory:
        raise UsageError(f"--dir {options['directory']} is not --resume {directory}")
    known = {**_BEFORE, **run.spec, "nodes": run.nodes, "spares": run.spares, "db": run.database}
    wanted = {**options, **_frozen(options)}
    for name in (*_FROZEN, "nodes", "spares", "db"):
        if name in given and wanted[name] != known[name]:
            option = name.replace("_", "-")
            was, new = _shown(name, known[name]), _shown(name, wanted[name])
            raise UsageError(f"--{option} is {was} in the run in {directory}; it cannot become {new}")
    steps = options["steps"] if "steps" in given else run.spec["steps"]
    if steps < run.spec["steps"]:
        raise UsageError(f"--steps is {run.spec['steps']} in the run in {directory}; it may only grow")
    spec = {**_BEFORE, **run.spec, "steps": steps}
    if "evidence" in given:  # no bit depends on it, and whoever is asked to keep no data must be able to stop it
        spec["evidence"] = evidence.settings(options["evidence"], directory)
    checks.preset(str(spec["preset"]))
    checks.corpus(spec["corpus"])
    checks.tokenizer(spec["tokenizer"])
    merged = {**options, "nodes": run.nodes, "spares": run.spares, "preset": spec["preset"]}
    return _order(directory, run.database, spec, merged, texts)


def _order(
    directory: Path, database: str, spec: dict[str, Any], options: dict[str, Any], texts: tuple[str, ...]
) -> Order:
    nodes, spares = options["nodes"], options["spares"]
    if nodes + spares > MOST_NODES:
        raise UsageError(f"{nodes} nodes and {spares} spares are more than the {MOST_NODES} that fit one machine")
    names = frozenset(f"n{i}" for i in range(nodes + spares))
    bounds = drills.Bounds(spec["steps"], nodes, names, LAYERS[spec["preset"]])
    try:
        made = tuple(drills.parse(text, bounds, _drill_id(text, i)) for i, text in enumerate(texts))
    except drills.DrillError as error:
        raise UsageError(str(error)) from error
    return Order(directory, database, spec, nodes, spares, options["port"], made)


def _drill_id(text: str, number: int) -> str:
    """Names a file on the job's storage; unique over resumed runs."""
    plain = "".join(c for c in text.partition(":")[0] if c.isascii() and c.isalnum())[:24]
    return f"{plain}-{number}-{secrets.token_hex(3)}"


def _frozen(options: dict[str, Any]) -> dict[str, Any]:
    return {
        "preset": options["preset"],
        "seed": options["seed"],
        "precision": options["precision"],
        "corpus": checks.corpus(options["corpus"]),
        "tokenizer": checks.tokenizer(options["tokenizer"]),
        "vocab_size": options["vocab_size"],
        "pack": options["pack"],
        "sensors": options["sensors"] == "on",
        "tolerance_scale": checks.scale(options["tolerance_scale"]),
        "tolerances": tolerances.read(options["tolerances"]),
        "checkpoint_every": options["checkpoint_every"],
        "mesh": options["mesh"],
        "replays": options["replays"],
        "again": checks.share(options["again"]),
    }


def _shown(name: str, value: Any) -> Any:
    """An option's value as it is written on the command line."""
    if name == "tolerances" and value is not None:
        return "another table"
    return ",".join(f"{name}={size}" for name, size in value.items()) if isinstance(value, dict) else value
