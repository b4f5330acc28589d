"""`assay drill`: inject a fault, on purpose, into a job that is running."""

import secrets
from pathlib import Path

import click

from controller.cli import drills
from controller.cli.client import Operator
from controller.cli.errors import UnreachableError, UsageError
from controller.cli.output import output_option, print_json, say
from controller.cli.presets import LAYERS
from controller.cli.rundir import RunDirectory, dir_option, load


@click.command("drill")
@click.argument("kind")
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--job", required=True, help="The running job.")
@click.option("--step", required=True, type=int, help="The step in which it strikes.")
@click.option("--reason", default="drill", show_default=True, help="Why; kept on record.")
@dir_option
@output_option
def command(kind: str, settings: tuple[str, ...], job: str, step: int, reason: str, directory: Path, form: str) -> None:
    """Inject a fault of KIND (sdc, kill, hang, node, checkpoint, controller) into a running job.

    Keys: rank, node, layer, op, fault, bit, persistent.
    """
    run = load(directory)
    try:
        drill = drills.build(kind, step, settings, bounds(run), f"{kind}-{step}-{secrets.token_hex(4)}")
    except drills.DrillError as error:
        raise UsageError(str(error)) from error
    if not run.running:
        raise UnreachableError(f"the run in {directory} has ended: no controller answers")
    with Operator(run.grpc) as operator:
        committed = operator.read("job", job)["committed_steps"]
        if step <= committed and not drill.persistent:
            raise UsageError(f"step {step} is over: {job} has committed {committed} steps")
        ident = operator.inject(job, drill, reason)
    if form == "json":
        print_json({"schema": "assay.drill/1", "id": ident, "job": job, "kind": kind, "step": step})
    else:
        say(f"drill {ident} is armed in {job}")


def bounds(run: RunDirectory) -> drills.Bounds:
    """What a drill of this run may name."""
    return drills.Bounds(
        steps=run.spec.get("steps"),
        world=run.nodes,
        nodes=frozenset(f"n{i}" for i in range(run.nodes + run.spares)),
        layers=LAYERS.get(str(run.spec.get("preset"))),
    )
