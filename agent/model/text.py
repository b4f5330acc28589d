"""What a model's ids mean to people: bytes, or the pieces of a tokenizer.json."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any, Protocol

from agent.model.presets import BYTE_VOCAB

TOKENIZER = "tokenizer.json"
_RUN = "run.json"
_BYTES = 256


class TextError(ValueError):
    """Text that a model cannot be given; the message is one line that says what to do."""


class Text(Protocol):
    """Text to ids and back."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""

    def decode(self, ids: list[int]) -> str:
        """A text of ids; what is no text becomes the replacement character."""


class Bytes:
    """Each byte is an id, as in the presets. Ids behind the bytes are marks and have no text."""

    def encode(self, text: str) -> list[int]:
        """As :class:`Text` says; bytes of the command line that are no UTF-8 come through as they are."""
        return list(text.encode(errors="surrogateescape"))

    def decode(self, ids: list[int]) -> str:
        """As :class:`Text` says."""
        return bytes(i for i in ids if i < _BYTES).decode(errors="replace")


class Pieces:
    """Through the `tokenizers` library."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        """Raises TextError for a file that is none, or has more ids than the model."""
        # Only here: whoever reads bytes should not need the library. See `agent.training.corpora`.
        tokenised = importlib.import_module("agent.training.tokenised")
        try:
            _, self.tokenizer = tokenised.load(path)
        except ValueError as error:
            raise TextError(str(error)) from error
        if (known := tokenised.vocabulary(self.tokenizer)) > vocab_size:
            raise TextError(f"tokenizer {path} knows {known} ids, the model {vocab_size}: it was trained with another")

    def encode(self, text: str) -> list[int]:
        """As :class:`Text` says."""
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """As :class:`Text` says."""
        text: str = self.tokenizer.decode(ids)
        return text


def text_of(model: Path, vocab_size: int, tokenizer: Path | None) -> Text:
    """How to read the ids of a model on disk: with ``tokenizer``, with its own if one lies beside it, or as bytes.

    Raises:
        TextError: the tokenizer does not fit, or there is none and the ids cannot be bytes.
    """
    found = tokenizer or _beside(model)
    if found is not None:
        return Pieces(found, vocab_size)
    if vocab_size != BYTE_VOCAB:
        raise TextError(f"{model}: has {vocab_size} ids, which are not bytes: name its tokenizer.json by --tokenizer")
    return Bytes()


def _beside(model: Path) -> Path | None:
    """The tokenizer.json of a Hugging Face folder, or the one that a checkpoint's run was given."""
    if (model / TOKENIZER).is_file():
        return model / TOKENIZER
    try:  # DIR/checkpoints/JOB/step-NNNNNNNN and DIR/run.json, as `assay run` lays them out
        run: dict[str, Any] = json.loads((model.absolute().parents[2] / _RUN).read_text())
        named = run["spec"]["tokenizer"]
    except (OSError, IndexError, ValueError, KeyError, TypeError):
        return None
    return None if named is None else Path(named)
