"""What a held step leaves behind: gathered while the gate holds it, so that the computation can be run again later."""

import json
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agent.training.data import Batch
from agent.training.engine import Engine
from agent.training.evidence.bundle import Bundle, Coordinates, Tensors, write
from agent.training.evidence.retention import Removed, prune
from agent.training.fingerprint import fingerprint
from agent.training.held import Held, Member, alarm_body, vote_body
from agent.training.journal import Passage
from agent.training.layout import State
from agent.training.spec import EvidenceSettings, JobSpec
from diagnostics.sensors.digest import chain
from diagnostics.verify.votes import Ruling, Vote

#: What a forward and backward depend on, of all that a checkpoint holds; moments are the optimizer's alone.
COMPUTED_FROM = ("master.", "router_bias.")


@dataclass(frozen=True, slots=True)
class Left:
    """The name of the bundle that was written, or none; and what it lacks, what was removed for it, or why none."""

    name: str = ""
    note: str = ""


def leave(
    engine: Engine,
    held: Held,
    rank: int,
    here: Member,
    votes: Sequence[Vote],
    ruling: Ruling,
    record: Sequence[Passage],
) -> Left:
    """Write the bundle of `rank`'s held computation on this rank, which made it, and remove what is too much now.

    `record` is what the rank exchanged with others. A disk that cannot take the bundle does not end the training: the
    note says what it answered.
    """
    settings = engine.spec.evidence
    if settings is None:
        return Left()
    folder = Path(settings.folder) / engine.spec.job
    at = Coordinates(held.step, rank, held.generation, held.attempt)
    batch = engine.batch(held.step, rank)
    parts, left_out = _parts(settings, batch, record, weights(engine, held.state))
    facts = {
        **_coordinates(engine, at, here),
        **_computed_from(engine, held, batch),
        "alarms": [_finite(alarm_body(alarm)) for alarm in held.computation.alarms],
        "beside": [_finite(asdict(statistic)) for statistic in held.computation.unusual],
        "votes": [vote_body(vote) for vote in votes],
        "ruling": {**asdict(ruling), "verdict": ruling.verdict.value if ruling.verdict else ""},
        "exchanges": [_described(passage) for passage in record],
        "left_out": left_out,
    }
    try:
        size = write(folder, str(at), Bundle(facts, parts))
    except OSError as error:
        return Left(note=f"no evidence was kept: {error.strerror or error}")
    try:
        removed = prune(folder, settings, held.step, held.generation, time.time())
    except OSError as error:
        return Left(str(at), f"{_note(size, left_out, ())}; older evidence stays: {error.strerror or error}")
    return Left(str(at), _note(size, left_out, removed))


def tidy(spec: JobSpec, step: int, generation: int) -> None:
    """Remove what has grown too old since the last held step: called when a generation goes on from `step`."""
    if spec.evidence is not None:
        # A folder that cannot be tidied will be heard of when the next bundle is written to it.
        with suppress(OSError):
            prune(Path(spec.evidence.folder) / spec.job, spec.evidence, step + 1, generation, time.time())


def weights(engine: Engine, state: State) -> Tensors:
    """What `state` holds of the model, by the names that a checkpoint has; arrays share its memory."""
    parts = engine.layout.parts(state)
    return {name: tensor.numpy() for name, _, tensor in parts if name.startswith(COMPUTED_FROM)}


def _parts(
    settings: EvidenceSettings, batch: Batch, record: Sequence[Passage], model: Tensors
) -> tuple[dict[str, Tensors], dict[str, str]]:
    """The tensors that go into the bundle, and why the others do not: what is small and needed first, comes first."""
    samples: Tensors = {"tokens": batch.tokens.numpy()}
    if batch.documents is not None:
        samples["documents"] = batch.documents.numpy()
    received = {f"exchange-{i:04d}": _bytes(passage) for i, passage in enumerate(record)}
    parts: dict[str, Tensors] = {}
    left_out: dict[str, str] = {}
    room = settings.bundle_bytes
    for name, tensors, private in (("samples", samples, True), ("received", received, True), ("weights", model, False)):
        size = sum(array.nbytes for array in tensors.values())
        if private and not settings.data:
            left_out[name] = "training data is left out of evidence"
        elif size > room:
            left_out[name] = f"{size} bytes, and a bundle has room for {room} more"
        elif tensors:
            parts[name] = tensors
            room -= size
    return parts, left_out


def _coordinates(engine: Engine, at: Coordinates, here: Member) -> dict[str, Any]:
    spec = engine.spec
    return {
        "job": spec.job,
        **asdict(at),
        "node": here.node,
        "device": here.device,
        "created": time.time(),
        "spec": json.loads(spec.to_json()),
        "model": asdict(engine.preset.config),
        "fingerprint": json.loads(fingerprint(spec.threads)),
        "rng_key": f"{chain(spec.seed, at.step, at.rank):016x}",
    }


def _computed_from(engine: Engine, held: Held, batch: Batch) -> dict[str, Any]:
    """The samples, the corpus and the state by their digests; the rank's words of the state hash to `found` now."""
    return {
        "samples": {
            "ids": list(batch.ids),
            "total": engine.total,
            "length": int(batch.tokens.shape[1]),
            "digest": batch.digest,
            "dtype": batch.dtype.name,
        },
        "corpus": {"digest": engine.corpus.digest, "source": engine.corpus.source},
        "state": {
            "step": held.step - 1,
            "digest": f"{held.digest:016x}",
            "own": f"{held.own:016x}",
            "found": f"{engine.layout.digest(held.state):016x}",
        },
    }


def _finite(body: dict[str, Any]) -> dict[str, Any]:
    """An alarm or a statistic in JSON's types: a float that is no number is its name."""
    return {name: str(v) if isinstance(v, float) and not math.isfinite(v) else v for name, v in body.items()}


def _described(passage: Passage) -> dict[str, Any]:
    rows = passage.received
    return {"sent": f"{passage.sent:016x}", "dtype": str(rows.dtype)[6:], "shape": list(rows.shape)}


def _bytes(passage: Passage) -> np.ndarray[Any, Any]:
    """Rows as the bytes that they are: numpy knows neither bfloat16 nor FP8."""
    return passage.received.detach().contiguous().view(-1).view(torch.uint8).numpy()


def _note(size: int, left_out: dict[str, str], removed: Sequence[Removed]) -> str:
    told = [f"{size} bytes", *(f"without {part} ({why})" for part, why in left_out.items())]
    return "; ".join([*told, *(f"{gone.name} was removed, {gone.why}" for gone in removed)])
