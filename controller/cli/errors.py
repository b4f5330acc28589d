"""What goes wrong in a command, each with its exit code and one clear line."""

import click

OK = 0
FAILED = 1
USAGE = 2
UNREACHABLE = 3
DENIED = 4
CONDITION = 5
INTERRUPTED = 130


class CommandError(click.ClickException):
    """A command that ends with one line and a nonzero code."""

    exit_code = FAILED

    def format_message(self) -> str:
        """One line, whatever the cause said."""
        return " ".join(self.message.split())


class UsageError(CommandError):
    """The command line, or what it names, makes no sense."""

    exit_code = USAGE


class UnreachableError(CommandError):
    """Nobody answers."""

    exit_code = UNREACHABLE


class DeniedError(CommandError):
    """The controller knows the caller and says no."""

    exit_code = DENIED


class ConditionError(CommandError):
    """Something that must hold on this machine does not."""

    exit_code = CONDITION
