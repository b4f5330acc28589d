"""`python -m agent.training.evidence.tool BUNDLE`, which `assay incident replay` runs: the computation again."""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agent.training.corpus_cache import CorpusError
from agent.training.data import BatchCorrupted
from agent.training.evidence.bundle import Bundle, BundleRefused, read
from agent.training.evidence.rerun import Given, NotEnough, rerun
from agent.training.fingerprint import fingerprint
from diagnostics.verify.votes import Vote

#: As the `assay` command has them: a digest does not hold; what was asked makes no sense; this machine does not let us.
FAILED, USAGE, CONDITION = 1, 2, 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one bundle again and print what it gave; what goes wrong is one line on stderr.

    0: this machine upholds the recorded verdict, or, where that blames nobody, computes what some voter computed.
    1: it does not, or contradicts itself, or the bundle is damaged. 5: it cannot be compared here.
    """
    options = _parser().parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="assay-replay-") as cache:
            given = Given(Path(cache), options.corpus, options.tokenizer, options.checkpoints)
            bundle = read(options.bundle)
            document = judged(bundle, rerun(bundle, given, options.times))
    except (BundleRefused, BatchCorrupted) as error:
        return _told(str(error), FAILED)
    except CorpusError as error:
        return _told(str(error), USAGE)
    except NotEnough as error:
        return _told(str(error), CONDITION)
    except OSError as error:
        return _told(f"{error.filename or options.bundle}: {error.strerror or error}", CONDITION)
    sys.stdout.write(json.dumps(document, indent=1) + "\n")
    return int(document["exit"])


def judged(bundle: Bundle, here: Sequence[Vote]) -> dict[str, Any]:
    """What this machine computed beside what the voters did. `upholds` is null where there is nobody to blame."""
    facts = bundle.facts
    digests = [vote.digest for vote in here]
    own = digests[0] if len(set(digests)) == 1 else None
    votes = [{**vote, "agrees": vote["digest"] == own} for vote in facts["votes"]]
    fingerprints = json.loads(fingerprint(facts["spec"]["threads"])), facts["fingerprint"]
    upholds = _upholds(facts["ruling"], votes)
    held = own is not None and any(vote["agrees"] for vote in votes) and upholds is not False
    comparable = fingerprints[0] == fingerprints[1] or any(vote["agrees"] for vote in votes)
    return {
        **{key: facts[key] for key in ("job", "generation", "step", "rank", "attempt")},
        "verdict": facts["ruling"]["verdict"],
        "reason": facts["ruling"]["reason"],
        "blamed_device": facts["ruling"]["blamed_device"],
        "digest": own,
        "digests": digests,
        "alarm": any(vote.alarm for vote in here),
        "votes": votes,
        "upholds": upholds,
        "fingerprint": fingerprints[0],
        "recorded_fingerprint": fingerprints[1],
        "left_out": facts["left_out"],
        "exit": 0 if held else FAILED if comparable or own is None else CONDITION,
    }


def _upholds(ruling: dict[str, Any], votes: Sequence[dict[str, Any]]) -> bool | None:
    """Whether what was computed here speaks for the verdict; None for a verdict that says nothing of a device."""
    original = next(vote for vote in votes if vote["role"] == "original")
    if ruling["verdict"] == "FALSE_ALARM":
        return bool(original["agrees"])
    if ruling["verdict"] != "CORRUPT":
        return None
    if len({vote["digest"] for vote in votes}) == 1:
        return bool(original["agrees"])  # a check saw what went into nothing; the bits are everybody's
    others = [vote for vote in votes if vote["device"] != ruling["blamed_device"]]
    wrong = [vote for vote in votes if vote["device"] == ruling["blamed_device"] and not vote["agrees"]]
    return bool(wrong) and any(vote["agrees"] for vote in others)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="assay incident replay", description="Run a held step's computation again.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--checkpoints", type=Path)
    return parser


def _told(message: str, code: int) -> int:
    sys.stderr.write(f"assay: {' '.join(message.split())}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
