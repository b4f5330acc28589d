"""`python -m agent.training.check_corpus`: opens a corpus as a rank will, without torch, before anything is started.

Reads one JSON object from stdin: `corpus`, `tokenizer`, `cache` (paths; the first two may be null), `length` (tokens of
one sample), `vocab_size` (or null), `preset_vocab_size`, `digest` (what the corpus must have, or null). What is made on
the way (copies, tokenised text) stays in the cache for the ranks. Prints one JSON object, or one line on stderr.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from agent.training.corpora import open_tokens
from agent.training.corpus_cache import CorpusError

#: Exit codes: the corpus cannot be trained on; the cache cannot be written.
UNUSABLE = 2
CACHE = 5
#: A vocabulary made for a tokenizer is a multiple of this, as the presets' are: rows of logits stay aligned.
_MULTIPLE = 8


def check(request: dict[str, Any]) -> dict[str, Any]:
    """What the job must know of its corpus: `digest`, `tokens`, `documents`, and `vocab_size` (null: the preset's).

    Raises CorpusError, or OSError if the cache cannot be written.
    """
    corpus, tokenizer = (None if request[name] is None else Path(request[name]) for name in ("corpus", "tokenizer"))
    size = request["vocab_size"] if tokenizer is None else _vocabulary(tokenizer, request["vocab_size"])
    tokens = open_tokens(corpus, Path(request["cache"]), tokenizer)
    tokens.samples(request["length"])
    tokens.check_vocabulary(size or request["preset_vocab_size"])
    if request["digest"] not in (None, tokens.digest):
        told = f"it had digest {request['digest'][:16]} and has {tokens.digest[:16]}"
        raise CorpusError(f"corpus {tokens.source} changed since the run was started: {told}; put it back to go on")
    return {
        "digest": tokens.digest,
        "tokens": len(tokens.ids),
        "documents": len(tokens.documents) - 1,
        "vocab_size": size,
    }


def _vocabulary(tokenizer: Path, given: int | None) -> int:
    """What was asked for, else what the tokenizer needs."""
    tokenised = importlib.import_module("agent.training.tokenised")  # only now: see `corpora`
    known: int = tokenised.vocabulary(tokenised.load(tokenizer)[1])
    if given is not None and given < known:
        raise CorpusError(f"tokenizer {tokenizer} knows {known} ids, more than the {given} of --vocab-size")
    return given or -(-known // _MULTIPLE) * _MULTIPLE


def main() -> int:
    """Answer one request."""
    request = json.load(sys.stdin)
    try:
        answer = check(request)
    except CorpusError as error:
        sys.stderr.write(f"{error}\n")
        return UNUSABLE
    except OSError as error:
        if request["corpus"] is not None and str(error.filename).startswith(request["corpus"]):
            sys.stderr.write(f"{error.filename} cannot be read: {error.strerror}\n")
            return UNUSABLE
        sys.stderr.write(f"cannot write to {request['cache']}: {error.strerror}\n")
        return CACHE
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
