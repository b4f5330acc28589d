"""`assay run`: a whole cluster on this machine for one job, from the first process to the summary."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from controller.cli import checks, corpus
from controller.cli.client import Operator
from controller.cli.errors import INTERRUPTED, OK, CommandError, UnreachableError
from controller.cli.follow import Display, follow
from controller.cli.order import MOST_NODES, Order, new_order, ranks, resumed_order
from controller.cli.output import output_option, print_json, say
from controller.cli.presets import AGAIN, LAYERS, REPLAYS, state_bytes
from controller.cli.reading import queries, told
from controller.cli.rundir import RunDirectory, claimed, unused
from controller.cli.session import Session, Stopped, stoppable
from controller.cli.summary import print_summary
from controller.local.plan import Plan, make_plan

#: Ids that a vocabulary may have: rows of `small`'s embedding and head then take 128 GiB of state.
MOST_IDS = 2**24
#: All ranks are held meanwhile, and a worker that replays for half a minute counts as one that hangs.
MOST_REPLAYS = 8
#: Interval of checkpoints, in steps: the main job of 40 steps has four.
CHECKPOINT_EVERY = 10
#: Importing, migrating and listening takes the controller about a second; on a crowded machine many.
CONTROLLER_S = 60.0
CANCEL_S = 0.5


@click.command("run")
@click.option("--preset", default="tiny", show_default=True, help=f"The model: {', '.join(LAYERS)}.")
@click.option("--nodes", default=2, show_default=True, type=click.IntRange(1, MOST_NODES), help="Nodes, a rank each.")
@click.option("--spares", default=1, show_default=True, type=click.IntRange(0, MOST_NODES), help="Spare nodes.")
@click.option("--steps", default=40, show_default=True, type=click.IntRange(min=1, max=2**31), help="Steps to train.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**32 - 1), help="Everything follows it.")
@click.option("--drill", "texts", multiple=True, metavar="KIND@STEP[:key=value,...]", help="A fault on purpose.")
@click.option("--dir", "directory", type=click.Path(path_type=Path), help="Keep all of the run here. [default: fresh]")
@click.option("--db", help="The database's URL. [default: sqlite, in the run's directory]")
@click.option("--port", type=click.IntRange(1, 65535), help="Port of the status page. [default: a free one]")
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp8"]), default="fp32", show_default=True)
@click.option("--corpus", help="A text file, a folder of them, or a token file's PREFIX. [default: Python's sources]")
@click.option("--tokenizer", help="A tokenizer.json for text. [default: each byte is a token]")
@click.option("--vocab-size", type=click.IntRange(1, MOST_IDS), help="Ids. [default: the preset's or the tokenizer's]")
@click.option(
    "--pack",
    type=click.Choice(["stream", "documents"]),
    default="stream",
    show_default=True,
    help="Samples cut from one long text, or their documents kept apart.",
)
@click.option("--mesh", metavar="dp=N[,ep=N][,local=N]", help="Divide experts and optimizer. [default: whole copies]")
@click.option("--sensors", type=click.Choice(["on", "off"]), default="on", show_default=True, help="Sense corruption.")
@click.option("--tolerance-scale", type=float, default=1.0, show_default=True, help="Scales every tolerance.")
@click.option("--tolerances", metavar="FILE", help="A table that assay calibrate wrote. [default: the shipped one]")
@click.option(
    "--replays",
    type=click.IntRange(1, MOST_REPLAYS),
    default=REPLAYS,
    show_default=True,
    help="Times that a suspect computes a held step again, at most.",
)
@click.option(
    "--again",
    type=click.FloatRange(0, 1),
    default=AGAIN,
    show_default=True,
    help="Share of the operators without an identity that each step runs again.",
)
@click.option(
    "--evidence",
    default="with-data",
    show_default=True,
    metavar="with-data|no-data[,keep=N][,days=N][,total=SIZE][,bundle=SIZE]|off",
    help="What held steps leave to be replayed.",
)
@click.option("--checkpoint-every", default=CHECKPOINT_EVERY, show_default=True, type=click.IntRange(min=1))
@click.option("--resume", type=click.Path(path_type=Path), help="Go on with the run in this directory.")
@output_option
@click.pass_context
def command(ctx: click.Context, /, texts: tuple[str, ...], form: str, **options: Any) -> int:
    """Train a job on a cluster of its own on this machine."""
    given = {name for name in options if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    options["mesh"] = checks.mesh(options["mesh"])
    if options["mesh"] and not options["resume"]:
        options["nodes"] = ranks(options["mesh"], options["nodes"] if "nodes" in given else None)
    order = resumed_order(options, given, texts) if options["resume"] else new_order(options, texts)
    order = replace(order, spec=corpus.checked(order.spec, order.directory))
    check_machine(order)
    with claimed(order.directory):
        if not options["resume"]:
            unused(order.directory)  # again: until now another run could have taken it
        check_storage(order)
        plan = make_plan(order.directory, order.database, order.nodes, order.spares, order.port or 0, _otlp())
        say(f"status {plan.status_url} dir {order.directory}")
        try:
            with stoppable():
                document = execute(order, plan)
        except Stopped as stopped:
            say(f"stopped; go on with: assay run --resume {order.directory}")
            return INTERRUPTED if stopped.number == signal.SIGINT else 128 + stopped.number
    if form == "json":
        print_json(document)
    else:
        print_summary(document)
    if document["status"] == "COMPLETED":
        return OK
    raise CommandError(f"job {order.job} {str(document['status']).lower()}: {document['reason']}")


def check_machine(order: Order) -> None:
    """What must hold here before the directory is taken. Raises ConditionError."""
    checks.ray()
    checks.port(order.port)
    checks.directory(order.directory)


def check_storage(order: Order) -> None:
    """What must hold of disk, memory and database before anything is started. Raises ConditionError."""
    state = state_bytes(str(order.spec["preset"]), order.spec["vocab_size"])
    checks.room(order.directory, state, order.nodes, order.spares)
    checks.database(order.database)


def execute(order: Order, plan: Plan) -> dict[str, Any]:
    """Start the cluster, train, stop everything; the run's document, read when all is stored."""
    session = Session(plan)
    record: RunDirectory | None = None
    with told():
        try:
            session.start()
            record = _record(order, plan, session.pid)
            record.save(order.directory)
            _train(order, plan, session, record)
        except Stopped:
            _cancel(plan, order.job)
            raise
        finally:
            session.stop()
            if record is not None:
                record.end(order.directory, time.time())
        with queries(record) as ask:
            return ask.run(order.job, str(order.directory), plan.status_url)


