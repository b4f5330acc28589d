"""What a job is: the specification that travels as JSON "assay.job/1" from the operator to every worker."""

import json
from dataclasses import MISSING, asdict, dataclass, fields

SCHEMA = "assay.job/1"
PRECISIONS = ("fp32", "bf16", "fp8")


class SpecError(ValueError):
    """A specification that cannot be run; the message names the field."""


@dataclass(frozen=True, slots=True)
class JobSpec:
    """One job. Bits depend on preset, vocab_size, seed, world, precision, corpus, tokenizer, pack and threads only.

    `corpus` is a path, or None for the running Python's own sources; `storage` is the folder of all checkpoints;
    `cache` a folder for files that can be made again; `threads` is torch's intra-op thread count on every rank.
    `tokenizer` is a tokenizer.json for a corpus of text, or None for bytes; `vocab_size` the model's ids, or None for
    the preset's; `pack` is "stream" (windows anywhere, as if the corpus were one text) or "documents" (windows whose
    documents do not see each other). Ranks refuse a corpus that has not `corpus_digest`, if there is one.
    """

    job: str
    preset: str
    seed: int
    steps: int
    world: int
    precision: str
    corpus: str | None
    sensors: bool
    tolerance_scale: float
    checkpoint_every: int
    storage: str
    threads: int
    cache: str
    tokenizer: str | None = None
    vocab_size: int | None = None
    pack: str = "stream"
    corpus_digest: str | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise SpecError(f"precision is {self.precision!r}; use {', '.join(PRECISIONS)}")
        if self.pack not in ("stream", "documents"):
            raise SpecError(f"pack is {self.pack!r}; use stream or documents")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise SpecError(f"vocab_size is {self.vocab_size}; it must be at least 1")
        for name in ("steps", "world", "checkpoint_every", "threads"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.tolerance_scale > 0:
            raise SpecError(f"tolerance_scale is {self.tolerance_scale}; it must be above 0")

    @classmethod
    def from_json(cls, text: str) -> "JobSpec":
        """Parse; raises SpecError naming what is missing or unknown."""
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            raise SpecError(f"the job's specification is not JSON: {error}") from error
        if not isinstance(document, dict) or document.pop("schema", None) != SCHEMA:
            raise SpecError(f"the job's specification is not {SCHEMA}")
        known = {field.name for field in fields(cls)}
        needed = {field.name for field in fields(cls) if field.default is MISSING}
        if missing := needed - document.keys():
            raise SpecError(f"the job's specification lacks {', '.join(sorted(missing))}")
        return cls(**{name: document[name] for name in known & document.keys()})

    def to_json(self) -> str:
        """The document, keys in the order of the fields."""
        return json.dumps({"schema": SCHEMA, **asdict(self)})
