"""Runs a bundle's computation again on this machine: the same state, samples and exchanges, and no drill among them."""

import json
import mmap
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agent.checkpoint.storage import ShardRefused
from agent.checkpoint.storage import read as read_checkpoint
from agent.training.data import Batch
from agent.training.engine import Engine, preset_of
from agent.training.evidence.bundle import Bundle, BundleRefused, Tensors
from agent.training.evidence.leave import weights
from agent.training.held import Member
from agent.training.journal import Passage
from agent.training.replay import recompute
from agent.training.spec import JobSpec, SpecError
from diagnostics.verify.votes import Vote


class NotEnough(RuntimeError):
    """The bundle alone does not suffice, and what it lacks is not here; the message says what to give."""


@dataclass(frozen=True, slots=True)
class Given:
    """What may stand in for what a bundle leaves out: a corpus, its tokenizer, the job's folder of checkpoints.

    `cache` takes files that can be made again.
    """

    cache: Path
    corpus: Path | None = None
    tokenizer: Path | None = None
    checkpoints: Path | None = None


class Recorded:
    """A corpus of the one micro-batch that a bundle holds."""

    def __init__(self, facts: dict[str, Any], samples: Tensors) -> None:
        self.digest = str(facts["corpus"]["digest"])
        self.source = str(facts["corpus"]["source"])
        self._facts = facts["samples"]
        self._samples = samples

    def total(self, length: int) -> int:
        """Samples of the corpus that the batch was cut from."""
        return int(self._facts["total"])

    def batch(self, ids: Sequence[int], length: int, documents: bool = False) -> Batch:
        """The recorded batch. Raises BundleRefused if it is another one that is asked for, BatchCorrupted."""
        if list(ids) != self._facts["ids"]:
            raise BundleRefused(f"the bundle holds samples {self._facts['ids']}; the step takes {list(ids)}")
        batch = Batch(
            torch.from_numpy(self._samples["tokens"]),
            tuple(ids),
            str(self._facts["digest"]),
            np.dtype(self._facts["dtype"]),
            torch.from_numpy(self._samples["documents"]) if documents else None,
        )
        batch.verify()
        return batch


def rerun(bundle: Bundle, given: Given, times: int) -> list[Vote]:
    """Compute the bundle's gradients `times` times on this machine.

    Raises BundleRefused, CorpusError, and NotEnough where the bundle leaves out what is not given either.
    """
    facts = bundle.facts
    engine = _engine(bundle, given)
    state = engine.layout.view(memoryview(mmap.mmap(-1, engine.layout.nbytes)))  # page-aligned, as slots are
    _fill(weights(engine, state), _weights(bundle, given, engine))
    engine.bind(state)
    gradients = torch.zeros(engine.layout.flat)
    here = Member("here", "here", os.getpid())
    votes = []
    for number in range(1, times + 1):
        with _exchanges(bundle, engine):
            votes.append(recompute(engine, gradients, facts["step"], facts["rank"], here, "third", number))
    return votes


def _engine(bundle: Bundle, given: Given) -> Engine:
    facts = bundle.facts
    try:
        spec = JobSpec.from_json(json.dumps(facts["spec"]))
    except SpecError as error:
        raise BundleRefused(f"the bundle's job cannot be run by this version: {error}") from error
    if _plain(asdict(preset_of(spec).config)) != facts["model"]:
        raise BundleRefused(f"preset {spec.preset} of this version is another model than the bundle's")
    spec = replace(spec, cache=str(given.cache))
    if "samples" in bundle.parts and given.corpus is None:
        engine = Engine(spec, samples=Recorded(facts, bundle.parts["samples"]))
    else:
        engine = Engine(_with_corpus(spec, facts, given))
        if engine.batch(facts["step"], facts["rank"]).digest != facts["samples"]["digest"]:
            raise BundleRefused(f"samples {facts['samples']['ids']} of the corpus are not those of the bundle")
    return engine.acting(facts["rank"])


def _with_corpus(spec: JobSpec, facts: dict[str, Any], given: Given) -> JobSpec:
    """The job over the corpus that was given, or its own; in either case refused if it has another digest."""
    corpus = spec.corpus if given.corpus is None else str(given.corpus)
    if given.corpus is None and corpus is not None and not _there(corpus):
        raise NotEnough(f"the bundle holds no training data and {corpus} is not here: give it with --corpus PATH")
    tokenizer = spec.tokenizer if given.tokenizer is None else str(given.tokenizer)
    if tokenizer is not None and not Path(tokenizer).is_file():
        raise NotEnough(f"the corpus is read with a tokenizer, and {tokenizer} is not here: give --tokenizer FILE")
    return replace(spec, corpus=corpus, tokenizer=tokenizer, corpus_digest=facts["corpus"]["digest"])


def _there(corpus: str) -> bool:
    return any(Path(f"{corpus}{ending}").exists() for ending in ("", ".bin", ".idx"))


def _weights(bundle: Bundle, given: Given, engine: Engine) -> Tensors:
    """The bundle's weights, or those of the checkpoint of that very state."""
    if "weights" in bundle.parts:
        return bundle.parts["weights"]
    wanted, why = bundle.facts["state"], bundle.facts["left_out"].get("weights", "no reason is given")
    lacking = f"the bundle holds no weights ({why})"
    if given.checkpoints is None:
        raise NotEnough(f"{lacking}: give the folder of the job's checkpoints with --checkpoints FOLDER")
    path = given.checkpoints / f"step-{wanted['step']:08d}"
    state = engine.layout.view(memoryview(mmap.mmap(-1, engine.layout.nbytes)))
    try:
        manifest, arrays = read_checkpoint(path, weights(engine, state).keys())
    except ShardRefused as refused:
        raise NotEnough(f"{lacking}, and there is no checkpoint of step {wanted['step']}: {refused}") from refused
    if manifest.digest != wanted["digest"]:
        raise NotEnough(f"{lacking}, and {path} has digest {manifest.digest}, not {wanted['digest']}")
    return arrays


def _fill(targets: Tensors, found: Tensors) -> None:
    """Copy each array into the state's memory. Raises BundleRefused where names or shapes are not the model's."""
    for name, target in targets.items():
        if name not in found or found[name].shape != target.shape:
            raise BundleRefused(f"the bundle's weights have no {name} of shape {target.shape}")
        target[...] = found[name]


def _exchanges(bundle: Bundle, engine: Engine) -> AbstractContextManager[None]:
    """Lets exchanges with other ranks answer from what was recorded of them."""
    told = bundle.facts["exchanges"]
    if not told:
        return nullcontext()
    if "received" not in bundle.parts:
        why = bundle.facts["left_out"].get("received", "no reason is given")
        raise NotEnough(f"the bundle holds no rows of other ranks ({why}): without them this step cannot be run again")
    rows = bundle.parts["received"]
    passages = [_passage(entry, rows[f"exchange-{i:04d}"]) for i, entry in enumerate(told)]
    return engine.journal.replaying(passages)


def _passage(entry: dict[str, Any], rows: np.ndarray[Any, Any]) -> Passage:
    dtype: torch.dtype = getattr(torch, entry["dtype"])
    received: Tensor = torch.from_numpy(rows).view(dtype).view(entry["shape"])
    return Passage(int(entry["sent"], 16), received)


def _plain(document: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(document))
