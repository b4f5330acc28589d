"""What held steps leave behind, as commands speak of it: the settings of `--evidence`, and an incident's bundle."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from controller.cli.errors import CONDITION, USAGE, CommandError, ConditionError, UsageError

FOLDER = "evidence"
#: Days, bundles and bytes: the reasons stand where the job's specification has them, in `agent.training.spec`.
DEFAULTS = {"days": 30.0, "keep": 32, "total_bytes": 1 << 30, "bundle_bytes": 256 << 20}
#: Imports torch and computes one step as often as asked; a minute covers `small` on a crowded machine.
REPLAY_S = 600.0
#: Bytes of a bundle's document that are read: one of 10,000 exchanges with other ranks has half as many.
DOCUMENT_BYTES = 4 << 20
_ERRORS: dict[int, type[CommandError]] = {USAGE: UsageError, CONDITION: ConditionError}
_NAME = re.compile(r"step-\d{8}-rank-\d{1,9}-generation-\d{1,9}-attempt-\d{1,9}")
_WHOLE = re.compile(r"[1-9][0-9]{0,8}")
_SIZE = re.compile(r"([1-9][0-9]{0,8})(|KB|MB|GB|TB|KiB|MiB|GiB|TiB)")
_UNITS = {"": 1} | {
    f"{letter}{ending}": base**power
    for power, letter in enumerate("KMGT", start=1)
    for ending, base in (("B", 1000), ("iB", 1024))
}


def settings(text: str, directory: Path) -> dict[str, Any] | None:
    """The specification's `evidence` of "with-data,keep=32,days=30,total=1GiB,bundle=256MiB"; None for "off".

    Raises UsageError naming the part that makes no sense.
    """
    kind, *parts = text.split(",")
    if kind == "off" and not parts:
        return None
    if kind not in ("with-data", "no-data"):
        raise UsageError(f"--evidence {text}: {kind!r} is not with-data or no-data, nor is all of it off")
    found: dict[str, Any] = {"folder": str(directory / FOLDER), "data": kind == "with-data", **DEFAULTS}
    given = set()
    for part in parts:
        name, _, value = part.partition("=")
        if name in given:
            raise UsageError(f"--evidence {text}: {name} is there twice")
        given.add(name)
        found.update(_setting(text, part, name, value))
    return found


def _setting(text: str, part: str, name: str, value: str) -> dict[str, int]:
    if name in ("keep", "days") and _WHOLE.fullmatch(value):
        return {name: int(value)}
    size = _SIZE.fullmatch(value)
    if name in ("total", "bundle") and size is not None:
        return {f"{name}_bytes": int(size[1]) * _UNITS[size[2]]}
    told = "keep=, days= with a whole number, or total=, bundle= with a size such as 500MB"
    raise UsageError(f"--evidence {text}: {part!r} is not {told}")


def bundle_of(directory: Path, incident: dict[str, Any], attempt: int | None) -> Path:
    """The folder of the bundle that the incident's first attempt left, or that of `attempt`.

    Raises CommandError if it left none, ConditionError if the bundle is gone, with what the ledger says of it.
    """
    names = [name for name in incident.get("evidence", []) if _NAME.fullmatch(name)]
    if attempt is not None:
        names = [name for name in names if name.endswith(f"-attempt-{attempt}")]
    if not names:
        of = "" if attempt is None else f" of attempt {attempt}"
        raise CommandError(
            f"incident {incident['id']} has no evidence bundle{of}: only steps that are judged by computing them again "
            "leave one; what ranks hand each other is judged by hashes, which the incident's reason tells"
        )
    folder = directory / FOLDER / str(incident["job"])
    path = folder / str(names[0])
    if not path.is_dir():
        raise ConditionError(f"{path} is gone: {removal(folder, path.name) or 'nobody noted why'}")
    return path


def beside(directory: Path, incident: dict[str, Any]) -> list[dict[str, Any]]:
    """What each bundle that is there says of its step's scalars: `bundle`, and `statistics`, the most unusual first.

    Each has `name`, `value`, `median` of the steps before and `z`, any of which may be NaN or infinite. After too few
    steps there are none; a bundle of an older version, and one that cannot be read, is left out.
    """
    folder = directory / FOLDER / str(incident["job"])
    found = []
    for name in incident.get("evidence", []):
        if _NAME.fullmatch(name) and (told := _told(folder / name / "evidence.json")) is not None:
            found.append({"bundle": name, "statistics": told})
    return found


def _told(path: Path) -> list[dict[str, Any]] | None:
    try:
        with path.open("rb") as file:
            statistics = json.loads(file.read(DOCUMENT_BYTES))["beside"]
        return [
            {"name": str(one["name"]), **{k: float(one[k]) for k in ("value", "median", "z")}} for one in statistics
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def removal(folder: Path, name: str) -> str:
    """Why a bundle was removed, by the ledger; empty if it does not say."""
    try:
        lines = (folder / "removed.jsonl").read_text(errors="replace").splitlines()
        entries = [json.loads(line) for line in lines]
    except (OSError, ValueError):
        return ""
    return next((f"it was removed, {entry['why']}" for entry in entries if entry.get("name") == name), "")


def rerun(bundle: Path, checkpoints: Path, times: int, corpus: Path | None, tokenizer: Path | None) -> dict[str, Any]:
    """Run the bundle's computation in a process of its own: this one never loads torch.

    Raises CommandError, of the kind that has that process's exit code.
    """
    child = [sys.executable, "-P", "-m", "agent.training.evidence.tool", str(bundle), "--times", str(times)]
    child += ["--checkpoints", str(checkpoints)]
    for option, path in (("--corpus", corpus), ("--tokenizer", tokenizer)):
        child += [option, str(path.absolute())] if path is not None else []
    try:
        done = subprocess.run(child, capture_output=True, text=True, timeout=REPLAY_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise CommandError(f"replaying {bundle} took longer than {REPLAY_S:.0f} s") from error
    try:
        document: dict[str, Any] = json.loads(done.stdout)
    except ValueError as error:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise _ERRORS.get(done.returncode, CommandError)(last.removeprefix("assay: ")) from error
    return document
