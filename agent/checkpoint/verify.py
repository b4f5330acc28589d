"""`python -m agent.checkpoint.verify PATH`: recompute a checkpoint's digests from its files and print them as JSON."""

import json
import sys
from pathlib import Path
from typing import Any

from agent.checkpoint.storage import ShardRefused, read


def verify(path: Path) -> dict[str, Any]:
    """The result document: `ok`, `step`, `digest` and `chain`, or what was refused and why."""
    try:
        manifest, _ = read(path)
    except ShardRefused as refused:
        return {
            "path": str(path),
            "ok": False,
            "step": refused.step,
            "digest": None,
            "chain": None,
            "shard": refused.shard,
            "expected": refused.expected,
            "found": refused.found,
            "error": str(refused),
        }
    return {
        "path": str(path),
        "ok": True,
        "step": manifest.step,
        "digest": manifest.digest,
        "chain": manifest.chain,
        "tensors": len(manifest.tensors),
        "error": None,
    }


def main(arguments: list[str]) -> int:
    """Verify one folder; 0 if it holds, 1 if not, 2 for wrong usage."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m agent.checkpoint.verify FOLDER\n")
        return 2
    result = verify(Path(arguments[0]))
    sys.stdout.write(json.dumps(result) + "\n")
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
