"""`assay model generate`: text from a model on disk, with its MTP modules as drafters."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from agent.model.decoding import Choice, Decoder, Generation, Greedy, Sampling
from agent.model.decoding import generate as generated
from agent.model.files.transfer import read_model
from agent.model.text import TextError, text_of
from agent.model.v3 import V3

__all__ = ["TextError", "added"]

TOKENS = 200


def added(commands: Any) -> argparse.ArgumentParser:
    """The command, added to those of the tool."""
    parser: argparse.ArgumentParser = commands.add_parser("generate", help="text after a prompt")
    parser.add_argument("subject", metavar="MODEL", type=Path, help="checkpoint, model file or HF folder")
    parser.add_argument("--prompt", required=True, help="what the text begins with")
    parser.add_argument("--tokens", type=_whole, default=TOKENS, help=f"how many to generate (default: {TOKENS})")
    parser.add_argument("--temperature", type=_temperature, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing (default: 0)")
    parser.add_argument("--no-draft", action="store_true", help="one token a forward")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json (default: that of the run, or bytes)")
    parser.add_argument("--threads", type=_whole, default=1, help="of torch (default: 1, for which bits are promised)")
    parser.set_defaults(make=_make, show=_show)
    return parser


def _make(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    model = read_model(options.subject)
    text = text_of(options.subject, model.config.vocab_size, options.tokenizer)
    prompt = text.encode(options.prompt)
    if not prompt:
        raise TextError("--prompt: at least one token is needed to begin with")
    if (highest := max(prompt)) >= model.config.vocab_size:
        raise TextError(f"--prompt: has id {highest}, the model {model.config.vocab_size} ids")
    choice: Choice = Sampling(options.temperature, options.seed) if options.temperature else Greedy()
    done = generated(model, prompt, options.tokens, choice, draft=not options.no_draft)
    same = _same_bits(model, prompt) if done.drafted and not options.temperature else None
    _tell(done, same)
    return {
        "schema": "assay.model-generate/1",
        "model": str(options.subject),
        "prompt": options.prompt,
        "text": text.decode(done.tokens),
        "tokens": done.tokens,
        "temperature": options.temperature,
        "seed": options.seed,
        "drafted": done.drafted,
        "accepted": done.accepted,
        "acceptance": done.acceptance,
        "forwards": done.forwards,
        "forwards_per_token": done.forwards_per_token,
        "seconds": done.seconds,
        "tokens_per_s": done.tokens_per_second,
        "same_bits": same,
    }


def _same_bits(model: V3, prompt: list[int]) -> bool:
    """Whether this machine computes a token alike alone and with others, tried on the prompt's beginning."""
    together = 1 + len(model.mtp)
    tokens = (prompt * together)[:together]
    return Decoder(model, together, together).rows_agree(torch.tensor(tokens))


def _tell(done: Generation, same: bool | None) -> None:
    drafts = "no drafts" if done.acceptance is None else f"{done.acceptance:.1%} of {done.drafted} drafts accepted"
    speed = f"{done.forwards_per_token:.3f} forwards a token, {done.tokens_per_second:.1f} tokens/s"
    sys.stderr.write(f"{drafts}, {speed}\n")
    if same is False:
        sys.stderr.write("a token's last bits depend on its place on this machine: without drafts ties may differ\n")


def _show(document: Mapping[str, Any]) -> str:
    """The text; what could steer a terminal is shown as its code."""
    kept = (c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in document["text"])
    return "".join(kept) + "\n"


def _whole(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, not {text!r}")
    return int(text)


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number >= 0, not {text!r}")
    return value
