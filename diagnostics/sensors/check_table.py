"""`python -m diagnostics.sensors.check_table`: whether what is on stdin is a table of tolerances, without torch."""

import sys

from diagnostics.sensors.tolerance import TableError, parse_table

#: The exit code for what is none; the reason is one line on stderr.
NO_TABLE = 2


def main() -> int:
    """Read one document."""
    try:
        parse_table(sys.stdin.read())
    except (TableError, UnicodeDecodeError) as error:
        sys.stderr.write(f"{error}\n")
        return NO_TABLE
    return 0


if __name__ == "__main__":
    sys.exit(main())
