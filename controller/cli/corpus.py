"""Has a run's corpus looked at before anything is started, by the code that will train on it, in a process of its own.

The commands import nothing of the agent; they start it, here as elsewhere. What the check copies or tokenises lies in
the run's cache afterwards, where the ranks find it.
"""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from controller.cli.errors import CommandError, ConditionError, UsageError
from controller.cli.output import say
from controller.cli.presets import SAMPLE_TOKENS, VOCABULARY
from controller.local.plan import PYTHON

#: After so long a person wants to know why nothing happens: a large text is being copied, tokenised or hashed.
_SILENT_S = 2.0
_UNUSABLE = 2
_CACHE = 5


def checked(spec: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The specification with what its corpus settles: vocabulary and digest. Raises UsageError, ConditionError.

    Python's own sources as bytes fit every preset and are not looked at. A directory that is made on the way goes again
    if the corpus is refused.
    """
    if spec["corpus"] is None and spec["tokenizer"] is None and spec["vocab_size"] is None:
        return spec
    request = {
        **{name: spec[name] for name in ("corpus", "tokenizer", "vocab_size", "cache")},
        "length": SAMPLE_TOKENS[spec["preset"]],
        "preset_vocab_size": VOCABULARY,
        "digest": spec["corpus_digest"],
    }
    made = [path for path in (directory, directory.parent) if not path.exists()]
    try:
        answer = _asked(request)
    except BaseException:
        for path in made[:1]:
            shutil.rmtree(path, ignore_errors=True)
        for path in made[1:]:
            if path.exists() and not any(path.iterdir()):
                path.rmdir()
        raise
    return {**spec, "vocab_size": answer["vocab_size"], "corpus_digest": answer["digest"]}


def _asked(request: dict[str, Any]) -> dict[str, Any]:
    with subprocess.Popen(
        [*PYTHON, "-m", "agent.training.check_corpus"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            out, err = _answer(process, json.dumps(request))
        except BaseException:
            process.kill()
            raise
    told = err.strip().rpartition("\n")[2]
    if process.returncode == _UNUSABLE:
        raise UsageError(told)
    if process.returncode == _CACHE:
        raise ConditionError(told)
    if process.returncode != 0:
        raise CommandError(f"the corpus could not be looked at: {told or f'exit {process.returncode}'}")
    answer: dict[str, Any] = json.loads(out)
    return answer


def _answer(process: subprocess.Popen[str], request: str) -> tuple[str, str]:
    try:
        return process.communicate(request, timeout=_SILENT_S)
    except subprocess.TimeoutExpired:
        say("reading the corpus")
        return process.communicate()
