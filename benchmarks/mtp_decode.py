"""Self-drafting decoding after training: how many drafts stand, forwards a token, and tokens/s against plain decoding.

One process, one thread, fp32. The preset is trained on the default corpus but its last part, from which the prompts are
taken. Every prompt is continued with drafts, without, and without the fixed shapes that make both equal, in turn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from agent.model import PRESETS, V3, Preset, huggingface, updated_bias
from agent.model.decoding import Decoder, Generation, Greedy, Sampling, cache_bytes, generate
from agent.training.data import Corpus, sample_ids
from agent.training.schedule import learning_rate
from benchmarks._figures import Figure, document

SEED = 1
HELD_OUT = 0.02  # of the corpus, at its end
PROMPT, TOKENS = 64, 128  # together below the 256 positions that `small` is trained on


@dataclass(frozen=True)
class Work:
    """How much is done."""

    preset: Preset
    steps: int
    prompts: int
    rounds: int


def trained(work: Work, corpus: Corpus, samples: int, tick: Callable[[], None]) -> tuple[V3, float, float]:
    """The model after ``steps``, and the mean of its last ten losses: main and of the MTP module, nats per byte."""
    preset = work.preset
    model = V3(preset.config)
    model.initialise(SEED)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    main, mtp = [], []
    for step in range(1, work.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, preset)
        ids = sample_ids(SEED, step, 0, 0, preset.micro_batch, samples)
        result = model.loss(corpus.batch(ids, preset.sample_len).verify())
        optimizer.zero_grad()
        torch.autograd.backward(result.total)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for router, counts in zip(model.routers(), result.counts, strict=True):
            router.router_bias.copy_(updated_bias(router.router_bias, counts, preset.config.bias_update_speed))
        main.append(float(result.main))
        mtp.append(float(result.mtp))
        tick()
    return model, statistics.mean(main[-10:]), statistics.mean(mtp[-10:])


def without_shape(model: V3, prompt: list[int], count: int) -> tuple[list[int], float]:
    """Plain greedy decoding, each token in products of one row, and its tokens/s."""
    begin = time.perf_counter()
    decoder = Decoder(model, len(prompt) + count)
    tokens = [int(decoder.prefill(torch.tensor(prompt)).logits.argmax())]
    while len(tokens) < count:
        tokens.append(int(decoder.prefill(torch.tensor(tokens[-1:])).logits.argmax()))
    return tokens, count / (time.perf_counter() - begin)


def decoded(work: Work, model: V3, prompts: list[list[int]], tick: Callable[[], None]) -> list[Figure]:
    """All figures of decoding."""
    drafting: list[Generation] = []
    sampled: list[Generation] = []
    plain: list[Generation] = []
    drawn: list[Generation] = []
    single: list[float] = []
    differing = 0
    for number in range(work.rounds):
        for prompt in prompts:
            drafting.append(generate(model, prompt, TOKENS, Greedy()))
            plain.append(generate(model, prompt, TOKENS, Greedy(), draft=False))
            single.append(without_shape(model, prompt, TOKENS)[1])
            sampled.append(generate(model, prompt, TOKENS, Sampling(1.0, number)))
            drawn.append(generate(model, prompt, TOKENS, Sampling(1.0, number), draft=False))
            differing += drafting[-1].tokens != plain[-1].tokens
            tick()
    samples = len(drafting)
    ratio, sampling_ratio = (
        statistics.median(d.tokens_per_second / p.tokens_per_second for d, p in zip(*runs, strict=True))
        for runs in ((drafting, plain), (sampled, drawn))
    )
    single_ratio = statistics.median(d.tokens_per_second / s for d, s in zip(drafting, single, strict=True))
    speed = [statistics.median(g.tokens_per_second for g in runs) for runs in (drafting, plain)]
    figures = [Figure("greedy texts that drafts change", differing, "texts", "lower", 0, samples=samples)]
    for name, runs in (("greedy", drafting), ("sampling at temperature 1", sampled)):
        stand = sum(run.accepted for run in runs) / sum(run.drafted for run in runs)
        forwards = sum(run.forwards for run in runs) / sum(len(run.tokens) for run in runs)
        figures += [
            Figure(f"drafts accepted, {name}", stand, "share", "higher", samples=sum(run.drafted for run in runs)),
            Figure(f"forwards per token, {name}", forwards, "forwards", "lower", 1.0, forwards < 1, samples=samples),
        ]
    same, free = "plain decoding, same shapes", "plain decoding, one row"
    return [
        *figures,
        Figure("speed, drafting", speed[0], "tokens/s", "higher", None, None, same, speed[1], None, samples),
        Figure("speed over plain, same shapes", ratio, "times", "higher", 1.0, peer=same, samples=samples),
        Figure("speed over plain, sampling", sampling_ratio, "times", "higher", 1.0, peer=same, samples=samples),
        Figure("speed over plain, one row", single_ratio, "times", "higher", 1.0, peer=free, samples=samples),
    ]


def cache_figures() -> list[Figure]:
    """Bytes of a token at the 671B shape."""
    size = cache_bytes(huggingface.config(huggingface.DEEPSEEK_V3))
    name = "cache of a token at the published shape, bf16"
    return [
        Figure(name, size.mla, "bytes", "lower", peer="8 groups of 128", peer_value=size.gqa),
        Figure(name, size.mla, "bytes", "lower", peer="128 heads of 128", peer_value=size.mha),
    ]


def main() -> None:
    """Run and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the document only (it is the only output anyway)")
    parser.add_argument("--quick", action="store_true", help="`tiny` and little: does it run, not what is it")
    quick = parser.parse_args().quick
    work = Work(PRESETS["tiny"], 40, 2, 1) if quick else Work(PRESETS["small"], 300, 12, 3)
    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory(prefix="assay-bench-") as folder,
        Progress(console=Console(file=sys.stderr)) as bar,
    ):
        corpus = Corpus.open(None, Path(folder))
        kept = int(len(corpus) * (1 - HELD_OUT))
        gap = (len(corpus) - kept) // work.prompts
        prompts = [corpus.content.ids[kept + i * gap :][:PROMPT].tolist() for i in range(work.prompts)]
        steps = bar.add_task("training", total=work.steps)
        model, loss, ahead = trained(work, corpus, kept - work.preset.sample_len, lambda: bar.advance(steps))
        texts = bar.add_task("decoding", total=work.rounds * work.prompts)
        figures = decoded(work, model, prompts, lambda: bar.advance(texts))
    name = f"after {work.steps} steps of `{work.preset.name}`"
    losses = [
        Figure(f"loss {name}", loss, "nats/byte", "lower", samples=work.steps),
        Figure(f"loss of the MTP module {name}", ahead, "nats/byte", "lower", samples=work.steps),
    ]
    print(document("mtp_decode", [*losses, *figures, *cache_figures()], threads=1))


if __name__ == "__main__":
    main()
