"""What a checkpoint says of itself: where it comes from, and the digest every tensor had when it was captured."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

SCHEMA = "assay.checkpoint/2"
NAME = "manifest.json"


class ManifestError(ValueError):
    """A manifest that is missing, damaged or of another schema."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: `word` is where it starts in the hashed state, in 32-bit words; `digest` 16 hex digits."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    word: int
    digest: str
    shard: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """A whole checkpoint. `digest` (16 hex digits) is of the state as the ranks agreed on it at the gate, `chain` the
    link of its step. Bits are promised for equal preset, vocab_size, seed, world, precision, threads, corpus, pack,
    mesh and fingerprint. `mesh` is "" where every rank holds the whole state, else its sizes as `Mesh` writes them.
    """

    job: str
    generation: int
    step: int
    parent_step: int
    digest: str
    chain: str
    preset: str
    seed: int
    world: int
    precision: str
    threads: int
    corpus: str
    fingerprint: str
    created: float
    tensors: tuple[TensorEntry, ...]
    vocab_size: int
    pack: str
    mesh: str = ""

    def to_json(self) -> str:
        """The document, readable by people too, with a check of what it says: like each tensor it needs one."""
        document = {"schema": SCHEMA, **asdict(self)}
        return json.dumps({**document, "check": _check(document)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Parse; raises ManifestError, also if anything in it is not as it was written."""
        try:
            document = json.loads(text)
            if (check := document.pop("check", None)) != _check(document):
                raise ManifestError(f"the check {check} over contents that give {_check(document)}")
            if document.pop("schema", None) != SCHEMA:
                raise ManifestError(f"another schema than {SCHEMA}")
            entries = _entries(document.pop("tensors"))
            wanted = {f.name for f in fields(cls) if f.default is MISSING or f.name in document} - {"tensors"}
            return cls(tensors=entries, **{name: document[name] for name in wanted})
        except ManifestError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ManifestError(f"damage: {error!r}") from error


def entries_to_json(entries: Sequence[TensorEntry]) -> str:
    """A list of tensors with a check of what it says, until a manifest takes it in."""
    document = [asdict(entry) for entry in entries]
    return json.dumps({"tensors": document, "check": _check(document)}) + "\n"


def entries_from_json(text: str) -> tuple[TensorEntry, ...]:
    """Parse; raises ManifestError if anything in it is not as it was written."""
    try:
        document = json.loads(text)
        if document["check"] != _check(document["tensors"]):
            raise ManifestError(f"the check {document['check']} over other contents")
        return _entries(document["tensors"])
    except ManifestError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ManifestError(f"damage: {error!r}") from error


def _entries(listed: Any) -> tuple[TensorEntry, ...]:
    return tuple(TensorEntry(**{**entry, "shape": tuple(entry["shape"])}) for entry in listed)


def _check(document: Any) -> str:
    """32 hex digits over the document's values, whatever its layout."""
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()
