"""Makes a small corpus of every kind, each with the ids and documents that must come out of it."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from agent.training.token_file import DTYPES, Writer

TEXTS = ["".join(f"line {n * m} of {name}\n" for n in range(60)) for m, name in enumerate(("one", "two", "three"))]


class Kind(NamedTuple):
    """A corpus on disk, and what it holds."""

    path: Path
    tokenizer: Path | None
    documents: list[list[int]]


def tokenizer(path: Path) -> Tokenizer:
    """A byte-level BPE of 300 ids that marks the start of a document, written to `path`."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<begin>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    made.post_processor = processors.TemplateProcessing("<begin> $A", special_tokens=[("<begin>", 0)])
    made.enable_truncation(8)
    made.save(str(path))
    made.no_truncation()
    return made


def folder(root: Path) -> Path:
    """TEXTS as a folder of files."""
    path = root / "texts"
    path.mkdir(exist_ok=True)
    for number, text in enumerate(TEXTS):
        (path / f"{number}.txt").write_text(text)
    return path


def one_file(root: Path) -> Kind:
    path = root / "text.txt"
    path.write_text("".join(TEXTS))
    return Kind(path, None, [list("".join(TEXTS).encode())])


def many_files(root: Path) -> Kind:
    return Kind(folder(root), None, [list(text.encode()) for text in TEXTS])


def token_file(root: Path, code: int = 8) -> Kind:
    random = np.random.default_rng(code)
    documents = [random.integers(0, 120, size).tolist() for size in (700, 1, 0, 330, 69)]
    with Writer(root / f"tokens{code}", DTYPES[code]) as writer:
        for document in documents:
            writer.add(document)
    return Kind(root / f"tokens{code}", None, documents)


def through_tokenizer(root: Path) -> Kind:
    path = root / "tokenizer.json"
    made = tokenizer(path)
    return Kind(folder(root), path, [made.encode(text).ids for text in TEXTS])


KINDS: dict[str, Callable[[Path], Kind]] = {
    "file": one_file,
    "folder": many_files,
    **{f"tokens {dtype.name}": lambda root, code=code: token_file(root, code) for code, dtype in DTYPES.items()},  # type: ignore[misc]
    "tokenizer": through_tokenizer,
}
