"""The whole model: embedding, blocks, head, MTP modules, and the training loss of section 2.2 (eq. 24-25)."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agent.model.block import Block
from agent.model.config import V3Config
from agent.model.crossing import Comparison, summed
from agent.model.fp8 import activation_dtype
from agent.model.fused import NO_LABEL, cross_entropy
from agent.model.linear import Linear
from agent.model.moe import MoE, RouterLoad
from agent.model.mtp import MTPModule
from agent.model.norm import RMSNorm
from agent.model.packing import Packed, Spans
from agent.model.parallel.transport import ExpertParallel
from agent.model.rope import rotation
from agent.model.router import Router


class V3Output(NamedTuple):
    """A forward pass without MTP modules."""

    logits: Tensor  # fp32 [batch, time, vocab_size]
    counts: Tensor  # int64 [MoE layers without MTP modules, n_routed_experts]


class LossOutput(NamedTuple):
    """The loss of one micro-batch; its first four are fp32 scalars. total = main + mtp_weight * mtp + balance."""

    total: Tensor  # the only one that carries gradient
    main: Tensor  # next-token cross entropy, nats per token
    mtp: Tensor  # mean over the D modules of their cross entropies, unweighted; 0 when D = 0
    balance: Tensor  # sum over MoE layers of the sequence-wise balance loss, alpha included
    counts: Tensor  # int64 [num_moe_layers, n_routed_experts], MTP modules last
    crossing: Comparison | None = None  # sum over MoE layers of what crosses between nodes; None: all experts are here


class V3(nn.Module):
    """DeepSeek-V3 (arXiv 2412.19437).

    Parameters are fp32 masters whatever ``compute_dtype``. With bf16 every product casts its operands explicitly, while
    the residual stream, norms, router, softmax and loss stay in fp32. With ``torch.float8_e4m3fn`` the linears of
    blocks and experts multiply in FP8 (section 3.3); head, attention core and what flows between are as in bf16.
    Nothing keeps a parameter's storage between calls, so a caller may swap ``param.data`` and preset ``param.grad``; a
    forward changes no state but FP8's statistics, which no result depends on.

    With ``parallel`` this rank holds its share of each layer's routed experts, under the names and with the initial
    values that they have in the whole model, and all else whole; every rank of the group makes the same calls.

    Raises:
        ConfigError: the experts do not divide among the ranks.
    """

    def __init__(
        self,
        config: V3Config,
        compute_dtype: torch.dtype = torch.float32,
        parallel: ExpertParallel | None = None,
    ) -> None:
        super().__init__()
        if compute_dtype not in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
            known = "torch.float32, torch.bfloat16 or torch.float8_e4m3fn"
            raise ValueError(f"compute_dtype: {known}, not {compute_dtype}")
        if parallel is not None:
            parallel.experts(config)
        self.config = config
        self.compute_dtype = compute_dtype
        self.parallel = parallel
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, dtype=torch.float32))
        self.layers = nn.ModuleList(
            Block(config, dense=i < config.first_k_dense_replace, dtype=compute_dtype, parallel=parallel)
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, torch.float32)
        self.head = Linear(config.hidden_size, config.vocab_size, activation_dtype(compute_dtype))
        self.mtp = nn.ModuleList(MTPModule(config, compute_dtype, parallel) for _ in range(config.mtp_depth))
        self.initialise(0)

    def initialise(self, seed: int) -> None:
        """Set matrices to N(0, initializer_range), norms to 1, biases to 0.

        Each parameter has a generator of its own, keyed by (seed, name): the result depends neither on the order of the
        parameters nor on the global generator.
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.data.fill_(0.0 if name.endswith(".bias") else 1.0)
            elif not parameter.is_meta:
                generator = torch.Generator(parameter.device).manual_seed(_key(seed, name))
                parameter.data.normal_(0.0, self.config.initializer_range, generator=generator)
        for router in self.routers():
            router.router_bias.zero_()

    def routers(self) -> list[Router]:
        """Routers in the order of the rows of ``LossOutput.counts``: layers first, MTP modules last."""
        blocks = [*self.layers, *(module.block for module in self.mtp)]
        return [block.moe.router for block in blocks if isinstance(getattr(block, "moe", None), MoE)]

    def forward(self, tokens: Tensor) -> V3Output:
        """Logits for int64 ``tokens`` [batch, time].

        Raises:
            ValueError: a wrong dtype or shape, or an id outside the vocabulary.
        """
        self._check(tokens, at_least=1)
        raw, loads = self._trunk(tokens)
        logits = self.head(self.norm(raw)).float()
        return V3Output(logits.view(*tokens.shape, -1), self._counts(loads))

    def loss(self, tokens: Tensor, documents: Tensor | None = None) -> LossOutput:
        """The training loss of int64 ``tokens`` [batch, time + 1 + D], D = mtp_depth.

        Position i < time of the main model is given t_i and asked for t_{i+1}; that of module k is given t_{i+k} and
        asked for t_{i+k+1}. The D extra tokens let every module see ``time`` positions.

        With ``documents`` (int64, the shape of ``tokens``; a document is a run of equal numbers) the sequences are
        packed: nothing of one document reaches another. Attention stays within each, a label beyond its end is not
        asked for, each is balanced by itself, and the cross entropies are means over the labels that remain.

        Raises:
            ValueError: a wrong dtype or shape, or an id outside the vocabulary.
        """
        depth = len(self.mtp)
        self._check(tokens, at_least=2 + depth)
        time = tokens.shape[1] - 1 - depth
        spans = Spans(documents, tokens, time)
        raw, loads = self._trunk(tokens[:, :time], spans.packed(0))
        normed = self.norm(raw)
        main = self._cross_entropy(normed, tokens[:, 1 : time + 1], spans.within(1))
        turns = rotation(self.config, time, tokens.device)
        ahead = []
        for k, module in enumerate(self.mtp, start=1):
            hidden = normed if self.config.mtp_after_norm else raw
            raw, normed, load = module(hidden, self._embed(tokens[:, k : time + k]), turns, spans.packed(k))
            loads.append(load)
            ahead.append(self._cross_entropy(normed, tokens[:, k + 1 : time + k + 1], spans.within(k + 1)))
        return self._total(main, ahead, loads)

    def _total(self, main: Tensor, ahead: list[Tensor], loads: list[RouterLoad]) -> LossOutput:
        zero = main.new_zeros(())
        mtp = torch.stack(ahead).mean() if ahead else zero
        balance = torch.stack([load.balance for load in loads]).sum() if loads else zero
        total = main + self.config.mtp_weight * mtp + balance
        crossing = summed([load.crossing for load in loads if load.crossing is not None])
        return LossOutput(total, main.detach(), mtp.detach(), balance.detach(), self._counts(loads), crossing)

    def _trunk(self, tokens: Tensor, packed: Packed | None = None) -> tuple[Tensor, list[RouterLoad]]:
        """The blocks' output before the final norm, fp32 [batch * time, hidden_size], and the routers' loads."""
        turns = rotation(self.config, tokens.shape[1], tokens.device)
        x = self._embed(tokens)
        loads = []
        for block in self.layers:
            x, load = block(x, turns, packed)
            if load is not None:
                loads.append(load)
        return x, loads

    def _embed(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens.reshape(-1), self.embedding)

    def _cross_entropy(self, normed: Tensor, labels: Tensor, within: Tensor | None = None) -> Tensor:
        """Mean over all labels, or over those ``within`` (bool, as ``labels``) their document; 0 if there is none."""
        if within is None:
            return cross_entropy(self.head(normed), labels.reshape(-1)).mean()
        kept = labels.masked_fill(~within, NO_LABEL).reshape(-1)
        return cross_entropy(self.head(normed), kept).sum() / within.sum().clamp(min=1)

    def _counts(self, loads: list[RouterLoad]) -> Tensor:
        if not loads:
            return torch.zeros(0, self.config.n_routed_experts, dtype=torch.int64)
        return torch.stack([load.counts for load in loads])

    def _check(self, tokens: Tensor, at_least: int) -> None:
        if tokens.dtype != torch.int64 or tokens.dim() != 2:
            raise ValueError(f"tokens: int64 [batch, time] expected, not {tokens.dtype} {list(tokens.shape)}")
        if tokens.shape[0] < 1 or tokens.shape[1] < at_least:
            raise ValueError(f"tokens: at least [1, {at_least}] expected, not {list(tokens.shape)}")
        if tokens.device.type == "cpu":  # elsewhere the question would stall the device; its own lookup asserts there
            low, high = (int(end) for end in tokens.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(f"tokens: ids {low}..{high} outside the vocabulary 0..{self.config.vocab_size - 1}")


def _key(seed: int, name: str) -> int:
    """A 63-bit generator seed for one parameter."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