def _train(order: Order, plan: Plan, session: Session, record: RunDirectory) -> None:
    with Display(int(order.spec["steps"])) as display:
        display.tell("starting the controller, Ray and the agents")
        _submit(order, plan, session)
        with queries(record) as ask:
            follow(ask, order.job, display, session.check)


def _submit(order: Order, plan: Plan, session: Session) -> None:
    """Hand in the job as soon as the controller answers."""
    deadline = time.monotonic() + CONTROLLER_S
    with Operator(plan.grpc, deadline=1.0) as operator:
        while True:
            session.check()
            try:
                operator.submit(json.dumps(order.spec), order.drills, "assay run")
                return
            except UnreachableError as error:
                if time.monotonic() > deadline:
                    raise CommandError(f"the controller did not start: {_last_line(order.directory)}") from error


def _cancel(plan: Plan, job: str) -> None:
    """Tell the controller that this end is wanted, if it can be told at once: the job is then no outage."""
    with Operator(plan.grpc, deadline=CANCEL_S) as operator:
        try:
            operator.cancel(job, "interrupted")
        except CommandError:
            return


def _record(order: Order, plan: Plan, pid: int) -> RunDirectory:
    return RunDirectory(
        job=order.job,
        spec=order.spec,
        nodes=order.nodes,
        spares=order.spares,
        status_url=plan.status_url,
        grpc=plan.grpc,
        database=order.database,
        supervisor_pid=pid,
        started_at=time.time(),
    )


def _otlp() -> str | None:
    """The standard variable of OpenTelemetry, read once for all processes of the run."""
    return os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or None


def _last_line(directory: Path) -> str:
    try:
        lines = (directory / "logs" / "controller.log").read_text(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1] if lines else "it said nothing"
