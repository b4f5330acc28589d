"""What a checkpoint says of itself: where it comes from, and the digest every tensor had when it was captured."""

import json
from dataclasses import asdict, dataclass, fields

SCHEMA = "assay.checkpoint/1"
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
    link of its step. Bits are promised for equal preset, vocab_size, seed, world, precision, threads, corpus, pack and
    fingerprint. Checkpoints from before vocabulary and packing could be chosen have the values that were fixed then.
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
    vocab_size: int = 264
    pack: str = "stream"

    def to_json(self) -> str:
        """The document, readable by people too."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Parse; raises ManifestError."""
        try:
            document = json.loads(text)
            if document.pop("schema", None) != SCHEMA:
                raise ManifestError(f"not {SCHEMA}")
            entries = tuple(TensorEntry(**{**e, "shape": tuple(e["shape"])}) for e in document.pop("tensors"))
            wanted = {field.name for field in fields(cls)} - {"tensors", "vocab_size", "pack"}
            chosen = {name: document.pop(name) for name in ("vocab_size", "pack") if name in document}
            return cls(tensors=entries, **chosen, **{name: document[name] for name in wanted})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ManifestError(f"damaged manifest: {error!r}") from error
