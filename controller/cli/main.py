"""`assay`: the commands of a person. Each noun is loaded when it is asked for, so that the rest costs nothing."""

import importlib
import sys
from collections.abc import Sequence
from importlib import metadata

import click

from controller.cli.errors import INTERRUPTED, USAGE

#: name -> (module, what it does). The texts stand here so that help loads no command.
COMMANDS = {
    "run": ("controller.cli.run", "Train a job on a cluster of its own on this machine."),
    "status": ("controller.cli.status", "Show the job, its nodes and every process."),
    "job": ("controller.cli.job", "Show a job or its steps."),
    "incident": ("controller.cli.incident", "List incidents, show one with its timeline, or replay what it was about."),
    "checkpoint": ("controller.cli.checkpoint", "List checkpoints or verify one."),
    "model": ("controller.cli.model", "Import or export weights, plan memory, generate text."),
    "calibrate": ("controller.cli.calibrate", "Measure the sensors' tolerances on this machine."),
    "drill": ("controller.cli.drill", "Inject a fault into a running job."),
}


class LazyGroup(click.Group):
    """A group whose commands live in modules of the same name and are imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of COMMANDS."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module; its command is called `command`."""
        if cmd_name not in COMMANDS:
            return None
        found = importlib.import_module(COMMANDS[cmd_name][0]).command
        return found if isinstance(found, click.Command) else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(metadata.version("assay"), prog_name="assay")
def cli() -> None:
    """Train DeepSeek-V3-style models and vouch for every step: silent corruption is sensed before it commits.

    Data goes to stdout, talk to stderr. Exit codes: 0 ok, 1 failed, 2 usage, 3 unreachable, 4 denied,
    5 a condition is not met, 130 interrupted.
    """


def call(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; what goes wrong is one line on stderr."""
    try:
        result = cli.main(args=None if arguments is None else list(arguments), prog_name="assay", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return USAGE
    except click.ClickException as error:
        click.echo(f"assay: {' '.join(error.format_message().split())}", err=True)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("assay: interrupted", err=True)
        return INTERRUPTED
    return result if isinstance(result, int) else 0


def main() -> None:
    """Entry point of the `assay` script."""
    sys.exit(call())


if __name__ == "__main__":
    main()
