"""`assay calibrate`: measuring takes torch, so another process does it; this one passes words along."""

import subprocess
import sys

import click

#: Options are the tool's own: writing them down here as well would be a second truth.
_PASS_ALL = {"ignore_unknown_options": True, "allow_extra_args": True}


@click.command("calibrate", context_settings=_PASS_ALL, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def command(arguments: tuple[str, ...]) -> int:
    """Measure the sensors' tolerances on this machine."""
    child = [sys.executable, "-P", "-m", "agent.calibrate.tool", *arguments]
    return subprocess.run(child, check=False).returncode
