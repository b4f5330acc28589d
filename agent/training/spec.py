"""What a job is: the specification that travels as JSON "assay.job/1" from the operator to every worker."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from diagnostics.sensors.tolerance import TableError, parse_table

SCHEMA = "assay.job/1"
PRECISIONS = ("fp32", "bf16", "fp8")
#: A suspect's replays of a held step, at most. With two no verdict takes more than three: one, a peer's and a third;
#: or, where nobody can cast the third, two and a peer's.
REPLAYS = 2
#: Share of the operators without an identity that a step runs again. All of them would take another half of a step of
#: `tiny`; what ranks compare and digests look at the rest. What is drawn changes with the step.
AGAIN = 1 / 16


class SpecError(ValueError):
    """A specification that cannot be run; the message names the field."""


@dataclass(frozen=True, slots=True)
class Mesh:
    """`dp` ranks, each with data of its own, that hold the state in shards (arXiv 2412.19437, section 3.2).

    Experts are spread over groups of `ep` adjacent ranks; what a rank optimises is a dp-th of everything (ZeRO-1,
    arXiv 1910.02054, section 5.1). `local` adjacent ranks of a group count as one node for the two hops of a dispatch.
    """

    dp: int
    ep: int = 1
    local: int = 1

    def __post_init__(self) -> None:
        for name in ("dp", "ep", "local"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise SpecError(f"mesh.{name} is {value!r}; it must be a whole number, at least 1")
        if self.dp % self.ep:
            raise SpecError(f"mesh.ep is {self.ep}; it must divide mesh.dp, which is {self.dp}")
        if self.ep % self.local:
            raise SpecError(f"mesh.local is {self.local}; it must divide mesh.ep, which is {self.ep}")

    def __str__(self) -> str:
        return f"dp={self.dp},ep={self.ep},local={self.local}"

    @property
    def replicas(self) -> int:
        """How often each expert exists: dp / ep."""
        return self.dp // self.ep

    @classmethod
    def parse(cls, body: Mapping[str, Any]) -> "Mesh":
        """From the specification's object. Raises SpecError naming the key."""
        if unknown := sorted(body.keys() - {"dp", "ep", "local"}):
            raise SpecError(f"mesh has an unknown key {unknown[0]!r}; it takes dp, ep, local")
        if "dp" not in body:
            raise SpecError("mesh lacks dp, the number of ranks")
        return cls(**body)


@dataclass(frozen=True, slots=True)
class EvidenceSettings:
    """What held steps leave behind in `folder`, and for how long; without `data`, no training data is in it.

    Of one job at most `keep` bundles, none older than `days`, together at most `total_bytes`; what does not fit into
    `bundle_bytes` is left out of a bundle, weights first.
    """

    folder: str
    # Incidents are looked into within weeks; privacy rules often grant a month.
    data: bool = True
    days: float = 30.0
    # An incident a day for a month.
    keep: int = 32
    # All of them, at the size of `small` (34 MB of weights).
    total_bytes: int = 1 << 30
    # The gate holds all ranks while it is written: at a disk's 500 MB/s, half a second at most.
    bundle_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        if not isinstance(self.folder, str) or not self.folder:
            raise SpecError(f"evidence.folder is {self.folder!r}; it must be a path")
        if not isinstance(self.data, bool):
            raise SpecError(f"evidence.data is {self.data!r}; it must be true or false")
        for name in ("days", "keep", "total_bytes", "bundle_bytes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise SpecError(f"evidence.{name} is {value!r}; it must be a number above 0")

    @classmethod
    def parse(cls, body: Mapping[str, Any]) -> "EvidenceSettings":
        """From the specification's object. Raises SpecError naming the key."""
        known = [item.name for item in fields(cls)]
        if unknown := sorted(body.keys() - set(known)):
            raise SpecError(f"evidence has an unknown key {unknown[0]!r}; it takes {', '.join(known)}")
        if "folder" not in body:
            raise SpecError("evidence lacks folder, where bundles are kept")
        return cls(**body)


@dataclass(frozen=True, slots=True)
class JobSpec:
    """One job. Bits depend on preset, vocab_size, seed, world, precision, corpus, tokenizer, pack, threads, mesh only.

    `corpus` is a path, or None for the running Python's own sources; `storage` is the folder of all checkpoints;
    `cache` a folder for files that can be made again; `threads` is torch's intra-op thread count on every rank.
    `tokenizer` is a tokenizer.json for a corpus of text, or None for bytes; `vocab_size` the model's ids, or None for
    the preset's; `pack` is "stream" (windows anywhere, as if the corpus were one text) or "documents" (windows whose
    documents do not see each other). `replays` is how often a suspect computes a held step again at most, see
    `diagnostics.verify.votes`; `again` is the share of operators without an identity that each step runs again; without
    `evidence` a held step leaves none. Ranks refuse a corpus that has not `corpus_digest`, if there is one. Without a
    `mesh` every rank holds the whole state; with one, `world` is its dp.
    `tolerances` is the text of a table "assay.tolerances/1" whose entries go before the shipped ones.
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
    mesh: Mesh | None = None
    replays: int = REPLAYS
    again: float = AGAIN
    evidence: EvidenceSettings | None = None
    tolerances: str | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise SpecError(f"precision is {self.precision!r}; use {', '.join(PRECISIONS)}")
        if self.pack not in ("stream", "documents"):
            raise SpecError(f"pack is {self.pack!r}; use stream or documents")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise SpecError(f"vocab_size is {self.vocab_size}; it must be at least 1")
        for name in ("steps", "world", "checkpoint_every", "threads", "replays"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.tolerance_scale > 0:
            raise SpecError(f"tolerance_scale is {self.tolerance_scale}; it must be above 0")
        if not 0 <= self.again <= 1:
            raise SpecError(f"again is {self.again}; it must be a share, 0 to 1")
        if self.tolerances is not None:
            try:
                parse_table(self.tolerances)
            except TableError as error:
                raise SpecError(f"tolerances: {error}; make a table with assay calibrate") from error
        if self.mesh is not None and self.mesh.dp != self.world:
            raise SpecError(f"mesh.dp is {self.mesh.dp}; it must be world, which is {self.world}")

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
        if document.get("mesh") is not None:
            if not isinstance(document["mesh"], dict):
                raise SpecError(f"mesh is {document['mesh']!r}; it must be an object with dp, ep, local")
            document["mesh"] = Mesh.parse(document["mesh"])
        if document.get("evidence") is not None:
            if not isinstance(document["evidence"], dict):
                raise SpecError(f"evidence is {document['evidence']!r}; it must be an object with folder")
            document["evidence"] = EvidenceSettings.parse(document["evidence"])
        return cls(**{name: document[name] for name in known & document.keys()})

    def to_json(self) -> str:
        """The document, keys in the order of the fields."""
        return json.dumps({"schema": SCHEMA, **asdict(self)})
