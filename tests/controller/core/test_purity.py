"""The decisions stay pure: what core may import is short, and has no clock, no randomness and no I/O in it."""

import ast
from pathlib import Path

import controller.core

ALLOWED = {"dataclasses", "enum", "typing", "collections", "math", "itertools", "functools", "heapq", "bisect"}
OURS = ("controller.core", "diagnostics.health", "diagnostics.baseline")


def foreign(source: str) -> set[str]:
    """The modules that a source imports and core may not."""
    found: set[str] = set()
    for item in ast.walk(ast.parse(source)):
        if isinstance(item, ast.Import):
            found |= {name.name for name in item.names}
        elif isinstance(item, ast.ImportFrom):
            found.add(item.module or ".")
    return {name for name in found if name.split(".")[0] not in ALLOWED and not name.startswith(OURS)}


def test_core_imports_nothing_that_could_make_it_impure() -> None:
    files = sorted(Path(controller.core.__path__[0]).glob("*.py"))
    assert len(files) > 10
    assert {file.name: names for file in files if (names := foreign(file.read_text()))} == {}


def test_an_import_of_a_clock_is_found() -> None:
    assert foreign("import time\nfrom random import Random\nfrom math import inf") == {"time", "random"}
